// product.c: splits a product into tasks of a group of packed weight panels by a block of row tiles.
//
// A thread converts and packs the panels it needs into its scratch, panel by panel, and keeps them while its tasks
// stay in the same group; bias and activation are applied to a tile while it is in the first-level cache.
#include "kernels/cpu/product.h"

// Packed panels of a group stay in the second-level cache beside the rows that stream by.
enum { GROUP_FLOATS = 128 * 1024 };

struct panel {
    int part, vecs;
    int64_t first, columns; // within the part
    int64_t y_column;
};

struct plan {
    const struct product *p;
    struct device *d;
    int64_t k, width;              // inner length; columns of a panel
    int64_t panels, group, blocks; // group: panels a task packs; blocks: blocks of row tiles
    int64_t *packed;               // (threads) group in the thread's scratch, -1: none
};

static struct panel panel_at(const struct plan *plan, int64_t index)
{
    const struct linear *w = plan->p->w;
    int64_t column = 0;
    for (int part = 0;; part++) {
        int64_t n = w->w[part].n[0], panels = ceil_div(n, plan->width);
        if (index < panels) {
            int64_t first = index * plan->width, columns = min64(plan->width, n - first);
            return (struct panel){part, (int)ceil_div(columns, LANES), first, columns, column + first};
        }
        index -= panels;
        column += n;
    }
}

INLINE void finish_act(float *y, int64_t y_ld, const float *c, const vf *bias, int vecs, int rows, int64_t columns,
                       enum act act)
{
    for (int r = 0; r < rows; r++, y += y_ld, c += vecs * LANES)
        for (int64_t v = 0; v * LANES < columns; v++)
            vstore_n(y + v * LANES, vact(vload(c + v * LANES) + bias[v], act), columns - v * LANES);
}

#define FINISH(ACT)                                                                                                    \
    case ACT:                                                                                                          \
        finish_act(y, y_ld, c, bias, vecs, rows, columns, ACT);                                                        \
        break

static void finish(float *y, int64_t y_ld, const float *c, const vf *bias, int vecs, int rows, int64_t columns,
                   enum act act)
{
    switch (act) {
        FINISH(ACT_NONE);
        FINISH(ACT_SILU);
        FINISH(ACT_GELU_TANH);
        FINISH(ACT_GELU_ERF);
        FINISH(ACT_QUICK_GELU);
    }
}

static void panel_bias(const struct linear *w, const struct panel *at, vf bias[TILE_VECS])
{
    struct tensor b = w->b[at->part];
    for (int v = 0; v < at->vecs; v++)
        bias[v] = tensor_none(b)
                      ? vset(0)
                      : weight_load(b.data, b.dtype, at->first + (int64_t)v * LANES, at->columns - (int64_t)v * LANES);
}

static void pack_group(const struct plan *plan, float *to, int64_t first, int64_t last)
{
    for (int64_t i = first; i < last; i++, to += plan->k * plan->width) {
        struct panel at = panel_at(plan, i);
        struct tensor w = plan->p->w->w[at.part];
        const char *data = (const char *)w.data + at.first * w.ld * (int64_t)dtype_size(w.dtype);
        tile_pack_transposed(to, at.vecs, data, w.dtype, w.ld, at.columns, plan->k);
    }
}

// Asks for the lines that the tile will be written to, so that they arrive while it is computed.
static void fetch_output(const float *y, int64_t y_ld, int rows, int64_t columns)
{
    for (int r = 0; r < rows; r++, y += y_ld)
        for (int64_t i = 0; i < columns; i += 16)
            __builtin_prefetch(y + i, 1);
}

static void task(void *ctx, int64_t task, int thread)
{
    const struct plan *plan = ctx;
    const struct product *p = plan->p;
    int64_t group = task / plan->blocks, block = task % plan->blocks;
    int64_t first = group * plan->group, last = min64(plan->panels, first + plan->group);
    float *c = plan->d->scratch[thread].data, *gathered = c + TILE_FLOATS, *packed = gathered + p->gather;
    if (plan->packed[thread] != group)
        pack_group(plan, packed, first, last);
    plan->packed[thread] = group;
    for (int64_t t = p->tiles * block / plan->blocks, end = p->tiles * (block + 1) / plan->blocks; t < end; t++) {
        struct tile_rows a;
        float *y;
        int rows = p->locate(p, t, gathered, &a, &y);
        for (int64_t i = first; i < last; i++) {
            struct panel at = panel_at(plan, i);
            vf bias[TILE_VECS];
            panel_bias(p->w, &at, bias);
            fetch_output(y + at.y_column, p->y_ld, rows, at.columns);
            tile_multiply(rows, at.vecs, a, packed + (i - first) * plan->k * plan->width, c, at.vecs * LANES);
            finish(y + at.y_column, p->y_ld, c, bias, at.vecs, rows, at.columns, p->act);
        }
    }
}

void product_run(struct device *d, const struct product *p)
{
    int64_t packed[d->threads];
    struct plan plan = {.p = p, .d = d, .k = p->w->k, .width = (int64_t)p->vecs * LANES, .packed = packed};
    for (int i = 0; i < p->w->parts; i++)
        plan.panels += ceil_div(p->w->w[i].n[0], plan.width);
    for (int i = 0; i < d->threads; i++)
        packed[i] = -1;
    if (p->tiles == 0 || plan.panels == 0)
        return;
    // Four tasks a thread let a fast thread take over from a slow one. Rows are split only when panels are too few for
    // that and not an even share, for then threads pack the same panel.
    int64_t fits = max64(1, GROUP_FLOATS / max64(1, plan.k * plan.width)),
            tasks = d->threads == 1 ? 1 : 4L * d->threads;
    plan.group = max64(1, min64(fits, plan.panels / tasks));
    int64_t groups = ceil_div(plan.panels, plan.group);
    bool even = groups >= tasks || (groups % d->threads == 0 && groups > d->threads);
    plan.blocks = even ? 1 : min64(p->tiles, ceil_div(tasks, groups));
    if (cpu_scratch(d, (size_t)(TILE_FLOATS + p->gather + plan.group * plan.k * plan.width)))
        pool_run(d->pool, groups * plan.blocks, task, &plan);
}
