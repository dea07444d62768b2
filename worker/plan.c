#include "worker/plan.h"

#include <stdio.h>

static void divisors(int64_t n, char *text, size_t size)
{
    int at = 0;
    for (int64_t d = 1; d <= n && d <= COMM_MAX_RANKS && at < (int)size; d++)
        if (n % d == 0)
            at += snprintf(text + at, size - (size_t)at, "%s%lld", at ? ", " : "", (long long)d);
}

int plan_make(const struct dit_info *model, int ranks, bool true_cfg, int cfg_degree, int ulysses_degree,
              struct plan *out, struct err *err)
{
    char legal[128];
    if (ranks < 1 || ranks > COMM_MAX_RANKS)
        return err_set(err, ERR_INVALID, "%d ranks; a group has 1 to %d", ranks, COMM_MAX_RANKS);
    if (cfg_degree < 0 || cfg_degree > 2)
        return err_set(err, ERR_INVALID, "cfg_degree %d; guidance has two branches, so 1 or 2 is allowed", cfg_degree);
    if (cfg_degree == 2 && !true_cfg)
        return err_set(
            err, ERR_UNSUPPORTED,
            "cfg_degree 2 needs a job with two guidance branches: a negative prompt and true_cfg_scale above 1");
    int cfg = cfg_degree;
    if (cfg == 0)
        cfg = true_cfg && ranks % 2 == 0 && (ulysses_degree == 0 || ranks / 2 == ulysses_degree) ? 2 : 1;
    int ulysses = ulysses_degree ? ulysses_degree : ranks / cfg;
    if (ulysses < 1 || cfg * ulysses != ranks)
        return err_set(err, ERR_UNSUPPORTED, "cfg_degree %d x ulysses_degree %d is not the %d ranks of the group", cfg,
                       ulysses, ranks);
    divisors(model->heads, legal, sizeof legal);
    if (model->heads % ulysses != 0)
        return err_set(err, ERR_UNSUPPORTED,
                       "%d ranks: ulysses_degree %d does not divide the model's %lld attention heads; it may be %s",
                       ranks, ulysses, (long long)model->heads, legal);
    *out = (struct plan){.ranks = ranks, .cfg = cfg, .ulysses = ulysses};
    return 0;
}

void plan_print(const struct plan *p, char text[PLAN_TEXT])
{
    snprintf(text, PLAN_TEXT, "cfg=%d ulysses=%d", p->cfg, p->ulysses);
}
