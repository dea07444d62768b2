#include "worker/plan.h"

#include <stdio.h>

static void divisors(int64_t n, char *text, size_t size)
{
    int at = 0;
    for (int64_t d = 1; d <= n && d <= COMM_MAX_RANKS && at < (int)size; d++)
        if (n % d == 0)
            at += snprintf(text + at, size - (size_t)at, "%s%lld", at ? ", " : "", (long long)d);
}

static int common_divisor(int64_t a, int64_t b)
{
    while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return (int)a;
}

// What is wrong whatever the model.
static int check_want(const struct plan *want, bool true_cfg, struct err *err)
{
    if (want->ranks < 1 || want->ranks > COMM_MAX_RANKS)
        return err_set(err, ERR_INVALID, "%d ranks; a group has 1 to %d", want->ranks, COMM_MAX_RANKS);
    if (want->cfg < 0 || want->cfg > 2)
        return err_set(err, ERR_INVALID, "cfg_degree %d; guidance has two branches, so 1 or 2 is allowed", want->cfg);
    if (want->ulysses < 0 || want->ulysses > COMM_MAX_RANKS)
        return err_set(err, ERR_INVALID, "ulysses_degree %d; it may be 1 to %d", want->ulysses, COMM_MAX_RANKS);
    if (want->ring < 0 || want->ring > COMM_MAX_RANKS)
        return err_set(err, ERR_INVALID, "ring_degree %d; it may be 1 to %d", want->ring, COMM_MAX_RANKS);
    if (want->cfg == 2 && !true_cfg)
        return err_set(
            err, ERR_UNSUPPORTED,
            "cfg_degree 2 needs a job with two guidance branches: a negative prompt and true_cfg_scale above 1");
    return 0;
}

// Fills the degrees that are 0 of ranks that make one branch, heads permitting. False: the others do not fit.
static bool share_branch(struct plan *p, int64_t heads, int ranks)
{
    if (p->ulysses == 0 && p->ring == 0)
        p->ulysses = common_divisor(ranks, heads);
    else if (p->ulysses == 0)
        p->ulysses = ranks > p->ring ? ranks / p->ring : 1;
    if (p->ring == 0)
        p->ring = ranks > p->ulysses ? ranks / p->ulysses : 1;
    return p->ulysses * p->ring == ranks;
}

// The degrees as wanted, 0 filled in; true when they make up the ranks.
static bool fill(const struct plan *want, int64_t heads, bool true_cfg, struct plan *out)
{
    *out = *want;
    if (want->cfg == 0 && true_cfg && want->ranks % 2 == 0) {
        out->cfg = 2;
        if (share_branch(out, heads, want->ranks / 2))
            return true;
        *out = *want;
    }
    if (out->cfg == 0)
        out->cfg = 1;
    return share_branch(out, heads, want->ranks / out->cfg) && out->cfg * out->ulysses * out->ring == out->ranks;
}

// "; on 6 ranks cfg=1 ulysses=2 ring=3 would do", or nothing where there is no such plan.
static void print_instead(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
                          char text[96])
{
    char degrees[PLAN_TEXT];
    struct plan p;
    fill(&(struct plan){.ranks = want->ranks}, model->heads, true_cfg, &p);
    plan_print(&p, degrees);
    *text = 0;
    if (p.ring == 1 || k->attention_part)
        snprintf(text, 96, "; on %d ranks %s would do", want->ranks, degrees);
}

int plan_make(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
              struct plan *out, struct err *err)
{
    char legal[128], instead[96];
    TRY(check_want(want, true_cfg, err));
    const bool whole = fill(want, model->heads, true_cfg, out);
    print_instead(model, k, want, true_cfg, instead);
    divisors(model->heads, legal, sizeof legal);
    if (!whole)
        return err_set(err, ERR_UNSUPPORTED,
                       "cfg_degree %d x ulysses_degree %d x ring_degree %d is not the %d ranks of the group%s",
                       out->cfg, out->ulysses, out->ring, want->ranks, instead);
    if (model->heads % out->ulysses != 0)
        return err_set(err, ERR_UNSUPPORTED,
                       "ulysses_degree %d does not divide the model's %lld attention heads; it may be %s%s",
                       out->ulysses, (long long)model->heads, legal, instead);
    if (out->ring > 1 && !k->attention_part)
        return err_set(err, ERR_UNSUPPORTED,
                       "ring_degree %d: %s has no ring attention; without it the ranks of a branch are the "
                       "ulysses_degree, %s for the model's %lld attention heads",
                       out->ring, k->name, legal, (long long)model->heads);
    return 0;
}

void plan_print(const struct plan *p, char text[PLAN_TEXT])
{
    snprintf(text, PLAN_TEXT, "cfg=%d ulysses=%d ring=%d", p->cfg, p->ulysses, p->ring);
}
