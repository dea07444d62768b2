#include "worker/plan.h"

#include <stdio.h>
#include <string.h>

#include "proto/conf.h"

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
    if (want->pipe < 0 || want->pipe > COMM_MAX_RANKS)
        return err_set(err, ERR_INVALID, "pipefusion_degree %d; it may be 1 to %d", want->pipe, COMM_MAX_RANKS);
    if (want->patches < 0 || want->patches > PLAN_MAX_PATCHES)
        return err_set(err, ERR_INVALID, "num_pipeline_patch %d; it may be 1 to %d", want->patches, PLAN_MAX_PATCHES);
    if (want->warmup < 0)
        return err_set(err, ERR_INVALID, "warmup_steps %d; it may be 1 or more", want->warmup);
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

static int stages_with_blocks(const struct plan *p)
{
    int n = 0;
    while (n < COMM_MAX_RANKS && p->blocks[n] != 0)
        n++;
    return n;
}

static void fill_pipe(struct plan *p)
{
    p->pipe = p->pipe ? p->pipe : 1;
    p->patches = p->patches ? p->patches : p->pipe;
    if (!plan_in_patches(p))
        p->warmup = 0;
    else if (p->warmup == 0)
        p->warmup = 1;
    if (p->pipe > 1 && p->ring == 0) // which none of its stages has
        p->ring = 1;
}

// The degrees as wanted, 0 filled in; true when they make up the ranks.
static bool fill(const struct plan *want, int64_t heads, bool true_cfg, struct plan *out)
{
    struct plan p = *want;
    fill_pipe(&p);
    *out = p;
    const int stages = want->ranks / p.pipe;
    if (want->cfg == 0 && true_cfg && stages % 2 == 0) {
        out->cfg = 2;
        if (share_branch(out, heads, stages / 2) && stages * p.pipe == out->ranks)
            return true;
        *out = p;
    }
    if (out->cfg == 0)
        out->cfg = 1;
    return share_branch(out, heads, stages / out->cfg) && out->cfg * out->pipe * out->ulysses * out->ring == out->ranks;
}

// "2,4"
static void print_blocks(const struct plan *p, char text[PLAN_TEXT])
{
    const int stages = stages_with_blocks(p);
    *text = 0;
    for (int i = 0, at = 0; i < stages; i++)
        at += snprintf(text + at, PLAN_TEXT - (size_t)at, "%s%d", i ? "," : "", p->blocks[i]);
}

static int check_blocks(const struct dit_info *model, const struct plan *p, struct err *err)
{
    const int stages = stages_with_blocks(p);
    char text[PLAN_TEXT];
    int sum = 0;
    print_blocks(p, text);
    for (int i = 0; i < stages; i++)
        sum += p->blocks[i];
    if (stages > 0 && stages != p->pipe)
        return err_set(err, ERR_UNSUPPORTED, "pipefusion_blocks %.80s: %d stages, but pipefusion_degree is %d", text,
                       stages, p->pipe);
    if (stages > 0 && sum != model->blocks)
        return err_set(err, ERR_UNSUPPORTED, "pipefusion_blocks %.80s: that is %d, the model has %d blocks", text, sum,
                       model->blocks);
    return 0;
}

// Parts of blocks are gathered by ranks that go through all blocks, and together.
static int check_sharded(const struct plan *p, int ranks, struct err *err)
{
    if (p->weights != PLAN_SHARDED)
        return 0;
    if (ranks == 1)
        return err_set(err, ERR_UNSUPPORTED, "weights sharded: one rank has nobody to share them with");
    if (plan_in_patches(p))
        return err_set(err, ERR_UNSUPPORTED,
                       "weights sharded with pipefusion_degree %d: its stages have their own blocks' weights already",
                       p->pipe);
    return 0;
}

// What PipeFusion asks for.
static int check_pipe(const struct dit_info *model, const struct plan *p, struct err *err)
{
    if (p->pipe > model->blocks)
        return err_set(err, ERR_UNSUPPORTED, "pipefusion_degree %d: the model has %d blocks, a stage one at least",
                       p->pipe, model->blocks);
    if (plan_in_patches(p) && p->ring > 1)
        return err_set(
            err, ERR_UNSUPPORTED,
            "pipefusion_degree %d with ring_degree %d: a ring's ranks keep a slice of the keys, patches need "
            "all of them; use ulysses_degree inside the stages",
            p->pipe, p->ring);
    return check_blocks(model, p, err);
}

// "; on 6 ranks cfg=1 ulysses=2 ring=3 would do", or nothing where there is no such plan.
static void print_instead(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
                          char text[PLAN_TEXT + 48])
{
    char degrees[PLAN_TEXT];
    struct plan p;
    fill(&(struct plan){.ranks = want->ranks}, model->heads, true_cfg, &p);
    plan_print(&p, degrees);
    *text = 0;
    if (p.ring == 1 || k->attention_part)
        snprintf(text, PLAN_TEXT + 48, "; on %d ranks %s would do", want->ranks, degrees);
}

// Of one part of the group.
static int make_part(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
                     struct plan *out, struct err *err)
{
    char legal[128], instead[PLAN_TEXT + 48], more[80] = "";
    TRY(check_want(want, true_cfg, err));
    const bool whole = fill(want, model->heads, true_cfg, out);
    print_instead(model, k, want, true_cfg, instead);
    divisors(model->heads, legal, sizeof legal);
    if (out->pipe > 1)
        snprintf(more, sizeof more, " x pipefusion_degree %d", out->pipe);
    if (want->data > 1)
        snprintf(more + strlen(more), sizeof more - strlen(more), " x data_degree %d", want->data);
    if (!whole)
        return err_set(err, ERR_UNSUPPORTED,
                       "cfg_degree %d x ulysses_degree %d x ring_degree %d%s is not the %d ranks of the group%s",
                       out->cfg, out->ulysses, out->ring, more, want->ranks * want->data, instead);
    if (model->heads % out->ulysses != 0)
        return err_set(err, ERR_UNSUPPORTED,
                       "ulysses_degree %d does not divide the model's %lld attention heads; it may be %s%s",
                       out->ulysses, (long long)model->heads, legal, instead);
    if (out->ring > 1 && !k->attention_part)
        return err_set(err, ERR_UNSUPPORTED,
                       "ring_degree %d: %s has no ring attention; without it the ranks of a branch are the "
                       "ulysses_degree, %s for the model's %lld attention heads",
                       out->ring, k->name, legal, (long long)model->heads);
    return check_pipe(model, out, err);
}

int plan_make(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
              struct plan *out, struct err *err)
{
    struct plan part = *want;
    part.data = want->data ? want->data : 1;
    if (part.data < 0 || part.data > COMM_MAX_RANKS)
        return err_set(err, ERR_INVALID, "data_degree %d; it may be 1 to %d", want->data, COMM_MAX_RANKS);
    if (want->ranks % part.data != 0)
        return err_set(err, ERR_UNSUPPORTED, "data_degree %d does not divide the %d ranks of the group", part.data,
                       want->ranks);
    part.ranks = want->ranks / part.data;
    TRY(make_part(model, k, &part, true_cfg, out, err));
    out->ranks = want->ranks;
    return check_sharded(out, out->ranks, err);
}

int plan_deal_images(struct plan *want, int images, struct err *err)
{
    int taken = want->cfg > 1 ? want->cfg : 1; // ranks that a picture is to have at least
    const int degrees[] = {want->ulysses, want->ring, want->pipe};
    for (int i = 0; i < 3; i++)
        taken *= degrees[i] > 1 && degrees[i] <= COMM_MAX_RANKS ? degrees[i] : 1;
    if (want->data == 0)
        want->data = want->ranks % taken == 0 ? common_divisor(want->ranks / taken, images) : 1;
    if (want->data > 0 && images % want->data != 0)
        return err_set(err, ERR_UNSUPPORTED,
                       "data_degree %d: %d images cannot be dealt to so many parts evenly; it may be a divisor of both "
                       "the ranks and num_images",
                       want->data, images);
    return 0;
}

int plan_choices(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
                 struct plan_choice out[PLAN_MAX_CHOICES])
{
    const int pipe = want->pipe > 1 ? want->pipe : 1;
    const int ranks = want->data > 1 ? want->ranks / want->data : want->ranks; // of a part
    int n = 0;
    for (int cfg = 2; cfg >= 1; cfg--)
        for (int u = ranks < COMM_MAX_RANKS ? ranks : COMM_MAX_RANKS; u >= 1; u--) {
            struct plan p = *want;
            p.cfg = cfg;
            p.ulysses = u;
            p.ring = ranks / (cfg * pipe * u);
            const bool whole = p.ring >= 1 && cfg * pipe * u * p.ring == ranks && n < PLAN_MAX_CHOICES;
            if (!whole || (want->cfg && want->cfg != cfg) || (want->ulysses && want->ulysses != u) ||
                (want->ring && want->ring != p.ring))
                continue;
            out[n] = (struct plan_choice){.plan = p, .why.code = ERR_NONE};
            if (plan_make(model, k, &p, true_cfg, &out[n].plan, &out[n].why) == 0)
                out[n].why.code = ERR_NONE;
            n++;
        }
    return n;
}

struct span plan_stage(const struct plan *p, int blocks, int stage)
{
    struct spread s = spread_even(blocks, stage, p->pipe);
    if (stages_with_blocks(p) == p->pipe)
        for (int i = 0; i < p->pipe; i++)
            s.start[i + 1] = s.start[i] + p->blocks[i];
    return spread_mine(&s);
}

int plan_parse_weights(const char *text, struct plan *p, struct err *err)
{
    const bool sharded = text && strcmp(text, "sharded") == 0;
    if (text && !sharded && strcmp(text, "replicated") != 0)
        return err_set(err, ERR_INVALID, "weights %.40s: they may be replicated or sharded", text);
    p->weights = sharded ? PLAN_SHARDED : PLAN_REPLICATED;
    return 0;
}

int plan_hold(const struct plan *want, int ranks, struct plan *out, struct err *err)
{
    const int data = want->data ? want->data : 1;
    *out = (struct plan){.ranks = ranks, .weights = want->weights};
    TRY(check_sharded(want, ranks, err));
    if (want->pipe < 2 || ranks % (want->pipe * data) != 0) // in the latter case plan_make refuses every job
        return 0;
    out->weights = PLAN_BY_STAGE;
    out->pipe = want->pipe;
    out->data = data;
    memcpy(out->blocks, want->blocks, sizeof out->blocks);
    return 0;
}

struct plan plan_keep_to(const struct plan *held, const struct plan *want)
{
    struct plan p = *want;
    p.weights = held->weights;
    if (held->weights == PLAN_BY_STAGE && p.data == 0)
        p.data = held->data;
    return p;
}

int plan_check_kept(const struct plan *held, const struct plan *p, struct err *err)
{
    if (held->weights != PLAN_BY_STAGE ||
        (p->pipe == held->pipe && p->data == held->data && memcmp(p->blocks, held->blocks, sizeof p->blocks) == 0))
        return 0;
    return err_set(err, ERR_UNSUPPORTED,
                   "pipefusion_degree %d x data_degree %d: the group's ranks have the weights of %d stages x %d parts "
                   "and can make no other plan",
                   p->pipe, p->data, held->pipe, held->data);
}

int plan_parse_blocks(const char *text, struct plan *p, struct err *err)
{
    const int n = conf_numbers(text, 1, 1000, p->blocks, COMM_MAX_RANKS);
    if (n < 0)
        return err_set(
            err, ERR_INVALID,
            "pipefusion_blocks \"%.80s\"; it may be how many blocks each stage has, say 2,4: 1 to %d numbers "
            "from 1 to 1000",
            text, COMM_MAX_RANKS);
    if (p->pipe == 0)
        p->pipe = n;
    return 0;
}

void plan_print(const struct plan *p, char text[PLAN_TEXT])
{
    char blocks[PLAN_TEXT];
    const int at = snprintf(text, PLAN_TEXT, "cfg=%d ulysses=%d ring=%d", p->cfg, p->ulysses, p->ring);
    if (plan_in_patches(p))
        snprintf(text + at, (size_t)(PLAN_TEXT - at), " pipe=%d patches=%d warmup=%d", p->pipe, p->patches, p->warmup);
    print_blocks(p, blocks);
    if (*blocks)
        snprintf(text + strlen(text), PLAN_TEXT - strlen(text), " blocks=%s", blocks);
    if (p->data > 1)
        snprintf(text + strlen(text), PLAN_TEXT - strlen(text), " data=%d", p->data);
    if (p->exact)
        snprintf(text + strlen(text), PLAN_TEXT - strlen(text), " exact");
    if (p->weights == PLAN_SHARDED)
        snprintf(text + strlen(text), PLAN_TEXT - strlen(text), " weights=sharded");
}
