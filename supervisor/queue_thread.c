// One loop: releases first, then the reaper when it is due, then a round of admission; a failure makes it wait and
// retry.
#include "supervisor/queue_thread.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "proto/clock.h"
#include "proto/queue.h"
#include "worker/moderation.h"

enum { CONNECT_MS = 2000, COMMAND_MS = 2000, ADMIT_BLOCK_MS = 250, JUDGE_MS = 100, REAP_MS = 1000 };
#define NUMBERS_SECONDS 1.0
#define RETRY_SECONDS   0.5

struct release {
    struct release *next;
    char worker[CONF_WORKER_ID_BYTES], incarnation[32];
    struct err why;
};

struct settings {
    bool admit, numbers;           // numbers: somebody asks for them
    bool callbacks;                // they are made here: admission takes jobs that ask for one
    struct moderation *moderation; // NULL: admission takes every prompt
    int max_attempts, max_backlog_s, max_speed;
    double retention_s;
    struct log log;
};

struct queue_thread {
    pthread_t thread;
    char *url, *name, *node;
    int fd; // eventfd
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    // under the mutex
    bool stop, changed; // changed: settings are new
    struct settings settings;
    struct release *first, **last;
    struct queue_thread_status status;
    struct queue_thread_numbers numbers; // asked, up, error and age_s are of the status and numbers_at
    double numbers_at;                   // monotonic seconds
    // of the thread alone
    struct queue *queue;
    struct settings used;
    bool applied; // the queue's settings were sent over this connection
    double numbers_due;
};

static void tell(struct queue_thread *t)
{
    uint64_t one = 1;
    ssize_t ignored = write(t->fd, &one, sizeof one); // full means readable already
    (void)ignored;
}

// Notes whether Redis answers; says so once a change.
static void report(struct queue_thread *t, bool up, const struct err *err)
{
    pthread_mutex_lock(&t->mutex);
    bool news = !t->status.known || t->status.up != up || (!up && strcmp(t->status.error, err->text) != 0);
    bool turn = !t->status.known || t->status.up != up;
    t->status.known = true;
    t->status.up = up;
    snprintf(t->status.error, sizeof t->status.error, "%s", up ? "" : err->text);
    pthread_mutex_unlock(&t->mutex);
    if (!news)
        return;
    if (up)
        log_line(&t->used.log, LOG_INFO, "redis.up", "queue=%s", t->name);
    else
        log_line(&t->used.log, turn ? LOG_ERROR : LOG_WARN, "redis.down", "queue=%s error=\"%s\"", t->name, err->text);
    tell(t);
}

static int connect_queue(struct queue_thread *t, struct err *err)
{
    const struct redis_options options = {.connect_ms = CONNECT_MS, .command_ms = COMMAND_MS};
    if (t->queue)
        return 0;
    t->applied = false;
    return queue_open(&t->queue, t->url, t->name, QUEUE_NODE, &options, err);
}

// The file's settings of the queue itself; 0 leaves them as the queue has them.
static int apply_settings(struct queue_thread *t, struct err *err)
{
    if (t->applied)
        return 0;
    if (t->used.max_attempts > 0)
        TRY(queue_set(t->queue, "max_attempts", (uint64_t)t->used.max_attempts, err));
    if (t->used.retention_s > 0)
        TRY(queue_set(t->queue, "retention_ms", (uint64_t)(t->used.retention_s * 1000), err));
    if (t->used.max_backlog_s > 0)
        TRY(queue_set(t->queue, "max_backlog_ms", (uint64_t)t->used.max_backlog_s * 1000, err));
    if (t->used.max_speed > 0)
        TRY(queue_set(t->queue, "max_speed", (uint64_t)t->used.max_speed, err));
    t->applied = true;
    return 0;
}

static int do_releases(struct queue_thread *t, struct err *err)
{
    for (;;) {
        pthread_mutex_lock(&t->mutex);
        struct release *r = t->first; // only this thread takes from the front
        pthread_mutex_unlock(&t->mutex);
        if (!r)
            return 0;
        unsigned count = 0;
        TRY(queue_release_all(t->queue, r->worker, r->incarnation, &r->why, &count, err));
        if (count > 0)
            log_line(&t->used.log, LOG_INFO, "jobs.released", "worker=%s incarnation=%s jobs=%u", r->worker,
                     r->incarnation, count);
        pthread_mutex_lock(&t->mutex);
        t->first = r->next;
        if (!t->first)
            t->last = &t->first;
        t->status.pending--;
        t->status.released += count;
        pthread_mutex_unlock(&t->mutex);
        free(r);
        tell(t);
    }
}

static void on_refusal(void *arg, const char *tenant, const char *id, const char *entry, const struct err *why)
{
    const struct queue_thread *t = arg;
    log_line(&t->used.log, LOG_WARN, "job.refused", "tenant=%s job=\"%s\" entry=%s code=%s reason=\"%s\"", tenant, id,
             entry, err_name(why->code), why->text);
}

// Once a second, whoever asks how often: Redis must not notice who scrapes.
static int ask_numbers(struct queue_thread *t, struct err *err)
{
    struct queue_thread_numbers n = {.known = true};
    if (!t->used.numbers || monotonic_seconds() < t->numbers_due)
        return 0;
    TRY(queue_stats(t->queue, &n.stats, err));
    TRY(queue_pools(t->queue, &n.pools, &n.n_pools, err));
    t->numbers_due = monotonic_seconds() + NUMBERS_SECONDS;
    pthread_mutex_lock(&t->mutex);
    free(t->numbers.pools);
    t->numbers = n;
    t->numbers_at = monotonic_seconds();
    pthread_mutex_unlock(&t->mutex);
    return 0;
}

// One round of everything. *next is when the reaper wants the next one, monotonic seconds; *idle: admission has nothing
// to wait on.
static int round_of_work(struct queue_thread *t, double *reap_at, bool *idle, struct err *err)
{
    struct queue_reaped reaped = {0};
    struct queue_admitted admitted = {0};
    TRY(connect_queue(t, err));
    TRY(apply_settings(t, err));
    TRY(do_releases(t, err));
    if (monotonic_seconds() >= *reap_at) {
        TRY(queue_reap(t->queue, &reaped, err));
        uint64_t ms = reaped.next_ms < REAP_MS ? reaped.next_ms : REAP_MS;
        *reap_at = monotonic_seconds() + 1e-3 * (double)(ms > 10 ? ms : 10);
        if (reaped.lost || reaped.expired || reaped.orphans)
            log_line(&t->used.log, LOG_INFO, "queue.reaped", "lost=%u expired=%u orphans=%u", reaped.lost,
                     reaped.expired, reaped.orphans);
    }
    *idle = !t->used.admit;
    if (t->used.admit) {
        struct moderation *moderation = t->used.moderation;
        const struct queue_admission admission = {.consumer = t->node,
                                                  .on_refusal = on_refusal,
                                                  .arg = t,
                                                  .callbacks = t->used.callbacks,
                                                  .judge = moderation ? moderation_judge : NULL,
                                                  .judge_arg = moderation};
        TRY(queue_admit(t->queue, &admission, ADMIT_BLOCK_MS, &admitted, err));
        if (admitted.judging && moderation)
            moderation_wait(moderation, JUDGE_MS);
        *idle = admitted.no_models;
    }
    return ask_numbers(t, err); // last: what they meet holds up no job
}

// Waits until monotonic `until`, a release (unless failed: then the wait is for Redis), new settings or the end. false:
// end.
static bool wait_for_work(struct queue_thread *t, double until, bool failed)
{
    struct timespec at = {.tv_sec = (time_t)until, .tv_nsec = (long)(1e9 * (until - (double)(time_t)until))};
    pthread_mutex_lock(&t->mutex);
    while (!t->stop && !t->changed && (failed || !t->first) && monotonic_seconds() < until)
        pthread_cond_timedwait(&t->wake, &t->mutex, &at);
    bool go_on = !t->stop;
    if (t->changed) {
        moderation_free(t->used.moderation);
        t->used = t->settings;
        t->applied = t->changed = false;
    }
    pthread_mutex_unlock(&t->mutex);
    return go_on;
}

static void *run(void *arg)
{
    struct queue_thread *t = arg;
    double reap_at = 0, until = 0;
    bool failed = false, idle = false;
    while (wait_for_work(t, until, failed)) {
        struct err err = {0};
        failed = round_of_work(t, &reap_at, &idle, &err) != 0;
        report(t, !failed, &err);
        const double due = t->used.numbers ? fmin(reap_at, t->numbers_due) : reap_at;
        until = failed ? monotonic_seconds() + RETRY_SECONDS : idle ? due : 0;
    }
    queue_close(t->queue);
    return NULL;
}

static int make_settings(const struct conf *conf, const struct log *log, struct settings *out, struct err *err)
{
    *out = (struct settings){.admit = conf->n_groups == 0,
                             .numbers = *conf->metrics.listen != 0,
                             .callbacks = *conf->callback.secret_file != 0,
                             .max_attempts = conf->queue.max_attempts,
                             .max_speed = conf->queue.max_speed,
                             .max_backlog_s = conf->queue.max_backlog_s,
                             .retention_s = conf->queue.retention_s,
                             .log = *log};
    return out->admit ? moderation_new(conf, log, &out->moderation, err) : 0;
}

static void free_thread(struct queue_thread *t)
{
    for (struct release *r = t->first, *next; r; r = next) {
        next = r->next;
        free(r);
    }
    if (t->fd >= 0)
        close(t->fd);
    if (t->changed)
        moderation_free(t->settings.moderation);
    moderation_free(t->used.moderation);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->mutex);
    free(t->numbers.pools);
    free(t->url);
    free(t->name);
    free(t->node);
    free(t);
}

int queue_thread_start(struct queue_thread **out, const struct conf *conf, const struct log *log, struct err *err)
{
    pthread_condattr_t monotonic;
    struct settings settings;
    TRY(make_settings(conf, log, &settings, err));
    struct queue_thread *t = calloc(1, sizeof *t);
    if (!t) {
        moderation_free(settings.moderation);
        return err_set(err, ERR_NO_MEMORY, "queue thread: out of memory");
    }
    pthread_mutex_init(&t->mutex, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&t->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    t->last = &t->first;
    t->used = t->settings = settings;
    t->url = strdup(conf->redis.url);
    t->name = strdup(conf->redis.queue);
    t->node = strdup(conf->fleet.node);
    t->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = t->url && t->name && t->node && t->fd >= 0 ? pthread_create(&t->thread, NULL, run, t) : ENOMEM;
    if (rc != 0) {
        free_thread(t);
        return err_set(err, ERR_NO_MEMORY, "cannot start the queue thread: %s", strerror(rc));
    }
    *out = t;
    return 0;
}

void queue_thread_stop(struct queue_thread *t)
{
    if (!t)
        return;
    pthread_mutex_lock(&t->mutex);
    t->stop = true;
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&t->mutex);
    pthread_join(t->thread, NULL);
    free_thread(t);
}

int queue_thread_configure(struct queue_thread *t, const struct conf *conf, const struct log *log, struct err *err)
{
    struct settings settings;
    TRY(make_settings(conf, log, &settings, err));
    pthread_mutex_lock(&t->mutex);
    if (t->changed) // a reload's that was not taken over yet
        moderation_free(t->settings.moderation);
    t->settings = settings;
    t->changed = true;
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&t->mutex);
    return 0;
}

void queue_thread_release(struct queue_thread *t, const char *worker, const char *incarnation, const struct err *why)
{
    struct release *r = calloc(1, sizeof *r);
    if (!r)
        return; // the lease runs out: the reaper does it later
    snprintf(r->worker, sizeof r->worker, "%s", worker);
    snprintf(r->incarnation, sizeof r->incarnation, "%s", incarnation);
    r->why = *why;
    pthread_mutex_lock(&t->mutex);
    *t->last = r;
    t->last = &r->next;
    t->status.pending++;
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&t->mutex);
}

void queue_thread_status(struct queue_thread *t, struct queue_thread_status *out)
{
    uint64_t count;
    while (read(t->fd, &count, sizeof count) > 0)
        ;
    pthread_mutex_lock(&t->mutex);
    *out = t->status;
    pthread_mutex_unlock(&t->mutex);
}

int queue_thread_fd(const struct queue_thread *t)
{
    return t->fd;
}

bool queue_thread_numbers(struct queue_thread *t, struct queue_thread_numbers *out)
{
    pthread_mutex_lock(&t->mutex);
    *out = t->numbers;
    out->pools = calloc(t->numbers.n_pools + 1, sizeof *out->pools);
    if (out->pools && t->numbers.n_pools)
        memcpy(out->pools, t->numbers.pools, t->numbers.n_pools * sizeof *out->pools);
    out->asked = t->status.known;
    out->up = t->status.up;
    memcpy(out->error, t->status.error, sizeof out->error);
    out->age_s = out->known ? monotonic_seconds() - t->numbers_at : 0;
    pthread_mutex_unlock(&t->mutex);
    return out->pools != NULL;
}
