#include "worker/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/clock.h"
#include "worker/ownership.h"
#include "worker/stages.h"
#include "worker/tuned.h"

enum { ESTIMATES = 16, PRICE_LISTS = 8, KEY = PLAN_TEXT + 256, LINK_TIMEOUT_MS = 60000 };

// What a job takes of a rank's memory besides weights.
struct demand {
    size_t stage[ENGINE_STAGES], most; // bytes of the arena: for each stage, and for the one that takes most
    int64_t fixed;                     // throughout: libraries, prompts
    int64_t between;                   // what one stage leaves to the next, where the arena is replaced between them
};

struct engine {
    const struct kernels *k; // table below
    struct kernels table;    // the backend's, saying the activation type that was asked for
    struct device *d;
    struct arena *arena; // grown to what a job needs, kept for the next
    size_t arena_bytes;
    struct comm *control;
    struct comm *data; // between devices: a link of its own, or control
    char opened[KEY];  // the job for which data's memory is open; "": it is not
    int64_t memory_limit;
    bool fp8, exact;
    struct plan held;            // of all models with this engine's home
    struct residency *residency; // NULL: the device computes in the host's memory
    struct prompt_cache *cache;
    struct demand demand; // of the job in hand
    double ended;         // when the device was done with the job before; 0: there was none
    void *between;        // not NULL: this job's arena is replaced between stages, so that weights can make way for it
    struct {
        char key[KEY]; // what the estimate depends on, as text
        struct engine_estimate estimate;
    } estimates[ESTIMATES]; // a ring
    int next_estimate;
    bool tuned, priced;     // priced: on rank 0, by the machine's parameters
    struct machine machine; // of this group
    struct price_list {
        char key[KEY];
        struct price list[PLAN_MAX_CHOICES];
        struct engine_estimate most[PLAN_MAX_CHOICES]; // memory; activation_bytes 0: not asked for yet
        int n;
    } prices[PRICE_LISTS]; // a ring
    int next_prices;
};

// All ranks go on, or none: the first failing rank's error is everybody's.
static int agree(struct comm *control, int rc, struct err *err)
{
    const int ranks = comm_size(control);
    struct err all[COMM_MAX_RANKS];
    int64_t counts[COMM_MAX_RANKS];
    if (ranks == 1)
        return rc;
    struct err mine = {.code = ERR_NONE};
    if (rc != 0)
        mine = *err;
    for (int r = 0; r < ranks; r++)
        counts[r] = sizeof mine;
    comm_all_gather(control, &mine, all, counts);
    TRY(comm_check(control, err));
    for (int r = 0; r < ranks; r++)
        if (all[r].code != ERR_NONE)
            return err_set(err, all[r].code, "%s", all[r].text);
    return 0;
}

// The budget of a device with memory of its own.
static int open_residency(struct engine *e, int64_t budget, struct err *err)
{
    size_t available = 0, total = 0;
    if (!e->k->memory)
        return 0;
    e->k->memory(e->d, &available, &total);
    if (budget > (int64_t)total)
        return err_set(err, ERR_INVALID, "memory budget %.2f GiB: the device has %.2f GiB", (double)budget / (1 << 30),
                       (double)total / (1 << 30));
    TRY(residency_new(e->k, e->d, budget ? budget : (int64_t)available, &e->residency, err));
    residency_reserve(e->residency, ENGINE_LIBRARY_BYTES);
    return 0;
}

// Prices are rank 0's alone: files and free memory are not the same to all.
static void open_prices(struct engine *e, const struct engine_options *options)
{
    const struct precision precision = {.activation = options->device.activation, .fp8 = options->fp8};
    struct tuned_key key;
    e->tuned = options->tuned && comm_size(e->control) > 1;
    if (!e->tuned || comm_rank(e->control) != 0)
        return;
    tuned_key_of(options->kernels, comm_size(e->control), options->device.threads, &precision, &key);
    e->priced = tuned_load(NULL, &key, &e->machine);
}

// Of several ranks all hear of a device that does not open: nobody waits for it.
static int open_device(struct engine *e, const struct device_options *options, struct err *err)
{
    int rc = e->k->open(options, &e->d, err);
    if (!e->k->link || comm_size(e->control) == 1)
        return rc;
    TRY(agree(e->control, rc, err));
    return comm_link_new(e->control, e->k, e->d, LINK_TIMEOUT_MS, &e->data, err);
}

int engine_new(const struct engine_options *options, struct engine **out, struct err *err)
{
    *out = NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return err_set(err, ERR_NO_MEMORY, "no memory for an engine");
    e->table = *options->kernels;
    e->table.activation = options->device.activation;
    e->k = &e->table;
    e->data = e->control = options->control;
    e->memory_limit = options->memory_limit;
    e->fp8 = options->fp8;
    e->exact = options->device.exact;
    e->held = options->held;
    open_prices(e, options);
    int rc = open_device(e, &options->device, err);
    if (rc == 0)
        rc = open_residency(e, options->memory_budget, err);
    if (rc == 0)
        rc = prompt_cache_new(e->k, e->d, &e->cache, err);
    if (rc != 0) {
        engine_free(e);
        return rc;
    }
    *out = e;
    return 0;
}

void engine_free(struct engine *e)
{
    if (!e)
        return;
    if (e->data != e->control)
        comm_free(e->data);
    prompt_cache_free(e->cache);
    arena_free(e->arena);
    residency_free(e->residency);
    if (e->d)
        e->k->close(e->d);
    free(e);
}

struct home engine_home(const struct engine *e)
{
    struct home home = {.k = e->k, .d = e->d, .fp8 = e->fp8, .residency = e->residency, .held = e->held};
    home.rank = comm_rank(e->data);
    if (!e->residency)
        home.room = e->memory_limit ? e->memory_limit : engine_host_memory_free() / comm_size(e->data);
    return home;
}

struct comm_times engine_comm_times(const struct engine *e)
{
    return comm_times(e->data);
}

int engine_precision(const struct kernels *k, Ditfleet__V1__Precision wanted, Ditfleet__V1__Precision preferred,
                     struct precision *out, struct err *err)
{
    const bool f32_alone = k->activation == DT_F32; // a backend whose own type is float32 has no other
    if (wanted == DITFLEET__V1__PRECISION__PRECISION_DEFAULT && !f32_alone)
        wanted = preferred;
    *out = (struct precision){.activation = k->activation};
    switch (wanted) {
    case DITFLEET__V1__PRECISION__PRECISION_DEFAULT:
        return 0;
    case DITFLEET__V1__PRECISION__PRECISION_FP32:
        out->activation = DT_F32;
        return 0;
    case DITFLEET__V1__PRECISION__PRECISION_BF16:
    case DITFLEET__V1__PRECISION__PRECISION_FP16:
    case DITFLEET__V1__PRECISION__PRECISION_FP8:
        out->activation = wanted == DITFLEET__V1__PRECISION__PRECISION_FP16 ? DT_F16 : DT_BF16;
        out->fp8 = wanted == DITFLEET__V1__PRECISION__PRECISION_FP8;
        if (!f32_alone)
            return 0;
        break;
    default:
        break;
    }
    return err_set(err, ERR_UNSUPPORTED, "precision %s: on %s there is %s", job_precision_name(wanted), k->name,
                   f32_alone ? "fp32" : "fp32, bf16, fp16 and fp8");
}

const char *precision_name(const struct precision *p)
{
    if (p->fp8)
        return "fp8";
    return p->activation == DT_F32 ? "fp32" : p->activation == DT_BF16 ? "bf16" : "fp16";
}

void engine_result_free(struct engine_result *r)
{
    free(r->pixels);
    r->pixels = NULL;
}

// ---- a job

// Remembers what the stage took at most, in a dry run.
static void note_peak(struct run *r, enum engine_stage stage)
{
    const size_t peak = arena_peak(r->world.arena);
    if (!r->dry)
        return;
    if (peak > r->peaks[stage])
        r->peaks[stage] = peak;
    arena_peak_restart(r->world.arena);
}

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

// Where memory is so short that stages take turns in it, this stage's arena takes the place of the last one's.
static int begin_stage(struct run *r, enum engine_stage stage, unsigned parts, struct err *err)
{
    struct engine *e = r->engine;
    if (e && e->between) {
        TRY(exec_check(&r->world, err));
        drop_arena(e);
        residency_reserve(e->residency, e->demand.fixed + e->demand.between + (int64_t)e->demand.stage[stage]);
        TRY(grow_arena(e, e->demand.stage[stage], err));
        run_use(r, e->k, e->d, e->arena);
    }
    return run_need(r, parts, err);
}

static struct tensor tokens_of(struct run *r)
{
    const int64_t n = r->image_tokens, channels = r->model->info.channels;
    if (r->engine && r->engine->between)
        return tensor_2d(r->engine->between, r->world.k->activation, n, channels);
    return exec_tensor(&r->world, 2, n, channels, 1, 1);
}

static int make_picture(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, uint8_t *pixels,
                        struct err *err)
{
    const size_t mark =
        arena_mark(r->world.arena); // 0 where the arena is replaced: then it holds nothing between stages
    struct tensor tokens = tokens_of(r);
    TRY(begin_stage(r, ENGINE_DENOISE, 1U << PART_DIT, err));
    TRY(denoise(r, prompts, noise, tokens, err));
    note_peak(r, ENGINE_DENOISE);
    TRY(begin_stage(r, ENGINE_DECODE, 1U << PART_VAE, err));
    TRY(decode(r, tokens, pixels, err));
    note_peak(r, ENGINE_DECODE);
    run_enter(r, ENGINE_DENOISE); // of the next one
    arena_release(r->world.arena, mark);
    return 0;
}

// The path from prompts to pixels, for every backend and number of ranks. noise: room for that of all images, NULL in a
// dry run. It is drawn while the device encodes.
static int make_pictures(struct run *r, float *noise, struct engine_result *out, struct err *err)
{
    struct prompt prompts[BRANCHES];
    const int64_t values = r->image_tokens * r->model->info.channels;
    const int64_t picture = (int64_t)r->job->width * r->job->height * 3;
    TRY(encode_prompts(r, prompts, out->prompt_cut, err));
    note_peak(r, ENGINE_TEXT);
    if (noise)
        TRY(noise_tokens(r, noise, err));
    const uint32_t each = r->job->num_images / (uint32_t)r->plan.data, first = each * (uint32_t)r->part_index;
    for (uint32_t i = first; i < first + each; i++)
        TRY(make_picture(r, prompts, noise ? noise + i * values : NULL, out->pixels ? out->pixels + i * picture : NULL,
                         err));
    out->prompt_cached = r->prompt_cached;
    out->encode_seconds = r->seconds[ENGINE_TEXT];
    out->denoise_seconds = r->seconds[ENGINE_DENOISE];
    out->decode_seconds = r->seconds[ENGINE_DECODE];
    return 0;
}

static int predict(struct run *r, int rank, enum dtype activation, struct engine_estimate *out, struct err *err)
{
    struct comm *comm = NULL;
    struct device *d = NULL;
    struct arena *arena = NULL;
    struct engine_result unused = {0};
    const struct device_options options = {.threads = 1, .activation = activation};
    struct kernels dry = kernels_dry;
    dry.activation = activation;
    r->dry = true;
    int rc = comm_dry_new(rank, r->plan.ranks, &comm, err);
    if (rc == 0)
        rc = kernels_dry.open(&options, &d, err);
    if (rc == 0)
        rc = arena_new(&dry, d, ARENA_UNBOUNDED, &arena, err);
    if (rc == 0) {
        run_use(r, &dry, d, arena);
        rc = run_join(r, comm, err);
    }
    if (rc == 0)
        rc = make_pictures(r, NULL, &unused, err);
    for (int i = 0; rc == 0 && i < ENGINE_STAGES; i++) {
        out->stage_bytes[i] = r->peaks[i];
        if (r->peaks[i] > out->activation_bytes)
            out->activation_bytes = r->peaks[i];
    }
    if (rc == 0)
        kernels_dry.cost(d, &out->cost);
    out->loop = r->loop;
    run_leave(r);
    arena_free(arena);
    if (d)
        kernels_dry.close(d);
    comm_free(comm);
    return rc;
}

int engine_predict_rank(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, int rank,
                        enum dtype activation, struct engine_estimate *out, struct err *err)
{
    struct run r;
    *out = (struct engine_estimate){0};
    run_init(&r, m, job, plan);
    return predict(&r, rank, activation, out, err);
}

static int predict_anew(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                        const struct plan *plan, struct engine_estimate *out, struct err *err)
{
    return engine_predict_rank(m, job, plan, comm_rank(e->data), e->k->activation, out, err);
}

// What an estimate depends on, besides the engine.
static void key_of(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, char key[KEY])
{
    char plan_text[PLAN_TEXT];
    plan_print(plan, plan_text);
    snprintf(key, KEY, "%s fp8=%d %ux%u steps=%u text=%u images=%u branches=%d weights=%d %s", m->hash,
             m->home && m->home->fp8, job->width, job->height, job->num_inference_steps, job->max_sequence_length,
             job->num_images, job_true_cfg(job) ? 2 : 1, plan->weights, plan_text);
}

int engine_predict(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   struct engine_estimate *out, struct err *err)
{
    char key[KEY];
    key_of(m, job, plan, key);
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

// ---- memory

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

// extra: bytes of activations that no dry run knows of.
static struct demand demand_of(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                               const struct engine_estimate *estimate, size_t extra)
{
    const struct prompt_shape shape = {job->max_sequence_length, m->info.text_dim, m->info.pooled_dim};
    const int64_t patch = 2 * vae_scale(m->vae), tokens = (job->width / patch) * (job->height / patch);
    struct demand d = {.most = estimate->activation_bytes + extra};
    for (int i = 0; i < ENGINE_STAGES; i++)
        d.stage[i] = estimate->stage_bytes[i] + extra;
    d.fixed = ENGINE_LIBRARY_BYTES + prompt_cache_bytes(e->cache, &shape);
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

// limit: of activations in the host's memory.
static bool fits(const struct engine *e, const struct model *m, const struct demand *d, int64_t limit)
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
            const struct demand d = demand_of(e, m, &square, &estimate, extra);
            fine = fits(e, m, &d, limit);
        }
        *(fine ? &low : &high) = middle;
    }
    const long long side = low * m->side_multiple;
    if (low > least)
        snprintf(text, 96, "the largest square that fits is %lld x %lld", side, side);
    else
        snprintf(text, 96, "no size fits");
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
    const int64_t limit = e->memory_limit ? e->memory_limit : engine_host_memory_free() / plan->ranks;
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

// Two more tensors of the whole picture that only a traced run holds.
static size_t trace_bytes(const struct engine_hooks *hooks, const Ditfleet__V1__Job *job)
{
    return hooks->trace ? (size_t)job->width * job->height * 3 * sizeof(float) * 2 + (1 << 20) : 0;
}

static int reserve_prompts(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, struct err *err)
{
    const struct prompt_shape shape = {job->max_sequence_length, m->info.text_dim, m->info.pooled_dim};
    if (e->residency)
        residency_reserve(e->residency,
                          ENGINE_LIBRARY_BYTES + prompt_cache_bytes(e->cache, &shape) + (int64_t)e->arena_bytes);
    return prompt_cache_reserve(e->cache, &shape, err);
}

static int reserve(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   size_t extra, struct err *err)
{
    struct engine_estimate estimate;
    TRY(engine_predict(e, m, job, plan, &estimate, err));
    e->demand = demand_of(e, m, job, &estimate, extra);
    return (e->residency ? reserve_on_device : reserve_on_host)(e, m, job, plan, extra, err);
}

// ---- the job itself

// Rank 0 gets the pictures of the other parts of the group from their first ranks.
static void gather_pictures(const struct engine *e, const struct run *r, struct engine_result *out)
{
    const int me = comm_rank(e->control), parts = r->plan.data, ranks = r->plan.ranks / parts;
    const int64_t bytes = (int64_t)(r->job->num_images / (uint32_t)parts) * r->job->width * r->job->height * 3;
    int64_t sent[COMM_MAX_RANKS] = {0}, got[COMM_MAX_RANKS] = {0}, from[COMM_MAX_RANKS] = {0}, to[COMM_MAX_RANKS] = {0};
    if (parts == 1)
        return;
    if (me > 0 && me % ranks == 0) {
        sent[0] = bytes;
        from[0] = r->part_index * bytes;
    }
    for (int i = 1; me == 0 && i < parts; i++) {
        got[i * ranks] = bytes;
        to[i * ranks] = i * bytes;
    }
    comm_all_to_all(e->control, out->pixels, sent, from, out->pixels, got, to);
    if (me > 0)
        engine_result_free(out);
}

static int run_prepared(struct engine *e, struct run *r, struct engine_result *out, struct err *err)
{
    const Ditfleet__V1__Job *job = r->job;
    const size_t noise_bytes = (size_t)(job->num_images * r->image_tokens * r->model->info.channels) * sizeof(float);
    float *noise = malloc(noise_bytes);
    const bool keeps_pixels = comm_rank(e->data) % (r->plan.ranks / r->plan.data) == 0;
    if (keeps_pixels)
        out->pixels = malloc((size_t)job->num_images * job->width * job->height * 3);
    int rc = 0;
    if (!noise || (keeps_pixels && !out->pixels))
        rc = err_set(err, ERR_NO_MEMORY, "no memory for %u pictures of %u x %u", job->num_images, job->width,
                     job->height);
    if (rc == 0)
        rc = run_join(r, e->data, err);
    if (rc == 0)
        rc = make_pictures(r, noise, out, err);
    run_leave(r);
    if (rc == 0) {
        gather_pictures(e, r, out);
        rc = comm_check(e->control, err); // a part may have failed after the last word that all heard
    }
    free(noise);
    return rc;
}

// ---- the choice of a plan

static int price(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                 struct price_list **out, struct err *err)
{
    char key[KEY];
    key_of(m, job, want, key);
    for (int i = 0; i < PRICE_LISTS; i++)
        if (strcmp(e->prices[i].key, key) == 0) {
            *out = &e->prices[i];
            return 0;
        }
    struct price_list *p = &e->prices[e->next_prices];
    *p = (struct price_list){0};
    TRY(cost_all(&e->machine, m, e->k, job, want, p->list, &p->n, err));
    memcpy(p->key, key, sizeof key);
    e->next_prices = (e->next_prices + 1) % PRICE_LISTS;
    *out = p;
    return 0;
}

// The cheapest plan that fits; where none does, the one that takes least, to be refused.
static int cheapest(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                    size_t extra, struct plan *out, struct err *err)
{
    struct price_list *prices;
    double seconds[PLAN_MAX_CHOICES];
    int least = -1, picked;
    TRY(price(e, m, job, want, &prices, err));
    int64_t limit = e->memory_limit ? e->memory_limit : engine_host_memory_free() / want->ranks;
    limit = limit > (int64_t)e->arena_bytes ? limit : (int64_t)e->arena_bytes;
    for (int i = 0; i < prices->n; i++)
        seconds[i] = price_seconds(&prices->list[i]);
    while ((picked = cost_pick(seconds, prices->n)) >= 0) {
        struct engine_estimate *most = &prices->most[picked];
        if (most->activation_bytes == 0)
            TRY(cost_memory(m, job, &prices->list[picked].plan, e->k->activation, most, err));
        const struct demand d = demand_of(e, m, job, most, extra);
        if (fits(e, m, &d, limit))
            break;
        if (least < 0 || most->activation_bytes < prices->most[least].activation_bytes)
            least = picked;
        seconds[picked] = -1;
    }
    *out = prices->list[picked < 0 ? least : picked].plan;
    return 0;
}

// Rank 0's choice, where it has prices; else *want, whose open degrees plan_make fills in.
static int choose(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                  size_t extra, struct plan *out, struct err *err)
{
    int rc = 0;
    *out = *want;
    if (e->priced)
        rc = cheapest(e, m, job, want, extra, out, err);
    if (e->tuned)
        comm_broadcast(e->control, out, sizeof *out, 0);
    return rc ? rc : comm_check(e->control, err);
}

// How the model's weights are had.
static struct plan held_of(const struct model *m)
{
    return m->home ? m->home->held : (struct plan){.weights = PLAN_REPLICATED};
}

// What can be known before any work: the plan, and whether it fits. The cache of prompts comes first: what is in it
// must not depend on what fails on one rank alone.
static int plan_and_reserve(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct plan *want, const struct engine_hooks *hooks, struct plan *plan,
                            struct err *err)
{
    const struct plan held = held_of(m);
    struct plan open = plan_keep_to(&held, want), here;
    open.ranks = comm_size(e->data);
    open.exact = e->exact;
    if (e->exact && open.ring == 0)
        open.ring = 1;
    TRY(reserve_prompts(e, m, job, err));
    TRY(plan_deal_images(&open, (int)job->num_images, err));
    TRY(choose(e, m, job, &open, trace_bytes(hooks, job), &here, err));
    TRY(plan_make(&m->info, e->k, &here, job_true_cfg(job), plan, err));
    TRY(plan_check_kept(&held, plan, err));
    return reserve(e, m, job, plan, trace_bytes(hooks, job), err);
}

// The same with all ranks. Where images that are made side by side do not fit, they are made one after the other.
static int agree_on_plan(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                         const struct engine_hooks *hooks, struct plan *plan, struct err *err)
{
    struct plan dealt = *want;
    struct err unused;
    int rc = agree(e->control, plan_and_reserve(e, m, job, want, hooks, plan, err), err);
    dealt.ranks = comm_size(e->data);
    if (rc != ERR_UNSUPPORTED || want->data != 0 || plan_deal_images(&dealt, (int)job->num_images, &unused) != 0 ||
        dealt.data == 1)
        return rc;
    dealt.data = 1;
    return agree(e->control, plan_and_reserve(e, m, job, &dealt, hooks, plan, err), err);
}

// Memory that other ranks write is opened as it is for a job; it stays so while jobs are alike, as nothing is allocated
// for them.
static int close_memory(struct engine *e, const char *key, struct err *err)
{
    if (strcmp(e->opened, key) == 0)
        return 0;
    e->opened[0] = '\0';
    return comm_close_memory(e->data, err);
}

// Sharded weights are messages, too, and their memory comes and goes with the transformer: it is not opened.
static int open_memory(struct engine *e, const struct model *m, const char *key, struct err *err)
{
    if (*e->opened)
        return 0;
    memcpy(e->opened, key, KEY);
    return comm_open_memory(e->data, !e->between && held_of(m).weights != PLAN_SHARDED, err);
}

static int begin_run(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                     const struct engine_hooks *hooks, struct plan *plan, struct err *err)
{
    char key[KEY];
    key_of(m, job, want, key);
    if (hooks->trace)
        snprintf(key + strlen(key), KEY - strlen(key), " traced");
    TRY(close_memory(e, key, err));
    TRY(agree_on_plan(e, m, job, want, hooks, plan, err));
    return open_memory(e, m, key, err);
}

// Between jobs the arena holds nothing.
static void end_run(struct engine *e, struct engine_result *out)
{
    if (e->between)
        e->k->free(e->d, e->between);
    e->between = NULL;
    if (e->arena)
        arena_release(e->arena, 0);
    prompt_cache_drop(e->cache);
    if (e->residency)
        out->moves = residency_moves(e->residency);
}

// Where exchanges hold the waiting: the rank that others waited for has the least of them.
static void tell_waiting(struct rank_times *times, int ranks)
{
    double least = times[0].exchange;
    for (int r = 0; r < ranks; r++)
        if (times[r].wait > 0)
            return; // they were told apart
    for (int r = 1; r < ranks; r++)
        least = times[r].exchange < least ? times[r].exchange : least;
    for (int r = 0; r < ranks; r++) {
        times[r].wait = times[r].exchange - least;
        times[r].exchange = least;
    }
}

// Every rank's times of the job that began then.
static void share_times(const struct engine *e, double began, struct comm_times before, struct engine_result *out)
{
    const struct comm_times now = comm_times(e->data);
    struct rank_times mine = {.exchange = now.exchange - before.exchange, .wait = now.wait - before.wait};
    int64_t counts[COMM_MAX_RANKS];
    mine.compute = monotonic_seconds() - began - mine.exchange - mine.wait;
    for (int r = 0; r < out->plan.ranks; r++)
        counts[r] = sizeof mine;
    comm_all_gather(e->control, &mine, out->ranks, counts);
    if (comm_on_device(e->data))
        tell_waiting(out->ranks, out->plan.ranks);
}

int engine_run(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
               const struct engine_hooks *hooks, struct engine_result *out, struct err *err)
{
    struct run r;
    const double began = monotonic_seconds();
    const struct comm_times before = comm_times(e->data);
    *out = (struct engine_result){0};
    if (e->residency)
        residency_moves(e->residency); // of this job from here on
    int rc = begin_run(e, m, job, want, hooks, &out->plan, err);
    if (rc != 0) {
        end_run(e, out);
        return rc;
    }
    run_init(&r, m, job, &out->plan);
    r.hooks = hooks;
    r.control = e->control;
    r.engine = e;
    r.residency = e->residency;
    r.cache = e->cache;
    run_use(&r, e->k, e->d, e->arena);
    rc = run_prepared(e, &r, out, err);
    out->direct = comm_memory_is_open(e->data);
    out->idle_seconds = e->ended > 0 && r.begun > 0 ? r.begun - e->ended : 0;
    e->ended = monotonic_seconds();
    end_run(e, out);
    if (rc == 0) {
        share_times(e, began, before, out);
        rc = comm_check(e->control, err);
    }
    if (rc != 0) {
        if (!r.agreed) // the other ranks do not know: nobody may wait for this one
            comm_abort(e->control, err->text);
        engine_result_free(out);
    }
    return rc;
}
