// tensor.c: views and number formats. Nothing here knows a backend.
#include "kernels/tensor.h"

#include <string.h>

static const struct {
    const char *name;
    size_t size;
} types[DT_COUNT] = {
    [DT_F32] = {"F32", 4}, [DT_BF16] = {"BF16", 2},    [DT_F16] = {"F16", 2},
    [DT_F64] = {"F64", 8}, [DT_I32] = {"I32", 4},      [DT_I64] = {"I64", 8},
    [DT_U8] = {"U8", 1},   [DT_E4M3] = {"F8_E4M3", 1}, [DT_I8] = {"I8", 1},
};

size_t dtype_size(enum dtype dtype)
{
    return types[dtype].size;
}

const char *dtype_name(enum dtype dtype)
{
    return types[dtype].name;
}

struct tensor tensor_of(void *data, enum dtype dtype, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
    return (struct tensor){data, dtype, dims, {n0, n1, n2, n3}, n1 * n2 * n3, NULL};
}

int64_t tensor_count(struct tensor t)
{
    return tensor_none(t) ? 0 : t.n[0] * t.n[1] * t.n[2] * t.n[3];
}

size_t tensor_bytes(struct tensor t)
{
    return (size_t)tensor_count(t) * dtype_size(t.dtype);
}

// Addresses of zero-row views are never read, so they stay where they are (data may be NULL).
static void *element(struct tensor t, int64_t index, int64_t count)
{
    return count == 0 || index == 0 ? t.data : (char *)t.data + index * (int64_t)dtype_size(t.dtype);
}

struct tensor tensor_rows(struct tensor t, int64_t start, int64_t count)
{
    t.data = element(t, start * t.ld, count);
    t.n[0] = count;
    if (t.scale && count)
        t.scale += start;
    return t;
}

struct tensor tensor_cols(struct tensor t, int64_t start, int64_t count)
{
    t.data = element(t, start, t.n[0]);
    t.n[1] = count;
    return t;
}

struct tensor tensor_reshape(struct tensor t, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
    struct tensor r = tensor_of(t.data, t.dtype, dims, n0, n1, n2, n3);
    if (n0 == t.n[0] && dims > 1)
        r.ld = t.ld;
    return r;
}

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float bf16_to_f32(uint16_t h)
{
    return float_of((uint32_t)h << 16);
}

uint16_t f32_to_bf16(float f)
{
    uint32_t u = bits_of(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40); // keeps a NaN one when its payload is cut
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00)
        return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // The exponent's bias differs by 112; a product by 2^112 also normalises subnormals.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

uint16_t f32_to_f16(float f)
{
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000u) // rounds to 65536 or more
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000u) // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | ((rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13));
}
