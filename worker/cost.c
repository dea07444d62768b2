#include "worker/cost.h"

#include <math.h>

static double compute_seconds(const struct machine *c, const struct kernel_cost *k)
{
    return (k->flops - k->attention) / c->products + k->attention / c->attention + k->row_bytes / c->rows +
           k->copied / c->copies + k->calls * c->operation;
}

static double exchange_seconds(const struct machine *c, const struct engine_work *w, int steps, int ranks)
{
    return ranks > 1 ? w->sent / c->exchange + (w->collectives + steps) * c->collective : 0;
}

// GPUs fetch shards while they compute. What the same plan sends with its weights replicated, they wait for.
static int leave_out_shards(const struct machine *c, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct plan *plan, int rank, const struct kernels *k, struct engine_work *loop,
                            struct err *err)
{
    struct plan whole = *plan;
    struct engine_estimate e;
    if (plan->weights != PLAN_SHARDED || !k->link)
        return 0;
    whole.weights = PLAN_REPLICATED;
    TRY(engine_predict_rank(m, job, &whole, rank, k, &e, err));
    loop->sent = e.loop.sent + c->beside * (loop->sent - e.loop.sent);
    loop->collectives = e.loop.collectives;
    return 0;
}

// How much longer than its own work a stage takes for some steps of count patches each: the ticks of pipefusion.c, of
// which it works at steps * count.
static double stretch(int steps, int count, int stages)
{
    const int period = count > stages ? count : stages;
    return steps > 0 ? (double)((steps - 1) * period + count + stages - 1) / (steps * count) : 0;
}

// Seconds that a rank computes in the whole loop, waiting for other stages included.
static int loop_seconds(const struct machine *c, const struct model *m, const Ditfleet__V1__Job *job,
                        const struct plan *plan, int rank, const struct kernels *k, const struct engine_estimate *all,
                        double *out, struct err *err)
{
    const double seconds = compute_seconds(c, &all->loop.cost);
    const int steps = (int)job->num_inference_steps, warmup = plan->warmup < steps ? plan->warmup : steps;
    struct engine_estimate first;
    Ditfleet__V1__Job short_job = *job;
    *out = seconds;
    if (!plan_in_patches(plan))
        return 0;
    short_job.num_inference_steps = (uint32_t)warmup;
    TRY(engine_predict_rank(m, &short_job, plan, rank, k, &first, err));
    const double whole = compute_seconds(c, &first.loop.cost);
    *out =
        whole * stretch(warmup, 1, plan->pipe) + (seconds - whole) * stretch(steps - warmup, plan->patches, plan->pipe);
    return 0;
}

// A picture for each part of the group; one step, where all are alike.
static Ditfleet__V1__Job sample_job(const Ditfleet__V1__Job *job, const struct plan *plan)
{
    Ditfleet__V1__Job sample = *job;
    sample.num_images = (uint32_t)plan->data;
    if (!plan_in_patches(plan))
        sample.num_inference_steps = 1;
    return sample;
}

int cost_of(const struct machine *c, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
            const struct kernels *k, struct price *out, struct err *err)
{
    const Ditfleet__V1__Job sample = sample_job(job, plan);
    const int steps = (int)sample.num_inference_steps;
    *out = (struct price){.plan = *plan};
    for (int r = 0; r < plan->ranks; r++) {
        struct engine_estimate e;
        double compute;
        TRY(engine_predict_rank(m, &sample, plan, r, k, &e, err));
        TRY(loop_seconds(c, m, &sample, plan, r, k, &e, &compute, err));
        if (e.loop.sent / steps > out->sent)
            out->sent = e.loop.sent / steps;
        TRY(leave_out_shards(c, m, &sample, plan, r, k, &e.loop, err));
        const double exchange = exchange_seconds(c, &e.loop, steps, plan->ranks);
        if ((compute + exchange) / steps > price_seconds(out)) {
            out->compute = compute / steps;
            out->exchange = exchange / steps;
        }
    }
    return 0;
}

int cost_memory(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, const struct kernels *k,
                struct engine_estimate *out, struct err *err)
{
    Ditfleet__V1__Job first = *job; // pictures of a part follow each other in the same memory
    struct engine_estimate most = {0};
    first.num_images = (uint32_t)plan->data;
    for (int r = 0; r < plan->ranks; r++) {
        struct engine_estimate e;
        TRY(engine_predict_rank(m, &first, plan, r, k, &e, err));
        if (e.activation_bytes > most.activation_bytes)
            most.activation_bytes = e.activation_bytes;
        for (int i = 0; i < ENGINE_STAGES; i++)
            if (e.stage_bytes[i] > most.stage_bytes[i])
                most.stage_bytes[i] = e.stage_bytes[i];
        if (e.cost.codes > most.cost.codes)
            most.cost.codes = e.cost.codes;
    }
    *out = most;
    return 0;
}

int cost_all(const struct machine *c, const struct model *m, const struct kernels *k, const Ditfleet__V1__Job *job,
             const struct plan *want, struct price out[PLAN_MAX_CHOICES], int *n, struct err *err)
{
    struct plan_choice choices[PLAN_MAX_CHOICES];
    struct plan chosen;
    const int count = plan_choices(&m->info, k, want, job_true_cfg(job), choices);
    *n = 0;
    TRY(plan_make(&m->info, k, want, job_true_cfg(job), &chosen, err)); // it is among them
    for (int i = 0; i < count; i++)
        if (choices[i].why.code == ERR_NONE)
            TRY(cost_of(c, m, job, &choices[i].plan, k, &out[(*n)++], err));
    return 0;
}

int cost_pick(const double *seconds, int n)
{
    double least = INFINITY;
    for (int i = 0; i < n; i++)
        if (seconds[i] >= 0 && seconds[i] < least)
            least = seconds[i];
    for (int i = 0; i < n; i++)
        if (seconds[i] >= 0 && seconds[i] <= least * COST_CLOSE)
            return i;
    return -1;
}
