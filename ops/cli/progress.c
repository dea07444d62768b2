#include "ops/cli/progress.h"

#include <string.h>

enum { BAR = 30 };

static const char *what(const Ditfleet__V1__Event *e)
{
    switch (e->state) {
    case DITFLEET__V1__STATE__STATE_QUEUED:
        return "queued";
    case DITFLEET__V1__STATE__STATE_DELAYED:
        return "delayed";
    case DITFLEET__V1__STATE__STATE_LEASED:
        return "claimed";
    case DITFLEET__V1__STATE__STATE_RUNNING:
        return *e->stage ? e->stage : "running";
    case DITFLEET__V1__STATE__STATE_UPLOADING:
        return "upload";
    case DITFLEET__V1__STATE__STATE_RETRY_WAIT:
        return "waiting to try again";
    default:
        return job_state_name(e->state);
    }
}

static bool has_steps(const Ditfleet__V1__Event *e)
{
    return e->state == DITFLEET__V1__STATE__STATE_RUNNING && e->steps > 0 && strcmp(e->stage, "denoise") == 0;
}

const char *progress_text(const Ditfleet__V1__Event *e, bool bar, char out[PROGRESS_BYTES])
{
    char steps[BAR + 48] = "", eta[24] = "", error[64] = "";
    if (has_steps(e)) {
        const uint32_t step = e->step < e->steps ? e->step : e->steps;
        char cells[BAR + 4] = "";
        if (bar) {
            memset(cells, ' ', BAR + 2);
            memset(cells + 1, '#', (size_t)BAR * step / e->steps);
            cells[0] = '[', cells[BAR + 1] = ']', cells[BAR + 2] = ' ';
        }
        snprintf(steps, sizeof steps, "%s%u/%u", cells, step, e->steps);
        if (e->eta_seconds > 0 && e->eta_seconds < 1e6)
            snprintf(eta, sizeof eta, "  eta %.*f s", e->eta_seconds < 10 ? 1 : 0, e->eta_seconds);
    }
    if (e->error && !job_state_final(e->state))
        snprintf(error, sizeof error, "  (attempt %u: %.20s)", e->attempt, e->error->code);
    snprintf(out, PROGRESS_BYTES, "%-8s %s%s%s", what(e), steps, eta, error);
    size_t n = strlen(out);
    while (n > 0 && out[n - 1] == ' ')
        out[--n] = 0;
    return out;
}

void progress_event(struct progress *p, const Ditfleet__V1__Event *e)
{
    char text[PROGRESS_BYTES], milestone[sizeof p->milestone];
    if (e->time_ms < p->time_ms || job_state_final(e->state))
        return; // the end is told by the result
    p->time_ms = e->time_ms;
    progress_text(e, p->terminal, text);
    if (strcmp(text, p->shown) == 0)
        return;
    snprintf(milestone, sizeof milestone, "%d %.8s %u %u", (int)e->state, e->stage, e->attempt,
             has_steps(e) ? 10 * (e->step < e->steps ? e->step : e->steps) / e->steps : 0);
    if (p->terminal)
        fprintf(p->to, "\r%s\x1b[K", text);
    else if (strcmp(milestone, p->milestone) != 0)
        fprintf(p->to, "%s\n", text);
    fflush(p->to);
    snprintf(p->milestone, sizeof p->milestone, "%s", milestone);
    snprintf(p->shown, sizeof p->shown, "%s", text);
}

void progress_clear(struct progress *p)
{
    if (p->terminal && *p->shown)
        fputs("\r\x1b[K", p->to);
    fflush(p->to);
    *p->shown = 0;
}
