// dry.c: the backend that computes nothing: it checks every shape and counts operations and bytes.
//
// Addresses it hands out have no memory behind them; no pointer is ever read here.
#include "kernels/check.h"

#include <stdlib.h>

struct device {
    struct check check;
    struct kernel_cost cost;
    uintptr_t next; // address of the next allocation
};

static int dry_open(const struct device_options *options, struct device **out, struct err *err)
{
    *out = malloc(sizeof **out);
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for a dry device");
    **out =
        (struct device){.check = {.activation = options->activation, .quantised = true}, .next = (uintptr_t)1 << 32};
    return 0;
}

static void dry_close(struct device *d)
{
    free(d);
}

static int dry_sync(struct device *d, struct err *err)
{
    return check_report(&d->check, err);
}

static void dry_cost(struct device *d, struct kernel_cost *out)
{
    *out = d->cost;
}

static int dry_alloc(struct device *d, size_t bytes, void **out, struct err *err)
{
    // No real allocation comes near the most that one takes of the address space, so SIZE_MAX is a fine capacity.
    const uintptr_t most = (uintptr_t)1 << 46, end = (uintptr_t)1 << 62;
    *out = NULL;
    if (d->next >= end)
        return err_set(err, ERR_NO_MEMORY, "the dry device has no addresses left: open another one");
    *out = (void *)d->next; // NOLINT(performance-no-int-to-ptr): nothing is behind it
    d->next += bytes > most ? most : ((uintptr_t)bytes + 511) & ~(uintptr_t)255;
    return 0;
}

static void dry_free(struct device *d, void *p)
{
    (void)d, (void)p;
}

static double bytes_of(int operands, const struct tensor *list)
{
    double bytes = 0;
    for (int i = 0; i < operands; i++)
        bytes += (double)tensor_bytes(list[i]);
    return bytes;
}

// An operation, each operand read or written once; in-place operands count twice.
static void count(struct device *d, double flops, int operands, const struct tensor *list)
{
    const double bytes = bytes_of(operands, list);
    d->cost.flops += flops;
    d->cost.bytes += bytes;
    d->cost.row_bytes += flops > 0 ? 0 : bytes;
    d->cost.calls++;
}

#define COUNT(flops, ...)                                                                                              \
    count(d, (flops), sizeof((struct tensor[]){__VA_ARGS__}) / sizeof(struct tensor), (struct tensor[]){__VA_ARGS__})

static void dry_upload(struct device *d, struct tensor dst, const void *host)
{
    if (check_transfer(&d->check, "upload", dst, host))
        COUNT(0, dst);
}

static void dry_download(struct device *d, void *host, struct tensor src)
{
    if (check_transfer(&d->check, "download", src, host))
        COUNT(0, src);
}

// As a device with memory of its own would hold it.
static int dry_place(struct device *d, struct tensor host, struct tensor *out, struct err *err)
{
    (void)err;
    const bool number = host.dtype == DT_F32 || host.dtype == DT_BF16 || host.dtype == DT_F16;
    *out = host;
    if (host.dims > 1 && number)
        out->dtype = d->check.activation;
    return 0;
}

static int dry_place_linear(struct device *d, struct linear *w, enum dtype type, bool twice, struct err *err)
{
    (void)err;
    struct linear one = {.parts = 1, .n = w->n, .k = w->k};
    one.w[0] = tensor_2d(w->w[0].data, type, w->n, w->k);
    one.second = twice && dtype_quantised(type) ? (int64_t)tensor_bytes(one.w[0]) : 0;
    for (int i = 0; i < w->parts; i++)
        if (!tensor_none(w->b[i]))
            one.b[0] = tensor_1d(w->b[i].data, d->check.activation, w->n);
    *w = one;
    return 0;
}

static void dry_displace(struct device *d, struct tensor placed)
{
    (void)d, (void)placed;
}

static void dry_copy(struct device *d, struct tensor dst, struct tensor src)
{
    if (!check_copy(&d->check, dst, src))
        return;
    COUNT(0, dst, src);
    d->cost.row_bytes -= (double)(tensor_bytes(dst) + tensor_bytes(src));
    d->cost.copied += (double)(tensor_bytes(dst) + tensor_bytes(src));
}

static void dry_zero(struct device *d, struct tensor t)
{
    if (check_zero(&d->check, t))
        COUNT(0, t);
}

static void dry_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    (void)act;
    if (!check_linear(&d->check, y, x, w))
        return;
    COUNT(2.0 * (double)y.n[0] * (double)w->n * (double)w->k, y, x);
    d->cost.bytes += bytes_of(w->parts, w->w) + bytes_of(w->parts, w->b);
    const double codes = dtype_quantised(w->w[0].dtype) && !dtype_quantised(x.dtype) ? (double)tensor_count(x) : 0;
    d->cost.codes = codes > d->cost.codes ? codes : d->cost.codes;
}

static void dry_activate(struct device *d, struct tensor x, enum act act)
{
    (void)act;
    if (check_activate(&d->check, x))
        COUNT(0, x, x);
}

static void dry_add(struct device *d, struct tensor x, struct tensor y)
{
    if (check_pair(&d->check, "add", x, y))
        COUNT(0, x, x, y);
}

static void dry_add_row(struct device *d, struct tensor x, struct tensor row)
{
    if (check_add_row(&d->check, x, row))
        COUNT(0, x, x, row);
}

static void dry_mul(struct device *d, struct tensor x, struct tensor y, enum act act)
{
    (void)act;
    if (check_pair(&d->check, "mul", x, y))
        COUNT(0, x, x, y);
}

static void dry_gate_add(struct device *d, struct tensor x, struct tensor gate, struct tensor y)
{
    if (check_gate_add(&d->check, x, gate, y))
        COUNT(0, x, x, gate, y);
}

static void dry_layer_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta,
                           float eps)
{
    (void)eps;
    if (check_layer_norm(&d->check, y, x, gamma, beta))
        COUNT(0, y, x, gamma, beta);
}

static void dry_modulate(struct device *d, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift,
                         float eps)
{
    (void)eps;
    if (check_modulate(&d->check, y, x, scale, shift))
        COUNT(0, y, x, scale, shift);
}

static void dry_gate_add_modulate(struct device *d, struct tensor x, struct tensor gate, struct tensor update,
                                  struct tensor y, struct tensor scale, struct tensor shift, float eps)
{
    (void)eps;
    if (check_gate_add_modulate(&d->check, x, gate, update, y, scale, shift))
        COUNT(0, x, x, gate, update, y, scale, shift);
}

static void dry_rms_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, float eps)
{
    (void)eps;
    if (check_rms_norm(&d->check, y, x, gamma))
        COUNT(0, y, x, gamma);
}

static void dry_qk_norm_rope(struct device *d, struct tensor q, struct tensor k, struct tensor gamma_q,
                             struct tensor gamma_k, float eps, struct tensor rope)
{
    (void)eps;
    if (check_qk_norm_rope(&d->check, q, k, gamma_q, gamma_k, rope))
        COUNT(0, q, q, k, k, gamma_q, gamma_k, rope);
}

static void dry_embed(struct device *d, struct tensor y, struct tensor table, struct tensor ids)
{
    if (check_embed(&d->check, y, table, ids)) // the table's rows that are read are as many as y's
        COUNT(0, y, ids, tensor_of(NULL, table.dtype, 2, y.n[0], y.n[1], 1, 1));
}

static void dry_relative_bias(struct device *d, struct tensor y, struct tensor table, struct tensor buckets)
{
    if (check_relative_bias(&d->check, y, table, buckets))
        COUNT(0, y, table, buckets);
}

static void dry_attention(struct device *d, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                          const struct attention_opts *opts)
{
    if (!check_attention(&d->check, out, q, k, v, opts))
        return;
    double m = (double)q.n[0], s = (double)k.n[0], pairs = opts->causal ? m * (m + 1) / 2 : m * s;
    const double flops = 4 * pairs * (double)q.n[1] * (double)q.n[2];
    COUNT(flops, out, q, k, v, opts->bias);
    d->cost.attention += flops;
}

static void dry_attention_part(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                               struct tensor v, const struct attention_opts *opts)
{
    if (!check_attention_part(&d->check, out, lse, q, k, v, opts))
        return;
    const double flops = 4.0 * (double)tensor_count(q) * (double)k.n[0];
    COUNT(flops, out, lse, q, k, v, opts->bias);
    d->cost.attention += flops;
}

static void dry_attention_merge(struct device *d, struct tensor out, struct tensor parts, struct tensor lse)
{
    if (check_attention_merge(&d->check, out, parts, lse))
        COUNT(0, out, parts, lse);
}

static void dry_conv2d(struct device *d, struct tensor y, struct tensor x, const struct conv *conv)
{
    if (check_conv2d(&d->check, y, x, conv))
        COUNT(2.0 * (double)(y.n[0] * y.n[1]) * (double)tensor_count(conv->w), y, x, conv->w, conv->b);
}

static void dry_group_sums(struct device *d, struct tensor sums, struct tensor x)
{
    if (check_group_sums(&d->check, sums, x))
        COUNT(0, sums, x);
}

static void dry_group_norm(struct device *d, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                           struct tensor beta, float eps, enum act act)
{
    (void)eps, (void)act;
    if (check_group_norm(&d->check, y, x, sums, gamma, beta))
        COUNT(0, y, x, sums, gamma, beta);
}

static void dry_upsample2x(struct device *d, struct tensor y, struct tensor x)
{
    if (check_upsample2x(&d->check, y, x))
        COUNT(0, y, x);
}

static void dry_unpack_latents(struct device *d, struct tensor latent, struct tensor tokens, float scale, float shift)
{
    (void)scale, (void)shift;
    if (check_unpack_latents(&d->check, latent, tokens))
        COUNT(0, latent, tokens);
}

static void dry_to_u8(struct device *d, struct tensor y, struct tensor x)
{
    if (check_to_u8(&d->check, y, x))
        COUNT(0, y, x);
}

static void dry_axpy(struct device *d, struct tensor x, float a, struct tensor y)
{
    (void)a;
    if (check_pair(&d->check, "axpy", x, y))
        COUNT(0, x, x, y);
}

static void dry_cfg_combine(struct device *d, struct tensor out, struct tensor negative, struct tensor positive,
                            float scale)
{
    (void)scale;
    if (check_cfg_combine(&d->check, out, negative, positive))
        COUNT(0, out, negative, positive);
}

const struct kernels kernels_dry = {
    .name = "dry",
    .activation = DT_F32,
    .open = dry_open,
    .close = dry_close,
    .sync = dry_sync,
    .pace = dry_sync,
    .cost = dry_cost,
    .alloc = dry_alloc,
    .free = dry_free,
    .upload = dry_upload,
    .download = dry_download,
    .place = dry_place,
    .place_linear = dry_place_linear,
    .displace = dry_displace,
    .copy = dry_copy,
    .zero = dry_zero,
    .linear = dry_linear,
    .activate = dry_activate,
    .add = dry_add,
    .add_row = dry_add_row,
    .mul = dry_mul,
    .gate_add = dry_gate_add,
    .layer_norm = dry_layer_norm,
    .modulate = dry_modulate,
    .gate_add_modulate = dry_gate_add_modulate,
    .rms_norm = dry_rms_norm,
    .qk_norm_rope = dry_qk_norm_rope,
    .embed = dry_embed,
    .relative_bias = dry_relative_bias,
    .attention = dry_attention,
    .attention_part = dry_attention_part,
    .attention_merge = dry_attention_merge,
    .conv2d = dry_conv2d,
    .group_sums = dry_group_sums,
    .group_norm = dry_group_norm,
    .upsample2x = dry_upsample2x,
    .unpack_latents = dry_unpack_latents,
    .to_u8 = dry_to_u8,
    .axpy = dry_axpy,
    .cfg_combine = dry_cfg_combine,
};
