// arena.c: bump allocation; see arena.h.
#include "kernels/arena.h"

#include <stdlib.h>

enum { ALIGNMENT = 256 };

struct arena {
    const struct kernels *k;
    struct device *d;
    char *base;
    size_t capacity, peak;
    size_t used[2]; // by the stack that grows up from base, and by the one that grows down from its end
    int side;       // the stack in use
    size_t refused; // the request that failed the arena, 0: none; it needed `refused` bytes at `refused_at`
    size_t refused_at;
};

int arena_new(const struct kernels *k, struct device *d, size_t capacity, struct arena **out, struct err *err)
{
    *out = NULL;
    struct arena *a = malloc(sizeof *a);
    if (!a)
        return err_set(err, ERR_NO_MEMORY, "no memory for an arena");
    capacity &= ~(size_t)(ALIGNMENT - 1);
    *a = (struct arena){.k = k, .d = d, .capacity = capacity};
    void *base = NULL;
    int code = k->alloc(d, capacity, &base, err);
    if (code) {
        free(a);
        return err_context(err, "arena of %zu bytes", capacity);
    }
    a->base = base;
    *out = a;
    return 0;
}

void arena_free(struct arena *a)
{
    if (!a)
        return;
    a->k->free(a->d, a->base);
    free(a);
}

// Bytes of the shape rounded up to the alignment; false when they do not fit a size_t.
static bool shape_bytes(enum dtype dtype, const int64_t *n, size_t *out)
{
    size_t bytes = dtype_size(dtype);
    for (int i = 0; i < TENSOR_MAX_DIMS; i++)
        if (n[i] < 0 || __builtin_mul_overflow(bytes, (size_t)n[i], &bytes))
            return false;
    *out = (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    return *out >= bytes;
}

struct tensor arena_tensor(struct arena *a, enum dtype dtype, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
    size_t bytes = 0;
    bool sane = shape_bytes(dtype, (int64_t[]){n0, n1, n2, n3}, &bytes);
    size_t used = a->used[0] + a->used[1];
    if (!a->refused && (!sane || bytes > a->capacity - used)) {
        a->refused = sane ? bytes : SIZE_MAX;
        a->refused_at = used;
    }
    if (a->refused)
        return tensor_of(a->base, dtype, dims, 0, sane ? n1 : 1, sane ? n2 : 1, sane ? n3 : 1);
    size_t at = a->side ? a->capacity - a->used[1] - bytes : a->used[0];
    a->used[a->side] += bytes;
    if (used + bytes > a->peak)
        a->peak = used + bytes;
    return tensor_of(a->base + at, dtype, dims, n0, n1, n2, n3);
}

int arena_check(const struct arena *a, struct err *err)
{
    if (a->refused)
        return err_set(err, ERR_NO_MEMORY,
                       "activations need %zu bytes more, but %zu of the %zu bytes set aside are in use", a->refused,
                       a->refused_at, a->capacity);
    return 0;
}

size_t arena_mark(const struct arena *a)
{
    return a->used[a->side];
}

void arena_release(struct arena *a, size_t mark)
{
    a->used[a->side] = mark;
}

void arena_flip(struct arena *a)
{
    a->side = !a->side;
}

size_t arena_peak(const struct arena *a)
{
    return a->peak;
}

void arena_peak_restart(struct arena *a)
{
    a->peak = a->used[0] + a->used[1];
}
