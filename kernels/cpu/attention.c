// attention.c: softmax(scale q k^T + bias) v without a matrix of scores: keys pass by in blocks, and each query keeps
// the running maximum and sum of its softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//
// A task is a head and a range of queries. A block of keys and values is packed once a task and met by its queries in
// tiles of QUERIES; the output rows themselves hold the running weighted sums. Blocks start at multiples of a size
// that depends on dim alone, so a row's result depends on neither threads nor the other rows.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

enum { QUERIES = 12, PANEL = TILE_VECS * LANES, MAX_BLOCK = 512, BLOCK_FLOATS = 64 * 1024 };

struct attention {
    struct device *d;
    struct tensor out, lse, q, k, v; // lse: none where nobody asks for it
    const struct attention_opts *opts;
    int64_t s, dim, block; // keys; block: keys of one block, a multiple of PANEL
    int64_t width;         // columns of a panel of values
    int64_t ranges;        // ranges of queries a head is split into
    int64_t range;         // queries of a range
};

// A thread's scratch, laid out by layout().
struct space {
    float *keys;    // panels of (dim, PANEL)
    float *values;  // panels of (block, width)
    float *scores;  // (QUERIES, block)
    float *tile;    // (QUERIES, width)
    float *highest; // (range) running maxima
    float *sum;     // (range) running sums
};

static size_t layout(const struct attention *a, float *base, struct space *s)
{
    int64_t padded = ceil_div(a->dim, a->width) * a->width;
    int64_t sizes[] = {a->block * a->dim, a->block * padded, QUERIES * a->block, QUERIES * PANEL, a->range, a->range};
    float **fields[] = {&s->keys, &s->values, &s->scores, &s->tile, &s->highest, &s->sum};
    size_t used = 0;
    for (int i = 0; i < 6; i++) {
        *fields[i] = base ? base + used : NULL;
        used += (size_t)(ceil_div(sizes[i], LANES) * LANES);
    }
    return used;
}

static const float *row_of(struct tensor t, int64_t row, int64_t head)
{
    return (const float *)t.data + row * t.ld + head * t.n[2];
}

// Vectors of a panel when n columns are left.
static int vecs_of(int64_t n, int64_t width)
{
    return (int)ceil_div(min64(n, width), LANES);
}

static void pack_block(const struct attention *a, const struct space *s, int64_t head, int64_t first, int64_t keys)
{
    for (int64_t i = 0; i < keys; i += PANEL)
        tile_pack_transposed(s->keys + i * a->dim, vecs_of(keys - i, PANEL), row_of(a->k, first + i, head), DT_F32,
                             a->k.ld, min64(PANEL, keys - i), a->dim);
    for (int64_t j = 0; j < a->dim; j += a->width)
        tile_pack(s->values + j * a->block, vecs_of(a->dim - j, a->width), row_of(a->v, first, head) + j, a->v.ld,
                  min64(a->width, a->dim - j), keys);
}

// Largest of the n numbers at t; those beyond n may be anything.
static float highest_of(const float *t, int64_t n)
{
    vf top[2] = {vset(-INFINITY), vset(-INFINITY)};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++)
            top[j] = vmax(vload(t + i + j * LANES), top[j]);
    for (; i < n; i += LANES)
        top[0] = vmax(vselect(vlanes() < (int32_t)min64(n - i, LANES), vload(t + i), vset(-INFINITY)), top[0]);
    return vmax_lane(vmax(top[0], top[1]));
}

// t = e^(scale * t - base), 0 beyond n up to a whole vector; returns the sum.
static float exponentials(float *t, int64_t n, float scale, float base)
{
    vf sum[2] = {vset(0), vset(0)};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) {
            vf p = vexp_negative(vload(t + i + j * LANES) * scale - base);
            vstore(t + i + j * LANES, p);
            sum[j] += p;
        }
    for (; i < n; i += LANES) {
        vf p = vexp_negative(vload(t + i) * scale - base);
        p = vselect(vlanes() < (int32_t)min64(n - i, LANES), p, vset(0));
        vstore(t + i, p);
        sum[0] += p;
    }
    return vsum(sum[0] + sum[1]);
}

// Turns one query's scores into weights e^(score - highest); moves its running maximum and sum. keys: how many it sees.
// Returns the factor that earlier sums shrink by.
static float soften(const struct attention *a, float *t, int64_t keys, const float *bias, float *highest, float *sum)
{
    float scale = a->opts->scale;
    if (bias || scale <= 0) { // without a bias and with a positive scale, the largest score is that of the largest q.k
        for (int64_t i = 0; i < keys; i += LANES)
            vstore(t + i, vload(t + i) * scale + (bias ? vload_n(bias + i, keys - i) : vset(0)));
        scale = 1;
    }
    float top = highest_of(t, keys) * scale, now = top > *highest ? top : *highest;
    float base = now == -INFINITY ? 0 : now; // every key hidden so far: all weights are 0
    float shrink = *highest == -INFINITY ? 0 : expf(*highest - base);
    *highest = now;
    *sum = *sum * shrink + exponentials(t, keys, scale, base);
    return shrink;
}

// out rows = shrink * out rows + weights times values
static void accumulate(const struct attention *a, const struct space *s, int64_t head, int64_t query, int rows,
                       int64_t keys, const float *shrink)
{
    struct tile_rows weights = {s->scores, a->block, keys, 0, 1};
    for (int64_t j = 0; j < a->dim; j += a->width) {
        int64_t columns = min64(a->width, a->dim - j);
        tile_multiply(rows, vecs_of(columns, a->width), weights, s->values + j * a->block, s->tile, PANEL);
        for (int r = 0; r < rows; r++) {
            float *o = (float *)a->out.data + (query + r) * a->out.ld + head * a->dim + j;
            for (int64_t i = 0; i < columns; i += LANES) {
                vf new = vload(s->tile + r * PANEL + i);
                // The first block's shrink is 0, and what out held before must not matter, NaN included.
                vf old = shrink[r] == 0 ? vset(0) : vload_n(o + i, columns - i) * shrink[r];
                vstore_n(o + i, old + new, columns - i);
            }
        }
    }
}

static void tile_of_queries(const struct attention *a, const struct space *s, int64_t head, int64_t query, int rows,
                            int64_t first, int64_t keys, int64_t state)
{
    struct tile_rows q = {row_of(a->q, query, head), a->q.ld, a->dim, 0, 1};
    const struct tensor *bias = &a->opts->bias;
    float shrink[QUERIES];
    for (int64_t i = 0; i < keys; i += PANEL)
        tile_multiply(rows, vecs_of(keys - i, PANEL), q, s->keys + i * a->dim, s->scores + i, a->block);
    for (int r = 0; r < rows; r++) {
        float *t = s->scores + r * a->block;
        int64_t seen = a->opts->causal ? max64(0, min64(keys, query + r + 1 - first)) : keys;
        const float *row =
            tensor_none(*bias) ? NULL : (const float *)bias->data + head * bias->ld + (query + r) * bias->n[2] + first;
        shrink[r] = soften(a, t, seen, row, s->highest + state + r, s->sum + state + r);
        for (int64_t i = seen; i < keys; i++)
            t[i] = 0;
    }
    accumulate(a, s, head, query, rows, keys, shrink);
}

static void finish(const struct attention *a, const struct space *s, int64_t head, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++) {
        float *o = (float *)a->out.data + i * a->out.ld + head * a->dim;
        float sum = s->sum[i - from], factor = sum > 0 || isnan(sum) ? 1 / sum : 0;
        for (int64_t j = 0; j < a->dim; j += LANES)
            vstore_n(o + j, sum == 0 ? vset(0) : vload_n(o + j, a->dim - j) * factor, a->dim - j);
        if (!tensor_none(a->lse)) // no key seen: -inf + log 0
            ((float *)a->lse.data)[i * a->lse.ld + head] = s->highest[i - from] + logf(sum);
    }
}

static void task(void *ctx, int64_t task, int thread)
{
    const struct attention *a = ctx;
    int64_t head = task / a->ranges, from = task % a->ranges * a->range, to = min64(a->q.n[0], from + a->range);
    struct space s;
    layout(a, a->d->scratch[thread].data, &s);
    for (int64_t i = 0; i < to - from; i++) {
        s.highest[i] = -INFINITY;
        s.sum[i] = 0;
    }
    int64_t last = a->opts->causal ? min64(a->s, to) : a->s;
    for (int64_t first = 0; first < last; first += a->block) {
        int64_t keys = min64(a->block, last - first);
        pack_block(a, &s, head, first, keys);
        for (int64_t i = from; i < to; i += QUERIES)
            tile_of_queries(a, &s, head, i, (int)min64(QUERIES, to - i), first, keys, i - from);
    }
    finish(a, &s, head, from, to);
}

static void attend(struct attention a)
{
    struct device *d = a.d;
    const struct tensor q = a.q;
    a.s = a.k.n[0], a.dim = q.n[2];
    int64_t fit = max64(1, BLOCK_FLOATS / a.dim / PANEL) * PANEL;
    a.block = min64(fit, MAX_BLOCK);
    a.width = (int64_t)tile_vecs(a.dim) * LANES;
    // Heads are shared out; when they do not balance, each is split into ranges of whole tiles.
    int64_t tiles = ceil_div(q.n[0], QUERIES), heads = q.n[1];
    int64_t ranges = heads % d->threads == 0 ? 1 : min64(tiles, ceil_div(4L * d->threads, heads));
    a.range = ceil_div(tiles, ranges) * QUERIES;
    a.ranges = ceil_div(q.n[0], a.range);
    struct space s;
    if (cpu_scratch(d, layout(&a, NULL, &s)))
        pool_run(d->pool, heads * a.ranges, task, &a);
}

void cpu_attention(struct device *d, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                   const struct attention_opts *opts)
{
    if (check_attention(&d->check, out, q, k, v, opts) && tensor_count(out) > 0)
        attend((struct attention){.d = d, .out = out, .q = q, .k = k, .v = v, .opts = opts});
}

void cpu_attention_part(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                        struct tensor v, const struct attention_opts *opts)
{
    if (check_attention_part(&d->check, out, lse, q, k, v, opts) && tensor_count(out) > 0)
        attend((struct attention){.d = d, .out = out, .lse = lse, .q = q, .k = k, .v = v, .opts = opts});
}

// ---- parts

struct merge {
    struct tensor out, parts, lse;
};

static const float *lse_of(const struct merge *m, int64_t part, int64_t row, int64_t head)
{
    return (const float *)m->lse.data + part * m->lse.ld + row * m->lse.n[2] + head;
}

// out (dim) of one query and head
static void merge_one(const struct merge *m, int64_t row, int64_t head)
{
    const int64_t heads = m->out.n[1], dim = m->out.n[2];
    float *out = (float *)m->out.data + row * m->out.ld + head * dim;
    float top = -INFINITY, sum = 0;
    for (int64_t p = 0; p < m->parts.n[0]; p++)
        top = fmaxf(top, *lse_of(m, p, row, head));
    for (int64_t j = 0; j < dim; j += LANES)
        vstore_n(out + j, vset(0), dim - j);
    for (int64_t p = 0; p < m->parts.n[0]; p++) {
        const float lse = *lse_of(m, p, row, head), weight = expf(lse - top);
        const float *part = (const float *)m->parts.data + p * m->parts.ld + (row * heads + head) * dim;
        if (lse == -INFINITY)
            continue;
        sum += weight;
        for (int64_t j = 0; j < dim; j += LANES)
            vstore_n(out + j, vload_n(out + j, dim - j) + vload_n(part + j, dim - j) * weight, dim - j);
    }
    for (int64_t j = 0; sum != 0 && j < dim; j += LANES)
        vstore_n(out + j, vload_n(out + j, dim - j) / sum, dim - j);
}

static void merge_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct merge *m = ctx;
    for (int64_t i = from; i < to; i++)
        for (int64_t head = 0; head < m->out.n[1]; head++)
            merge_one(m, i, head);
}

void cpu_attention_merge(struct device *d, struct tensor out, struct tensor parts, struct tensor lse)
{
    const struct merge m = {out, parts, lse};
    if (check_attention_merge(&d->check, out, parts, lse) && tensor_count(out) > 0)
        cpu_rows(d, out.n[0], (parts.n[0] + 1) * out.n[1] * out.n[2], merge_rows, &m);
}
