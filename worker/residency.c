#include "worker/residency.h"

#include <stdlib.h>
#include <string.h>

#include "proto/clock.h"

enum { MAX_MODELS = 64 };

struct residency {
    const struct kernels *k;
    struct device *d;
    int64_t budget, reserved;
    struct model *models[MAX_MODELS];
    uint64_t used[MAX_MODELS][PARTS]; // when a part was needed last
    uint64_t clock;
    int n_models;
    struct residency_moves moves;
};

int residency_new(const struct kernels *k, struct device *d, int64_t budget, struct residency **out, struct err *err)
{
    *out = calloc(1, sizeof **out);
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for a list of weights");
    **out = (struct residency){.k = k, .d = d, .budget = budget};
    return 0;
}

void residency_free(struct residency *r)
{
    free(r);
}

int residency_join(struct residency *r, struct model *m, struct err *err)
{
    if (r->n_models == MAX_MODELS)
        return err_set(err, ERR_UNSUPPORTED, "%s: a device serves at most %d models", m->dir, MAX_MODELS);
    memset(r->used[r->n_models], 0, sizeof *r->used);
    r->models[r->n_models++] = m;
    return 0;
}

static int find(const struct residency *r, const struct model *m)
{
    for (int i = 0; i < r->n_models; i++)
        if (r->models[i] == m)
            return i;
    return -1;
}

void residency_leave(struct residency *r, const struct model *m)
{
    const int i = find(r, m);
    if (i < 0)
        return;
    r->n_models--;
    for (int j = i; j < r->n_models; j++) {
        r->models[j] = r->models[j + 1];
        for (int p = 0; p < PARTS; p++)
            r->used[j][p] = r->used[j + 1][p];
    }
}

int64_t residency_budget(const struct residency *r)
{
    return r->budget;
}

int64_t residency_all_bytes(const struct residency *r)
{
    int64_t sum = 0;
    for (int i = 0; i < r->n_models; i++)
        sum += model_placed_bytes(r->models[i], PARTS_ALL);
    return sum;
}

static int64_t here_bytes(const struct residency *r)
{
    int64_t sum = 0;
    for (int i = 0; i < r->n_models; i++)
        sum += model_placed_bytes(r->models[i], r->models[i]->here);
    return sum;
}

// The part to part with: the one least recently used; of those that were needed together the smallest of at least so
// many bytes, or, where least is 0, the largest.
static bool choose(const struct residency *r, int64_t least, int model, unsigned keep, int *of, enum model_part *out)
{
    bool found = false;
    uint64_t used = 0;
    int64_t bytes = 0;
    for (int i = 0; i < r->n_models; i++)
        for (enum model_part p = 0; p < PARTS; p++) {
            const struct model *m = r->models[i];
            const int64_t size = model_placed_bytes(m, 1U << p);
            if (!(m->here & 1U << p) || size < least || (i == model && keep & 1U << p))
                continue;
            const bool better = least ? size < bytes : size > bytes;
            if (found && (r->used[i][p] > used || (r->used[i][p] == used && !better)))
                continue;
            found = true, used = r->used[i][p], bytes = size, *of = i, *out = p;
        }
    return found;
}

// Evicts until there is room for more bytes; keeps these parts of the model. One part that is large enough goes before
// several small ones do.
static void make_room(struct residency *r, int64_t more, int model, unsigned keep)
{
    int of = 0;
    enum model_part p = 0;
    bool idle = false;
    for (;;) {
        const int64_t short_of = here_bytes(r) + r->reserved + more - r->budget;
        struct err ignored; // a failed device says so at the next check
        if (short_of <= 0 || (!choose(r, short_of, model, keep, &of, &p) && !choose(r, 0, model, keep, &of, &p)))
            return;
        if (!idle)
            r->k->sync(r->d, &ignored);
        idle = true;
        model_evict(r->models[of], p);
        r->moves.evicted |= 1U << p;
    }
}

void residency_reserve(struct residency *r, int64_t bytes)
{
    r->reserved = bytes;
    make_room(r, 0, -1, 0);
}

static int bring(struct residency *r, int i, enum model_part p, struct err *err)
{
    const double start = monotonic_seconds();
    TRY(model_bring(r->models[i], p, err));
    r->moves.loaded |= 1U << p;
    r->moves.loaded_bytes += model_placed_bytes(r->models[i], 1U << p);
    r->moves.load_seconds += monotonic_seconds() - start;
    return 0;
}

int residency_need(struct residency *r, const struct model *m, unsigned parts, struct err *err)
{
    const int i = find(r, m);
    if (i < 0)
        return err_set(err, ERR_INTERNAL, "%s was not loaded for this device", m->dir);
    r->clock++;
    for (enum model_part p = 0; p < PARTS; p++)
        if (parts & 1U << p)
            r->used[i][p] = r->clock;
    const int64_t missing = model_placed_bytes(m, parts & ~m->here);
    if ((parts & ~m->here) == 0)
        return 0;
    make_room(r, missing, i, parts);
    if (here_bytes(r) + r->reserved + missing > r->budget)
        return err_set(err, ERR_NO_MEMORY, "%s: weights of %.2f GiB do not fit beside %.2f GiB in a budget of %.2f GiB",
                       m->dir, (double)missing / (1 << 30), (double)(here_bytes(r) + r->reserved) / (1 << 30),
                       (double)r->budget / (1 << 30));
    for (enum model_part p = 0; p < PARTS; p++)
        if (parts & ~m->here & 1U << p)
            TRY(bring(r, i, p, err));
    return 0;
}

int residency_fill(struct residency *r, const struct model *m, struct err *err)
{
    const int i = find(r, m);
    for (enum model_part p = 0; i >= 0 && p < PARTS; p++) // in the order of a job's stages
        if (!(m->here & 1U << p) && here_bytes(r) + r->reserved + model_placed_bytes(m, 1U << p) <= r->budget)
            TRY(bring(r, i, p, err));
    return 0;
}

struct residency_moves residency_moves(struct residency *r)
{
    const struct residency_moves moves = r->moves;
    r->moves = (struct residency_moves){0};
    return moves;
}
