#include "worker/job_run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/clock.h"
#include "worker/admit.h"
#include "worker/deliver.h"
#include "worker/herald.h"

enum { WAIT_MS = 500, CLAIM_RETRY_MS = 500 };

// What rank 0 broadcasts before each job; the packed job follows.
struct order {
    int32_t model; // index into worker.models; ORDER_STOP: drain
    int32_t padding;
    int64_t job_bytes;
};
enum { ORDER_STOP = -1 };

// ---- on every rank

struct watch {
    struct worker *w;
    struct herald *herald; // rank 0 with a job of the queue, else NULL
    struct held *held;
    double step_at; // when the last step ended
    bool release;   // the job was stopped because the worker drains
};

// The engine asks at each stage and step; rank 0's answer counts.
static int on_progress(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    static const enum stage stages[] = {
        [ENGINE_TEXT] = STAGE_TEXT, [ENGINE_DENOISE] = STAGE_DENOISE, [ENGINE_DECODE] = STAGE_DECODE};
    struct watch *v = arg;
    const double at = monotonic_seconds(), last = v->step_at;
    v->step_at = at;
    pulse_report(v->w->pulse, stages[stage], (uint32_t)step, (uint32_t)steps, NULL);
    if (!v->herald)
        return 0;
    const struct queue_progress progress = {DITFLEET__V1__STATE__STATE_RUNNING, stage_name(stages[stage]),
                                            (uint32_t)step, (uint32_t)steps,
                                            stage == ENGINE_DENOISE && step > 0 ? (at - last) * (steps - step) : 0};
    herald_report(v->herald, v->held, &progress);
    TRY(held_check(v->held, err));
    v->release = pulse_must_release(v->w->pulse, v->w->conf->restart.grace_s, step > 0 ? at - last : 0);
    return v->release ? err_set(err, ERR_UNAVAILABLE, "the worker is draining") : 0;
}

int worker_plan(const struct conf_group *g, struct plan *out, struct err *err)
{
    *out = (struct plan){.cfg = g->cfg_degree,
                         .ulysses = g->ulysses_degree,
                         .ring = g->ring_degree,
                         .pipe = g->pipefusion_degree,
                         .patches = g->num_pipeline_patch,
                         .warmup = g->warmup_steps,
                         .data = g->data_degree,
                         .weights = g->weights ? PLAN_SHARDED : PLAN_REPLICATED};
    return plan_parse_blocks(g->pipefusion_blocks, out, err);
}

// The degrees asked of the group, where the job allows them: a job of one guidance branch has no use for two, and
// images cannot always be dealt to so many parts. The stages stay: they have their weights.
static int wanted(const struct worker *w, const Ditfleet__V1__Job *job, struct plan *out, struct err *err)
{
    const struct conf_group *g = w->group;
    TRY(worker_plan(g, out, err));
    if ((g->cfg_degree == 2 && !job_true_cfg(job)) ||
        (g->data_degree > 0 && job->num_images % (uint32_t)g->data_degree != 0))
        out->cfg = out->ulysses = out->ring = out->data = 0;
    return 0;
}

static int run_job(struct worker *w, int model, const Ditfleet__V1__Job *job, struct watch *watch,
                   struct engine_result *out, struct err *err)
{
    const struct engine_hooks hooks = {.progress = on_progress, .arg = watch};
    struct plan want;
    TRY(wanted(w, job, &want, err));
    const double start = monotonic_seconds();
    comm_set_timeout(w->comm, (int)(w->conf->deadline.denoise_s * 1000));
    int rc = engine_run(w->engine, w->models[model], job, &want, &hooks, out, err);
    comm_set_timeout(w->comm, 0);
    pulse_busy(w->pulse, monotonic_seconds() - start);
    return rc;
}

// Large enough to start every thread, where the model takes it.
static uint32_t warm_up_side(const struct model *m)
{
    const struct model_limits *l = &m->limits;
    const int64_t multiple = m->side_multiple, least = (l->min_side + multiple - 1) / multiple * multiple;
    int64_t side = 256 / multiple * multiple;
    while (side > least && (side > l->max_side || side * side > l->max_pixels))
        side -= multiple;
    return (uint32_t)(side > least ? side : least);
}

static int make_one(struct worker *w, int model, Ditfleet__V1__Job *job, struct err *err)
{
    struct engine_result result = {0};
    struct watch watch = {.w = w};
    job->prompt = (char *)"warm up";
    job->seed__case = DITFLEET__V1__JOB__SEED__SEED;
    TRY(model_resolve_job(w->models[model], job, err));
    TRY(run_job(w, model, job, &watch, &result, err));
    engine_result_free(&result);
    return 0;
}

static int warm_up_small(struct worker *w, int model, struct err *err)
{
    Ditfleet__V1__Job job = DITFLEET__V1__JOB__INIT;
    job.width = job.height = warm_up_side(w->models[model]);
    job.num_inference_steps = 1;
    job.max_sequence_length = 64;
    return make_one(w, model, &job, err);
}

// The loop records its second step. What does not fit is no reason not to serve smaller pictures.
static int warm_up_gpu(struct worker *w, int model, struct err *err)
{
    Ditfleet__V1__Job job = DITFLEET__V1__JOB__INIT;
    job.num_inference_steps = 2;
    int rc = make_one(w, model, &job, err);
    if (rc != ERR_UNSUPPORTED || comm_check(w->comm, NULL) != 0)
        return rc;
    log_line(w->log, LOG_WARN, "model.default_size", "model=%s@%s error=\"%s\"", w->group->models[model].name,
             w->group->models[model].version, err->text);
    return warm_up_small(w, model, err);
}

int worker_warm_up(struct worker *w, struct err *err)
{
    // Ranks that load longer are waited for as long as loading may take, not as long as a step.
    comm_set_timeout(w->comm, (int)(w->conf->deadline.load_s * 1000));
    comm_barrier(w->comm);
    TRY(comm_check(w->comm, err));
    for (int i = 0; i < w->group->model.count; i++)
        TRY((w->group->device == CONF_DEVICE_CUDA ? warm_up_gpu : warm_up_small)(w, i, err));
    return 0;
}

int worker_follow(struct worker *w, struct err *err)
{
    w->serving = true;
    for (;;) {
        struct order order;
        pulse_report(w->pulse, STAGE_IDLE, 0, 0, "");
        comm_broadcast(w->comm, &order, sizeof order, 0);
        TRY(comm_check(w->comm, err));
        if (order.model == ORDER_STOP)
            return 0;
        void *bytes = malloc((size_t)order.job_bytes + 1);
        if (!bytes) // rank 0 goes on without us: nobody may wait for this rank
            return err_set(err, ERR_NO_MEMORY, "no memory for a job of %lld bytes", (long long)order.job_bytes);
        comm_broadcast(w->comm, bytes, order.job_bytes, 0);
        TRY(comm_check(w->comm, err));
        Ditfleet__V1__Job *job = ditfleet__v1__job__unpack(NULL, (size_t)order.job_bytes, bytes);
        free(bytes);
        if (!job)
            return err_set(err, ERR_INTERNAL, "rank 0 sent a job that does not parse");
        struct watch watch = {.w = w};
        struct engine_result result = {0};
        struct err ended = {.code = ERR_NONE};
        run_job(w, order.model, job, &watch, &result, &ended); // a job refused here is refused on rank 0 too
        engine_result_free(&result);
        job_free(job);
        TRY(comm_check(w->comm, err));
    }
}

// ---- rank 0

struct leader {
    struct worker *w;
    struct queue *queue; // the main path's own; NULL while not connected
    struct upload_policy policy;
    struct uploader *uploader; // judges targets before any work is spent
    struct deliver_options options;
    struct herald *herald;
    struct deliverer *deliverer;
    struct admitter *admitter;
    const char **pools; // (group->model.count) "name@version"
    char cursor[QUEUE_ENTRY_SIZE];
    bool waiting_for_redis;
};

static int share_order(struct leader *l, int model, const Ditfleet__V1__Job *job, struct err *err)
{
    struct order order = {.model = model};
    if (comm_size(l->w->comm) == 1)
        return 0;
    if (job)
        order.job_bytes = (int64_t)ditfleet__v1__job__get_packed_size(job);
    uint8_t *bytes = malloc((size_t)order.job_bytes + 1);
    if (!bytes)
        return err_set(err, ERR_NO_MEMORY, "no memory to share a job");
    if (job)
        ditfleet__v1__job__pack(job, bytes);
    comm_broadcast(l->w->comm, &order, sizeof order, 0);
    if (job)
        comm_broadcast(l->w->comm, bytes, order.job_bytes, 0);
    free(bytes);
    return comm_check(l->w->comm, err);
}

// A group computes in one precision: its weights lie on the device in it.
static int check_precision(const struct worker *w, Ditfleet__V1__Precision wanted, struct err *err)
{
    struct precision p;
    if (wanted == DITFLEET__V1__PRECISION__PRECISION_DEFAULT)
        return 0;
    TRY(precision_of(w->kernels, wanted, wanted, &p, err));
    if (p.activation == w->precision.activation && p.codes == w->precision.codes)
        return 0;
    return err_set(err, ERR_UNSUPPORTED,
                   "precision %s: group %s, which took the job, computes in %s; leave precision at default, or ask for "
                   "a model of a group with precision = %s",
                   job_precision_name(wanted), w->group->name, precision_name(&w->precision),
                   job_precision_name(wanted));
}

// Everything about a claimed job that can be judged before a GPU is touched. *model: index into worker.models.
static int examine(struct leader *l, struct held *h, int *model, struct err *err)
{
    struct worker *w = l->w;
    TRY(job_parse(h->claim.payload, h->claim.payload_length, &h->job, NULL, err));
    for (*model = 0; *model < w->group->model.count; ++*model)
        if (strcmp(l->pools[*model], h->claim.pool) == 0)
            break;
    if (*model == w->group->model.count)
        return err_set(err, ERR_INTERNAL, "claimed a job of pool %s, which this group does not serve", h->claim.pool);
    h->model = w->models[*model];
    TRY(check_precision(w, h->job->precision, err));
    TRY(uploader_check(l->uploader, h->job->output, h->claim.fence.id, err));
    return model_resolve_job(h->model, h->job, err);
}

static uint64_t wall_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void let_go(struct leader *l, struct held *h)
{
    herald_drop(l->herald, h);
    held_free(h);
}

// A job that ends here: refused, stopped, or given back. The leader's own queue connection says so.
static void settle(struct leader *l, struct held *h, const struct err *why, bool release)
{
    if (release)
        settle_release(&l->options, &l->queue, h);
    else
        settle_failure(&l->options, &l->queue, h, why, settle_cause(why));
    let_go(l, h);
}

// A GPU that failed stays so for the process, and memory that another program took does not come back by waiting: what
// might go well another time needs another process.
static bool gpu_failed(const struct watch *watch, int rc, const struct err *why)
{
    return rc != 0 && watch->w->group->device == CONF_DEVICE_CUDA && why->retryable && !watch->release;
}

// Tells the others and runs. An error: the group is broken; else *rc is the job's.
static int run_shared(struct leader *l, struct watch *watch, int model, int *rc, struct err *why, struct err *err)
{
    struct held *h = watch->held;
    const Ditfleet__V1__Job *job = h->job;
    log_line(l->w->log, LOG_INFO, "job.started", "job=%s model=%s size=%ux%u steps=%u prompt_bytes=%zu%s%s",
             h->claim.fence.id, h->claim.pool, job->width, job->height, job->num_inference_steps, strlen(job->prompt),
             *job->traceparent ? " traceparent=" : "", job->traceparent);
    pulse_report(l->w->pulse, STAGE_TEXT, 0, 0, h->claim.fence.id);
    TRY(share_order(l, model, h->job, err));
    *rc = run_job(l->w, model, h->job, watch, &h->result, why);
    if (gpu_failed(watch, *rc, why)) {
        *err = *why; // what comm_check has to say of it
        return err->code;
    }
    return comm_check(l->w->comm, err);
}

// One claimed job: examine, tell the others, run, hand on. Returns an error only when the group is broken.
static int run_claimed(struct leader *l, struct held *h, struct err *err)
{
    struct worker *w = l->w;
    struct watch watch = {.w = w, .herald = l->herald, .held = h};
    struct err why = {.code = ERR_NONE};
    int model, rc = 0;
    h->claimed_at = monotonic_seconds();
    h->claimed_ms = wall_ms();
    log_line(w->log, LOG_INFO, "job.claimed", "tenant=%s job=%s epoch=%llu", h->claim.fence.tenant, h->claim.fence.id,
             (unsigned long long)h->claim.fence.epoch);
    herald_hold(l->herald, h);
    if (examine(l, h, &model, &why) != 0) {
        settle(l, h, &why, false);
        return 0;
    }
    if (run_shared(l, &watch, model, &rc, &why, err) != 0) { // else the supervisor gives the lease back
        if (gpu_failed(&watch, rc, &why))
            settle_failure(&l->options, &l->queue, h, &why, QUEUE_CAUSE_INFRA);
        let_go(l, h);
        return err->code;
    }
    h->denoised_at = monotonic_seconds();
    if (rc != 0)
        settle(l, h, &why, watch.release);
    else
        deliverer_put(l->deliverer, h);
    return 0;
}

// *out: a claimed job, or NULL when there is none or Redis is away.
static int claim(struct leader *l, struct held **out, struct err *err)
{
    struct worker *w = l->w;
    const struct queue_claim want = {.worker = w->id,
                                     .incarnation = w->incarnation,
                                     .pools = l->pools,
                                     .n_pools = (size_t)w->group->model.count,
                                     .lease_ms = (uint64_t)(w->conf->queue.lease_s * 1000),
                                     .max = 1};
    size_t count = 0;
    bool woken;
    *out = NULL;
    if (!l->queue)
        TRY(queue_open(&l->queue, w->conf->redis.url, w->conf->redis.queue, QUEUE_NODE, NULL, err));
    struct held *h = calloc(1, sizeof *h);
    if (!h)
        return err_set(err, ERR_NO_MEMORY, "no memory for a job");
    int rc = queue_claim(l->queue, &want, &h->claim, &count, l->cursor, err);
    if (rc == 0 && count == 1) {
        *out = h;
        return 0;
    }
    free(h);
    TRY(rc);
    return queue_wait(l->queue, l->cursor, WAIT_MS, &woken, err);
}

// Redis away is no reason to die: it is said once, and tried again.
static void tell_redis(struct leader *l, int rc, const struct err *err)
{
    const bool away = rc != 0;
    if (away && !l->waiting_for_redis)
        log_line(l->w->log, LOG_WARN, "queue.waiting", "error=\"%s\"", err->text);
    if (!away && l->waiting_for_redis)
        log_line(l->w->log, LOG_INFO, "queue.resumed", "queue=%s", l->w->conf->redis.queue);
    l->waiting_for_redis = away;
    if (away)
        nanosleep(&(struct timespec){.tv_nsec = CLAIM_RETRY_MS * 1000000L}, NULL);
}

static int serve(struct leader *l, struct err *err)
{
    while (!pulse_draining(l->w->pulse, NULL)) {
        struct held *h;
        struct err away = {.code = ERR_NONE};
        TRY(comm_check(l->w->comm, err));
        pulse_report(l->w->pulse, STAGE_IDLE, 0, 0, "");
        tell_redis(l, claim(l, &h, &away), &away);
        if (h)
            TRY(run_claimed(l, h, err));
    }
    pulse_report(l->w->pulse, STAGE_DRAINING, 0, 0, NULL);
    deliverer_wait(l->deliverer); // a rank that leaves early may cost the others their lives
    return share_order(l, ORDER_STOP, NULL, err);
}

static int name_pools(struct leader *l, struct err *err)
{
    const struct conf_group *g = l->w->group;
    l->pools = calloc((size_t)g->model.count + 1, sizeof *l->pools);
    for (int i = 0; l->pools && i < g->model.count; i++) {
        char name[JOB_MODEL_SIZE];
        snprintf(name, sizeof name, "%s@%s", g->models[i].name, g->models[i].version);
        l->pools[i] = strdup(name);
        if (!l->pools[i])
            return err_set(err, ERR_NO_MEMORY, "no memory for model names");
    }
    return l->pools ? 0 : err_set(err, ERR_NO_MEMORY, "no memory for model names");
}

static int leader_start(struct leader *l, struct err *err)
{
    struct worker *w = l->w;
    l->policy = (struct upload_policy){.allow_hosts = (const char *const *)w->conf->upload.allow.items,
                                       .n_allow_hosts = (size_t)w->conf->upload.allow.count,
                                       .file_roots = (const char *const *)w->conf->upload.file_roots.items,
                                       .n_file_roots = (size_t)w->conf->upload.file_roots.count};
    TRY(name_pools(l, err));
    l->uploader = uploader_new(&l->policy, &upload_defaults, w->log, err);
    if (!l->uploader)
        return err->code;
    TRY(herald_new(w->conf, w->log, w->pulse, &l->herald, err));
    l->options = (struct deliver_options){
        .conf = w->conf, .log = w->log, .pulse = w->pulse, .herald = l->herald, .policy = &l->policy, .worker = w->id};
    TRY(deliverer_new(&l->options, &l->deliverer, err));
    return admitter_new(w->conf, w->group, w->log, w->id, &l->admitter, err);
}

static void leader_stop(struct leader *l)
{
    admitter_free(l->admitter);
    if (l->deliverer)
        deliverer_wait(l->deliverer);
    deliverer_free(l->deliverer);
    herald_free(l->herald);
    uploader_free(l->uploader);
    queue_close(l->queue);
    for (int i = 0; l->pools && i < l->w->group->model.count; i++)
        free((char *)l->pools[i]);
    free(l->pools);
}

int worker_lead(struct worker *w, struct err *err)
{
    struct leader l = {.w = w};
    int rc = leader_start(&l, err);
    w->serving = rc == 0;
    if (rc == 0)
        rc = serve(&l, err);
    leader_stop(&l);
    return rc;
}
