// pictures.c: the path from prompts to pixels, for every backend and number of ranks; and the same path dry, which says
// what it would take.
#include "worker/engine_internal.h"
#include "worker/stages.h"

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

static int begin_stage(struct run *r, enum engine_stage stage, unsigned parts, struct err *err)
{
    struct engine *e = r->engine;
    if (e && e->between) {
        TRY(exec_check(&r->world, err));
        TRY(engine_take_turn(e, stage, err));
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

// Sharded weights stay where they are for as long. Where one rank alone fails nobody waits for it to hide them: the
// group ends.
static int denoise_shown(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
                         struct err *err)
{
    if (r->dry)
        return denoise(r, prompts, noise, tokens, err);
    TRY(ownership_show(&r->ownership, &r->branch, r->model->dit->weights, err));
    r->direct = comm_memory_is_open(r->world.comm);
    struct err late;
    const int rc = denoise(r, prompts, noise, tokens, err);
    const int hidden = rc == 0 || r->agreed ? ownership_hide(&r->ownership, rc ? &late : err) : 0;
    return rc ? rc : hidden;
}

static int make_picture(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, uint8_t *pixels,
                        struct err *err)
{
    const size_t mark =
        arena_mark(r->world.arena); // 0 where the arena is replaced: then it holds nothing between stages
    struct tensor tokens = tokens_of(r);
    TRY(begin_stage(r, ENGINE_DENOISE, 1U << PART_DIT, err));
    TRY(denoise_shown(r, prompts, noise, tokens, err));
    note_peak(r, ENGINE_DENOISE);
    TRY(begin_stage(r, ENGINE_DECODE, 1U << PART_VAE, err));
    TRY(decode(r, tokens, pixels, err));
    note_peak(r, ENGINE_DECODE);
    run_enter(r, ENGINE_DENOISE); // of the next one
    arena_release(r->world.arena, mark);
    return 0;
}

int make_pictures(struct run *r, float *noise, struct engine_result *out, struct err *err)
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

static int predict(struct run *r, int rank, const struct kernels *k, struct engine_estimate *out, struct err *err)
{
    struct comm *comm = NULL;
    struct device *d = NULL;
    struct arena *arena = NULL;
    struct engine_result unused = {0};
    const struct device_options options = {.threads = 1, .activation = k->activation};
    struct kernels dry = kernels_dry;
    dry.activation = k->activation;
    r->dry = true;
    int rc = comm_dry_new(rank, r->plan.ranks, k->link != NULL, &comm, err);
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
                        const struct kernels *k, struct engine_estimate *out, struct err *err)
{
    struct run r;
    *out = (struct engine_estimate){0};
    run_init(&r, m, job, plan);
    return predict(&r, rank, k, out, err);
}
