// codes.cuh: numbers of 8 bits that have a factor in common: E4M3 (8-bit floats) and I8 (integers). What is not finite
// stays visible: as E4M3 an element that no finite number tells is NaN, and with an infinity the factor is infinite;
// integers have a factor of NaN.
#ifndef DITFLEET_CUDA_CODES_CUH
#define DITFLEET_CUDA_CODES_CUH

#include "kernels/cuda/vec.cuh"

#include <cfloat>
#include <cuda_fp8.h>

// factor: of numbers whose largest magnitude is top. The least normal number bounds it from below, since a factor of 0
// would have no inverse.
struct as_e4m3 {
    static constexpr float MOST = 448;
    __device__ static float magnitude(float v) { return fabsf(v); }
    __device__ static float factor(float top) { return top > 0 ? fmaxf(top / MOST, FLT_MIN) : 1; }
    __device__ static uint8_t code(float v) { return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3); }
    __device__ static uint16_t two(float a, float b)
    {
        return __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
    }
    __device__ static float number(uint8_t code)
    {
        return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
    }
};

struct as_integer {
    static constexpr float MOST = 127;
    __device__ static float magnitude(float v) { return fabsf(v) < INFINITY ? fabsf(v) : INFINITY; } // NaN, too
    __device__ static float factor(float top)
    {
        return top == INFINITY ? NAN : top > 0 ? fmaxf(top / MOST, FLT_MIN) : 1;
    }
    __device__ static uint8_t code(float v) { return (uint8_t)(int8_t)__float2int_rn(v); }
    __device__ static uint16_t two(float a, float b) { return (uint16_t)(code(a) | code(b) << 8); }
    __device__ static float number(uint8_t code) { return (float)(int8_t)code; }
};

// Codes of V numbers that were multiplied by the inverse of their factor.
template <typename C, int V> __device__ inline void store_codes(uint8_t *y, const float (&v)[V], float inverse)
{
    if constexpr (V == 1) {
        *y = C::code(v[0] * inverse);
    } else {
        pack<uint16_t, V / 2> out;
#pragma unroll
        for (int j = 0; j < V; j += 2)
            out.v[j / 2] = C::two(v[j] * inverse, v[j + 1] * inverse);
        *reinterpret_cast<decltype(out) *>(y) = out;
    }
}

// Every thread of the block gets the largest of all. None is negative, so their bits are in their order.
__device__ inline float block_largest(float v)
{
    enum { WARP = 32, MOST_WARPS = 32 };
    __shared__ unsigned shared[MOST_WARPS];
    unsigned bits = __reduce_max_sync(~0u, __float_as_uint(v));
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = bits;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / WARP; i++)
        bits = max(bits, shared[i]);
    return __uint_as_float(bits);
}

// Calls f with a null pointer of the type's way.
template <typename F> static inline void with_codes(enum dtype type, F f)
{
    if (type == DT_I8)
        f((as_integer *)nullptr);
    else
        f((as_e4m3 *)nullptr);
}

#endif
