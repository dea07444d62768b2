// softmax.cu: weights of attention from scores in memory, for heads that fit no fused engine. A row is read once and
// stays in registers; only one of more than KEPT numbers is read twice.
//
// Weights take the place of their row's scores: of halves, they fill its first half.
#include "kernels/cuda/vec.cuh"

#include <cmath>
#include <cstdint>

enum { WARP = 32, MAX_THREADS = 1024, V = 4, R = 8, LONG_R = 4, KEPT = MAX_THREADS * R * V };

// Some numbers' largest, and the sum of e^(x - top) over them.
struct part {
    float top, sum;
};

__device__ static part merge(part a, part b)
{
    float top = fmaxf(a.top, b.top), from = top == -INFINITY ? 0 : top; // all hidden: the sum is 0
    return {top, a.sum * __expf(a.top - from) + b.sum * __expf(b.top - from)};
}

// Every thread gets the whole block's; what threads read before it, others may write after it.
__device__ static part merge_block(part m, part *shared)
{
    for (int i = 1; i < WARP; i *= 2)
        m = merge(m, {__shfl_xor_sync(~0u, m.top, i), __shfl_xor_sync(~0u, m.sum, i)});
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = m;
    __syncthreads();
    part all = shared[0];
    for (unsigned i = 1; i < blockDim.x / WARP; i++)
        all = merge(all, shared[i]);
    return all;
}

// One query of one head.
struct line {
    float *scores;
    const float *bias; // or NULL
    int64_t seen;      // keys
};

__device__ static line line_of(const softmax &p)
{
    int64_t q = blockIdx.x % p.rows, head = blockIdx.x / p.rows;
    return {p.scores + blockIdx.x * p.ld, p.bias ? p.bias + head * p.bias_head + q * p.bias_row : nullptr,
            p.causal && p.first + q + 1 < p.keys ? p.first + q + 1 : p.keys};
}

// Numbers i.. as they are in memory, where columns from keys on may never have been written.
__device__ static void load_scores(float (&v)[V], const line &l, int64_t i, int64_t keys)
{
    if (i + V <= keys)
        load(v, l.scores + i);
    else
#pragma unroll
        for (int j = 0; j < V; j++)
            v[j] = i + j < keys ? l.scores[i + j] : 0;
}

// The same scaled and biased; -inf where no key is seen.
__device__ static void scale_scores(float (&v)[V], const softmax &p, const line &l, int64_t i)
{
#pragma unroll
    for (int j = 0; j < V; j++)
        v[j] = i + j < l.seen ? p.scale * v[j] + (l.bias ? l.bias[i + j] : 0) : -INFINITY;
}

__device__ static float top_of(float top, const float (&v)[V])
{
#pragma unroll
    for (int j = 0; j < V; j++)
        top = fmaxf(top, v[j]);
    return top;
}

__device__ static void tell_lse(const softmax &p, part all)
{
    const int64_t q = blockIdx.x % p.rows, head = blockIdx.x / p.rows;
    if (p.lse && threadIdx.x == 0)
        p.lse[(p.first + q) * p.lse_ld + head] = all.sum == 0 ? -INFINITY : all.top + logf(all.sum);
}

// A block a row.
template <typename T> __global__ void __launch_bounds__(MAX_THREADS) softmax_kernel(softmax p)
{
    __shared__ part shared[MAX_THREADS / WARP];
    const line l = line_of(p);
    const int step = (int)blockDim.x * V, at = (int)threadIdx.x * V, n = (int)p.ld;
    float v[R][V];
    part own = {-INFINITY, 0};
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r * step + at < n)
            load_scores(v[r], l, r * step + at, p.keys);
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r * step + at < n) {
            scale_scores(v[r], p, l, r * step + at);
            own.top = top_of(own.top, v[r]);
        }
    const float from = own.top == -INFINITY ? 0 : own.top;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r * step + at < n)
#pragma unroll
            for (int j = 0; j < V; j++) {
                v[r][j] = __expf(v[r][j] - from);
                own.sum += v[r][j];
            }
    const part all = merge_block(own, shared);
    tell_lse(p, all);
    // A thread that sees no key has no top, and weights of 0 already.
    const float factor = own.top == -INFINITY ? 1 : __expf(from - all.top) / all.sum;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r * step + at < n) {
#pragma unroll
            for (int j = 0; j < V; j++)
                v[r][j] *= factor;
            store((T *)l.scores + r * step + at, v[r]);
        }
}

// A block a row of any length. Second time, a round's numbers are read by all before weights take their place: those of
// later rounds lie behind.
template <typename T> __global__ void __launch_bounds__(MAX_THREADS) long_softmax_kernel(softmax p)
{
    __shared__ part shared[MAX_THREADS / WARP];
    const line l = line_of(p);
    const int64_t step = MAX_THREADS * V, round = step * LONG_R, at = threadIdx.x * V;
    float v[LONG_R][V];
    part own = {-INFINITY, 0};
    auto load_round = [&](int64_t first) {
#pragma unroll
        for (int r = 0; r < LONG_R; r++)
            if (first + r * step + at < p.ld)
                load_scores(v[r], l, first + r * step + at, p.keys);
#pragma unroll
        for (int r = 0; r < LONG_R; r++)
            scale_scores(v[r], p, l, first + r * step + at);
    };
    for (int64_t first = 0; first < p.ld; first += round) {
        load_round(first);
        part some = {-INFINITY, 0};
#pragma unroll
        for (int r = 0; r < LONG_R; r++)
            some.top = top_of(some.top, v[r]);
        const float from = some.top == -INFINITY ? 0 : some.top;
#pragma unroll
        for (int r = 0; r < LONG_R; r++)
#pragma unroll
            for (int j = 0; j < V; j++)
                some.sum += __expf(v[r][j] - from);
        own = merge(own, some);
    }
    const part all = merge_block(own, shared);
    tell_lse(p, all);
    const float from = all.top == -INFINITY ? 0 : all.top, factor = all.sum == 0 ? 0 : 1 / all.sum;
    for (int64_t first = 0; first < p.ld; first += round) {
        load_round(first);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < LONG_R; r++)
            if (first + r * step + at < p.ld) {
#pragma unroll
                for (int j = 0; j < V; j++)
                    v[r][j] = __expf(v[r][j] - from) * factor;
                store((T *)l.scores + first + r * step + at, v[r]);
            }
    }
}

void launch_softmax(cudaStream_t s, const struct softmax *p)
{
    const unsigned blocks = (unsigned)(p->heads * p->rows);
    with_type(p->type, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if (p->ld > KEPT)
            long_softmax_kernel<T><<<blocks, MAX_THREADS, 0, s>>>(*p);
        else
            softmax_kernel<T><<<blocks, (unsigned)(ceil_div(ceil_div(p->ld, V), R * WARP) * WARP), 0, s>>>(*p);
    });
}

// ---- parts of attention

__global__ static void turn_kernel(float *y, int64_t ld, int64_t n, int64_t m, const float *x, float value)
{
    const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, row = i / m, column = i % m; // of y
    if (row < n)
        y[row * ld + column] = x ? x[column * n + row] : value;
}

void launch_turn(cudaStream_t s, struct tensor y, const float *x, float value)
{
    turn_kernel<<<(unsigned)ceil_div(tensor_count(y), 256), 256, 0, s>>>((float *)y.data, y.ld, y.n[0], y.n[1], x, value);
}

// A thread takes N numbers of one query's head.
template <typename T, int N>
__global__ static void merge_kernel(T *out, int64_t out_ld, const T *parts, int64_t part_ld, const float *lse,
                                    int64_t lse_ld, int n, int64_t rows, int64_t heads, int64_t dim)
{
    const int64_t i = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) * N, width = heads * dim;
    if (i >= rows * width)
        return;
    const float *own = lse + i / dim; // row * heads + head
    float top = -INFINITY, sum = 0, v[N], total[N] = {};
    for (int p = 0; p < n; p++)
        top = fmaxf(top, own[p * lse_ld]);
    for (int p = 0; p < n; p++) {
        const float weight = own[p * lse_ld] == -INFINITY ? 0 : expf(own[p * lse_ld] - top);
        if (weight == 0)
            continue;
        load(v, parts + p * part_ld + i);
        sum += weight;
#pragma unroll
        for (int j = 0; j < N; j++)
            total[j] += weight * v[j];
    }
#pragma unroll
    for (int j = 0; j < N; j++)
        total[j] = sum == 0 ? 0 : total[j] / sum;
    store(out + i / width * out_ld + i % width, total);
}

void launch_merge(cudaStream_t s, struct tensor out, struct tensor parts, struct tensor lse)
{
    const int64_t rows = out.n[0], heads = out.n[1], dim = out.n[2], count = rows * heads * dim;
    with_type(out.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        const bool vectors = dim % 8 == 0 && wide(out, 8) && wide(parts, 8);
        const unsigned blocks = (unsigned)ceil_div(count, vectors ? 8 * 256 : 256);
        auto *kernel = vectors ? merge_kernel<T, 8> : merge_kernel<T, 1>;
        kernel<<<blocks, 256, 0, s>>>((T *)out.data, out.ld, (const T *)parts.data, parts.ld, (const float *)lse.data,
                                      lse.ld, (int)parts.n[0], rows, heads, dim);
    });
}
