// place.c: weights from host memory to the device.
#include "kernels/cuda/loader.h"

#include <stdlib.h>

enum { E4M3_SINCE = 89 }; // compute capability, tens and ones

// Memory that lives as long as the device.
static int keep(struct device *d, size_t bytes, void **out, struct err *err)
{
    if (d->n_placed == d->room_placed) {
        size_t room = d->room_placed ? 2 * d->room_placed : 256;
        void **list = realloc(d->placed, room * sizeof *list);
        if (!list)
            return err_set(err, ERR_NO_MEMORY, "no memory for a list of %zu weights", room);
        d->placed = list;
        d->room_placed = room;
    }
    TRY(cuda_alloc(d, bytes, out, err));
    d->placed[d->n_placed++] = *out;
    return 0;
}

static bool is_float(enum dtype type)
{
    return type == DT_F32 || is_half(type);
}

int cuda_place(struct device *d, struct tensor host, struct tensor *out, struct err *err)
{
    TRY(check_report(&d->check, err));
    bool convert = host.dims > 1 && is_float(host.dtype);
    struct tensor t =
        tensor_of(NULL, convert ? d->type : host.dtype, host.dims, host.n[0], host.n[1], host.n[2], host.n[3]);
    if (host.dims == 1)
        t.ld = 1;
    if (tensor_none(host) || tensor_count(host) == 0) {
        *out = host;
        return 0;
    }
    TRY(keep(d, tensor_bytes(t), &t.data, err));
    TRY(loader_put(d, t, host, 0, err));
    *out = t;
    return 0;
}

// ERR_UNSUPPORTED where the GPU has not the type.
static int check_codes(const struct device *d, enum dtype type, struct err *err)
{
    if (type == DT_I8 && is_half(d->type))
        return 0;
    if (type == DT_I8)
        return err_set(err, ERR_UNSUPPORTED, "int8 goes with activations of bf16 or fp16, here they are %s",
                       dtype_name(d->type));
    if (is_half(d->type) && d->capability >= E4M3_SINCE)
        return 0;
    return err_set(
        err, ERR_UNSUPPORTED,
        "fp8 asks for a GPU of compute capability 8.9 (RTX 40, H100) or newer and activations of bf16 or fp16, "
        "here are %d.%d and %s: use precision int8 or bf16",
        d->capability / 10, d->capability % 10, dtype_name(d->type));
}

// Undefined weights of one part; the factors of 8 bits lie behind the numbers, in the same block.
static int keep_linear(struct device *d, struct linear *one, enum dtype type, bool twice, bool bias, struct err *err)
{
    const size_t numbers = (size_t)(one->n * one->k) * dtype_size(type);
    one->w[0] = tensor_2d(NULL, type, one->n, one->k);
    TRY(keep(d, numbers + (dtype_quantised(type) ? (size_t)one->n * sizeof(float) : 0), &one->w[0].data, err));
    if (dtype_quantised(type))
        one->w[0].scale = (float *)((char *)one->w[0].data + numbers);
    if (dtype_quantised(type) && twice) {
        void *second;
        TRY(keep(d, numbers, &second, err));
        one->second = (char *)second - (char *)one->w[0].data;
    }
    if (!bias)
        return 0;
    one->b[0] = tensor_1d(NULL, d->type, one->n);
    TRY(keep(d, tensor_bytes(one->b[0]), &one->b[0].data, err));
    return 0;
}

// All parts in one; rows without a bias get zeros when another part has one.
int cuda_place_linear(struct device *d, struct linear *w, enum dtype type, bool twice, struct err *err)
{
    TRY(check_report(&d->check, err));
    if (dtype_quantised(type))
        TRY(check_codes(d, type, err));
    struct linear one = {.parts = 1, .n = w->n, .k = w->k};
    bool bias = false;
    for (int i = 0; i < w->parts; i++)
        bias |= !tensor_none(w->b[i]);
    TRY(keep_linear(d, &one, linear_placed(w, type, d->type), twice, bias, err));
    for (int64_t i = 0, row = 0; i < w->parts; row += w->w[i++].n[0]) {
        struct tensor b = bias ? tensor_rows(one.b[0], row, w->w[i].n[0]) : (struct tensor){0};
        TRY(loader_put(d, tensor_rows(one.w[0], row, w->w[i].n[0]), w->w[i], one.second, err));
        if (!tensor_none(w->b[i]))
            TRY(loader_put(d, b, w->b[i], 0, err));
        else if (bias)
            cuda_ok(d, cudaMemsetAsync(b.data, 0, tensor_bytes(b), d->stream), "placing a weight");
    }
    *w = one;
    return 0;
}

void cuda_displace(struct device *d, struct tensor placed)
{
    for (size_t i = 0; i < d->n_placed; i++)
        if (d->placed[i] == placed.data) {
            cuda_enter(d);
            cudaFree(placed.data);
            d->placed[i] = d->placed[--d->n_placed];
            return;
        }
}
