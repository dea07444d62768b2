#include "worker/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/clock.h"
#include "worker/stages.h"

struct engine {
    const struct kernels *k; // table below
    struct kernels table;    // the backend's, saying the activation type that was asked for
    struct device *d;
    struct arena *arena; // grown to what a job needs, kept for the next
    size_t arena_bytes;
    struct comm *data, *control;
    int64_t memory_limit;
    bool fp8;
};

int engine_new(const struct engine_options *options, struct engine **out, struct err *err)
{
    *out = NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return err_set(err, ERR_NO_MEMORY, "no memory for an engine");
    e->table = *options->kernels;
    e->table.activation = options->device.activation;
    e->k = &e->table;
    e->data = options->data;
    e->control = options->control;
    e->memory_limit = options->memory_limit;
    e->fp8 = options->fp8;
    int rc = e->k->open(&options->device, &e->d, err);
    if (rc != 0) {
        free(e);
        return rc;
    }
    *out = e;
    return 0;
}

void engine_free(struct engine *e)
{
    if (!e)
        return;
    arena_free(e->arena);
    e->k->close(e->d);
    free(e);
}

struct home engine_home(const struct engine *e)
{
    return (struct home){.k = e->k, .d = e->d, .fp8 = e->fp8};
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

void engine_result_free(struct engine_result *r)
{
    free(r->pixels);
    r->pixels = NULL;
}

// ---- a job

// The path from prompts to pixels, for every backend and number of ranks. noise: of all images, NULL in a dry run.
static int make_pictures(struct run *r, const float *noise, struct engine_result *out, struct err *err)
{
    struct prompt prompts[BRANCHES];
    const int64_t channels = r->model->info.channels, picture = (int64_t)r->job->width * r->job->height * 3;
    const double start = monotonic_seconds();
    TRY(encode_prompts(r, prompts, out->prompt_cut, err));
    out->encode_seconds = monotonic_seconds() - start;
    for (uint32_t i = 0; i < r->job->num_images; i++) {
        const size_t mark = arena_mark(r->world.arena);
        struct tensor tokens = exec_tensor(&r->world, 2, r->image_tokens, channels, 1, 1);
        const double begin = monotonic_seconds();
        TRY(denoise(r, prompts, noise ? noise + i * r->image_tokens * channels : NULL, tokens, err));
        const double between = monotonic_seconds();
        TRY(decode(r, tokens, out->pixels ? out->pixels + i * picture : NULL, err));
        out->denoise_seconds += between - begin;
        out->decode_seconds += monotonic_seconds() - between;
        arena_release(r->world.arena, mark);
    }
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
    if (rc == 0) {
        out->activation_bytes = arena_peak(arena);
        kernels_dry.cost(d, &out->cost);
    }
    run_leave(r);
    arena_free(arena);
    if (d)
        kernels_dry.close(d);
    comm_free(comm);
    return rc;
}

int engine_predict(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   struct engine_estimate *out, struct err *err)
{
    struct run r;
    *out = (struct engine_estimate){0};
    run_init(&r, m, job, plan);
    return predict(&r, comm_rank(e->data), e->k->activation, out, err);
}

// Bytes the host could still give, from the kernel's own estimate.
static int64_t host_memory_free(void)
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

static int reserve(struct engine *e, const Ditfleet__V1__Job *job, size_t bytes, int ranks, struct err *err)
{
    if (bytes <= e->arena_bytes)
        return 0;
    arena_free(e->arena);
    e->arena = NULL;
    e->arena_bytes = 0;
    const int64_t limit = e->memory_limit ? e->memory_limit : host_memory_free() / ranks;
    if ((int64_t)bytes > limit)
        return err_set(err, ERR_UNSUPPORTED,
                       "width %u x height %u needs %.2f GiB of activations on each of %d ranks, but %.2f GiB are free; "
                       "ask for a smaller picture or use more ranks",
                       job->width, job->height, (double)bytes / (1 << 30), ranks, (double)limit / (1 << 30));
    TRY(arena_new(e->k, e->d, bytes, &e->arena, err));
    e->arena_bytes = bytes;
    return 0;
}

// Two more tensors of the whole picture that only a traced run holds.
static size_t trace_bytes(const struct engine_hooks *hooks, const Ditfleet__V1__Job *job)
{
    return hooks->trace ? (size_t)job->width * job->height * 3 * sizeof(float) * 2 + (1 << 20) : 0;
}

static int run_prepared(struct engine *e, struct run *r, struct engine_result *out, struct err *err)
{
    const Ditfleet__V1__Job *job = r->job;
    const size_t noise_bytes = (size_t)(job->num_images * r->image_tokens * r->model->info.channels) * sizeof(float);
    float *noise = malloc(noise_bytes);
    if (comm_rank(e->data) == 0)
        out->pixels = malloc((size_t)job->num_images * job->width * job->height * 3);
    int rc = 0;
    if (!noise || (comm_rank(e->data) == 0 && !out->pixels))
        rc = err_set(err, ERR_NO_MEMORY, "no memory for %u pictures of %u x %u", job->num_images, job->width,
                     job->height);
    if (rc == 0)
        rc = noise_tokens(r, noise, err);
    if (rc == 0)
        rc = run_join(r, e->data, err);
    if (rc == 0)
        rc = make_pictures(r, noise, out, err);
    run_leave(r);
    free(noise);
    return rc;
}

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

// What can be known before any work: the plan, and whether it fits.
static int plan_and_reserve(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct plan *want, const struct engine_hooks *hooks, struct plan *plan,
                            struct err *err)
{
    struct engine_estimate estimate;
    TRY(plan_make(&m->info, comm_size(e->data), job_true_cfg(job), want->cfg, want->ulysses, plan, err));
    TRY(engine_predict(e, m, job, plan, &estimate, err));
    return reserve(e, job, estimate.activation_bytes + trace_bytes(hooks, job), comm_size(e->data), err);
}

int engine_run(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
               const struct engine_hooks *hooks, struct engine_result *out, struct err *err)
{
    struct run r;
    *out = (struct engine_result){0};
    TRY(agree(e->control, plan_and_reserve(e, m, job, want, hooks, &out->plan, err), err));
    run_init(&r, m, job, &out->plan);
    r.hooks = hooks;
    r.control = e->control;
    run_use(&r, e->k, e->d, e->arena);
    const size_t mark = arena_mark(e->arena);
    int rc = run_prepared(e, &r, out, err);
    arena_release(e->arena, mark);
    if (rc != 0) {
        if (!r.agreed) // the other ranks do not know: nobody may wait for this one
            comm_abort(e->control, err->text);
        engine_result_free(out);
    }
    return rc;
}
