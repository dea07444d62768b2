// denoise.c: the loop. Every rank keeps its own image rows from the first step to the last; each step predicts their
// velocity (the runner and the attention chain bring in the other ranks), joins the guidance branches, and moves along.
#include <stdio.h>
#include <stdlib.h>

#include "worker/loop.h"
#include "worker/parallel/sharing.h"

// What stays the same over the steps, on this rank.
struct loop {
    struct schedule schedule;
    struct share share; // of all rows
    struct dit_cond cond[BRANCHES];
    struct tensor v[BRANCHES]; // predicted velocities of my rows, side by side
    // Of predict_all, whose operations and addresses are the same at every step, or at every second one.
    struct recording *recording[2];
};

// What ranks reach of each other.
static void share_rooms(struct run *r, const struct share *s)
{
    const struct dit_info *info = &r->model->info;
    const enum dtype type = r->branch.k->activation;
    const int64_t size = (int64_t)dtype_size(type), rows = s->of_rank[comm_rank(r->branch.comm)];
    if (r->plan.ring > 1) { // keys and values of two layers, of the rows of all that share heads
        const int u = r->plan.ulysses, first = comm_rank(r->usp.across) * u;
        int64_t together = 0;
        for (int i = 0; i < u; i++)
            together += s->of_rank[first + i];
        sharing_make_room(&r->ring.room, &r->branch, r->usp.across, 2 * 2 * together * (info->hidden / u) * size);
        r->ring.layer = -1;
    }
    if (r->plan.ulysses == 1)
        return;
    if (r->branch.sharing)
        sharing_make_room(&r->sharing.room, &r->branch, r->usp.inside,
                          sharing_bytes(s->rows.rope.n[0], info->hidden, type));
    sharing_make_room(&r->usp.results, &r->branch, r->usp.inside, rows * info->attention_columns * size);
    r->branch.results = &r->usp.results;
}

static int prepare(struct run *r, struct loop *l, const struct prompt prompts[BRANCHES], struct err *err)
{
    loop_schedule(r, &l->schedule);
    TRY(loop_deal(r, r->text_tokens, (struct span){0, r->image_tokens}, &l->share, err));
    share_rooms(r, &l->share);
    loop_condition(r, &l->schedule, prompts, l->cond);
    return 0;
}

static void predict_all(struct run *r, struct loop *l, struct tensor x, int i)
{
    for (int b = 0; b < r->branches; b++)
        if (loop_my_branch(r, b))
            r->runner->run(r->runner, r->model->dit, &r->branch, &l->cond[b], &l->share.rows, i, x, l->v[b]);
}

static bool recordable(const struct comm *c)
{
    return comm_size(c) == 1 || comm_on_device(c);
}

static struct recording **recording_of(const struct run *r, struct loop *l, int i)
{
    return &l->recording[r->model->info.twice ? i % 2 : 0];
}

// Records the second step, and where weights are placed twice the third: the first one has shown the device every
// shape. Exchanges that are no operations of the device cannot be recorded.
static void record(struct run *r, struct loop *l, struct tensor x, int i)
{
    const struct kernels *k = r->branch.k;
    const bool whole = recordable(r->branch.comm) && (!r->branch.ownership || recordable(r->ownership.comm));
    if (i < 1 || i > 1 + r->model->info.twice || !k->record || !whole || !k->record(r->branch.d))
        return;
    predict_all(r, l, x, i);
    *recording_of(r, l, i) = k->recorded(r->branch.d);
}

// v[b] = the velocity that each branch of guidance predicts for my rows
static void predict(struct run *r, struct loop *l, struct tensor x, int i)
{
    for (int b = 0; b < r->branches; b++)
        if (loop_my_branch(r, b))
            dit_step(&r->branch, &l->cond[b], i);
    record(r, l, x, i);
    struct recording *recorded = *recording_of(r, l, i);
    if (!recorded || !r->branch.k->replay(r->branch.d, recorded))
        predict_all(r, l, x, i);
    loop_exchange(r, l->v);
}

static void trace_rows(struct run *r, const struct loop *l, const char *name, struct tensor mine)
{
    if (!r->hooks->trace)
        return;
    struct exec *x = &r->branch;
    const size_t mark = arena_mark(x->arena);
    struct tensor whole = exec_tensor(x, 2, r->image_tokens, mine.n[1], 1, 1);
    exec_gather(x, whole, mine, &l->share.spread);
    run_trace(r, name, tensor_reshape(whole, 3, 1, r->image_tokens, mine.n[1], 1));
    arena_release(x->arena, mark);
}

static void trace_predictions(struct run *r, struct loop *l, int step)
{
    static const char *const names[BRANCHES] = {"noise_pred_step_%d", "negative_noise_pred_step_%d"};
    for (int b = 0; b < BRANCHES && b < r->branches; b++) {
        char name[48];
        snprintf(name, sizeof name, names[b], step);
        trace_rows(r, l, name, l->v[b]);
    }
}

static int step(struct run *r, struct loop *l, struct tensor x, int i, struct err *err)
{
    char name[48];
    predict(r, l, x, i);
    trace_predictions(r, l, i);
    if (r->branches == 2)
        r->branch.k->cfg_combine(r->branch.d, l->v[0], l->v[1], l->v[0], r->job->true_cfg_scale);
    r->branch.k->axpy(r->branch.d, x, l->schedule.sigmas[i + 1] - l->schedule.sigmas[i], l->v[0]);
    snprintf(name, sizeof name, "latents_after_step_%d", i); // as the reference's recordings call it
    trace_rows(r, l, name, x);
    return run_checkpoint(r, ENGINE_DENOISE, i + 1, err);
}

static int whole(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
                 struct err *err)
{
    struct exec *x = &r->branch;
    const int64_t channels = r->model->info.channels;
    const size_t mark = arena_mark(x->arena);
    struct loop *l = calloc(1, sizeof *l);
    if (!l)
        return err_set(err, ERR_NO_MEMORY, "no memory for the loop");
    int rc = prepare(r, l, prompts, err);
    const int64_t rows = l->share.rows.image.count;
    struct tensor mine = exec_tensor(x, 2, rows, channels, 1, 1);
    struct tensor both = exec_tensor(x, 2, BRANCHES * rows, channels, 1, 1);
    for (int b = 0; b < BRANCHES; b++)
        l->v[b] = tensor_rows(both, b * rows, rows);
    if (rc == 0) {
        if (!r->dry)
            x->k->upload(x->d, mine, noise + l->share.rows.image.start * channels);
        loop_trace_schedule(r, &l->schedule);
        trace_rows(r, l, "initial_noise", mine);
        rc = run_checkpoint(r, ENGINE_DENOISE, 0, err);
    }
    for (int i = 0; rc == 0 && i < (int)r->job->num_inference_steps; i++)
        rc = step(r, l, mine, i, err);
    if (rc == 0)
        exec_gather(x, tokens, mine, &l->share.spread);
    for (int i = 0; i < 2; i++)
        if (l->recording[i])
            x->k->forget(x->d, l->recording[i]);
    free(l);
    arena_release(x->arena, mark);
    return rc;
}

int denoise(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
            struct err *err)
{
    run_begin(r);
    return (plan_in_patches(&r->plan) ? pipefusion : whole)(r, prompts, noise, tokens, err);
}
