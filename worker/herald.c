#include "worker/herald.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/clock.h"

// More news than this wait only when the connection is far slower than the steps: then the newest gives way.
enum { NEWS = 16 };

struct slot {
    struct held *job;                 // NULL: free
    struct queue_progress news[NEWS]; // to be told, oldest first; stage is a literal
    int n_news;
    double renewed_at; // monotonic; 0: not yet
    bool busy;         // the thread is speaking of it, unlocked
};

struct herald {
    const struct conf *conf;
    const struct log *log;
    struct pulse *pulse;
    struct queue *queue; // the thread's own; NULL while not connected
    pthread_t thread;
    pthread_mutex_t lock; // of what follows
    pthread_cond_t changed;
    struct slot slots[HERALD_MAX_HELD];
    bool failing; // the last round trip failed, and that was told
    bool ending;
};

// A worker whose main path stands still beyond its stage's deadline must lose its leases, not keep them.
static bool progressing(struct herald *h)
{
    enum stage stage;
    const double stalled = pulse_stalled(h->pulse, &stage);
    switch (stage) {
    case STAGE_TEXT:
        return stalled < h->conf->deadline.text_s;
    case STAGE_DENOISE:
        return stalled < h->conf->deadline.denoise_s;
    case STAGE_DECODE:
        return stalled < h->conf->deadline.decode_s;
    case STAGE_UPLOAD:
        return stalled < h->conf->deadline.upload_s;
    default:
        return true;
    }
}

// One round trip for one job, without the lock: its news if there are any, else a renewal.
static int speak(struct herald *h, const struct queue_fence *fence, const struct queue_progress *progress, bool renew,
                 struct err *err)
{
    if (!h->queue)
        TRY(queue_open(&h->queue, h->conf->redis.url, h->conf->redis.queue, QUEUE_NODE, NULL, err));
    if (progress)
        TRY(queue_progress(h->queue, fence, progress, err));
    if (renew && progressing(h))
        TRY(queue_beat(h->queue, fence, (uint64_t)(h->conf->queue.lease_s * 1000), err));
    return 0;
}

static void tend(struct herald *h, struct slot *s, double period)
{
    const bool renew = monotonic_seconds() - s->renewed_at >= period;
    if (!s->job || (!s->n_news && !renew))
        return;
    const bool news = s->n_news > 0;
    const struct queue_progress progress = s->news[0];
    struct held *job = s->job;
    struct err err = {.code = ERR_NONE};
    if (news)
        memmove(s->news, s->news + 1, (size_t)--s->n_news * sizeof *s->news);
    s->busy = true;
    pthread_mutex_unlock(&h->lock);
    int rc = speak(h, &job->claim.fence, news ? &progress : NULL, renew, &err);
    pthread_mutex_lock(&h->lock);
    s->busy = false;
    if (renew)
        s->renewed_at = monotonic_seconds();
    const bool taken_away = rc == ERR_STALE || rc == ERR_CANCELLED || rc == ERR_EXPIRED, failing = rc && !taken_away;
    if (taken_away) {
        int none = 0;
        atomic_compare_exchange_strong(&job->stop, &none, rc);
    }
    if (failing)
        s->renewed_at = monotonic_seconds() - period + 0.5; // again in half a second
    if (failing && !h->failing)
        log_line(h->log, LOG_WARN, "lease.not_renewed", "job=%s error=\"%s\"", job->claim.fence.id, err.text);
    if (!failing && h->failing)
        log_line(h->log, LOG_INFO, "lease.renewed", "job=%s", job->claim.fence.id);
    h->failing = failing;
    pthread_cond_broadcast(&h->changed);
}

static void *run(void *arg)
{
    struct herald *h = arg;
    const double period = h->conf->queue.lease_s / 3;
    pthread_mutex_lock(&h->lock);
    while (!h->ending) {
        for (int i = 0; i < HERALD_MAX_HELD; i++)
            tend(h, &h->slots[i], period);
        bool unsent = h->ending;
        for (int i = 0; i < HERALD_MAX_HELD; i++)
            unsent |= h->slots[i].job && h->slots[i].n_news > 0;
        if (unsent)
            continue;
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += 250 * 1000 * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&h->changed, &h->lock, &until);
    }
    pthread_mutex_unlock(&h->lock);
    queue_close(h->queue);
    return NULL;
}

int herald_new(const struct conf *conf, const struct log *log, struct pulse *pulse, struct herald **out,
               struct err *err)
{
    struct herald *h = calloc(1, sizeof *h);
    pthread_condattr_t attr;
    *out = NULL;
    if (!h)
        return err_set(err, ERR_NO_MEMORY, "no memory for the herald");
    h->conf = conf;
    h->log = log;
    h->pulse = pulse;
    pthread_mutex_init(&h->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&h->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (pthread_create(&h->thread, NULL, run, h) != 0) {
        free(h);
        return err_set(err, ERR_NO_MEMORY, "the herald's thread cannot be started");
    }
    *out = h;
    return 0;
}

void herald_free(struct herald *h)
{
    if (!h)
        return;
    pthread_mutex_lock(&h->lock);
    h->ending = true;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->lock);
    pthread_join(h->thread, NULL);
    pthread_cond_destroy(&h->changed);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

static struct slot *slot_of(struct herald *h, const struct held *job)
{
    for (int i = 0; i < HERALD_MAX_HELD; i++)
        if (h->slots[i].job == job)
            return &h->slots[i];
    return NULL;
}

void herald_hold(struct herald *h, struct held *job)
{
    pthread_mutex_lock(&h->lock);
    struct slot *s;
    while (!(s = slot_of(h, NULL)))
        pthread_cond_wait(&h->changed, &h->lock);
    *s = (struct slot){.job = job, .renewed_at = monotonic_seconds()};
    pthread_mutex_unlock(&h->lock);
}

void herald_drop(struct herald *h, struct held *job)
{
    pthread_mutex_lock(&h->lock);
    struct slot *s = slot_of(h, job);
    while (s && s->busy)
        pthread_cond_wait(&h->changed, &h->lock);
    if (s)
        s->job = NULL;
    pthread_cond_broadcast(&h->changed);
    pthread_mutex_unlock(&h->lock);
}

void herald_report(struct herald *h, struct held *job, const struct queue_progress *progress)
{
    pthread_mutex_lock(&h->lock);
    struct slot *s = slot_of(h, job);
    if (s) {
        s->n_news -= s->n_news == NEWS;
        s->news[s->n_news++] = *progress;
        pthread_cond_broadcast(&h->changed);
    }
    pthread_mutex_unlock(&h->lock);
}
