// linear.c: puts a linear layer together from a checkpoint's tensors.
#include "kernels/kernels.h"

static bool is_weight(struct tensor t)
{
    return t.dtype == DT_F32 || t.dtype == DT_BF16 || t.dtype == DT_F16;
}

int linear_init(struct linear *w, int parts, const struct tensor *weights, const struct tensor *biases, struct err *err)
{
    *w = (struct linear){0};
    if (parts < 1 || parts > LINEAR_MAX_PARTS)
        return err_set(err, ERR_INVALID, "a linear layer of %d parts: 1 to %d are allowed", parts, LINEAR_MAX_PARTS);
    struct linear made = {.parts = parts, .k = weights[0].n[1]};
    for (int i = 0; i < parts; i++) {
        struct tensor t = weights[i], b = biases ? biases[i] : (struct tensor){0};
        if (t.dims != 2 || !is_weight(t) || t.n[0] < 1 || t.n[1] < 1 || t.n[1] != made.k)
            return err_set(err, ERR_INVALID,
                           "weight %d of a linear layer is %s of %d dimensions (%lld, %lld): it must be F32, BF16 or "
                           "F16 of shape (n, %lld)",
                           i, dtype_name(t.dtype), t.dims, (long long)t.n[0], (long long)t.n[1], (long long)made.k);
        if (!tensor_none(b) && (b.dims != 1 || !is_weight(b) || b.n[0] != t.n[0]))
            return err_set(err, ERR_INVALID,
                           "bias %d of a linear layer is %s of %d dimensions (%lld): its weight asks for (%lld)", i,
                           dtype_name(b.dtype), b.dims, (long long)b.n[0], (long long)t.n[0]);
        made.w[i] = t;
        made.b[i] = b;
        made.n += t.n[0];
    }
    *w = made;
    return 0;
}

struct linear linear_slice(const struct linear *w, int runs, int64_t start, int64_t count)
{
    const int64_t run = w->n / runs;
    struct linear slice = {.parts = runs, .n = runs * count, .k = w->k, .of = w->n, .second = w->second};
    if (count == run)
        return *w;
    for (int i = 0; i < runs; i++) {
        const int part = w->parts == 1 ? 0 : i;
        const int64_t at = w->parts == 1 ? i * run + start : start;
        slice.w[i] = tensor_rows(w->w[part], at, count);
        if (!tensor_none(w->b[part]))
            slice.b[i] = tensor_rows(w->b[part], at, count);
    }
    return slice;
}
