// What /metrics and /healthz say. OpenMetrics: a family's lines stand together, a counter's samples end in _total, the
// text ends with # EOF.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "supervisor/metrics.h"

static void family(FILE *to, const char *name, const char *type, const char *unit, const char *help)
{
    fprintf(to, "# TYPE %s %s\n", name, type);
    if (*unit)
        fprintf(to, "# UNIT %s %s\n", name, unit);
    fprintf(to, "# HELP %s %s\n", name, help);
}

// name="value", as the format escapes it. Names of pools come from Redis.
static void label(FILE *to, const char *name, const char *value)
{
    fprintf(to, "%s=\"", name);
    for (; *value; value++) {
        if (*value == '\\' || *value == '"')
            fputc('\\', to);
        if (*value == '\n')
            fputs("\\n", to);
        else
            fputc(*value, to);
    }
    fputc('"', to);
}

static void sample(FILE *to, const char *name, const char *label_name, const char *value, const char *second,
                   const char *second_value)
{
    fprintf(to, "%s{", name);
    label(to, label_name, value);
    if (second) {
        fputc(',', to);
        label(to, second, second_value);
    }
    fputs("} ", to);
}

// ---- the queue, as Redis told it last

static const char *const places[] = {"queued", "delayed", "working"};
enum { PLACES = sizeof places / sizeof *places };

static void put_pools(FILE *to, const struct queue_thread_numbers *q)
{
    family(to, "ditfleet_backlog_gpu_seconds", "gauge", "seconds",
           "GPU-seconds of the jobs in the queue; queued and working together are what to scale on.");
    for (size_t i = 0; i < q->n_pools; i++) {
        const struct queue_pool *p = &q->pools[i];
        const uint64_t ms[PLACES] = {p->queued_ms, p->delayed_ms, p->working_ms};
        for (size_t k = 0; k < PLACES; k++) {
            sample(to, "ditfleet_backlog_gpu_seconds", "pool", p->name, "state", places[k]);
            fprintf(to, "%" PRIu64 ".%03u\n", ms[k] / 1000, (unsigned)(ms[k] % 1000));
        }
    }
    family(to, "ditfleet_jobs", "gauge", "", "Jobs in the queue that are not final.");
    for (size_t i = 0; i < q->n_pools; i++) {
        const struct queue_pool *p = &q->pools[i];
        const uint64_t jobs[PLACES] = {p->queued, p->delayed, p->working};
        for (size_t k = 0; k < PLACES; k++) {
            sample(to, "ditfleet_jobs", "pool", p->name, "state", places[k]);
            fprintf(to, "%" PRIu64 "\n", jobs[k]);
        }
    }
    family(to, "ditfleet_oldest_job_seconds", "gauge", "seconds",
           "How long the oldest queued job has been claimable; 0 where none is.");
    for (size_t i = 0; i < q->n_pools; i++) {
        sample(to, "ditfleet_oldest_job_seconds", "pool", q->pools[i].name, NULL, NULL);
        fprintf(to, "%" PRIu64 ".%03u\n", q->pools[i].oldest_ms / 1000, (unsigned)(q->pools[i].oldest_ms % 1000));
    }
}

static void put_totals(FILE *to, const struct queue_stats *s)
{
    const struct {
        const char *outcome;
        uint64_t jobs;
    } rows[] = {{"succeeded", s->succeeded},
                {"dead", s->dead},
                {"cancelled", s->cancelled},
                {"expired", s->expired},
                {"refused", s->refused}};
    family(to, "ditfleet_unadmitted_jobs", "gauge", "", "Submissions in the doors, which have no price yet.");
    fprintf(to, "ditfleet_unadmitted_jobs %" PRIu64 "\n", s->waiting);
    family(to, "ditfleet_finished_jobs", "counter", "", "Jobs by how they ended, since the queue's beginning.");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        sample(to, "ditfleet_finished_jobs_total", "outcome", rows[i].outcome, NULL, NULL);
        fprintf(to, "%" PRIu64 "\n", rows[i].jobs);
    }
    family(to, "ditfleet_retries", "counter", "", "Attempts that failed and were followed by another.");
    fprintf(to, "ditfleet_retries_total %" PRIu64 "\n", s->retries);
    family(to, "ditfleet_dead_letters", "gauge", "", "Entries in the stream of dead letters.");
    fprintf(to, "ditfleet_dead_letters %" PRIu64 "\n", s->dead_letter);
}

// What was never told is left out: a zero would be a lie that scales a fleet to nothing.
static void put_queue(FILE *to, const struct queue_thread_numbers *q)
{
    family(to, "ditfleet_redis_up", "gauge", "", "Whether Redis answered this node last time.");
    fprintf(to, "ditfleet_redis_up %d\n", q->asked && q->up);
    if (!q->known)
        return;
    family(to, "ditfleet_queue_age_seconds", "gauge", "seconds",
           "How long ago Redis told the numbers of the queue; they are those of the whole fleet on every node.");
    fprintf(to, "ditfleet_queue_age_seconds %.3f\n", q->age_s);
    put_pools(to, q);
    put_totals(to, &q->stats);
}

// ---- this node

static void put_groups(FILE *to, const struct metrics_numbers *n)
{
    unsigned states[GROUP_STATES] = {0}, gpus = 0;
    for (size_t i = 0; i < n->n_groups; i++) {
        states[n->groups[i].state]++;
        gpus += n->groups[i].state == GROUP_READY ? n->groups[i].ranks : 0;
    }
    family(to, "ditfleet_groups", "gauge", "", "Groups of this node by state.");
    for (int k = 0; k < GROUP_STATES; k++) {
        sample(to, "ditfleet_groups", "state", group_state_name((enum group_state)k), NULL, NULL);
        fprintf(to, "%u\n", states[k]);
    }
    family(to, "ditfleet_ranks", "gauge", "", "Living worker processes by the stage that they told last.");
    for (size_t i = 0; i < n->n_groups; i++)
        for (int k = 0; k < STAGES; k++) {
            sample(to, "ditfleet_ranks", "group", n->groups[i].name, "stage", stage_name((enum stage)k));
            fprintf(to, "%u\n", n->groups[i].stage[k]);
        }
    family(to, "ditfleet_capacity_gpus", "gauge", "gpus",
           "GPUs whose group takes jobs; with device = cpu a rank stands for one.");
    fprintf(to, "ditfleet_capacity_gpus %u\n", gpus);
    family(to, "ditfleet_utilisation", "gauge", "",
           "Share of the last minute that this node's ranks computed for jobs, 0 to 1.");
    fprintf(to, "ditfleet_utilisation %.4f\n", n->utilisation);
}

static void put_group_counters(FILE *to, const struct metrics_numbers *n)
{
    family(to, "ditfleet_group_restarts", "counter", "", "Starts of a group after a failure.");
    for (size_t i = 0; i < n->n_groups; i++) {
        sample(to, "ditfleet_group_restarts_total", "group", n->groups[i].name, NULL, NULL);
        fprintf(to, "%u\n", n->groups[i].restarts);
    }
    family(to, "ditfleet_busy_seconds", "counter", "seconds", "Seconds that ranks computed for jobs.");
    for (size_t i = 0; i < n->n_groups; i++) {
        sample(to, "ditfleet_busy_seconds_total", "group", n->groups[i].name, NULL, NULL);
        fprintf(to, "%.3f\n", n->groups[i].busy_s);
    }
    family(to, "ditfleet_rank_seconds", "counter", "seconds", "Seconds that ranks have been alive.");
    for (size_t i = 0; i < n->n_groups; i++) {
        sample(to, "ditfleet_rank_seconds_total", "group", n->groups[i].name, NULL, NULL);
        fprintf(to, "%.3f\n", n->groups[i].lifetime_s);
    }
}

char *metrics_text(const struct metrics_numbers *n, size_t *length)
{
    char *text = NULL;
    FILE *to = open_memstream(&text, length);
    if (!to)
        return NULL;
    // A gauge, not an "info": readers of Prometheus' older text format (KEDA's metrics-api) refuse a type they do not
    // know.
    family(to, "ditfleet_build_info", "gauge", "", "The program that runs.");
    fprintf(to, "ditfleet_build_info{version=\"%s\"} 1\n", DITFLEET_VERSION);
    put_queue(to, &n->queue);
    put_groups(to, n);
    put_group_counters(to, n);
    fputs("# EOF\n", to);
    if (fclose(to) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

unsigned metrics_health(const struct metrics_numbers *n, char *text, size_t size)
{
    if (n->loop_age_s > METRICS_LOOP_SECONDS) {
        snprintf(text, size, "the supervisor's loop has not turned for %.1f s\n", n->loop_age_s);
        return 503;
    }
    if (n->queue.asked && !n->queue.up) {
        snprintf(text, size, "Redis does not answer: %s\n", n->queue.error);
        return 503;
    }
    snprintf(text, size, "ok\n");
    return 200;
}
