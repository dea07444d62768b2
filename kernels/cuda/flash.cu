// flash.cu: attention in one pass over keys and values (FlashAttention-2, Dao 2023), for what the library has no engine
// for: a bias, causal attention, GPUs it does not know. Heads of up to 128 numbers, on the tensor cores of sm_80 and
// newer.
//
// A block takes TILE queries of a head, a warp ROWS of them. Keys and values come by in tiles of TILE, from key 0 on
// and never split, so that a query's row depends on no other query. Scores, weights and sums stay in registers, in the
// tensor cores' own layout: of a matrix (ROWS, 8) a lane holds rows lane / 4 and lane / 4 + 8, columns lane % 4 * 2 and
// the next.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/vec.cuh"

#include <cmath>
#include <cstdint>

enum { WARP = 32, TILE = 64, ROWS = 16, THREADS = TILE / ROWS * WARP, VECTOR = 8 }; // VECTOR: numbers in 16 bytes

// ---- instructions

// 16 bytes into shared memory, behind the thread's back; zeros unless here.
__device__ static void fetch(uint32_t to, const void *from, bool here)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(here ? 16 : 0) : "memory");
}

__device__ static void fetched() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Read once: not kept in the first cache. In its place among the other instructions, long before it is needed.
__device__ static void load_pair(float &a, float &b, const float *p)
{
    asm volatile("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "l"(p));
}

__device__ static float power_of_2(float x) // -inf gives 0
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ static uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- tiles

__device__ static uint32_t two(bf16 *, float low, float high)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

__device__ static uint32_t two(__half *, float low, float high)
{
    __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

template <typename T> struct flash_of {
    T *out;
    const T *q, *k, *v;
    const float *bias; // of head 0
    float *lse;        // (m, heads) rows of lse_ld, or NULL
    int64_t lse_ld, out_ld, q_ld, k_ld, v_ld, bias_head;
    int m, s, dim;
    float scale;
    bool causal, pairs; // pairs: the bias may be read two numbers at a time
};

// A tile's rows in shared memory, D numbers and a gap that spreads eight neighbours' vectors over all banks.
template <int D> struct tile {
    static constexpr int pitch = D + VECTOR, numbers = TILE * pitch;
};

// Rows first.. of a (rows, dim) matrix, with zeros beyond its rows and beyond dim.
template <typename T, int D>
__device__ static void fetch_tile(T *to, const T *from, int64_t ld, int first, int rows, int dim)
{
    constexpr int LANES = D % 64 ? 4 : 8, HEIGHT = THREADS / LANES; // lanes side by side, and rows at a time
    const int r = (int)threadIdx.x / LANES, c = (int)threadIdx.x % LANES * VECTOR;
    const T *at = from + (first + r) * ld + c;
    const uint32_t place = shared_address(to + r * tile<D>::pitch + c);
#pragma unroll
    for (int j = 0; j < TILE; j += HEIGHT, at += HEIGHT * ld)
#pragma unroll
        for (int i = 0; i < D; i += LANES * VECTOR) {
            const bool here = first + r + j < rows && c + i < dim;
            fetch(place + (j * tile<D>::pitch + i) * (int)sizeof(T), here ? at + i : from, here);
        }
}

// Bias of the lane's two queries and its keys in the tile from key `first` on.
__device__ static void load_bias(float (&s)[TILE / 8][4], const float *const (&row)[2], int first, int keys, bool pairs)
{
    int key = first + (int)threadIdx.x % 4 * 2;
    if (pairs && first + TILE <= keys) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            load_pair(s[n][0], s[n][1], row[0] + key + n * 8);
            load_pair(s[n][2], s[n][3], row[1] + key + n * 8);
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = key + n * 8 + i % 2;
            s[n][i] = at < keys ? row[i / 2][at] : 0;
        }
}

// s (ROWS, TILE) += q k^T. keys: where the lane's part of the tile begins.
template <typename T, int D>
__device__ static void add_scores(float (&s)[TILE / 8][4], const uint32_t (&q)[D / 16][4], uint32_t keys)
{
#pragma unroll
    for (int d = 0; d < D / 16; d++)
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            uint32_t k[4];
            load_matrices(k, keys + (n * 16 * tile<D>::pitch + d * 16) * (int)sizeof(T));
            multiply((T *)nullptr, s[2 * n], q[d], k[0], k[1]);
            multiply((T *)nullptr, s[2 * n + 1], q[d], k[2], k[3]);
        }
}

// o (ROWS, D) += p v
template <typename T, int D>
__device__ static void add_values(float (&o)[D / 8][4], const uint32_t (&p)[TILE / 16][4], uint32_t values)
{
#pragma unroll
    for (int n = 0; n < TILE / 16; n++)
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint32_t v[4];
            load_turned(v, values + (n * 16 * tile<D>::pitch + d * 16) * (int)sizeof(T));
            multiply((T *)nullptr, o[2 * d], p[n], v[0], v[1]);
            multiply((T *)nullptr, o[2 * d + 1], p[n], v[2], v[3]);
        }
}

// ---- softmax

// Of the lane's two queries: how many keys each sees, the largest score so far, and the lane's part of the sum.
struct running {
    int seen[2];
    float top[2], sum[2];
};

__device__ static void hide(float (&s)[TILE / 8][4], const running &r, int first)
{
    int key = first + (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (key + n * 8 + i % 2 >= r.seen[i / 2])
                s[n][i] = -INFINITY;
}

// Scores become weights 2^(scale * (s - top)); what was summed before is brought to the new top. A tile of hidden keys
// changes nothing at all: its factor is exactly 1.
template <typename T, int D>
__device__ static void weigh(uint32_t (&p)[TILE / 16][4], float (&s)[TILE / 8][4], float (&o)[D / 8][4], running &r,
                             float scale)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = r.top[h];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float from = top == -INFINITY ? 0 : top; // no key seen yet: all weights are 0
        float factor = power_of_2((r.top[h] - from) * scale), base = from * scale, sum = 0;
        r.top[h] = top;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            float a = power_of_2(s[n][2 * h] * scale - base), b = power_of_2(s[n][2 * h + 1] * scale - base);
            sum += a + b;
            p[n / 2][n % 2 * 2 + h] = two((T *)nullptr, a, b);
        }
        r.sum[h] = r.sum[h] * factor + sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            o[n][2 * h] *= factor;
            o[n][2 * h + 1] *= factor;
        }
    }
}

// The warp's rows, divided by their sums, through its own rows of shared memory: to memory in whole vectors.
template <typename T, int D>
__device__ static void write_out(const flash_of<T> &p, T *rows, float (&o)[D / 8][4], const running &r, int first)
{
    const int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = r.sum[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float factor = sum == 0 ? 0 : 1 / sum;
        const int row = first + lane / 4 + 8 * h;
        if (p.lse && lane % 4 == 0 && row < p.m)
            p.lse[row * p.lse_ld + blockIdx.y] = sum == 0 ? -INFINITY : r.top[h] * p.scale + logf(sum);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<uint32_t *>(rows + (lane / 4 + 8 * h) * tile<D>::pitch + n * 8 + lane % 4 * 2) =
                two((T *)nullptr, o[n][2 * h] * factor, o[n][2 * h + 1] * factor);
    }
    __syncwarp();
    T *out = p.out + blockIdx.y * (int64_t)p.dim;
#pragma unroll
    for (int j = 0; j < ROWS * D / VECTOR / WARP; j++) {
        int i = j * WARP + lane, row = i / (D / VECTOR), c = i % (D / VECTOR) * VECTOR;
        if (first + row < p.m && c < p.dim)
            *reinterpret_cast<uint4 *>(out + (first + row) * p.out_ld + c) =
                *reinterpret_cast<const uint4 *>(rows + row * tile<D>::pitch + c);
    }
}

// ---- the kernel

template <typename T, int D, bool BIAS>
__global__ void __launch_bounds__(THREADS, D > 64 ? 2 : BIAS ? 4 : 3) flash_kernel(flash_of<T> p)
{
    extern __shared__ uint4 flash_memory[];
    constexpr int NUMBERS = tile<D>::numbers, PITCH = tile<D>::pitch;
    T *q_tile = reinterpret_cast<T *>(flash_memory), *k_tile = q_tile + NUMBERS, *v_tile = k_tile + 2 * NUMBERS;
    const int lane = (int)threadIdx.x % WARP, warp_row = (int)threadIdx.x / WARP * ROWS;
    const int first = (int)blockIdx.x * TILE, row = first + warp_row + lane / 4;
    const int seen = p.causal ? min(p.s, first + TILE) : p.s, tiles = (seen + TILE - 1) / TILE;
    const int64_t head = blockIdx.y * (int64_t)p.dim;
    auto fetch_keys = [&](int t) {
        fetch_tile<T, D>(k_tile + t % 2 * NUMBERS, p.k + head, p.k_ld, t * TILE, p.s, p.dim);
        fetch_tile<T, D>(v_tile + t % 2 * NUMBERS, p.v + head, p.v_ld, t * TILE, p.s, p.dim);
    };
    fetch_tile<T, D>(q_tile, p.q + head, p.q_ld, first, p.m, p.dim);
    fetch_keys(0);

    running r = {{p.causal ? min(p.s, row + 1) : p.s, p.causal ? min(p.s, row + 9) : p.s}, {-INFINITY, -INFINITY}, {}};
    float s[TILE / 8][4], o[D / 8][4] = {};
    const float inverse = 1 / p.scale, *bias[2];
    if (BIAS) { // rows beyond the last read the last one's
        bias[0] = p.bias + blockIdx.y * p.bias_head + min(row, p.m - 1) * (int64_t)p.s;
        bias[1] = p.bias + blockIdx.y * p.bias_head + min(row + 8, p.m - 1) * (int64_t)p.s;
        load_bias(s, bias, 0, p.s, p.pairs);
    }
    fetched();
    __syncthreads();
    uint32_t q[D / 16][4], weights[TILE / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++)
        load_matrices(q[d], shared_address(q_tile + (warp_row + lane % 16) * PITCH + d * 16 + lane / 16 * 8));
    const uint32_t keys = shared_address(k_tile + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8),
                   values = shared_address(v_tile + lane % 16 * PITCH + lane / 16 * 8);

#pragma unroll 1
    for (int t = 0; t < tiles; t++) {
        const uint32_t turn = t % 2 * NUMBERS * (uint32_t)sizeof(T);
        fetched();
        __syncthreads(); // this tile is here, and nobody reads the one before it any more
        if (t + 1 < tiles)
            fetch_keys(t + 1);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] = BIAS ? s[n][i] * inverse : 0;
        add_scores<T, D>(s, q, keys + turn);
        if ((t + 1) * TILE > p.s || (p.causal && (t + 1) * TILE > first))
            hide(s, r, t * TILE);
        weigh<T, D>(weights, s, o, r, p.scale * 1.4426950408889634f);
        if (BIAS && t + 1 < tiles) // scores are weights now: their registers take the next tile's bias meanwhile
            load_bias(s, bias, (t + 1) * TILE, p.s, p.pairs);
        add_values<T, D>(o, weights, values + turn);
    }
    write_out<T, D>(p, q_tile + warp_row * PITCH, o, r, first + warp_row);
}

// ---- launch

template <typename T, int D> static void flash_rows(cudaStream_t s, const flash_of<T> &p, unsigned heads)
{
    const int bytes = 5 * tile<D>::numbers * (int)sizeof(T);
    const dim3 grid((unsigned)ceil_div(p.m, TILE), heads);
    if (p.bias) {
        cudaFuncSetAttribute(flash_kernel<T, D, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        flash_kernel<T, D, true><<<grid, THREADS, bytes, s>>>(p);
    } else {
        cudaFuncSetAttribute(flash_kernel<T, D, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        flash_kernel<T, D, false><<<grid, THREADS, bytes, s>>>(p);
    }
}

// Rows of whole vectors, few enough for numbers of 32 bits; scores can be divided by scale, and keep their order.
static bool takes(struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                  const struct attention_opts *opts)
{
    return q.dtype != DT_F32 && q.n[2] % VECTOR == 0 && q.n[2] <= 128 && q.n[1] <= MAX_GRID_Y &&
           q.n[0] < INT32_MAX / 2 && k.n[0] < INT32_MAX / 2 && wide(out, VECTOR) && wide(q, VECTOR) &&
           wide(k, VECTOR) && wide(v, VECTOR) && opts->scale >= 1e-6f && opts->scale <= 1e6f;
}

bool launch_flash(cudaStream_t s, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                  struct tensor v, const struct attention_opts *opts)
{
    if (!takes(out, q, k, v, opts))
        return false;
    const struct tensor *bias = &opts->bias;
    const bool pairs = (uintptr_t)bias->data % 8 == 0 && k.n[0] % 2 == 0 && bias->ld % 2 == 0;
    with_type(q.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if constexpr (sizeof(T) == 2) {
            const unsigned heads = (unsigned)q.n[1];
            flash_of<T> p = {(T *)out.data, (const T *)q.data, (const T *)k.data, (const T *)v.data,
                             tensor_none(*bias) ? nullptr : (const float *)bias->data,
                             (float *)lse.data, lse.ld, out.ld,        q.ld,              k.ld,              v.ld,
                             bias->ld,      (int)q.n[0],       (int)k.n[0],       (int)q.n[2],
                             opts->scale,   opts->causal,      pairs};
            if (p.dim <= 32)
                flash_rows<T, 32>(s, p, heads);
            else if (p.dim <= 64)
                flash_rows<T, 64>(s, p, heads);
            else if (p.dim <= 96)
                flash_rows<T, 96>(s, p, heads);
            else
                flash_rows<T, 128>(s, p, heads);
        }
    });
    return true;
}
