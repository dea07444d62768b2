#include "worker/deliver.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/clock.h"
#include "worker/output/describe.h"
#include "worker/output/png.h"

struct deliverer {
    struct deliver_options o;
    struct uploader *uploader;
    struct queue *queue; // the thread's own
    pthread_t thread;
    pthread_mutex_t lock; // of what follows
    pthread_cond_t changed;
    struct held *job; // in hand
    bool ending;
};

// ---- last words

// What is to be said to the queue about a job; 0, or the queue's answer.
typedef int last_word(struct queue *q, const struct held *job, const void *arg, struct err *err);

// Says it, again while Redis is away; after the lease's length somebody else has the job anyway. pulse: of the caller,
// if it is the main path, whose waiting is no hang; else NULL.
static int say(const struct deliver_options *o, struct pulse *pulse, struct queue **queue, const struct held *job,
               last_word *word, const void *arg, struct err *err)
{
    const double until = monotonic_seconds() + o->conf->queue.lease_s;
    for (bool told = false;; told = true) {
        int rc = *queue ? 0 : queue_open(queue, o->conf->redis.url, o->conf->redis.queue, QUEUE_NODE, NULL, err);
        if (rc == 0)
            rc = word(*queue, job, arg, err);
        if (rc == 0 || !err->retryable || monotonic_seconds() > until)
            return rc;
        if (!told)
            log_line(o->log, LOG_WARN, "queue.waiting", "job=%s error=\"%s\"", job->claim.fence.id, err->text);
        if (pulse)
            pulse_report(pulse, STAGE_UPLOAD, 0, 0, NULL);
        nanosleep(&(struct timespec){.tv_nsec = 500 * 1000000L}, NULL);
    }
}

struct failure {
    const struct err *why;
    enum queue_cause cause;
};

static int say_fail(struct queue *q, const struct held *job, const void *arg, struct err *err)
{
    const struct failure *f = arg;
    return queue_fail(q, &job->claim.fence, f->cause, f->why, NULL, err);
}

static int say_release(struct queue *q, const struct held *job, const void *arg, struct err *err)
{
    (void)arg;
    return queue_release(q, &job->claim.fence, err);
}

struct packed {
    void *bytes;
    size_t length;
};

static int say_finish(struct queue *q, const struct held *job, const void *arg, struct err *err)
{
    const struct packed *p = arg;
    return queue_finish(q, &job->claim.fence, p->bytes, p->length, err);
}

static void not_settled(const struct deliver_options *o, const struct held *job, const struct err *why)
{
    log_line(o->log, LOG_WARN, "job.not_settled", "tenant=%s job=%s error=\"%s\"", job->claim.fence.tenant,
             job->claim.fence.id, why->text);
}

static void fail(const struct deliver_options *o, struct pulse *pulse, struct queue **queue, const struct held *job,
                 const struct err *why, enum queue_cause cause)
{
    struct err err = {.code = ERR_NONE};
    const struct failure failure = {why, cause};
    const struct queue_fence *f = &job->claim.fence;
    const bool taken_away = why->code == ERR_STALE || why->code == ERR_CANCELLED || why->code == ERR_EXPIRED;
    log_line(o->log, LOG_WARN, "job.failed", "tenant=%s job=%s epoch=%llu code=%s error=\"%s\"", f->tenant, f->id,
             (unsigned long long)f->epoch, err_name(why->code), why->text);
    if (!taken_away && say(o, pulse, queue, job, say_fail, &failure, &err) != 0)
        not_settled(o, job, &err);
}

static void release(const struct deliver_options *o, struct pulse *pulse, struct queue **queue, const struct held *job)
{
    struct err err = {.code = ERR_NONE};
    if (say(o, pulse, queue, job, say_release, NULL, &err) != 0)
        not_settled(o, job, &err);
    else
        log_line(o->log, LOG_INFO, "job.released", "job=%s", job->claim.fence.id);
}

enum queue_cause settle_cause(const struct err *why)
{
    return why->code == ERR_NO_MEMORY || why->code == ERR_INTERNAL ? QUEUE_CAUSE_INFRA : QUEUE_CAUSE_APP;
}

void settle_failure(const struct deliver_options *o, struct queue **queue, const struct held *job,
                    const struct err *why, enum queue_cause cause)
{
    fail(o, o->pulse, queue, job, why, cause);
}

void settle_release(const struct deliver_options *o, struct queue **queue, const struct held *job)
{
    release(o, o->pulse, queue, job);
}

// ---- a delivery

// The images as they were stored; freed by the caller.
struct delivery {
    struct deliverer *d;
    struct held *job;
    Ditfleet__V1__Image *images; // (num_images)
    double png_seconds, upload_seconds;
    bool release; // it was stopped because the worker drains
    bool unheard; // all is stored, but Redis could not be told for as long as the lease lasts
};

// The uploader's question, before each try and once a second.
static int ask_stop(void *arg, struct err *err)
{
    struct delivery *v = arg;
    TRY(held_check(v->job, err));
    v->release = pulse_must_release(v->d->o.pulse, v->d->o.conf->restart.grace_s, 0);
    return v->release ? err_set(err, ERR_UNAVAILABLE, "the worker is draining") : 0;
}

static void report(const struct delivery *v, const char *stage, uint32_t step)
{
    const struct queue_progress progress = {DITFLEET__V1__STATE__STATE_UPLOADING, stage, step, v->job->job->num_images,
                                            0};
    herald_report(v->d->o.herald, v->job, &progress);
}

static int encode_image(struct delivery *v, uint32_t index, struct picture *picture, struct err *err)
{
    const Ditfleet__V1__Job *job = v->job->job;
    const double start = monotonic_seconds();
    struct description description;
    char plan[PLAN_TEXT];
    plan_print(&v->job->result.plan, plan);
    report(v, "png", index);
    TRY(describe_picture(job, v->job->model->hash, plan, index, &description, err));
    int rc = picture_encode(v->job->result.pixels + (size_t)index * job->width * job->height * 3, job->height,
                            job->width, description.texts, DESCRIPTION_TEXTS, picture, err);
    description_free(&description);
    v->png_seconds += monotonic_seconds() - start;
    return rc;
}

static int deliver_image(struct delivery *v, uint32_t index, struct err *err)
{
    const struct held *job = v->job;
    struct picture picture = {0};
    struct upload_result stored;
    TRY(encode_image(v, index, &picture, err));
    report(v, "upload", index);
    int rc = uploader_put(v->d->uploader, job->job->output, job->claim.fence.id, (uint32_t)job->claim.fence.epoch,
                          index, picture.bytes, picture.len, ask_stop, v, &stored, err);
    if (rc == 0) {
        Ditfleet__V1__Image *image = &v->images[index];
        image->location = stored.location;
        image->bytes = picture.len;
        image->sha256 = strdup(picture.sha256);
        image->index = index;
        if (!image->sha256)
            rc = err_set(err, ERR_NO_MEMORY, "no memory for a result");
    }
    v->upload_seconds += stored.seconds;
    picture_free(&picture);
    return rc;
}

enum { MAX_IMAGES = 64 };

// What a Result points to while it is packed.
struct result_parts {
    Ditfleet__V1__Image *images[MAX_IMAGES];
    Ditfleet__V1__RankTime times[COMM_MAX_RANKS], *ranks[COMM_MAX_RANKS];
    char *warnings[4], text[4][128], plan[PLAN_TEXT];
};

static void fill_ranks(struct result_parts *parts, const struct engine_result *from, Ditfleet__V1__Timing *timing)
{
    for (int i = 0; i < from->plan.ranks; i++) {
        parts->times[i] = (Ditfleet__V1__RankTime)DITFLEET__V1__RANK_TIME__INIT;
        parts->times[i].compute_seconds = from->ranks[i].compute;
        parts->times[i].exchange_seconds = from->ranks[i].exchange;
        parts->times[i].wait_seconds = from->ranks[i].wait;
        parts->ranks[timing->n_ranks++] = &parts->times[i];
    }
    timing->ranks = parts->ranks;
}

static double queued_seconds(const struct held *h)
{
    return h->claimed_ms > h->claim.created_ms ? (double)(h->claimed_ms - h->claim.created_ms) / 1000 : 0;
}

// Packs the Result; what it points to stays the caller's.
static int pack_result(const struct delivery *v, struct packed *out, struct err *err)
{
    static const char *const cut[] = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2"};
    const struct held *h = v->job;
    Ditfleet__V1__Job used = *h->job;
    Ditfleet__V1__Output where = DITFLEET__V1__OUTPUT__INIT; // no headers, no query: they are secrets
    Ditfleet__V1__Timing timing = DITFLEET__V1__TIMING__INIT;
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    struct result_parts parts;
    plan_print(&h->result.plan, parts.plan);
    used.output = &where;
    timing.queued_seconds = queued_seconds(h);
    timing.encode_seconds = h->result.encode_seconds;
    timing.denoise_seconds = h->result.denoise_seconds;
    timing.decode_seconds = h->result.decode_seconds;
    timing.png_seconds = v->png_seconds;
    timing.upload_seconds = v->upload_seconds;
    timing.gpu_seconds = (h->denoised_at - h->claimed_at) * h->result.plan.ranks;
    fill_ranks(&parts, &h->result, &timing);
    result.id = (char *)h->claim.fence.id;
    result.state = DITFLEET__V1__STATE__STATE_SUCCEEDED;
    for (uint32_t i = 0; i < h->job->num_images && i < MAX_IMAGES; i++)
        parts.images[result.n_images++] = &v->images[i];
    result.images = parts.images;
    result.used = &used;
    result.model_hash = (char *)h->model->hash;
    result.plan = parts.plan;
    result.attempt = (uint32_t)h->claim.fence.epoch;
    for (int i = 0; i < 4; i++)
        if (h->result.prompt_cut[i]) {
            snprintf(parts.text[i], sizeof parts.text[i], "%s is longer than its encoder takes; the rest was cut off",
                     cut[i]);
            parts.warnings[result.n_warnings++] = parts.text[i];
        }
    result.warnings = parts.warnings;
    result.timing = &timing;
    result.worker = (char *)v->d->o.worker;
    return result_pack(&result, &out->bytes, &out->length, err);
}

static int deliver(struct delivery *v, struct err *err)
{
    struct deliverer *d = v->d;
    struct packed packed = {0};
    for (uint32_t i = 0; i < v->job->job->num_images; i++) {
        TRY(held_check(v->job, err));
        TRY(deliver_image(v, i, err));
    }
    TRY(pack_result(v, &packed, err));
    int rc = say(&d->o, NULL, &d->queue, v->job, say_finish, &packed, err);
    v->unheard = rc != 0 && err->retryable;
    free(packed.bytes);
    return rc;
}

static void deliver_and_settle(struct deliverer *d, struct held *job)
{
    struct err err = {.code = ERR_NONE};
    struct delivery v = {.d = d, .job = job};
    int rc = 0;
    v.images = calloc(job->job->num_images, sizeof *v.images);
    if (!v.images)
        rc = err_set(&err, ERR_NO_MEMORY, "no memory for a result");
    for (uint32_t i = 0; v.images && i < job->job->num_images; i++)
        ditfleet__v1__image__init(&v.images[i]);
    if (rc == 0)
        rc = deliver(&v, &err);
    if (rc != 0 && v.release)
        release(&d->o, NULL, &d->queue, job);
    else if (v.unheard) // by now the lease has run out, which is charged to the fleet; this job did no wrong
        not_settled(&d->o, job, &err);
    else if (rc != 0)
        fail(&d->o, NULL, &d->queue, job, &err, settle_cause(&err));
    else
        log_line(d->o.log, LOG_INFO, "job.succeeded",
                 "tenant=%s job=%s epoch=%llu idle_ms=%.1f encode_s=%.3f denoise_s=%.3f decode_s=%.3f png_s=%.3f "
                 "upload_s=%.3f",
                 job->claim.fence.tenant, job->claim.fence.id, (unsigned long long)job->claim.fence.epoch,
                 job->result.idle_seconds * 1e3, job->result.encode_seconds, job->result.denoise_seconds,
                 job->result.decode_seconds, v.png_seconds, v.upload_seconds);
    for (uint32_t i = 0; v.images && i < job->job->num_images; i++) {
        if (v.images[i].location != protobuf_c_empty_string)
            free(v.images[i].location);
        if (v.images[i].sha256 != protobuf_c_empty_string)
            free(v.images[i].sha256);
    }
    free(v.images);
    herald_drop(d->o.herald, job);
    held_free(job);
}

// ---- the thread

static void *run(void *arg)
{
    struct deliverer *d = arg;
    pthread_mutex_lock(&d->lock);
    for (;;) {
        while (!d->job && !d->ending)
            pthread_cond_wait(&d->changed, &d->lock);
        if (!d->job)
            break;
        pthread_mutex_unlock(&d->lock);
        deliver_and_settle(d, d->job);
        pthread_mutex_lock(&d->lock);
        d->job = NULL;
        pthread_cond_broadcast(&d->changed);
    }
    pthread_mutex_unlock(&d->lock);
    queue_close(d->queue);
    return NULL;
}

int deliverer_new(const struct deliver_options *options, struct deliverer **out, struct err *err)
{
    struct upload_options upload = upload_defaults;
    upload.attempts = (uint32_t)options->conf->upload.retries + 1;
    upload.stall_seconds = options->conf->upload.timeout_s;
    *out = NULL;
    struct deliverer *d = calloc(1, sizeof *d);
    if (!d)
        return err_set(err, ERR_NO_MEMORY, "no memory for deliveries");
    d->o = *options;
    d->uploader = uploader_new(options->policy, &upload, options->log, err);
    if (!d->uploader) {
        free(d);
        return err->code;
    }
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->changed, NULL);
    if (pthread_create(&d->thread, NULL, run, d) != 0) {
        uploader_free(d->uploader);
        free(d);
        return err_set(err, ERR_NO_MEMORY, "the delivery thread cannot be started");
    }
    *out = d;
    return 0;
}

void deliverer_free(struct deliverer *d)
{
    if (!d)
        return;
    pthread_mutex_lock(&d->lock);
    d->ending = true;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
    pthread_join(d->thread, NULL);
    pthread_cond_destroy(&d->changed);
    pthread_mutex_destroy(&d->lock);
    uploader_free(d->uploader);
    free(d);
}

// Waits under the lock for the job in hand. Its own deadlines bound it, so waiting counts as progress.
static void wait_empty(struct deliverer *d)
{
    while (d->job) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 1;
        pulse_report(d->o.pulse, STAGE_UPLOAD, 0, 0, NULL);
        pthread_cond_timedwait(&d->changed, &d->lock, &until);
    }
}

void deliverer_put(struct deliverer *d, struct held *job)
{
    pthread_mutex_lock(&d->lock);
    wait_empty(d);
    d->job = job;
    pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
}

void deliverer_wait(struct deliverer *d)
{
    pthread_mutex_lock(&d->lock);
    wait_empty(d);
    pthread_mutex_unlock(&d->lock);
}
