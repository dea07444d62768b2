// linear.c: the linear layer, in the activation type and in 8 bits.
//
// Integers go through linear8.cu on Hopper. E4M3, y = act(x_scale * w_scale * (x w^T) + bias), goes the first of these
// ways that the library has an algorithm for: everything in its product (Hopper, cuBLAS 12.9 or newer); the product
// with its factors, then bias and activation in a pass of ours; bare sums in f32, a part of the rows at a time, then
// all the rest in a pass of ours (GPUs whose library knows one factor a tensor only). Where there is none (integers on
// other GPUs, GPUs without E4M3, sizes that are no multiple of 16) the sums come from the same numbers in the
// activation type, which holds them exactly.
#include "kernels/cuda/device.h"

#include <stdio.h>

static const int64_t SUMS_BYTES = 64 << 20; // at a time; more would leave the GPU's cache, and take memory
static const int64_t SUMS_ROWS = 128;       // of a tile: parts are whole tiles

// A part's weight in the activation type: itself, or a converted copy in scratch memory.
static struct tensor operand(struct device *d, struct tensor w)
{
    if (w.dtype == d->type)
        return w;
    struct tensor t = tensor_2d(NULL, d->type, w.n[0], w.n[1]);
    t.data = cuda_scratch(d, SLOT_OPERAND, tensor_bytes(t));
    if (t.data)
        launch_convert(d->stream, t, w);
    return t;
}

static struct product product_of(struct tensor y, struct tensor x, struct tensor w, struct tensor bias, enum act act)
{
    return (struct product){.m = y.n[0],
                            .n = y.n[1],
                            .k = w.n[1],
                            .batch = 1,
                            .x = x.data,
                            .w = w.data,
                            .y = y.data,
                            .type = w.dtype,
                            .y_type = y.dtype,
                            .x_ld = x.ld,
                            .w_ld = w.ld,
                            .y_ld = y.ld,
                            .bias = bias,
                            .act = act,
                            .x_scale = x.scale,
                            .w_scale = w.scale};
}

// Rows from each part to the next, where all lie evenly apart, factors and biases as the rows do; 0: they do not.
static int64_t rows_apart(const struct linear *w)
{
    const int64_t row = w->w[0].ld * (int64_t)dtype_size(w->w[0].dtype);
    const int64_t apart = w->parts < 2 ? 0 : ((char *)w->w[1].data - (char *)w->w[0].data) / row;
    bool even = apart > 0;
    for (int i = 0; i < w->parts && even; i++) {
        const struct tensor t = w->w[i], b = w->b[i], first = w->b[0];
        even = t.n[0] == w->w[0].n[0] && t.ld == w->w[0].ld && t.dtype == w->w[0].dtype &&
               (char *)t.data == (char *)w->w[0].data + i * apart * row &&
               (!t.scale || t.scale == w->w[0].scale + i * apart) && tensor_none(b) == tensor_none(first) &&
               (tensor_none(b) || (b.dtype == first.dtype &&
                                   (char *)b.data == (char *)first.data + i * apart * (int64_t)dtype_size(b.dtype)));
    }
    return even ? apart : 0;
}

// As one product of so many; false: nothing was done.
static bool linear_batched(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    const int64_t apart = rows_apart(w), n = w->w[0].n[0];
    if (apart == 0 || w->w[0].dtype != d->type || n == 0)
        return false;
    struct product p = product_of(tensor_cols(y, 0, n), x, w->w[0], w->b[0], act);
    p.batch = w->parts;
    p.w_stride = apart * w->w[0].ld;
    p.y_stride = n;
    p.bias_stride = apart;
    p.of = w->of;
    const int64_t epilogue = cuda_epilogue(&p);
    return epilogue >= 0 && cuda_product_library(d, &p, epilogue, false);
}

static void linear_parts(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    if (linear_batched(d, y, x, w, act))
        return;
    for (int64_t i = 0, column = 0; i < w->parts; column += w->w[i++].n[0]) {
        struct tensor weight = operand(d, w->w[i]), part = tensor_cols(y, column, w->w[i].n[0]);
        if (!weight.data)
            return;
        struct product p = product_of(part, x, weight, w->b[i], act);
        p.of = w->of;
        if (p.n > 0)
            cuda_product(d, &p);
    }
}

// ---- 8 bits

static size_t padded(int64_t bytes)
{
    return ((size_t)bytes + 255) & ~(size_t)255;
}

// Rows of a type of 8 bits with 16-byte aligned factors: themselves, a copy of their factors, or all made in scratch
// memory. data NULL: the device has failed.
static struct tensor quantised(struct device *d, struct tensor x, enum dtype type)
{
    struct tensor q = x;
    const int64_t m = x.n[0], k = x.n[1];
    if (x.dtype == type && alignment_of(x.scale, 16) == 16)
        return x;
    const size_t codes = x.dtype == type ? 0 : padded(m * k), factors = (size_t)m * sizeof(float);
    char *room = cuda_scratch(d, SLOT_QUANTISED, codes + factors);
    if (!room) {
        q.data = NULL;
        return q;
    }
    if (x.dtype == type) {
        q.scale = (float *)room;
        launch_copy(d->stream, tensor_1d(q.scale, DT_F32, m), tensor_1d(x.scale, DT_F32, m));
        return q;
    }
    q = tensor_2d(room, type, m, k);
    q.scale = (float *)(room + codes);
    launch_quantise(d->stream, q, x);
    return q;
}

static bool in_library(struct device *d, const struct product *p, int64_t epilogue)
{
    // Fast sums first, the others where the library has only those.
    return cuda_product_library(d, p, epilogue, true) || cuda_product_library(d, p, epilogue, false);
}

// The same numbers in the activation type, then their product.
static void sums_by_conversion(struct device *d, struct tensor sums, struct tensor x, struct tensor w)
{
    struct tensor to_w = tensor_2d(NULL, d->type, w.n[0], w.n[1]), to_x = tensor_2d(NULL, d->type, x.n[0], x.n[1]);
    char *room = cuda_scratch(d, SLOT_OPERAND, padded((int64_t)tensor_bytes(to_w)) + tensor_bytes(to_x));
    if (!room)
        return;
    to_w.data = room;
    to_x.data = room + padded((int64_t)tensor_bytes(to_w));
    launch_codes(d->stream, to_w, w);
    launch_codes(d->stream, to_x, x);
    const struct product p = product_of(sums, to_x, to_w, (struct tensor){0}, ACT_NONE);
    cuda_product(d, &p);
}

static void linear_by_sums(struct device *d, struct tensor y, struct tensor x, struct tensor w, struct tensor bias,
                           enum act act)
{
    const int64_t m = y.n[0], n = y.n[1];
    int64_t some = SUMS_BYTES / (n * (int64_t)sizeof(float)) / SUMS_ROWS * SUMS_ROWS;
    some = min64(m, some > 0 ? some : SUMS_ROWS);
    float *room = cuda_scratch(d, SLOT_SCORES, (size_t)(some * n) * sizeof(float));
    for (int64_t i = 0; room && i < m; i += some) {
        const int64_t rows = min64(some, m - i);
        struct tensor from = tensor_rows(x, i, rows), sums = tensor_2d(room, DT_F32, rows, n);
        struct product p = product_of(sums, from, w, (struct tensor){0}, ACT_NONE);
        p.x_scale = p.w_scale = NULL;
        if (w.dtype != DT_E4M3 || !in_library(d, &p, CUBLASLT_EPILOGUE_DEFAULT))
            sums_by_conversion(d, sums, from, w);
        launch_factored(d->stream, tensor_rows(y, i, rows), room, from.scale, w.scale, bias, act);
    }
}

// Integers on Hopper. False: other operands, and nothing was done.
static bool integers(struct device *d, struct tensor y, struct tensor x, const struct linear *l, enum act act)
{
    if (l->w[0].dtype != DT_I8 || !cuda_hopper(d) || (l->parts > 1 && rows_apart(l) == 0))
        return false;
    const size_t bytes = linear8_room(d->processors, y.n[0], y.n[1], l->k);
    void *room = bytes ? cuda_scratch(d, SLOT_SUMS, bytes) : NULL;
    return (bytes && !room) ||
           launch_linear8(d->stream, d->processors, y, x, l->w[0], l->b[0], rows_apart(l), act, room);
}

// A layer of one part. False: the library does not have it all, and nothing was done.
static bool linear_e4m3(struct device *d, struct tensor y, struct tensor x, const struct linear *l, enum act act)
{
    const struct tensor w = l->w[0];
    struct product p = product_of(y, x, w, l->b[0], act);
    const int64_t epilogue = cuda_epilogue(&p);
    p.of = l->of;
    if (w.dtype != DT_E4M3 || alignment_of(w.scale, 16) != 16)
        return false;
    if (epilogue >= 0 && in_library(d, &p, epilogue))
        return true;
    if (epilogue == CUBLASLT_EPILOGUE_DEFAULT || !in_library(d, &p, CUBLASLT_EPILOGUE_DEFAULT))
        return false;
    cuda_epilogue_after(d, &p);
    return true;
}

static void linear_codes(struct device *d, struct tensor y, struct tensor x, const struct linear *l, enum act act)
{
    const struct tensor q = quantised(d, x, l->w[0].dtype);
    if (!q.data)
        return;
    if (integers(d, y, q, l, act))
        return;
    for (int64_t i = 0, column = 0; i < l->parts; column += l->w[i++].n[0]) {
        const struct linear one = {
            .parts = 1, .n = l->w[i].n[0], .k = l->k, .w = {l->w[i]}, .b = {l->b[i]}, .of = l->of};
        const struct tensor part = tensor_cols(y, column, one.n);
        if (!integers(d, part, q, &one, act) && !linear_e4m3(d, part, q, &one, act))
            linear_by_sums(d, part, q, one.w[0], one.b[0], act);
    }
}

// A profile tells the shapes apart: rows x outputs x inputs.
static void launched(struct device *d, const struct tensor y, const struct linear *w)
{
    char op[64] = "linear";
    if (d->profile)
        snprintf(op, sizeof op, "linear %lld x %lld x %lld", (long long)y.n[0], (long long)w->n, (long long)w->k);
    cuda_launched(d, op);
}

void cuda_take_second(struct device *d, bool second)
{
    d->second = second;
}

void cuda_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    if (!check_linear(&d->check, y, x, w) || tensor_count(y) == 0)
        return;
    struct linear now = *w;
    for (int i = 0; d->second && i < w->parts; i++)
        now.w[i].data = (char *)now.w[i].data + w->second;
    cuda_enter(d);
    if (dtype_quantised(w->w[0].dtype))
        linear_codes(d, y, x, &now, act);
    else
        linear_parts(d, y, x, &now, act);
    launched(d, y, w);
}
