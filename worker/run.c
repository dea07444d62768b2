// run.c: one job on one rank: what its stages share.
#include "worker/run.h"

#include <stdlib.h>

#include "proto/clock.h"
#include "worker/parallel/stale.h"

void run_init(struct run *r, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan)
{
    static const struct engine_hooks none = {0};
    const int64_t scale = vae_scale(m->vae);
    *r = (struct run){.model = m, .job = job, .plan = *plan, .hooks = &none, .since = monotonic_seconds()};
    r->branches = job_true_cfg(job) ? 2 : 1;
    r->latent_h = job->height / scale;
    r->latent_w = job->width / scale;
    r->image_tokens = (r->latent_h / 2) * (r->latent_w / 2);
    r->text_tokens = job->max_sequence_length;
}

// Whether ranks that share heads send less so (struct input_sharing).
static bool shares_inputs(const struct run *r)
{
    const int64_t number = (int64_t)dtype_size(r->branch.k->activation), sent = r->model->info.eight_bits ? 1 : number;
    return r->plan.ulysses > 1 && r->plan.ulysses * sent < 3 * number && !plan_in_patches(&r->plan);
}

// How rows meet and how the blocks are gone through under this plan. A new way to share one picture is a link or a
// runner, and a line here.
static void choose_ways(struct run *r)
{
    r->stale = attention_stale;
    r->stale.next = &attention_local;
    r->ring_link = attention_ring;
    r->ring_link.state = &r->ring;
    const struct attention_link *over_rows = plan_in_patches(&r->plan) ? &r->stale
                                             : r->plan.ring > 1        ? &r->ring_link
                                                                       : &attention_local;
    r->branch.sharing = shares_inputs(r) ? &r->sharing : NULL;
    r->ulysses = r->branch.sharing ? attention_by_heads : attention_ulysses;
    r->ulysses.next = over_rows;
    r->ulysses.state = &r->usp;
    r->world.attention = r->decoding.attention = &attention_local;
    r->branch.attention = r->plan.ulysses > 1 ? &r->ulysses : over_rows;
    r->runner = &runner_whole;
}

// The ranks that make pictures together.
static int join_part(struct run *r, struct comm *world, struct comm **out, struct err *err)
{
    const int ranks = r->plan.ranks / r->plan.data;
    r->part_index = comm_rank(world) / ranks;
    r->leads = comm_rank(world) == 0;
    *out = world;
    if (r->plan.data == 1)
        return 0;
    TRY(comm_group(world, r->part_index * ranks, 1, ranks, &r->part, err));
    *out = r->part;
    return 0;
}

// The ranks that have the weights between them.
static int join_owners(struct run *r, struct comm *group, struct err *err)
{
    if (r->plan.weights == PLAN_REPLICATED)
        return 0;
    ownership_make(r->model->dit->weights, &r->plan, comm_rank(group), &r->ownership);
    r->branch.ownership = &r->ownership;
    return comm_group(group, 0, 1, comm_size(group), &r->ownership.comm, err);
}

int run_join(struct run *r, struct comm *group, struct err *err)
{
    struct comm *world;
    TRY(join_owners(r, group, err));
    TRY(join_part(r, group, &world, err));
    const int u = r->plan.ulysses, ranks = u * r->plan.ring; // of a branch, in a stage
    const int me = comm_rank(world), place = me % ranks, stage = ranks * r->plan.cfg, in_stage = me % stage;
    choose_ways(r);
    r->world.comm = world;
    // Convolutions of other heights may have other engines, and other bits.
    TRY(comm_group(world, r->plan.exact ? me : 0, 1, r->plan.exact ? 1 : comm_size(world), &r->decoding.comm, err));
    TRY(comm_group(world, me - place, 1, ranks, &r->branch.comm, err));
    TRY(comm_group(world, in_stage, stage, r->plan.pipe, &r->pipe, err));
    TRY(comm_group(r->branch.comm, place / u * u, 1, u, &r->usp.inside, err));
    TRY(comm_group(r->branch.comm, place % u, u, r->plan.ring, &r->usp.across, err));
    r->sharing = (struct input_sharing){.comm = r->usp.inside, .first = place / u * u};
    return r->plan.cfg == 2 ? comm_group(world, me - in_stage + place, ranks, 2, &r->pair, err) : 0;
}

void run_leave(struct run *r)
{
    comm_free(r->pair);
    comm_free(r->usp.across);
    comm_free(r->usp.inside);
    comm_free(r->pipe);
    comm_free(r->branch.comm);
    comm_free(r->decoding.comm);
    comm_free(r->part);
    comm_free(r->ownership.comm);
    r->part = r->pair = r->usp.across = r->usp.inside = r->pipe = r->branch.comm = r->decoding.comm = NULL;
    r->ownership.comm = NULL;
}

void run_use(struct run *r, const struct kernels *k, struct device *d, struct arena *arena)
{
    r->world.k = r->branch.k = r->decoding.k = k;
    r->world.d = r->branch.d = r->decoding.d = d;
    r->world.arena = r->branch.arena = r->decoding.arena = arena;
}

int run_need(struct run *r, unsigned parts, struct err *err)
{
    return r->residency && !r->dry ? residency_need(r->residency, r->model, parts, err) : 0;
}

void run_begin(struct run *r)
{
    if (r->begun == 0)
        r->begun = monotonic_seconds();
}

void run_enter(struct run *r, enum engine_stage stage)
{
    const double now = monotonic_seconds();
    r->seconds[r->stage] += now - r->since;
    r->stage = (int)stage;
    r->since = now;
}

// What was done since the last step's end, or the loop's beginning, was a step.
static void note_step(struct run *r, int step)
{
    const struct engine_work last = r->seen;
    struct engine_work *now = &r->seen, *loop = &r->loop;
    r->world.k->cost(r->world.d, &now->cost);
    now->sent = (double)comm_bytes_sent(r->world.comm);
    now->collectives = (double)comm_collectives(r->world.comm);
    if (step == 0)
        return;
    kernel_cost_add(&loop->cost, &now->cost, &last.cost);
    loop->sent += now->sent - last.sent;
    loop->collectives += now->collectives - last.collectives;
}

// What ranks or the device failed with, and when: a device runs a step or two behind.
static int at_step(const struct run *r, enum engine_stage stage, int step, int rc, struct err *err)
{
    static const char *const doing[ENGINE_STAGES] = {"encoding text", "denoising", "decoding"};
    if (rc == 0 || r->dry)
        return rc;
    if (stage == ENGINE_DENOISE && step > 0)
        return err_context(err, "denoising, step %d of %u", step, r->job->num_inference_steps);
    return err_context(err, "before %s", doing[stage]);
}

int run_checkpoint(struct run *r, enum engine_stage stage, int step, struct err *err)
{
    const bool within =
        stage == ENGINE_DENOISE && step > 0; // a loop keeps the device busy; a stage begins when all is done
    TRY(at_step(r, stage, step, (within ? exec_pace : exec_check)(&r->world, err), err));
    if (r->dry && stage == ENGINE_DENOISE)
        note_step(r, step);
    if (r->dry)
        return 0;
    if (!within)
        run_enter(r, stage);
    TRY(at_step(r, stage, step, comm_check(r->branch.comm, err), err));
    struct err stop = {.code = ERR_NONE};
    if (r->hooks->progress)
        r->hooks->progress(r->hooks->arg, stage, step, (int)r->job->num_inference_steps, &stop);
    if (comm_size(r->control) > 1)
        comm_broadcast(r->control, &stop, sizeof stop, 0);
    TRY(at_step(r, stage, step, comm_check(r->control, err), err));
    r->agreed = stop.code != ERR_NONE;
    return r->agreed ? err_set(err, stop.code, "%s", stop.text) : 0;
}

void run_trace(struct run *r, const char *name, struct tensor t)
{
    if (!r->hooks->trace || !r->leads)
        return;
    float *host = malloc((size_t)tensor_count(t) * sizeof *host);
    if (!host)
        return;
    r->world.k->download(r->world.d, host, t);
    r->hooks->trace(r->hooks->arg, name, tensor_of(host, DT_F32, t.dims, t.n[0], t.n[1], t.n[2], t.n[3]));
    free(host);
}
