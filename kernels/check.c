// check.c: one function an operation; each is its shape contract as one condition and one sentence.
#include "kernels/check.h"

#include <stdarg.h>
#include <stdio.h>

bool check_fail(struct check *c, enum err_code code, const char *format, ...)
{
    if (c->failure.code)
        return false;
    char text[sizeof c->failure.text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    err_set(&c->failure, code, "%s", text);
    return false;
}

int check_report(const struct check *c, struct err *err)
{
    if (c->failure.code && err)
        *err = c->failure;
    return (int)c->failure.code;
}

// Appends ", name TYPE (n0, n1)"; text is of size bytes.
static void describe(char *text, size_t size, size_t *used, const char *name, struct tensor t)
{
    int n = snprintf(text + *used, size - *used, "%s%s %s", *used ? ", " : "", name,
                     tensor_none(t) ? "none" : dtype_name(t.dtype));
    for (int i = 0; i < t.dims && n >= 0 && *used + (size_t)n < size; i++)
        n += snprintf(text + *used + n, size - *used - (size_t)n, "%s%lld", i ? ", " : " (", (long long)t.n[i]);
    if (t.dims && n >= 0 && *used + (size_t)n < size)
        n += snprintf(text + *used + n, size - *used - (size_t)n, ")");
    *used = n < 0 || *used + (size_t)n >= size ? size - 1 : *used + (size_t)n;
}

static bool sane(const struct check *c, struct tensor t)
{
    if (tensor_none(t))
        return true;
    if (t.dims < 0 || t.dims > TENSOR_MAX_DIMS || t.dtype >= DT_COUNT)
        return false;
    for (int i = 0; i < TENSOR_MAX_DIMS; i++)
        if (t.n[i] < 0 || (i >= t.dims && t.n[i] != 1))
            return false;
    int64_t row = t.n[1] * t.n[2] * t.n[3];
    bool stride = t.dims == 1 ? t.ld == 1 : t.n[0] < 2 || t.ld >= row;
    return stride && (!c->memory || t.data || tensor_count(t) == 0);
}

// operands: pairs of (const char *name, struct tensor).
static bool rule(struct check *c, bool ok, const char *op, const char *needs, int operands, ...)
{
    char text[320] = "";
    size_t used = 0;
    if (c->failure.code)
        return false;
    va_list args;
    va_start(args, operands);
    for (int i = 0; i < operands; i++) {
        const char *name = va_arg(args, const char *);
        struct tensor t = va_arg(args, struct tensor);
        if (!sane(c, t)) {
            check_fail(c, ERR_INVALID, "%s: %s is no tensor: %d dimensions (%lld, %lld, %lld, %lld), stride %lld%s", op,
                       name, t.dims, (long long)t.n[0], (long long)t.n[1], (long long)t.n[2], (long long)t.n[3],
                       (long long)t.ld, t.data ? "" : ", no address");
            break;
        }
        if (!ok) // a plan asks these rules hundreds of thousands of times
            describe(text, sizeof text, &used, name, t);
    }
    va_end(args);
    if (!ok)
        check_fail(c, ERR_INVALID, "%s needs %s; got %s", op, needs, text);
    return c->failure.code == 0;
}

static bool same_shape(struct tensor a, struct tensor b)
{
    return a.dims == b.dims && a.n[0] == b.n[0] && a.n[1] == b.n[1] && a.n[2] == b.n[2] && a.n[3] == b.n[3];
}

static bool shaped(struct tensor t, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
    return t.dims == dims && t.n[0] == n0 && t.n[1] == n1 && t.n[2] == n2 && t.n[3] == n3;
}

static bool weight_type(struct tensor t)
{
    return t.dtype == DT_F32 || t.dtype == DT_BF16 || t.dtype == DT_F16;
}

static bool active(const struct check *c, struct tensor t, int dims)
{
    return t.dtype == c->activation && t.dims > 0 && (dims == 0 || t.dims == dims);
}

// What a linear layer of numbers of 8 bits takes besides activations.
static bool quantised(const struct check *c, struct tensor t)
{
    return c->quantised && dtype_quantised(t.dtype) && t.dims == 2 && (t.scale || !c->memory || t.n[0] == 0);
}

// A vector of n: (n), or (1, n) as a row of a matrix is.
static bool vector(struct tensor t, int64_t n)
{
    return weight_type(t) && (shaped(t, 1, n, 1, 1, 1) || shaped(t, 2, 1, n, 1, 1));
}

bool check_transfer(struct check *c, const char *op, struct tensor t, const void *host)
{
    return rule(c, !tensor_none(t) && (host || tensor_count(t) == 0), op, "a tensor and a host buffer", 1, "t", t);
}

bool check_copy(struct check *c, struct tensor dst, struct tensor src)
{
    return rule(c, dst.dims > 0 && dst.dtype == src.dtype && same_shape(dst, src), "copy", "the same shape and type", 2,
                "dst", dst, "src", src);
}

bool check_zero(struct check *c, struct tensor t)
{
    return rule(c, t.dims > 0, "zero", "a tensor", 1, "t", t);
}

bool check_linear(struct check *c, struct tensor y, struct tensor x, const struct linear *w)
{
    const bool codes = quantised(c, w->w[0]);
    bool ok = active(c, y, 2) && (active(c, x, 2) || (codes && quantised(c, x) && x.dtype == w->w[0].dtype)) &&
              x.n[0] == y.n[0] && x.n[1] == w->k && y.n[1] == w->n && w->parts >= 1 && w->parts <= LINEAR_MAX_PARTS;
    int64_t n = 0;
    for (int i = 0; ok && i < w->parts; i++) {
        n += w->w[i].n[0];
        ok = (codes ? w->w[i].dtype == w->w[0].dtype : weight_type(w->w[i])) && w->w[i].dims == 2 &&
             w->w[i].n[1] == w->k && (tensor_none(w->b[i]) || vector(w->b[i], w->w[i].n[0]));
    }
    return rule(c, ok && n == w->n, "linear", "y (m, n), x (m, k), weights (n_i, k), n the sum of n_i", 3, "y", y, "x",
                x, "w", w->w[0]);
}

bool check_activate(struct check *c, struct tensor x)
{
    return rule(c, active(c, x, 0), "activate", "the activation type", 1, "x", x);
}

bool check_pair(struct check *c, const char *op, struct tensor x, struct tensor y)
{
    return rule(c, active(c, x, 0) && active(c, y, 0) && same_shape(x, y), op, "two activations of one shape", 2, "x",
                x, "y", y);
}

bool check_add_row(struct check *c, struct tensor x, struct tensor row)
{
    return rule(c, active(c, x, 2) && vector(row, x.n[1]), "add_row", "x (m, n), row (n)", 2, "x", x, "row", row);
}

bool check_gate_add(struct check *c, struct tensor x, struct tensor gate, struct tensor y)
{
    return rule(c, active(c, x, 2) && active(c, y, 2) && same_shape(x, y) && vector(gate, x.n[1]), "gate_add",
                "x and y (m, n), gate (n)", 3, "x", x, "gate", gate, "y", y);
}

bool check_layer_norm(struct check *c, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta)
{
    bool ok = active(c, y, 2) && active(c, x, 2) && same_shape(x, y) && (tensor_none(gamma) || vector(gamma, x.n[1])) &&
              (tensor_none(beta) || vector(beta, x.n[1]));
    return rule(c, ok, "layer_norm", "y and x (m, n), gamma and beta (n) or none", 4, "y", y, "x", x, "gamma", gamma,
                "beta", beta);
}

bool check_modulate(struct check *c, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift)
{
    bool ok = (active(c, y, 2) || quantised(c, y)) && active(c, x, 2) && same_shape(x, y) && vector(scale, x.n[1]) &&
              vector(shift, x.n[1]);
    return rule(c, ok, "modulate", "y and x (m, n), scale and shift (n)", 4, "y", y, "x", x, "scale", scale, "shift",
                shift);
}

bool check_gate_add_modulate(struct check *c, struct tensor x, struct tensor gate, struct tensor update,
                             struct tensor y, struct tensor scale, struct tensor shift)
{
    return check_gate_add(c, x, gate, update) && check_modulate(c, y, x, scale, shift);
}

bool check_rms_norm(struct check *c, struct tensor y, struct tensor x, struct tensor gamma)
{
    return rule(c, active(c, y, 2) && active(c, x, 2) && same_shape(x, y) && vector(gamma, x.n[1]), "rms_norm",
                "y and x (m, n), gamma (n)", 3, "y", y, "x", x, "gamma", gamma);
}

bool check_qk_norm_rope(struct check *c, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                        struct tensor rope)
{
    bool ok = active(c, q, 3) && active(c, k, 3) && same_shape(q, k) && q.n[2] % 2 == 0 && vector(gamma_q, q.n[2]) &&
              vector(gamma_k, q.n[2]) && rope.dtype == DT_F32 && shaped(rope, 3, q.n[0], q.n[2] / 2, 2, 1);
    return rule(c, ok, "qk_norm_rope", "q and k (m, heads, dim), dim even, gammas (dim), rope F32 (m, dim/2, 2)", 5,
                "q", q, "k", k, "gamma_q", gamma_q, "gamma_k", gamma_k, "rope", rope);
}

bool check_embed(struct check *c, struct tensor y, struct tensor table, struct tensor ids)
{
    bool ok = active(c, y, 2) && table.dims == 2 && weight_type(table) && y.n[1] == table.n[1] && ids.dtype == DT_I32 &&
              shaped(ids, 1, y.n[0], 1, 1, 1);
    return rule(c, ok, "embed", "y (m, n), table (rows, n), ids I32 (m)", 3, "y", y, "table", table, "ids", ids);
}

bool check_relative_bias(struct check *c, struct tensor y, struct tensor table, struct tensor buckets)
{
    bool ok = y.dtype == DT_F32 && y.dims == 3 && table.dims == 2 && weight_type(table) && table.n[1] == y.n[0] &&
              buckets.dtype == DT_I32 && buckets.dims == 1 &&
              (tensor_count(y) == 0 || buckets.n[0] == y.n[1] + y.n[2] - 1);
    return rule(c, ok, "relative_bias", "y F32 (heads, m, s), table (b, heads), buckets I32 (m + s - 1)", 3, "y", y,
                "table", table, "buckets", buckets);
}

static bool attends(const struct check *c, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                    struct tensor b)
{
    return active(c, out, 3) && active(c, q, 3) && active(c, k, 3) && active(c, v, 3) && same_shape(out, q) &&
           same_shape(k, v) && q.n[1] == k.n[1] && q.n[2] == k.n[2] &&
           (tensor_none(b) || (b.dtype == DT_F32 && shaped(b, 3, q.n[1], q.n[0], k.n[0], 1)));
}

bool check_attention(struct check *c, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                     const struct attention_opts *opts)
{
    struct tensor b = opts->bias;
    bool ok = attends(c, out, q, k, v, b) && (!opts->causal || q.n[0] == k.n[0]);
    return rule(c, ok, opts->causal ? "attention (causal)" : "attention",
                "out and q (m, heads, dim), k and v (s, heads, dim), bias F32 (heads, m, s) or none, m = s if causal",
                5, "out", out, "q", q, "k", k, "v", v, "bias", b);
}

bool check_attention_part(struct check *c, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                          struct tensor v, const struct attention_opts *opts)
{
    bool ok = attends(c, out, q, k, v, opts->bias) && lse.dtype == DT_F32 && shaped(lse, 2, q.n[0], q.n[1], 1, 1) &&
              !opts->causal;
    return rule(c, ok, opts->causal ? "attention_part (causal)" : "attention_part",
                "out and q (m, heads, dim), lse F32 (m, heads), k and v (s, heads, dim), no bias or F32 (heads, m, s), "
                "not to be causal",
                6, "out", out, "lse", lse, "q", q, "k", k, "v", v, "bias", opts->bias);
}

bool check_attention_merge(struct check *c, struct tensor out, struct tensor parts, struct tensor lse)
{
    bool ok = active(c, out, 3) && active(c, parts, 4) && shaped(parts, 4, parts.n[0], out.n[0], out.n[1], out.n[2]) &&
              lse.dtype == DT_F32 && shaped(lse, 3, parts.n[0], out.n[0], out.n[1], 1);
    return rule(c, ok, "attention_merge", "out (m, heads, dim), parts (n, m, heads, dim), lse F32 (n, m, heads)", 3,
                "out", out, "parts", parts, "lse", lse);
}

bool check_conv2d(struct check *c, struct tensor y, struct tensor x, const struct conv *conv)
{
    struct tensor w = conv->w;
    bool ok = active(c, y, 3) && active(c, x, 3) && w.dims == 4 && weight_type(w) && w.n[1] % 2 == 1 &&
              w.n[2] % 2 == 1 && y.n[2] == w.n[0] && x.n[2] == w.n[3] && x.n[1] == y.n[1] &&
              (x.n[0] == y.n[0] + w.n[1] - 1 || y.n[0] == 0) && (tensor_none(conv->b) || vector(conv->b, w.n[0]));
    return rule(c, ok, "conv2d", "y (h, w, c_out), x (h + kh - 1, w, c_in), weight (c_out, kh, kw, c_in), kh, kw odd",
                4, "y", y, "x", x, "weight", w, "bias", conv->b);
}

// (rows, groups, 2) with groups dividing the channels of x (h, w, c).
static bool sums_of(struct tensor sums, struct tensor x)
{
    return sums.dtype == DT_F64 && sums.dims == 3 && sums.n[2] == 2 && sums.n[1] > 0 && x.n[2] % sums.n[1] == 0;
}

bool check_group_sums(struct check *c, struct tensor sums, struct tensor x)
{
    return rule(c, active(c, x, 3) && sums_of(sums, x) && sums.n[0] == x.n[0], "group_sums",
                "sums F64 (h, groups, 2), x (h, w, c), groups dividing c", 2, "sums", sums, "x", x);
}

bool check_group_norm(struct check *c, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                      struct tensor beta)
{
    bool ok = active(c, y, 3) && active(c, x, 3) && same_shape(x, y) && sums_of(sums, x) &&
              (sums.n[0] > 0 || x.n[0] == 0) && vector(gamma, x.n[2]) && vector(beta, x.n[2]);
    return rule(c, ok, "group_norm",
                "y and x (h, w, c), sums F64 (rows, groups, 2), groups dividing c, gamma, beta (c)", 5, "y", y, "x", x,
                "sums", sums, "gamma", gamma, "beta", beta);
}

bool check_upsample2x(struct check *c, struct tensor y, struct tensor x)
{
    return rule(c, active(c, x, 3) && active(c, y, 3) && shaped(y, 3, 2 * x.n[0], 2 * x.n[1], x.n[2], 1), "upsample2x",
                "y (2h, 2w, c), x (h, w, c)", 2, "y", y, "x", x);
}

bool check_unpack_latents(struct check *c, struct tensor latent, struct tensor tokens)
{
    bool ok = active(c, latent, 3) && active(c, tokens, 2) && latent.n[0] % 2 == 0 && latent.n[1] % 2 == 0 &&
              tokens.n[0] == latent.n[0] / 2 * (latent.n[1] / 2) && tokens.n[1] == latent.n[2] * 4;
    return rule(c, ok, "unpack_latents", "latent (h, w, c), tokens (h/2 * w/2, c * 4)", 2, "latent", latent, "tokens",
                tokens);
}

bool check_to_u8(struct check *c, struct tensor y, struct tensor x)
{
    return rule(c, active(c, x, 0) && y.dtype == DT_U8 && same_shape(x, y), "to_u8", "y U8 of the shape of x", 2, "y",
                y, "x", x);
}

bool check_cfg_combine(struct check *c, struct tensor out, struct tensor negative, struct tensor positive)
{
    bool ok = active(c, out, 0) && active(c, negative, 0) && active(c, positive, 0) && same_shape(out, negative) &&
              same_shape(out, positive);
    return rule(c, ok, "cfg_combine", "three activations of one shape", 3, "out", out, "negative", negative, "positive",
                positive);
}
