// engine_plan.c: the plan of a job: what its model's weights allow, at the price of this machine, within the memory
// there is; all ranks agree on it.
#include <string.h>

#include "worker/engine_internal.h"

// Two more tensors of the whole picture that only a traced run holds.
static size_t trace_bytes(const struct engine_hooks *hooks, const Ditfleet__V1__Job *job)
{
    return hooks->trace ? (size_t)job->width * job->height * 3 * sizeof(float) * 2 + (1 << 20) : 0;
}

static int price(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                 struct price_list **out, struct err *err)
{
    char key[ENGINE_KEY];
    engine_key(m, job, want, key);
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
    int64_t limit = engine_memory_share(e);
    limit = limit > (int64_t)e->arena_bytes ? limit : (int64_t)e->arena_bytes;
    for (int i = 0; i < prices->n; i++)
        seconds[i] = price_seconds(&prices->list[i]);
    while ((picked = cost_pick(seconds, prices->n)) >= 0) {
        struct engine_estimate *most = &prices->most[picked];
        if (most->activation_bytes == 0)
            TRY(cost_memory(m, job, &prices->list[picked].plan, e->k, most, err));
        const struct demand d = engine_demand(e, m, job, most, extra);
        if (engine_fits(e, m, &d, limit))
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

struct plan engine_held(const struct model *m)
{
    return m->home ? m->home->held : (struct plan){.weights = PLAN_REPLICATED};
}

// What can be known before any work: the plan, and whether it fits. The cache of prompts comes first: what is in it
// must not depend on what fails on one rank alone.
static int plan_and_reserve(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct plan *want, const struct engine_hooks *hooks, struct plan *plan,
                            struct err *err)
{
    const struct plan held = engine_held(m);
    struct plan open = plan_keep_to(&held, want), here;
    open.ranks = comm_size(e->data);
    open.exact = e->exact;
    if (e->exact && open.ring == 0)
        open.ring = 1;
    TRY(engine_reserve_prompts(e, m, job, err));
    TRY(plan_deal_images(&open, (int)job->num_images, err));
    TRY(choose(e, m, job, &open, trace_bytes(hooks, job), &here, err));
    TRY(plan_make(&m->info, e->k, &here, job_true_cfg(job), plan, err));
    TRY(plan_check_kept(&held, plan, err));
    return engine_reserve(e, m, job, plan, trace_bytes(hooks, job), err);
}

int engine_agree_on_plan(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                         const struct engine_hooks *hooks, struct plan *plan, struct err *err)
{
    struct plan dealt = *want;
    struct err unused;
    int rc = engine_agree(e->control, plan_and_reserve(e, m, job, want, hooks, plan, err), err);
    dealt.ranks = comm_size(e->data);
    if (rc != ERR_UNSUPPORTED || want->data != 0 || plan_deal_images(&dealt, (int)job->num_images, &unused) != 0 ||
        dealt.data == 1)
        return rc;
    dealt.data = 1;
    return engine_agree(e->control, plan_and_reserve(e, m, job, &dealt, hooks, plan, err), err);
}
