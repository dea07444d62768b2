// queue_thread.h: the supervisor's dealings with Redis, on a thread of their own, so that its loop never waits for a
// server.
//
// The thread gives back the jobs of dead workers, again and again until Redis took it; reaps about once a second; on a
// node without groups it admits; where metrics are served it asks for the queue's numbers about once a second.
#ifndef DITFLEET_SUPERVISOR_QUEUE_THREAD_H
#define DITFLEET_SUPERVISOR_QUEUE_THREAD_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/conf.h"
#include "proto/queue.h"

struct queue_thread;

struct queue_thread_status {
    bool known;        // the first attempt is over
    bool up;           // Redis answered last time
    char error[512];   // why not
    unsigned pending;  // releases not done yet
    uint64_t released; // jobs given back since the start
};

// Copies what it needs of conf and log. The calling thread has blocked the signals it handles.
int queue_thread_start(struct queue_thread **out, const struct conf *conf, const struct log *log, struct err *err);
// Ends the thread, what is pending with it; may take a few seconds while a command waits for its deadline.
void queue_thread_stop(struct queue_thread *t);

// Takes over what a reload may change: admit (no groups) and whether prompts are judged, queue.max_attempts and
// queue.retention, the log level. After an error (moderation_new) all is as before.
int queue_thread_configure(struct queue_thread *t, const struct conf *conf, const struct log *log, struct err *err);

// What this incarnation of worker holds goes back to the queue. Never blocks.
void queue_thread_release(struct queue_thread *t, const char *worker, const char *incarnation, const struct err *why);

void queue_thread_status(struct queue_thread *t, struct queue_thread_status *out);
// Readable (an eventfd) when known, up or pending changed.
int queue_thread_fd(const struct queue_thread *t);

// The queue as Redis told it last.
struct queue_thread_numbers {
    bool asked, up;  // Redis: the first attempt is over; it answered last time
    char error[512]; // why not
    bool known;      // it has told once; else the rest is zero
    double age_s;    // how long ago it told
    struct queue_stats stats;
    struct queue_pool *pools; // (n_pools), the caller's to free()
    size_t n_pools;
};
// From any thread. False: out of memory.
bool queue_thread_numbers(struct queue_thread *t, struct queue_thread_numbers *out);

#endif
