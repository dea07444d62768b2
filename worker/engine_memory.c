// engine_memory.c: whether a job fits, by what a dry run says of it, and the memory it is given: reserved before any
// work, or refused with the numbers and the largest picture that would fit.
#include <stdio.h>
#include <string.h>

#include "worker/engine_internal.h"
#include "worker/ownership.h"
#include "worker/prompt_cache.h"

// ---- what a job takes

void engine_key(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, char key[ENGINE_KEY])
{
    char plan_text[PLAN_TEXT];
    plan_print(plan, plan_text);
    snprintf(key, ENGINE_KEY, "%s codes=%d %ux%u steps=%u text=%u images=%u branches=%d weights=%d %s", m->hash,
             m->home ? (int)m->home->codes : 0, job->width, job->height, job->num_inference_steps,
             job->max_sequence_length, job->num_images, job_true_cfg(job) ? 2 : 1, plan->weights, plan_text);
}

static int predict_anew(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                        const struct plan *plan, struct engine_estimate *out, struct err *err)
{
    return engine_predict_rank(m, job, plan, comm_rank(e->data), e->k, out, err);
}

int engine_predict(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   struct engine_estimate *out, struct err *err)
{
    char key[ENGINE_KEY];
    engine_key(m, job, plan, key);
    for (int i = 0; i < ESTIMATES; i++)
        if (strcmp(e->estimates[i].key, key) == 0) {
            *out = e->estimates[i].estimate;
            return 0;
        }
    TRY(predict_anew(e, m, job, plan, out, err));
    memcpy(e->estimates[e->next_estimate].key, key, sizeof key);
    e->estimates[e->next_estimate].estimate = *out;
    e->next_estimate = (e->next_estimate + 1) % ESTIMATES;
    return 0;
}

int64_t engine_host_memory_free(void)
{
    long long kib = INT64_MAX / 1024;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lld", &kib) == 1)
            break;
    if (f)
        fclose(f);
    return kib * 1024;
}

int64_t engine_memory_share(const struct engine *e)
{
    return e->memory_limit ? e->memory_limit : engine_host_memory_free() / e->ranks_here;
}

struct demand engine_demand(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct engine_estimate *estimate, size_t extra)
{
    const struct prompt_shape shape = {job->max_sequence_length, m->info.text_dim, m->info.pooled_dim};
    const int64_t patch = 2 * vae_scale(m->vae), tokens = (job->width / patch) * (job->height / patch);
    struct demand d = {.most = estimate->activation_bytes + extra};
    for (int i = 0; i < ENGINE_STAGES; i++)
        d.stage[i] = estimate->stage_bytes[i] + extra;
    const int64_t codes = (int64_t)estimate->cost.codes - ENGINE_CODES_BYTES;
    d.fixed = ENGINE_LIBRARY_BYTES + (codes > 0 ? codes : 0) + prompt_cache_bytes(e->cache, &shape);
    d.between = tokens * m->info.channels * (int64_t)dtype_size(e->k->activation);
    return d;
}

static int64_t stage_weights(const struct model *m, int stage)
{
    static const unsigned parts[ENGINE_STAGES] = {1U << PART_CLIP | 1U << PART_T5, 1U << PART_DIT, 1U << PART_VAE};
    return model_placed_bytes(m, parts[stage]);
}

// Bytes of the device in the stage that takes most of it; turns: the arena is replaced between stages.
static int64_t device_bytes(const struct model *m, const struct demand *d, bool turns, int *stage)
{
    int64_t most = 0;
    for (int i = 0; i < ENGINE_STAGES; i++) {
        const int64_t bytes =
            stage_weights(m, i) + d->fixed + (turns ? d->between + (int64_t)d->stage[i] : (int64_t)d->most);
        if (bytes > most) {
            most = bytes;
            *stage = i;
        }
    }
    return most;
}

bool engine_fits(const struct engine *e, const struct model *m, const struct demand *d, int64_t limit)
{
    int stage;
    if (!e->residency)
        return (int64_t)d->most <= limit;
    const int64_t budget = residency_budget(e->residency);
    return device_bytes(m, d, false, &stage) <= budget || device_bytes(m, d, true, &stage) <= budget;
}

// Says in text what the largest square is that fits.
static void print_largest(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                          const struct plan *plan, size_t extra, int64_t limit, char text[96])
{
    const struct model_limits *l = &m->limits;
    const int64_t least = (l->min_side - 1) / m->side_multiple; // too small
    int64_t low = least, high = l->max_side / m->side_multiple + 1;
    Ditfleet__V1__Job square = *job;
    while (high - low > 1) { // low fits, high does not
        const int64_t middle = low + (high - low) / 2, side = middle * m->side_multiple;
        struct engine_estimate estimate;
        struct err err;
        square.width = square.height = (uint32_t)side;
        bool fine = side * side <= l->max_pixels && predict_anew(e, m, &square, plan, &estimate, &err) == 0;
        if (fine) {
            const struct demand d = engine_demand(e, m, &square, &estimate, extra);
            fine = engine_fits(e, m, &d, limit);
        }
        *(fine ? &low : &high) = middle;
    }
    const long long side = low * m->side_multiple;
    if (low > least)
        snprintf(text, 96, "the largest square that fits is %lld x %lld", side, side);
    else
        snprintf(text, 96, "no size fits");
}

// ---- reserving it

static int grow_arena(struct engine *e, size_t bytes, struct err *err)
{
    TRY(arena_new(e->k, e->d, bytes, &e->arena, err));
    e->arena_bytes = bytes;
    return 0;
}

static void drop_arena(struct engine *e)
{
    arena_free(e->arena);
    e->arena = NULL;
    e->arena_bytes = 0;
}

static double gib(int64_t bytes)
{
    return (double)bytes / (1 << 30);
}

// Where weights stay mapped in the host's memory, activations alone are counted; a small cache of prompts is not.
static int reserve_on_host(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                           const struct plan *plan, size_t extra, struct err *err)
{
    const size_t bytes = e->demand.most;
    char largest[96];
    if (bytes <= e->arena_bytes)
        return 0;
    drop_arena(e);
    const int64_t limit = engine_memory_share(e);
    if ((int64_t)bytes <= limit)
        return grow_arena(e, bytes, err);
    print_largest(e, m, job, plan, extra, limit, largest);
    return err_set(err, ERR_UNSUPPORTED,
                   "width %u x height %u needs %.2f GiB of activations on each of %d ranks, but %.2f GiB are free; %s; "
                   "ask for a smaller picture or use more ranks",
                   job->width, job->height, gib((int64_t)bytes), plan->ranks, gib(limit), largest);
}

// Says what the transformer would take of each GPU if its weights were sharded, where they may be.
static void print_sharded(const struct model *m, const struct plan *plan, int stage, char text[96])
{
    struct plan sharded = *plan;
    sharded.weights = PLAN_SHARDED;
    *text = 0;
    if (stage == ENGINE_DENOISE && plan->ranks > 1 && plan->weights == PLAN_REPLICATED && !plan_in_patches(plan))
        snprintf(text, 96, "; with weights sharded the transformer takes %.2f GiB of each",
                 gib(ownership_bytes(m->dit->weights, &sharded, 0)));
}

static int refuse_on_device(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct plan *plan, size_t extra, int stage, struct err *err)
{
    static const char *const doing[ENGINE_STAGES] = {"encoding text", "denoising", "decoding"};
    const struct demand *d = &e->demand;
    char largest[96], sharded[96];
    print_largest(e, m, job, plan, extra, 0, largest);
    print_sharded(m, plan, stage, sharded);
    return err_set(err, ERR_UNSUPPORTED,
                   "width %u x height %u needs %.2f GiB of activations, %.2f GiB of weights and %.2f GiB for libraries "
                   "and prompts while %s on each of %d GPUs, more than the memory budget of %.2f GiB; %s%s",
                   job->width, job->height, gib((int64_t)d->stage[stage] + d->between), gib(stage_weights(m, stage)),
                   gib(d->fixed), doing[stage], plan->ranks, gib(residency_budget(e->residency)), largest, sharded);
}

// Every stage has to fit: its weights, its activations, and what is there throughout. One arena serves all stages,
// unless weights have to make way for it. One that is larger than the job asks for is kept where there is room.
static int reserve_on_device(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                             const struct plan *plan, size_t extra, struct err *err)
{
    const struct demand *d = &e->demand;
    const int64_t budget = residency_budget(e->residency), kept = d->fixed + (int64_t)e->arena_bytes;
    const bool roomy = residency_all_bytes(e->residency) + kept <= budget;
    int stage = 0;
    if (device_bytes(m, d, false, &stage) > budget) {
        if (device_bytes(m, d, true, &stage) > budget)
            return refuse_on_device(e, m, job, plan, extra, stage, err);
        drop_arena(e);
        residency_reserve(e->residency, d->fixed + d->between + (int64_t)d->stage[ENGINE_TEXT]);
        TRY(e->k->alloc(e->d, (size_t)d->between, &e->between, err));
        return grow_arena(e, d->stage[ENGINE_TEXT], err);
    }
    if (e->arena_bytes == d->most || (roomy && e->arena_bytes > d->most)) {
        residency_reserve(e->residency, kept);
        return 0;
    }
    drop_arena(e);
    residency_reserve(e->residency, d->fixed + (int64_t)d->most);
    return grow_arena(e, d->most, err);
}

int engine_reserve_prompts(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, struct err *err)
{
    const struct prompt_shape shape = {job->max_sequence_length, m->info.text_dim, m->info.pooled_dim};
    if (e->residency)
        residency_reserve(e->residency,
                          ENGINE_LIBRARY_BYTES + prompt_cache_bytes(e->cache, &shape) + (int64_t)e->arena_bytes);
    return prompt_cache_reserve(e->cache, &shape, err);
}

int engine_reserve(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   size_t extra, struct err *err)
{
    struct engine_estimate estimate;
    TRY(engine_predict(e, m, job, plan, &estimate, err));
    e->demand = engine_demand(e, m, job, &estimate, extra);
    return (e->residency ? reserve_on_device : reserve_on_host)(e, m, job, plan, extra, err);
}

int engine_take_turn(struct engine *e, enum engine_stage stage, struct err *err)
{
    drop_arena(e);
    residency_reserve(e->residency, e->demand.fixed + e->demand.between + (int64_t)e->demand.stage[stage]);
    return grow_arena(e, e->demand.stage[stage], err);
}
