// bench_part.c: the text encoders alone, and what the dry backend counts for each part.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/bench.h"
#include "proto/clock.h"

enum part { T5, CLIP, VAE };

// A device to run a part on, and its arena.
struct stand {
    struct exec x;
    struct kernels table; // of a dry stand
    struct device *own;   // likewise
    struct comm *comm;
};

// One run of the part, its input and output included.
static int run_part(struct bench *b, struct stand *s, enum part part, struct err *err)
{
    struct exec *x = &s->x;
    const size_t mark = arena_mark(x->arena);
    const struct model *m = b->model;
    const int64_t tokens = b->job->max_sequence_length, positions = clip_positions(m->clip);
    int32_t *ids = calloc((size_t)(tokens > positions ? tokens : positions), sizeof *ids);
    if (!ids)
        return err_set(err, ERR_NO_MEMORY, "no memory for token ids");
    if (part == T5) {
        invent_ids("measured", t5_vocabulary(m->t5), ids, tokens);
        t5_encode(m->t5, x, ids, exec_tensor(x, 2, tokens, t5_hidden(m->t5), 1, 1));
    } else if (part == CLIP) {
        invent_ids("measured", clip_vocabulary(m->clip), ids, positions);
        clip_encode(m->clip, x, ids, exec_tensor(x, 2, 1, clip_hidden(m->clip), 1, 1));
    } else {
        const int64_t scale = vae_scale(m->vae), h = b->job->height / scale, w = b->job->width / scale;
        const struct spread rows = spread_even(h, 0, 1);
        struct tensor latent = exec_tensor(x, 3, h, w, vae_latent_channels(m->vae), 1);
        struct tensor values = exec_tensor(x, 3, h * scale, w * scale, 3, 1);
        vae_decode(m->vae, x, latent, &rows, values);
    }
    free(ids);
    arena_release(x->arena, mark);
    return exec_check(x, err);
}

static void leave(struct stand *s)
{
    arena_free(s->x.arena);
    if (s->own)
        kernels_dry.close(s->own);
    comm_free(s->comm);
}

static int stand_dry(struct bench *b, struct stand *s, struct err *err)
{
    const struct device_options options = {.threads = 1, .activation = b->precision.activation};
    *s = (struct stand){.table = kernels_dry};
    s->table.activation = b->precision.activation;
    TRY(comm_dry_new(0, 1, false, &s->comm, err));
    TRY(kernels_dry.open(&options, &s->own, err));
    s->x = (struct exec){.k = &s->table, .d = s->own, .comm = s->comm, .attention = &attention_local};
    return arena_new(&s->table, s->own, ARENA_UNBOUNDED, &s->x.arena, err);
}

// *peak: bytes of activations.
static int dry_part(struct bench *b, enum part part, struct kernel_cost *cost, size_t *peak, struct err *err)
{
    struct stand s;
    int rc = stand_dry(b, &s, err);
    if (rc == 0)
        rc = run_part(b, &s, part, err);
    if (rc == 0) {
        kernels_dry.cost(s.own, cost);
        *peak = arena_peak(s.x.arena);
    }
    leave(&s);
    return rc;
}

static int time_part(struct bench *b, enum part part, int repeat, struct bench_spread *out, struct err *err)
{
    enum { WARM = 3 };
    struct kernel_cost cost;
    double ms[BENCH_MAX_REPEAT];
    size_t peak;
    TRY(dry_part(b, part, &cost, &peak, err));
    struct stand s = {.x = {.k = b->home.k, .d = b->home.d, .attention = &attention_local}};
    TRY(comm_self_new(&s.comm, err)); // a part is one rank's work
    s.x.comm = s.comm;
    int rc = arena_new(b->home.k, b->home.d, peak, &s.x.arena, err);
    for (int i = -WARM; rc == 0 && i < repeat; i++) {
        const double from = monotonic_seconds();
        rc = run_part(b, &s, part, err);
        if (i >= 0)
            ms[i] = (monotonic_seconds() - from) * 1e3;
    }
    if (rc == 0 && b->what == BENCH_TEXT && b->k->profile_start) {
        b->k->profile_start(b->home.d);
        rc = run_part(b, &s, part, err);
        bench_ops_take(b);
    }
    leave(&s);
    if (rc == 0)
        *out = bench_spread_of(ms, repeat);
    return rc;
}

int bench_text(struct bench *b, int repeat, struct err *err)
{
    if (b->home.residency)
        TRY(residency_need(b->home.residency, b->model, 1U << PART_T5 | 1U << PART_CLIP, err));
    TRY(time_part(b, T5, repeat, &b->t5, err));
    return time_part(b, CLIP, repeat, &b->clip, err);
}

// One more step's worth: predictions of one and two steps differ by it.
static int step_cost(struct bench *b, struct err *err)
{
    struct engine_estimate one, two, all;
    Ditfleet__V1__Job job = *b->job;
    job.num_inference_steps = 1;
    TRY(engine_predict(b->engine, b->model, &job, &b->plan, &one, err));
    job.num_inference_steps = 2;
    TRY(engine_predict(b->engine, b->model, &job, &b->plan, &two, err));
    TRY(engine_predict(b->engine, b->model, b->job, &b->plan, &all, err));
    const double rows = (double)bench_rows(b);
    b->step_sent = two.loop.sent - one.loop.sent;
    b->memory.activations = (int64_t)all.activation_bytes;
    b->step_cost = (struct bench_cost){.flops = two.cost.flops - one.cost.flops,
                                       .bytes = two.cost.bytes - one.cost.bytes,
                                       .attention = 4 * rows * rows * (double)b->model->info.hidden *
                                                    b->model->info.blocks * (job_true_cfg(&job) ? 2 : 1)};
    return 0;
}

int bench_costs(struct bench *b, struct err *err)
{
    struct kernel_cost t5, clip, vae;
    size_t peak;
    TRY(dry_part(b, T5, &t5, &peak, err));
    TRY(dry_part(b, CLIP, &clip, &peak, err));
    TRY(dry_part(b, VAE, &vae, &peak, err));
    b->text_cost = (struct bench_cost){.flops = t5.flops + clip.flops, .bytes = t5.bytes + clip.bytes};
    b->decode_cost = (struct bench_cost){.flops = vae.flops, .bytes = vae.bytes};
    return step_cost(b, err);
}
