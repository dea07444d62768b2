// vec.cuh: numbers of the three float types in registers: loads and stores of V neighbours at once, all as f32.
#ifndef DITFLEET_CUDA_VEC_CUH
#define DITFLEET_CUDA_VEC_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "kernels/cuda/launch.h"
}

typedef __nv_bfloat16 bf16;

__device__ inline float to_f32(float v) { return v; }
__device__ inline float to_f32(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_f32(__half v) { return __half2float(v); }
template <typename T> __device__ inline T from_f32(float v);
template <> __device__ inline float from_f32<float>(float v) { return v; }
template <> __device__ inline bf16 from_f32<bf16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ inline __half from_f32<__half>(float v) { return __float2half_rn(v); }

// Two at once: one instruction where the type has it.
template <typename T> __device__ inline void pair_from_f32(T *out, float a, float b)
{
    out[0] = from_f32<T>(a);
    out[1] = from_f32<T>(b);
}
template <> __device__ inline void pair_from_f32<bf16>(bf16 *out, float a, float b)
{
    *reinterpret_cast<__nv_bfloat162 *>(out) = __floats2bfloat162_rn(a, b);
}
template <> __device__ inline void pair_from_f32<__half>(__half *out, float a, float b)
{
    *reinterpret_cast<__half2 *>(out) = __floats2half2_rn(a, b);
}

template <typename T, int N> struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) pack {
    T v[N];
};

// V numbers at p, in accesses of at most 16 bytes; p is aligned to the smaller of 16 and V numbers.
template <typename T, int V> __device__ inline void load(float (&out)[V], const T *p)
{
    constexpr int N = sizeof(T) * V > 16 ? 16 / (int)sizeof(T) : V;
#pragma unroll
    for (int i = 0; i < V; i += N) {
        pack<T, N> t = *reinterpret_cast<const pack<T, N> *>(p + i);
#pragma unroll
        for (int j = 0; j < N; j++)
            out[i + j] = to_f32(t.v[j]);
    }
}

template <typename T, int V> __device__ inline void store(T *p, const float (&in)[V])
{
    constexpr int N = sizeof(T) * V > 16 ? 16 / (int)sizeof(T) : V;
#pragma unroll
    for (int i = 0; i < V; i += N) {
        pack<T, N> t;
        if constexpr (N % 2 == 0) {
#pragma unroll
            for (int j = 0; j < N; j += 2)
                pair_from_f32(&t.v[j], in[i + j], in[i + j + 1]);
        } else {
#pragma unroll
            for (int j = 0; j < N; j++)
                t.v[j] = from_f32<T>(in[i + j]);
        }
        *reinterpret_cast<pack<T, N> *>(p + i) = t;
    }
}

// The compiler must not keep these numbers as f32 as well, in twice the registers.
template <typename T, int V> __device__ inline void keep_packed(pack<T, V> &x)
{
    if constexpr (sizeof x == 16) {
        uint4 raw = *reinterpret_cast<uint4 *>(&x);
        asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
        *reinterpret_cast<uint4 *>(&x) = raw;
    }
}

// A vector operand of any weight type; p NULL: absent.
struct row {
    const void *p;
    enum dtype type;
};

template <int V> __device__ inline void load_row(float (&out)[V], row r, int64_t i)
{
    if (r.type == DT_BF16)
        load(out, (const bf16 *)r.p + i);
    else if (r.type == DT_F16)
        load(out, (const __half *)r.p + i);
    else
        load(out, (const float *)r.p + i);
}

__device__ inline float load_any(const void *p, enum dtype type, int64_t i)
{
    float v[1];
    load_row(v, row{p, type}, i);
    return v[0];
}

__device__ inline void store_any(void *p, enum dtype type, int64_t i, float v)
{
    if (type == DT_BF16)
        ((bf16 *)p)[i] = from_f32<bf16>(v);
    else if (type == DT_F16)
        ((__half *)p)[i] = from_f32<__half>(v);
    else
        ((float *)p)[i] = v;
}

__device__ inline float activated(float x, enum act act)
{
    switch (act) {
    case ACT_SILU:
        return x / (1 + expf(-x));
    case ACT_GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case ACT_GELU_ERF:
        return 0.5f * x * (1 + erff(x * 0.7071067811865476f));
    case ACT_QUICK_GELU:
        return x / (1 + expf(-1.702f * x));
    case ACT_NONE:
        break;
    }
    return x;
}

// ---- host side: choosing types and widths

// A tensor as `rows` rows of n contiguous numbers; a vector and a tensor without gaps can be one row.
struct grid_of {
    int64_t rows, n;
};

static inline grid_of rows_of(struct tensor t)
{
    int64_t rows = t.dims == 1 ? 1 : t.n[0];
    return {rows, tensor_count(t) / rows};
}

static inline bool wide(struct tensor t, int v) // may be read v numbers at a time
{
    if (tensor_none(t))
        return true;
    int64_t size = (int64_t)dtype_size(t.dtype), bytes = size * v > 16 ? 16 : size * v;
    return (uintptr_t)t.data % (uintptr_t)bytes == 0 && (t.dims == 1 || t.n[0] < 2 || t.ld * size % bytes == 0);
}

static inline row row_of(struct tensor t)
{
    return {tensor_none(t) ? nullptr : t.data, tensor_none(t) ? DT_F32 : t.dtype};
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a null pointer of the type's C++ type.
template <typename F> static inline void with_type(enum dtype type, F f)
{
    if (type == DT_BF16)
        f((bf16 *)nullptr);
    else if (type == DT_F16)
        f((__half *)nullptr);
    else
        f((float *)nullptr);
}

static constexpr int64_t MAX_GRID_Y = 65535;

#endif
