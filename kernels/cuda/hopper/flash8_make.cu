// flash8_make.cu: q, k and v of an attention to 8 bits: integers with a factor for each query and for the keys of a
// tile, values as E4M3 with a power of two for a tile, turned over, since products of 8 bits want the keys side by
// side. What is not finite stays visible: in q and k it makes the factor NaN, in v it becomes NaN.
#include "kernels/cuda/codes.cuh"
#include "kernels/cuda/hopper/flash8.cuh"

using namespace flash8;

enum {
    WARP = 32,
    THREADS = 256,
    V = 8, // numbers of a vector
    VECTORS = DIM / V,
    ROWS = THREADS / VECTORS, // that a block loads at once
    KEPT = TILE / ROWS,       // vectors of a thread
    LEAST_POWER = -126,
};

template <typename T> struct source {
    const T *q, *k, *v;
    int64_t q_ld, k_ld, v_ld;
    int dim;
    float scale;
};

template <typename T> using vec = pack<T, V>;

// INFINITY where one is not finite.
template <typename T> __device__ static float largest(const vec<T> &x)
{
    float top = 0;
#pragma unroll
    for (int i = 0; i < V; i++)
        top = fmaxf(top, as_integer::magnitude(to_f32(x.v[i])));
    return top;
}

template <typename T> __device__ static void store_integers(int8_t *to, const vec<T> &x, float factor)
{
    float v[V];
#pragma unroll
    for (int i = 0; i < V; i++)
        v[i] = to_f32(x.v[i]);
    store_codes<as_integer>((uint8_t *)to, v, 1 / factor);
}

// x: the tile's first row and the head's first column; row(i): of the tile, for each of a thread's vectors.
template <typename T, typename R>
__device__ static void load_tile(vec<T> (&v)[KEPT], const T *x, int64_t ld, int rows, int dim, R row)
{
    const int column = (int)threadIdx.x % VECTORS * V;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        v[i] = {};
        if (row(i) < rows && column < dim)
            v[i] = *reinterpret_cast<const vec<T> *>(x + row(i) * ld + column);
    }
}

__device__ static int row_of_vector(int i)
{
    return i * ROWS + (int)threadIdx.x / VECTORS;
}

template <typename T> __device__ static float tile_largest(vec<T> (&v)[KEPT])
{
    float top = 0;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        top = fmaxf(top, largest(v[i]));
        keep_packed(v[i]);
    }
    return block_largest(top);
}

template <typename T> __device__ static void make_queries(const eight &e, const source<T> &x, int first, int head)
{
    vec<T> v[KEPT];
    load_tile(v, x.q + first * x.q_ld + head * x.dim, x.q_ld, e.m - first, x.dim, row_of_vector);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int64_t row = first + row_of_vector(i), at = row * e.heads + head;
        float top = largest(v[i]);
        for (int lanes = 1; lanes < VECTORS; lanes *= 2)
            top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
        const float factor = as_integer::factor(top);
        if (row < e.m)
            store_integers(e.q + at * DIM + (int)threadIdx.x % VECTORS * V, v[i], factor);
        if (row < e.m && threadIdx.x % VECTORS == 0)
            e.q_factor[at] = factor * x.scale * 1.4426950408889634f;
    }
}

template <typename T> __device__ static void make_keys(const eight &e, const source<T> &x, int first, int head)
{
    vec<T> v[KEPT];
    load_tile(v, x.k + first * x.k_ld + head * x.dim, x.k_ld, e.s - first, x.dim, row_of_vector);
    const float factor = as_integer::factor(tile_largest(v));
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int64_t row = first + row_of_vector(i);
        if (row < e.s)
            store_integers(e.k + (row * e.heads + head) * DIM + (int)threadIdx.x % VECTORS * V, v[i], factor);
    }
    if (threadIdx.x == 0)
        e.tile[head * e.tiles + first / TILE].k = factor;
}

// The least with top <= 448 * 2^power.
__device__ static int power_of(float top)
{
    if (!(top > 0 && top < INFINITY))
        return LEAST_POWER;
    const int power = ilogbf(top) - 8;
    return max(LEAST_POWER, top > scalbnf(448, power) ? power + 1 : power);
}

template <typename T> __device__ static void make_values(const eight &e, const source<T> &x, int first, int head)
{
    enum { WORDS = TILE / 4, PITCH = WORDS + 1 };
    __shared__ uint32_t turned[DIM][PITCH]; // a word: four places of a row
    vec<T> v[KEPT];
    load_tile(v, x.v + first * x.v_ld + head * x.dim, x.v_ld, e.s - first, x.dim,
              [](int i) { return key_at(row_of_vector(i / 4) * 4 + i % 4); });
    const float top = tile_largest(v), inverse = top == INFINITY ? 0 : scalbnf(1, -power_of(top)); // 0: to NaN or 0
#pragma unroll
    for (int i = 0; i < KEPT; i += 4)
#pragma unroll
        for (int j = 0; j < V; j++) {
            uint32_t word = 0;
#pragma unroll
            for (int b = 0; b < 4; b++)
                word |= (uint32_t)__nv_cvt_float_to_fp8(to_f32(v[i + b].v[j]) * inverse, __NV_SATFINITE, __NV_E4M3)
                        << 8 * b;
            turned[(int)threadIdx.x % VECTORS * V + j][row_of_vector(i / 4)] = word;
        }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < DIM * WORDS / 4; i += THREADS) {
        const int row = i / (WORDS / 4), at = i % (WORDS / 4) * 4;
        const uint32_t *from = &turned[row][at];
        *reinterpret_cast<uint4 *>(e.v + (int64_t)(head * DIM + row) * e.tiles * TILE + first + 4 * at) =
            make_uint4(from[0], from[1], from[2], from[3]);
    }
    if (threadIdx.x == 0)
        e.tile[head * e.tiles + first / TILE].v_power = power_of(top);
}

template <typename T> __global__ void __launch_bounds__(THREADS, 4) make_kernel(eight e, source<T> x)
{
    const int first = (int)blockIdx.x * TILE, head = (int)blockIdx.y;
    if (blockIdx.z == 0 && first < e.s)
        make_keys(e, x, first, head);
    else if (blockIdx.z == 1 && first < e.s)
        make_values(e, x, first, head);
    else if (blockIdx.z == 2 && first < e.m)
        make_queries(e, x, first, head);
}

void flash8::make(cudaStream_t s, const eight &e, struct tensor q, struct tensor k, struct tensor v, float scale)
{
    const dim3 blocks((unsigned)ceil_div(e.m > e.s ? e.m : e.s, TILE), (unsigned)e.heads, 3);
    with_type(q.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if constexpr (sizeof(T) == 2) {
            const source<T> x = {
                (const T *)q.data, (const T *)k.data, (const T *)v.data, q.ld, k.ld, v.ld, (int)q.n[2], scale};
            make_kernel<T><<<blocks, THREADS, 0, s>>>(e, x);
        }
    });
}
