// pipefusion.c: PipeFusion (Fang et al. 2024): the blocks are cut into stages, a range a stage, and the image into
// patches that follow each other through them. Every layer keeps keys and values of all rows, so a patch attends to the
// rows of later patches as they were one step before. The first steps take the image whole: they fill what is kept.
//
// Time goes in ticks. At tick i stage s works on what stage 0 began at tick i - s; then every stage hands its rows on
// at once, the last one latents to the first. A step begins every max(patches, stages) ticks, so latents are back when
// they are wanted. Who does what at a tick, and so the size of every message, follows from the plan alone.
//
// The text travels with patch 0, whose share of the image is smaller by as much: patches have as many rows as can be
// even, and no stage waits for another's longer one.
#include <stdio.h>
#include <stdlib.h>

#include "worker/loop.h"

// Some rows of the image, or all of them, that go through the stages together.
struct patch {
    struct span all;           // of the image
    bool text;                 // the text's rows come along
    struct share share;        // of them, over the ranks of a stage
    struct tensor x;           // (image rows of this rank, channels): latents, of the first and the last stage
    struct tensor v[BRANCHES]; // as x: what the last stage predicted, side by side
};

struct pipe {
    struct run *r;
    struct schedule schedule;
    struct dit_info info;
    int stage, stages;
    struct span blocks; // of this stage
    struct dit_cond cond[BRANCHES];
    struct stale kept[BRANCHES];
    struct patch whole, patches[PLAN_MAX_PATCHES];
    struct tensor here, coming; // hidden rows of a patch, a branch after the other: in hand, and on their way
};

// ---- before the loop

static int patch_init(struct pipe *p, struct patch *a, struct span all, bool text, struct err *err)
{
    struct exec *x = &p->r->branch;
    a->all = all;
    a->text = text;
    TRY(loop_deal(p->r, text ? p->r->text_tokens : 0, all, &a->share, err));
    const int64_t mine = a->share.rows.image.count;
    a->x = exec_tensor(x, 2, mine, p->info.channels, 1, 1);
    struct tensor both = exec_tensor(x, 2, BRANCHES * mine, p->info.channels, 1, 1);
    for (int b = 0; b < BRANCHES; b++)
        a->v[b] = tensor_rows(both, b * mine, mine);
    return 0;
}

// Cuts the joint sequence, text first, into even parts.
static int cut(struct pipe *p, struct err *err)
{
    const int64_t text = p->r->text_tokens, rows = text + p->r->image_tokens, count = p->r->plan.patches;
    TRY(patch_init(p, &p->whole, (struct span){0, p->r->image_tokens}, true, err));
    for (int64_t i = 0, from = 0; i < count; i++) {
        const int64_t end = rows * (i + 1) / count - text, to = end > from ? end : from;
        TRY(patch_init(p, &p->patches[i], (struct span){from, to - from}, i == 0, err));
        from = to;
    }
    return 0;
}

// Room for the keys and values of every layer of this stage.
static int keep(struct pipe *p, struct stale *kept, struct err *err)
{
    struct exec *x = &p->r->branch;
    const int64_t rows = p->r->text_tokens + p->r->image_tokens, heads = p->info.heads / p->r->plan.ulysses;
    *kept = (struct stale){
        .first_layer = (int)p->blocks.start, .layers = (int)p->blocks.count, .text_rows = p->r->text_tokens};
    kept->k = calloc(2 * (size_t)p->blocks.count, sizeof *kept->k);
    if (!kept->k)
        return err_set(err, ERR_NO_MEMORY, "no memory for the layers of a stage");
    kept->v = kept->k + p->blocks.count;
    for (int i = 0; i < 2 * kept->layers; i++)
        kept->k[i] = exec_tensor(x, 3, rows, heads, p->info.head_dim, 1);
    return 0;
}

static int my_branches(const struct run *r)
{
    return r->pair ? 1 : r->branches;
}

static int prepare(struct pipe *p, const struct prompt prompts[BRANCHES], const float *noise, struct err *err)
{
    struct run *r = p->r;
    struct exec *x = &r->branch;
    r->model->dit->ops->info(r->model->dit, &p->info);
    p->stage = comm_rank(r->pipe);
    p->stages = comm_size(r->pipe);
    p->blocks = plan_stage(&r->plan, p->info.blocks, p->stage);
    loop_schedule(r, &p->schedule);
    TRY(cut(p, err));
    loop_condition(r, &p->schedule, prompts, p->cond);
    for (int b = 0; b < r->branches; b++)
        if (loop_my_branch(r, b))
            TRY(keep(p, &p->kept[b], err));
    const int64_t rows = my_branches(r) * (p->whole.share.rows.text.count + p->whole.share.rows.image.count);
    int64_t most = rows; // a rank's share of a patch may be larger by a row than its share of the whole would have it
    for (int i = 0; i < r->plan.patches; i++) {
        const struct dit_rows *of = &p->patches[i].share.rows;
        const int64_t n = my_branches(r) * (of->text.count + of->image.count);
        most = n > most ? n : most;
    }
    p->here = exec_tensor(x, 2, most, p->info.hidden, 1, 1);
    p->coming = exec_tensor(x, 2, most, p->info.hidden, 1, 1);
    if (!r->dry)
        x->k->upload(x->d, p->whole.x, noise + p->whole.share.rows.image.start * p->info.channels);
    return 0;
}

// ---- a patch through this stage

// The last block's residual, which the next stage cannot add: it has not the gate.
static void settle(struct exec *x, const struct dit_pass *pass)
{
    const int64_t text = pass->rows->text.count, image = pass->rows->image.count;
    if (!pass->pending)
        return;
    x->k->gate_add(x->d, tensor_rows(pass->hidden, 0, text), pass->text_gate, tensor_rows(pass->update, 0, text));
    x->k->gate_add(x->d, tensor_rows(pass->hidden, text, image), pass->image_gate,
                   tensor_rows(pass->update, text, image));
}

static void through_blocks(struct pipe *p, struct patch *a, int step, int b, struct tensor hidden)
{
    struct exec *x = &p->r->branch;
    const struct dit *m = p->r->model->dit;
    const size_t mark = arena_mark(x->arena);
    struct dit_pass pass = {.cond = &p->cond[b], .rows = &a->share.rows, .hidden = hidden};
    p->kept[b].image = a->all;
    p->kept[b].text = a->text;
    p->r->stale.state = &p->kept[b];
    dit_step(x, &p->cond[b], step);
    if (p->stage == 0)
        m->ops->embed(m, x, &pass, a->x);
    else
        pass.update = exec_tensor(x, 2, hidden.n[0], hidden.n[1], 1, 1);
    for (int64_t i = 0; i < p->blocks.count; i++)
        dit_block(m, x, &pass, (int)(p->blocks.start + i));
    if (p->stage + 1 == p->stages)
        m->ops->head(m, x, &pass, a->v[b]);
    else
        settle(x, &pass);
    arena_release(x->arena, mark);
}

// The last stage: the patch's latents move along.
static void advance(struct pipe *p, struct patch *a, int step)
{
    struct exec *x = &p->r->branch;
    const size_t mark = arena_mark(x->arena);
    struct tensor v = a->v[0];
    loop_exchange(p->r, a->v);
    if (p->r->branches == 2) {
        v = exec_tensor(x, 2, a->x.n[0], a->x.n[1], 1, 1); // what the branches said is still to be told
        x->k->cfg_combine(x->d, v, a->v[1], a->v[0], p->r->job->true_cfg_scale);
    }
    x->k->axpy(x->d, a->x, p->schedule.sigmas[step + 1] - p->schedule.sigmas[step], v);
    arena_release(x->arena, mark);
}

static struct tensor hidden_of(const struct pipe *p, struct tensor room, const struct patch *a)
{
    return tensor_rows(room, 0, my_branches(p->r) * (a->share.rows.text.count + a->share.rows.image.count));
}

static void compute(struct pipe *p, struct patch *a, int step)
{
    const int64_t rows = a->share.rows.text.count + a->share.rows.image.count;
    for (int b = 0, i = 0; b < p->r->branches; b++)
        if (loop_my_branch(p->r, b))
            through_blocks(p, a, step, b, tensor_rows(p->here, i++ * rows, rows));
    if (p->stage + 1 == p->stages)
        advance(p, a, step);
}

// ---- ticks

// What a stage does at a tick; patch NULL: nothing.
struct work {
    struct patch *patch;
    int step;
};

// Passes of some steps, each with the same patches.
struct passes {
    struct patch *patches;
    int count, first, steps; // patches; number of the first step; steps
    int period;              // ticks from step to step
};

static struct work work_at(const struct passes *q, int stage, int tick)
{
    const int begun = tick - stage, step = begun / q->period, i = begun % q->period;
    if (begun < 0 || step >= q->steps || i >= q->count)
        return (struct work){0};
    return (struct work){&q->patches[i], q->first + step};
}

// To the next stage: hidden rows; from the last to the first: latents.
static void hand_on(struct pipe *p, struct patch *done, struct patch *expected)
{
    struct tensor out = {0}, in = {0};
    if (p->stages == 1)
        return;
    if (done)
        out = p->stage + 1 == p->stages ? done->x : hidden_of(p, p->here, done);
    if (expected)
        in = p->stage == 0 ? expected->x : hidden_of(p, p->coming, expected);
    comm_shift(p->r->pipe, out.data, done ? (int64_t)tensor_bytes(out) : 0, in.data,
               expected ? (int64_t)tensor_bytes(in) : 0);
    const struct tensor here = p->here;
    p->here = p->coming;
    p->coming = here;
}

// whole (image tokens, channels) on every rank = what the last stage has of it: latents, or a branch's prediction.
static void collect(struct pipe *p, struct patch *patches, int count, int branch, struct tensor whole)
{
    struct exec *x = &p->r->branch;
    for (int i = 0; i < count; i++) {
        const struct patch *a = &patches[i];
        exec_gather(x, tensor_rows(whole, a->all.start, a->all.count), branch < 0 ? a->x : a->v[branch],
                    &a->share.spread);
    }
    comm_broadcast(p->r->pipe, whole.data, (int64_t)tensor_bytes(whole), p->stages - 1);
}

static void trace(struct pipe *p, struct patch *patches, int count, int branch, const char *name)
{
    struct exec *x = &p->r->branch;
    if (!p->r->hooks->trace)
        return;
    const size_t mark = arena_mark(x->arena);
    struct tensor whole = exec_tensor(x, 2, p->r->image_tokens, p->info.channels, 1, 1);
    collect(p, patches, count, branch, whole);
    run_trace(p->r, name, tensor_reshape(whole, 3, 1, p->r->image_tokens, p->info.channels, 1));
    arena_release(x->arena, mark);
}

static int end_step(struct pipe *p, const struct passes *q, int step, struct err *err)
{
    static const char *const names[BRANCHES] = {"noise_pred_step_%d", "negative_noise_pred_step_%d"};
    char name[48];
    for (int b = 0; b < BRANCHES && b < p->r->branches; b++) {
        snprintf(name, sizeof name, names[b], step);
        trace(p, q->patches, q->count, b, name);
    }
    snprintf(name, sizeof name, "latents_after_step_%d", step); // as the reference's recordings call it
    trace(p, q->patches, q->count, -1, name);
    return run_checkpoint(p->r, ENGINE_DENOISE, step + 1, err);
}

static int run_passes(struct pipe *p, struct patch *patches, int count, int first, int steps, struct err *err)
{
    const struct passes q = {patches, count, first, steps, count > p->stages ? count : p->stages};
    const int rest = count - 1 + p->stages - 1; // ticks from a step's first to its last, where its period is over
    for (int tick = 0; steps > 0 && tick <= (steps - 1) * q.period + rest; tick++) {
        const struct work mine = work_at(&q, p->stage, tick);
        const struct work before = work_at(&q, (p->stage + p->stages - 1) % p->stages, tick);
        if (mine.patch)
            compute(p, mine.patch, mine.step);
        hand_on(p, mine.patch, before.patch);
        if (tick >= rest && (tick - rest) % q.period == 0)
            TRY(end_step(p, &q, first + (tick - rest) / q.period, err));
    }
    return 0;
}

static int run_steps(struct pipe *p, struct tensor tokens, struct err *err)
{
    struct exec *x = &p->r->branch;
    const struct plan *plan = &p->r->plan;
    const int warmup = plan->warmup < p->schedule.steps ? plan->warmup : p->schedule.steps;
    TRY(run_passes(p, &p->whole, 1, 0, warmup, err));
    collect(p, &p->whole, 1, -1, tokens);
    if (warmup == p->schedule.steps)
        return 0;
    for (int i = 0; i < plan->patches; i++) {
        const struct span rows = p->patches[i].share.rows.image;
        x->k->copy(x->d, p->patches[i].x, tensor_rows(tokens, rows.start, rows.count));
    }
    TRY(run_passes(p, p->patches, plan->patches, warmup, p->schedule.steps - warmup, err));
    collect(p, p->patches, plan->patches, -1, tokens);
    return 0;
}

int pipefusion(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
               struct err *err)
{
    const size_t mark = arena_mark(r->branch.arena);
    struct pipe *p = calloc(1, sizeof *p);
    if (!p)
        return err_set(err, ERR_NO_MEMORY, "no memory for the loop");
    p->r = r;
    int rc = prepare(p, prompts, noise, err);
    if (rc == 0) {
        loop_trace_schedule(r, &p->schedule);
        trace(p, &p->whole, 1, -1, "initial_noise");
        rc = run_checkpoint(r, ENGINE_DENOISE, 0, err);
    }
    if (rc == 0)
        rc = run_steps(p, tokens, err);
    for (int b = 0; b < BRANCHES; b++)
        free(p->kept[b].k);
    free(p);
    arena_release(r->branch.arena, mark);
    return rc;
}
