// ditfleet submit --from FILE: many jobs, a bar for each that is in work, and one for all.
#include "ops/cli/submit.h"

#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "ops/cli/fetch.h"
#include "ops/cli/progress.h"
#include "proto/clock.h"

enum { ROWS = 24, COLUMNS = 80, WIDEST = 512, TOTAL_BAR = 30 };

struct many {
    struct submit *s;
    struct queue *q;
    struct submission *jobs; // (n)
    bool *ended;             // (n)
    size_t n, succeeded, failed, in_work;
    double began, away_since; // away_since 0: Redis answers
    bool terminal;            // stderr is one: bars
    int rows, columns;
    int drawn; // lines of bars that stand on the terminal
    char (*lines)[WIDEST];
    int n_lines; // to draw now
};

// ---- the terminal

static void measure(struct many *m)
{
    struct winsize size;
    const bool known = ioctl(2, TIOCGWINSZ, &size) == 0 && size.ws_row > 0 && size.ws_col > 0;
    m->rows = known ? size.ws_row : ROWS;
    m->columns = known ? size.ws_col : COLUMNS;
    m->columns = m->columns < WIDEST ? m->columns : WIDEST - 1;
}

static void clear(struct many *m)
{
    if (m->drawn > 0)
        fprintf(stderr, "\x1b[%dA\r\x1b[J", m->drawn);
    m->drawn = 0;
}

static void draw(struct many *m)
{
    if (!m->terminal)
        return;
    const size_t done = m->succeeded + m->failed;
    char bar[TOTAL_BAR + 1] = "", rest[48] = "";
    memset(bar, ' ', TOTAL_BAR);
    memset(bar, '#', TOTAL_BAR * done / m->n);
    if (done > 0 && done < m->n)
        snprintf(rest, sizeof rest, "  eta %.0f s",
                 (monotonic_seconds() - m->began) / (double)done * (double)(m->n - done));
    clear(m);
    for (int i = 0; i < m->n_lines; i++)
        fprintf(stderr, "%.*s\n", m->columns - 1, m->lines[i]);
    fprintf(stderr, "[%s] %zu/%zu, %zu failed, %zu in work, %zu waiting%s\n", bar, done, m->n, m->failed, m->in_work,
            m->n - done - m->in_work, rest);
    m->drawn = m->n_lines + 1;
}

static void add_bar(struct many *m, const struct submission *j, const struct queue_record *r)
{
    char text[PROGRESS_BYTES];
    Ditfleet__V1__Event e = DITFLEET__V1__EVENT__INIT;
    e.state = r->state;
    e.stage = (char *)r->stage;
    e.step = r->step;
    e.steps = r->steps;
    if (!m->terminal || m->n_lines + 2 >= m->rows)
        return;
    snprintf(m->lines[m->n_lines++], WIDEST, "%-16.*s %s", m->columns / 3, j->job->id, progress_text(&e, true, text));
}

// ---- one job

// In a path: {id} becomes the job's.
static void fill_in(const char *pattern, const char *id, char *out, size_t size)
{
    size_t n = 0;
    for (const char *p = pattern; *p && n + 1 < size;) {
        const bool here = strncmp(p, "{id}", 4) == 0;
        n += (size_t)snprintf(out + n, size - n, "%.*s", here ? (int)strlen(id) : 1, here ? id : p);
        p += here ? 4 : 1;
    }
}

static void tell_end(struct many *m, const struct submission *j, const Ditfleet__V1__Result *result)
{
    struct err err = {.code = ERR_NONE};
    const bool good = result->state == DITFLEET__V1__STATE__STATE_SUCCEEDED;
    ++*(good ? &m->succeeded : &m->failed);
    if (m->terminal)
        clear(m);
    if (m->s->json)
        submit_print_json(m->s, j, result);
    else if (good)
        printf("%s %s %s\n", j->job->id, job_state_name(result->state),
               result->n_images ? result->images[0]->location : "");
    else
        printf("%s %s %s: %s\n", j->job->id, job_state_name(result->state), result->error ? result->error->code : "",
               result->error ? result->error->message : "no reason given");
    if (good && m->s->out) {
        char path[4096];
        fill_in(m->s->out, j->job->id, path, sizeof path);
        if (submit_save(m->s, path, result, &err) != 0) {
            cli_fail(&err);
            m->succeeded--;
            m->failed++;
        }
    }
    fflush(stdout);
}

// The record of this very submission: another may have the id, and this one have been refused.
static int look_at(const struct many *m, const struct submission *j, struct queue_record *r, struct err *err)
{
    char receipt[JOB_NAME_SIZE];
    const char *tenant = connection_tenant(&m->s->connection);
    int rc = queue_get(m->q, tenant, j->job->id, r, err);
    if (rc == 0 && strcmp(r->entry, j->entry) == 0)
        return 0;
    if (rc != 0 && rc != ERR_NOT_FOUND)
        return rc;
    queue_record_free(r);
    snprintf(receipt, sizeof receipt, "@%s", j->entry);
    return queue_get(m->q, tenant, receipt, r, err);
}

// What became of one job since the last look. ERR_NOT_FOUND, it is still in its door, is fine.
static int see(struct many *m, size_t i, struct err *err)
{
    struct submission *j = &m->jobs[i];
    struct queue_record r = {0};
    Ditfleet__V1__Result *result = NULL;
    int rc = look_at(m, j, &r, err);
    if (rc != 0)
        return rc == ERR_NOT_FOUND ? 0 : rc;
    const bool final = job_state_final(r.state);
    if (final) {
        rc = queue_await(m->q, connection_tenant(&m->s->connection), j->job->id, j->entry, 1, NULL, NULL, &result, err);
    } else if (r.state != DITFLEET__V1__STATE__STATE_QUEUED && r.state != DITFLEET__V1__STATE__STATE_DELAYED) {
        m->in_work++;
        add_bar(m, j, &r);
    }
    queue_record_free(&r);
    if (rc == 0 && result) {
        m->ended[i] = true;
        tell_end(m, j, result);
    }
    result_free(result);
    return rc == ERR_TIMEOUT ? 0 : rc;
}

// ---- all of them

static int send_all(struct many *m, size_t *sent, struct err *err)
{
    for (*sent = 0; *sent < m->n; ++*sent) {
        struct submission *j = &m->jobs[*sent];
        TRY(submit_send(m->s, m->q, j, err));
        if (!m->s->wait && m->s->json)
            submit_print_json(m->s, j, NULL);
        else if (!m->s->wait)
            printf("%s %s\n", j->job->id, j->entry);
    }
    return 0;
}

// One look at every job that has not ended.
static int round_of_looks(struct many *m, struct err *err)
{
    m->in_work = 0;
    m->n_lines = 0;
    measure(m);
    m->lines = realloc(m->lines, (size_t)m->rows * sizeof *m->lines);
    if (!m->lines)
        return err_set(err, ERR_NO_MEMORY, "out of memory for the bars");
    for (size_t i = 0; i < m->n && !submit_interrupted(); i++)
        if (!m->ended[i])
            TRY(see(m, i, err));
    draw(m);
    return 0;
}

// ERR_CANCELLED: by Ctrl-C.
static int see_through(struct many *m, struct err *err)
{
    while (m->succeeded + m->failed < m->n) {
        *err = (struct err){.code = ERR_NONE};
        const int rc = round_of_looks(m, err);
        const double now = monotonic_seconds();
        const bool away = rc == ERR_UNAVAILABLE || rc == ERR_TIMEOUT;
        if (submit_interrupted())
            return ERR_CANCELLED;
        if (rc != 0 && !away)
            return rc;
        m->away_since = !away ? 0 : m->away_since > 0 ? m->away_since : now;
        if (away && now - m->away_since > SUBMIT_AWAY_SECONDS)
            return rc;
        nanosleep(&(struct timespec){.tv_nsec = SUBMIT_LOOK_MS * 1000000L}, NULL);
    }
    return 0;
}

static int wait_for_all(struct many *m)
{
    struct err err = {.code = ERR_NONE};
    const int rc = see_through(m, &err);
    const size_t left = m->n - m->succeeded - m->failed;
    if (m->terminal)
        clear(m);
    if (rc == 0 && !m->s->json)
        printf("%zu succeeded, %zu failed, in %.1f s\n", m->succeeded, m->failed, monotonic_seconds() - m->began);
    if (rc == 0)
        return m->failed ? CLI_FAILED : CLI_OK;
    fprintf(stderr, "ditfleet: %s; %zu of %zu jobs go on\n  look:   ditfleet jobs --tenant %s\n",
            rc == ERR_CANCELLED ? "stopped waiting" : "lost sight of them", left, m->n,
            connection_tenant(&m->s->connection));
    return rc == ERR_CANCELLED ? CLI_INTERRUPTED : cli_fail(&err);
}

static int submit_all(struct many *m)
{
    struct err err = {.code = ERR_NONE};
    size_t sent;
    int code = CLI_OK;
    if (send_all(m, &sent, &err) != 0) {
        code = cli_fail(&err);
        fprintf(stderr, "ditfleet: %zu of %zu jobs were submitted%s\n", sent, m->n,
                sent ? "; the same command with an --id submits the others alone" : "");
        return code;
    }
    fflush(stdout);
    if (submit_receipt(m->s, m->q, &err) != 0) {
        cli_fail(&err);
        code = CLI_FAILED;
    }
    return m->s->wait ? wait_for_all(m) : code;
}

int submit_many(struct submit *s, struct queue *q, const struct batch *batch)
{
    struct many m = {.s = s, .q = q, .n = batch->n, .began = monotonic_seconds(), .terminal = isatty(2)};
    int code = CLI_FAILED;
    m.jobs = calloc(m.n, sizeof *m.jobs);
    m.ended = calloc(m.n, sizeof *m.ended);
    if (m.jobs && m.ended) {
        for (size_t i = 0; i < m.n; i++)
            m.jobs[i].job = batch->jobs[i];
        code = submit_all(&m);
    } else {
        fprintf(stderr, "ditfleet: out of memory for %zu jobs\n", m.n);
    }
    free(m.jobs);
    free(m.ended);
    free(m.lines);
    return code;
}
