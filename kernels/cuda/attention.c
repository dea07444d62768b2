// attention.c: attention on Hopper through kernels of hopper/, in 8 bits where that may be (flash8.cu), else in halves
// (flash16.cu, heads of 128); else through cuDNN's fused engine where it has one (halves, head sizes it knows, no mask,
// no bias); else through flash.cu; what that does not take either (f32, large or odd heads, rows at any address), as
// two products with a softmax between, on as many queries at a time as fit the scratch memory.
#include "kernels/cuda/graph.h"

#include <math.h>

static const int64_t SCORE_BYTES = 256 << 20; // of scores, which their weights take the place of; of numbers of 8 bits

// ---- fused

static void describe(struct graph *g, const int64_t *key)
{
    enum dtype type = (enum dtype)key[0];
    const int64_t m = key[1], s = key[2], heads = key[3], dim = key[4], one[] = {1, 1, 1, 1};
    const int64_t rows[] = {m, s, s, m}; // of q, k, v, out
    int t[4];
    for (int i = 0; i < 4; i++) {
        int64_t ld = key[5 + i];
        t[i] = graph_tensor(g, type, GRAPH_GIVEN, (int64_t[]){1, heads, rows[i], dim},
                            (int64_t[]){rows[i] * ld, dim, ld, 1});
    }
    const int scale = graph_tensor(g, DT_F32, GRAPH_NUMBER, one, one);
    int lse = -1;
    if (key[9])
        lse = graph_tensor(g, DT_F32, GRAPH_GIVEN, (int64_t[]){1, heads, m, 1}, (int64_t[]){heads * m, m, 1, 1});
    graph_attention(g, t[0], t[1], t[2], t[3], scale, lse);
}

static int64_t ld_of(struct tensor t) // one row has no use for a stride; the engines want a sound one all the same
{
    return t.n[0] > 1 ? t.ld : t.n[1] * t.n[2];
}

static bool fused(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                  struct tensor v, const struct attention_opts *opts)
{
    const struct tensor all[] = {q, k, v, out};
    if (d->type == DT_F32 || !tensor_none(opts->bias) || opts->causal || q.n[2] % 8 || q.n[2] > 256 || k.n[0] == 0)
        return false;
    for (int i = 0; i < 4; i++)
        if (alignment_of(all[i].data, ld_of(all[i]) * 2) < 16)
            return false;
    const int64_t key[GRAPH_KEY] = {d->type,  q.n[0],   k.n[0],   q.n[1],     q.n[2],
                                    ld_of(q), ld_of(k), ld_of(v), ld_of(out), !tensor_none(lse)};
    float scale = opts->scale;
    void *by_head = NULL; // (heads, m), as the engine writes it
    if (!tensor_none(lse) && !(by_head = cuda_scratch(d, SLOT_SCORES, tensor_bytes(lse))))
        return true;
    void *pointers[] = {q.data, k.data, v.data, out.data, &scale, by_head};
    const double flops = 4 * (double)q.n[0] * (double)k.n[0] * (double)(q.n[1] * q.n[2]);
    if (!graph_run(d, GRAPH_ATTENTION, key, flops, describe, by_head ? 6 : 5, pointers))
        return false;
    if (by_head)
        launch_turn(d->stream, lse, by_head, 0);
    return true;
}

// ---- on Hopper

static bool on_hopper(const struct device *d, const struct attention_opts *opts)
{
    return cuda_hopper(d) && d->type != DT_F32 && !opts->causal && tensor_none(opts->bias);
}

// An exact device splits nothing. False: the device has failed.
static bool room_for_parts(struct device *d, struct tensor q, struct tensor k, void **room)
{
    const size_t bytes = d->exact ? 0 : flash_hopper_room(d->processors, q, k);
    *room = bytes ? cuda_scratch(d, SLOT_PARTS, bytes) : NULL;
    return bytes == 0 || *room;
}

static bool in_halves(struct device *d, const struct attention_out *out, struct tensor lse, struct tensor q,
                      struct tensor k, struct tensor v, const struct attention_opts *opts)
{
    void *room;
    return on_hopper(d, opts) && q.n[2] == HOPPER_HEAD &&
           (!room_for_parts(d, q, k, &room) ||
            launch_flash16(d->stream, d->processors, out, lse, q, k, v, opts->scale, room));
}

// Heads first.. of t (rows, heads, dim), or of lse (rows, heads), which may be none.
static struct tensor some_heads(struct tensor t, int64_t first, int64_t count)
{
    if (!tensor_none(t)) {
        t.data = (char *)t.data + first * t.n[2] * (int64_t)dtype_size(t.dtype);
        t.n[1] = count;
    }
    return t;
}

// As many heads at a time as fit the scratch memory.
static bool in_eight_bits(struct device *d, const struct attention_out *out, struct tensor lse, struct tensor q,
                          struct tensor k, struct tensor v, const struct attention_opts *opts)
{
    if (!opts->eight_bits || !on_hopper(d, opts))
        return false;
    const int64_t heads = q.n[1], one = (int64_t)flash8_scratch(some_heads(q, 0, 1), some_heads(k, 0, 1));
    const int64_t most = min64(heads, one < SCORE_BYTES ? SCORE_BYTES / one : 1);
    void *numbers = cuda_scratch(d, SLOT_SCORES, flash8_scratch(some_heads(q, 0, most), some_heads(k, 0, most)));
    for (int64_t h = 0; numbers && h < heads; h += most) {
        const int64_t n = min64(most, heads - h);
        const struct tensor q_n = some_heads(q, h, n), k_n = some_heads(k, h, n), v_n = some_heads(v, h, n);
        struct attention_out out_n = *out;
        void *room;
        for (int i = 0; i < out->n; i++)
            out_n.t[i] = some_heads(out->t[i], h, n);
        if (room_for_parts(d, q_n, k_n, &room) &&
            !launch_flash8(d->stream, d->processors, &out_n, some_heads(lse, h, n), q_n, k_n, v_n, opts->scale, numbers,
                           room))
            return false; // at the first: all are alike
    }
    return true;
}

// ---- in products

struct parts {
    struct device *d;
    struct tensor out, lse, q, k, v;
    const struct attention_opts *opts;
    int64_t ld; // of the scores: keys, rounded up to a whole 16 bytes of halves
    float *scores;
};

static void some_queries(const struct parts *a, int64_t first, int64_t rows)
{
    struct device *d = a->d;
    int64_t heads = a->q.n[1], dim = a->q.n[2], keys = a->k.n[0], size = (int64_t)dtype_size(d->type);
    int64_t weights_ld = a->ld * 4 / size; // a row of weights begins where its scores did
    const struct tensor *bias = &a->opts->bias;
    struct product scores = {.m = rows,
                             .n = keys,
                             .k = dim,
                             .batch = heads,
                             .x = (const char *)a->q.data + first * a->q.ld * size,
                             .w = a->k.data,
                             .y = a->scores,
                             .type = d->type,
                             .y_type = DT_F32,
                             .x_ld = a->q.ld,
                             .w_ld = a->k.ld,
                             .y_ld = a->ld,
                             .x_stride = dim,
                             .w_stride = dim,
                             .y_stride = rows * a->ld};
    struct product values = {.m = rows,
                             .n = dim,
                             .k = keys,
                             .batch = heads,
                             .x = a->scores,
                             .w = a->v.data,
                             .y = (char *)a->out.data + first * a->out.ld * size,
                             .type = d->type,
                             .y_type = d->type,
                             .w_rows = true,
                             .x_ld = weights_ld,
                             .w_ld = a->v.ld,
                             .y_ld = a->out.ld,
                             .x_stride = rows * weights_ld,
                             .w_stride = dim,
                             .y_stride = dim};
    cuda_product(d, &scores);
    launch_softmax(d->stream,
                   &(struct softmax){.scores = a->scores,
                                     .type = d->type,
                                     .heads = heads,
                                     .rows = rows,
                                     .keys = keys,
                                     .ld = a->ld,
                                     .scale = a->opts->scale,
                                     .causal = a->opts->causal,
                                     .first = first,
                                     .lse = a->lse.data,
                                     .lse_ld = a->lse.ld,
                                     .bias = tensor_none(*bias) ? NULL : (const float *)bias->data + first * keys,
                                     .bias_head = bias->ld,
                                     .bias_row = keys});
    cuda_product(d, &values);
}

// Queries of one pass, `fit` at most: as even as whole tiles of the products allow, so that few shapes are made.
static int64_t even_share(int64_t queries, int64_t fit)
{
    const int64_t tile = 128, passes = (queries + fit - 1) / fit, share = (queries + passes - 1) / passes;
    return min64(fit, (share + tile - 1) / tile * tile);
}

static void in_products(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                        struct tensor v, const struct attention_opts *opts)
{
    struct parts a = {
        .d = d, .out = out, .lse = lse, .q = q, .k = k, .v = v, .opts = opts, .ld = (k.n[0] + 7) & ~(int64_t)7};
    a.q.ld = ld_of(q), a.k.ld = ld_of(k), a.v.ld = ld_of(v), a.out.ld = ld_of(out);
    int64_t query = q.n[1] * a.ld * 4, fit = SCORE_BYTES / query > 0 ? SCORE_BYTES / query : 1;
    int64_t rows = min64(q.n[0], even_share(q.n[0], fit));
    a.scores = cuda_scratch(d, SLOT_SCORES, (size_t)(rows * query));
    if (!a.scores)
        return;
    for (int64_t first = 0; first < q.n[0] && d->check.failure.code == 0; first += rows)
        some_queries(&a, first, min64(rows, q.n[0] - first));
}

// ---- the table's entries

// A query that sees no key: a sum of 0, whose logarithm is -inf.
static void without_keys(struct device *d, struct tensor out, struct tensor lse)
{
    launch_copy(d->stream, out, (struct tensor){0});
    if (!tensor_none(lse))
        launch_turn(d->stream, lse, NULL, -INFINITY);
}

static void attend(struct device *d, const char *op, struct tensor out, struct tensor lse, struct tensor q,
                   struct tensor k, struct tensor v, const struct attention_opts *opts)
{
    if (tensor_count(out) == 0)
        return;
    cuda_enter(d);
    const struct attention_out here = {1, {out}};
    if (k.n[0] == 0)
        without_keys(d, out, lse);
    else if (!in_eight_bits(d, &here, lse, q, k, v, opts) && !in_halves(d, &here, lse, q, k, v, opts) &&
             !fused(d, out, lse, q, k, v, opts) && !launch_flash(d->stream, out, lse, q, k, v, opts))
        in_products(d, out, lse, q, k, v, opts);
    cuda_launched(d, op);
}

void cuda_attention(struct device *d, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                    const struct attention_opts *opts)
{
    if (check_attention(&d->check, out, q, k, v, opts))
        attend(d, "attention", out, (struct tensor){0}, q, k, v, opts);
}

bool cuda_attention_out(struct device *d, const struct attention_out *out, struct tensor q, struct tensor k,
                        struct tensor v, const struct attention_opts *opts)
{
    const struct tensor none = {0};
    if (q.n[0] == 0 || k.n[0] == 0)
        return false;
    cuda_enter(d);
    if (!in_eight_bits(d, out, none, q, k, v, opts) && !in_halves(d, out, none, q, k, v, opts))
        return false;
    cuda_launched(d, "attention");
    return true;
}

void cuda_attention_part(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                         struct tensor v, const struct attention_opts *opts)
{
    if (check_attention_part(&d->check, out, lse, q, k, v, opts))
        attend(d, "attention_part", out, lse, q, k, v, opts);
}

void cuda_attention_merge(struct device *d, struct tensor out, struct tensor parts, struct tensor lse)
{
    if (!check_attention_merge(&d->check, out, parts, lse) || tensor_count(out) == 0)
        return;
    cuda_enter(d);
    launch_merge(d->stream, out, parts, lse);
    cuda_launched(d, "attention_merge");
}
