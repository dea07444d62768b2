// metrics.h: GET /metrics in OpenMetrics text and GET /healthz, over HTTP on [metrics] listen.
//
// A thread of its own serves them; it never asks Redis and never waits for the main loop. The loop tells it of the
// groups once a second, the queue thread keeps what Redis told last. Labels are names of pools, groups and states:
// nothing of a job, a tenant or a prompt is here.
#ifndef DITFLEET_SUPERVISOR_METRICS_H
#define DITFLEET_SUPERVISOR_METRICS_H

#include "supervisor/group.h"
#include "supervisor/queue_thread.h"

#define METRICS_CONTENT_TYPE "application/openmetrics-text; version=1.0.0; charset=utf-8"
// A loop that told nothing for so long counts as stuck.
#define METRICS_LOOP_SECONDS 5.0

// What one scrape tells.
struct metrics_numbers {
    const struct group_numbers *groups; // (n_groups)
    size_t n_groups;
    double utilisation; // of all ranks over the last minute, 0 to 1
    double loop_age_s;  // since the loop told of the groups
    struct queue_thread_numbers queue;
};
// The text of /metrics, malloc, ends with "# EOF\n". NULL: out of memory.
char *metrics_text(const struct metrics_numbers *n, size_t *length);
// The text of /healthz, one line, and its status: 200, or 503 with the reason.
unsigned metrics_health(const struct metrics_numbers *n, char *text, size_t size);

struct metrics;
// Binds listen ("address:port", not empty) and starts the thread. The calling thread has blocked the signals it
// handles. ERR_CONFLICT: the port is in use. queue and log outlive it.
int metrics_start(const char *listen, struct queue_thread *queue, const struct log *log, struct metrics **out,
                  struct err *err);
// By the main loop, once a second: it is alive, and these are its groups.
void metrics_tell(struct metrics *m, const struct group_numbers *groups, size_t n);
void metrics_stop(struct metrics *m); // NULL is fine

#endif
