// vec.h: vectors of floats as the compiler's vector extension gives them, and the functions that libm has no vectors
// of.
//
// The width follows the instruction set that -march names. Nothing else in this folder depends on it.
#ifndef DITFLEET_VEC_H
#define DITFLEET_VEC_H

#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

#define FIRST_LANES(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s)
#define OTHER_LANES(F, s) F(8, s), F(9, s), F(10, s), F(11, s), F(12, s), F(13, s), F(14, s), F(15, s)
#ifdef __AVX512F__
enum { LANES = 16, REGISTERS = 32 };
#define EACH_LANE(F, s) FIRST_LANES(F, s), OTHER_LANES(F, s)
#else
enum { LANES = 8, REGISTERS = 16 };
#define EACH_LANE(F, s) FIRST_LANES(F, s)
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf_half __attribute__((vector_size(2 * LANES)));
typedef double vd __attribute__((vector_size(4 * LANES))); // half as many lanes
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

INLINE vf vset(float x)
{
    return x - (vf){0};
}

INLINE vf vload(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vd vload_half(const float *p)
{
    vf_half v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vd);
}

INLINE void vstore(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

// The first n lanes, 1 to LANES; loads leave the others 0.
INLINE vf vload_n(const float *p, int64_t n)
{
    if (n >= LANES)
        return vload(p);
    vf v = {0};
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
}

INLINE void vstore_n(float *p, vf v, int64_t n)
{
    if (n >= LANES)
        vstore(p, v);
    else
        memcpy(p, &v, (size_t)n * sizeof(float));
}

INLINE vf vselect(vi mask, vf yes, vf no)
{
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

INLINE vf vmax(vf a, vf b)
{
    return vselect(a > b, a, b);
}

// Lane i of the result is lane F(i, s) of a, or of b from LANES on; s and so the indices are constants.
#define VSHUFFLE(a, b, F, s) __builtin_shufflevector(a, b, EACH_LANE(F, s))
#define LANE_XOR(i, s)       ((i) ^ (s))

INLINE vi vlanes(void) // 0, 1, 2, ...
{
    return (vi){EACH_LANE(LANE_XOR, 0)};
}

INLINE float vsum(vf v)
{
    if (LANES > 8)
        v += VSHUFFLE(v, v, LANE_XOR, 8);
    v += VSHUFFLE(v, v, LANE_XOR, 4);
    v += VSHUFFLE(v, v, LANE_XOR, 2);
    v += VSHUFFLE(v, v, LANE_XOR, 1);
    return v[0];
}

INLINE float vmax_lane(vf v)
{
    if (LANES > 8)
        v = vmax(v, VSHUFFLE(v, v, LANE_XOR, 8));
    v = vmax(v, VSHUFFLE(v, v, LANE_XOR, 4));
    v = vmax(v, VSHUFFLE(v, v, LANE_XOR, 2));
    v = vmax(v, VSHUFFLE(v, v, LANE_XOR, 1));
    return v[0];
}

// n lanes from element i of a weight, as float.
INLINE vf weight_load(const void *data, enum dtype dtype, int64_t i, int64_t n)
{
    if (dtype == DT_F32)
        return vload_n((const float *)data + i, n);
    vh h = {0};
    if (n >= LANES)
        memcpy(&h, (const uint16_t *)data + i, sizeof h);
    else
        memcpy(&h, (const uint16_t *)data + i, (size_t)n * 2);
    vu u = __builtin_convertvector(h, vu);
    if (dtype == DT_BF16)
        return (vf)(u << 16);
    vu sign = (u & 0x8000) << 16, rest = u & 0x7fff;
    vf finite = (vf)(rest << 13) * 0x1p112f;
    vf special = (vf)(0x7f800000 | (rest & 0x3ff) << 13);
    return (vf)(sign | (vu)vselect((vi)(rest >= 0x7c00), special, finite));
}

// e^x within 2 ulp or so for x <= 0; 0 below -87.3; NaN stays.
// e^x = 2^n 2^r, n the nearest integer to x log2 e, |r| <= 1/2; 2^r by a polynomial of least relative error (9e-8).
INLINE vf vexp_negative(vf x)
{
    const float magic = 12582912.0f, log2e = 1.44269504f; // adding 1.5 * 2^23 leaves the integer in the low bits
    vi low = x < -87.3f;
    vf shifted = x * log2e + magic, n = shifted - magic, r = x * log2e - n;
    vf p = r * 0.00132647203f + 0.00967151299f;
    p = p * r + 0.0555073358f;
    p = p * r + 0.240222424f;
    p = p * r + 0.693147004f;
    p = p * r + 1.0f;
    return (vf)(~low & (vi)((vu)p + ((vu)shifted << 23)));
}

// e^x for any x; e^88.3 above that.
INLINE vf vexp(vf x)
{
    return vexp_negative(vselect(x > 88.3f, vset(88.3f), x));
}

INLINE vf vsigmoid_times(vf x, vf z) // x * sigmoid(z)
{
    return x / (1.0f + vexp(-z));
}

// x/2 (1 + erf(x / sqrt 2)); erfc after Press et al., Numerical Recipes, 2nd ed., 6.2 (relative error 1.2e-7).
INLINE vf vgelu_erf(vf x)
{
    vf a = vselect(x < 0.0f, -x, x) * 0.70710678f;
    vf t = 1.0f / (1.0f + 0.5f * a);
    vf p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    vf half = 0.5f * t * vexp(p - a * a);
    return x * vselect(x < 0.0f, half, 1.0f - half);
}

INLINE vf vact(vf x, enum act act)
{
    switch (act) {
    case ACT_SILU:
        return vsigmoid_times(x, x);
    case ACT_GELU_TANH: // (1 + tanh u) / 2 = sigmoid(2u)
        return vsigmoid_times(x, x * (1.59576912f + 0.07135481f * x * x));
    case ACT_GELU_ERF:
        return vgelu_erf(x);
    case ACT_QUICK_GELU:
        return vsigmoid_times(x, 1.702f * x);
    case ACT_NONE:
        break;
    }
    return x;
}

#endif
