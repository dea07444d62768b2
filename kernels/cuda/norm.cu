// norm.cu: normalisations. A row stays in registers between the passes over it; sums are taken in an
// order that depends on the row's length alone, so a row's result does not depend on the rows beside it.
#include "kernels/cuda/codes.cuh"

enum { WARP = 32, MAX_THREADS = 1024 };

struct add {
    template <typename F> __device__ static F of(F a, F b) { return a + b; }
};
struct largest {
    template <typename F> __device__ static F of(F a, F b) { return a > b ? a : b; }
};

template <typename O, typename F> __device__ static F warp_reduce(F v)
{
    for (int i = WARP / 2; i; i /= 2)
        v = O::of(v, __shfl_xor_sync(~0u, v, i));
    return v;
}

// Every thread gets the result; shared holds a number for each warp and is free again after the next __syncthreads.
template <typename O, typename F> __device__ static F block_reduce(F v, F *shared)
{
    v = warp_reduce<O>(v);
    if (blockDim.x == WARP)
        return v;
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = v;
    __syncthreads();
    F all = shared[0];
    for (unsigned i = 1; i < blockDim.x / WARP; i++)
        all = O::of(all, shared[i]);
    return all;
}

// ---- rows

template <typename T> struct norm_of {
    T *y;
    const T *x;
    row gamma, beta;
    int64_t y_ld, x_ld, n;
    float one, eps;
    bool centred;
};

template <int V>
__device__ static void norm_point(float (&v)[V], int64_t i, float mean, float rstd, float one, row gamma, row beta)
{
    float g[V], b[V];
    if (gamma.p)
        load_row(g, gamma, i);
    if (beta.p)
        load_row(b, beta, i);
#pragma unroll
    for (int j = 0; j < V; j++) {
        v[j] = (v[j] - mean) * rstd;
        if (gamma.p)
            v[j] *= g[j] + one;
        if (beta.p)
            v[j] += b[j];
    }
}

// A block a row. R: vectors a thread keeps in registers, 0: the row is too long and is read again for each pass.
template <typename T, int V, int R> __global__ void __launch_bounds__(MAX_THREADS) norm_kernel(norm_of<T> p)
{
    constexpr int KEPT = R ? R : 1;
    __shared__ float shared[MAX_THREADS / WARP];
    const T *x = p.x + blockIdx.x * p.x_ld;
    T *y = p.y + blockIdx.x * p.y_ld;
    const int n = (int)p.n, step = (int)blockDim.x * V, rounds = R ? R : (n + step - 1) / step;
    float v[KEPT][V], sum = 0, square = 0;
    if (R) {
#pragma unroll
        for (int r = 0; r < R; r++)
            if (r * step + (int)threadIdx.x * V < n)
                load(v[r], x + r * step + threadIdx.x * V);
    }
#pragma unroll KEPT
    for (int r = 0; r < rounds; r++) {
        int i = r * step + (int)threadIdx.x * V;
        if (i >= n)
            continue;
        if (!R)
            load(v[0], x + i);
#pragma unroll
        for (int j = 0; j < V; j++)
            sum += v[R ? r : 0][j];
    }
    float mean = p.centred ? block_reduce<add>(sum, shared) / (float)n : 0;
#pragma unroll KEPT
    for (int r = 0; r < rounds; r++) {
        int i = r * step + (int)threadIdx.x * V;
        if (i >= n)
            continue;
        if (!R)
            load(v[0], x + i);
#pragma unroll
        for (int j = 0; j < V; j++)
            square += (v[R ? r : 0][j] - mean) * (v[R ? r : 0][j] - mean);
    }
    float rstd = 1 / sqrtf(block_reduce<add>(square, shared) / (float)n + p.eps);
#pragma unroll KEPT
    for (int r = 0; r < rounds; r++) {
        int i = r * step + (int)threadIdx.x * V;
        if (i >= n)
            continue;
        if (!R)
            load(v[0], x + i);
        norm_point(v[R ? r : 0], i, mean, rstd, p.one, p.gamma, p.beta);
        store(y + i, v[R ? r : 0]);
    }
}

template <typename T, int V> static void norm_rows(cudaStream_t s, int64_t rows, const norm_of<T> &p)
{
    constexpr int R = 4;
    int64_t vectors = ceil_div(p.n, V), threads = ceil_div(ceil_div(vectors, R), WARP) * WARP;
    unsigned blocks = (unsigned)rows;
    if (vectors > R * MAX_THREADS)
        norm_kernel<T, V, 0><<<blocks, MAX_THREADS, 0, s>>>(p);
    else
        norm_kernel<T, V, R><<<blocks, (unsigned)threads, 0, s>>>(p);
}

void launch_norm(cudaStream_t s, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta, float one,
                 float eps, bool centred)
{
    with_type(x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 16 / sizeof(T);
        norm_of<T> p = {(T *)y.data, (const T *)x.data, row_of(gamma), row_of(beta), y.ld, x.ld, x.n[1], one, eps,
                        centred};
        if (p.n % V == 0 && wide(x, V) && wide(y, V) && wide(gamma, V) && wide(beta, V))
            norm_rows<T, V>(s, x.n[0], p);
        else
            norm_rows<T, 1>(s, x.n[0], p);
    });
}

// ---- adaLN: [residual and] norm and modulation in one pass over memory
//
// What bounds it after memory is how many instructions a row takes. So a few threads share a row, and what they have to
// say to each other is paid for once by each of many numbers.

enum { MOD_THREADS = 128, MOD_WARPS = MOD_THREADS / WARP, MOD_V = 8, MOD_STEP = MOD_THREADS * MOD_V, MOD_MOST = 8 };

template <typename T> struct mod_of {
    T *x;
    const T *update, *gate, *scale, *shift;
    void *y;
    float *y_scale;
    int64_t x_ld, update_ld, y_ld;
    int n;
    float eps;
};

// Every thread gets the result. shared holds a number a warp, and is for this one call.
template <typename O> __device__ static float across(float v, float *shared)
{
    v = warp_reduce<O>(v);
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = v;
    __syncthreads();
    v = shared[0];
#pragma unroll
    for (int i = 1; i < MOD_WARPS; i++)
        v = O::of(v, shared[i]);
    return v;
}

// x + gate * update, rounded as the residual is kept.
template <typename T> __device__ static void add_update(pack<T, MOD_V> &x, const T *gate, const pack<T, MOD_V> &update)
{
    const pack<T, MOD_V> g = *reinterpret_cast<const pack<T, MOD_V> *>(gate);
    float v[MOD_V];
#pragma unroll
    for (int j = 0; j < MOD_V; j++)
        v[j] = to_f32(x.v[j]) + to_f32(g.v[j]) * to_f32(update.v[j]);
    store(x.v, v);
}

// The row's numbers in 8 bits, its largest magnitude as the largest there is.
template <typename C, int R>
__device__ static void store_row_codes(uint8_t *y, float *scale, const float (&v)[R][MOD_V], int at, int n, float *shared)
{
    float top = 0;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < MOD_V; j++)
            top = at + r * MOD_STEP < n ? fmaxf(top, C::magnitude(v[r][j])) : top;
    top = across<largest>(top, shared);
    const float factor = C::factor(top), inverse = 1 / factor;
    if (threadIdx.x == 0)
        *scale = factor;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (at + r * MOD_STEP < n)
            store_codes<C>(y + at + r * MOD_STEP, v[r], inverse);
}

// C: the way of 8 bits, or void.
// A block a row, R vectors a thread. All that comes from far away is asked for before anything is used.
template <typename T, int R, bool UPDATE, typename C>
__global__ void __launch_bounds__(MOD_THREADS) mod_kernel(mod_of<T> p)
{
    __shared__ float shared[3][MOD_WARPS];
    typedef pack<T, MOD_V> vector;
    const int64_t row = blockIdx.x;
    const int at = (int)threadIdx.x * MOD_V, n = p.n;
    T *const x = p.x + row * p.x_ld;
    vector kept[R], update[R];
    float v[R][MOD_V] = {}, sum = 0, square = 0;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (at + r * MOD_STEP < n)
            kept[r] = *reinterpret_cast<const vector *>(x + at + r * MOD_STEP);
    if (UPDATE) {
#pragma unroll
        for (int r = 0; r < R; r++)
            if (at + r * MOD_STEP < n)
                update[r] = *reinterpret_cast<const vector *>(p.update + row * p.update_ld + at + r * MOD_STEP);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (at + r * MOD_STEP >= n)
            continue;
        if (UPDATE) {
            add_update(kept[r], p.gate + at + r * MOD_STEP, update[r]);
            *reinterpret_cast<vector *>(x + at + r * MOD_STEP) = kept[r];
        }
#pragma unroll
        for (int j = 0; j < MOD_V; j++)
            sum += v[r][j] = to_f32(kept[r].v[j]);
    }
    const float mean = across<add>(sum, shared[0]) / (float)n;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < MOD_V; j++) {
            v[r][j] -= mean;
            square += at + r * MOD_STEP < n ? v[r][j] * v[r][j] : 0;
        }
    const float rstd = rsqrtf(across<add>(square, shared[1]) / (float)n + p.eps);
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int i = at + r * MOD_STEP;
        if (i >= n)
            continue;
        const vector scale = *reinterpret_cast<const vector *>(p.scale + i),
                     shift = *reinterpret_cast<const vector *>(p.shift + i);
#pragma unroll
        for (int j = 0; j < MOD_V; j++)
            v[r][j] = v[r][j] * rstd * (1 + to_f32(scale.v[j])) + to_f32(shift.v[j]);
        if (std::is_void_v<C>)
            store((T *)p.y + row * p.y_ld + i, v[r]);
    }
    if constexpr (!std::is_void_v<C>)
        store_row_codes<C>((uint8_t *)p.y + row * p.y_ld, p.y_scale + row, v, at, n, shared[2]);
}

template <typename T, int R, typename C>
static void mod_rows_as(cudaStream_t s, const mod_of<T> &p, int64_t rows, bool residual)
{
    if (residual)
        mod_kernel<T, R, true, C><<<(unsigned)rows, MOD_THREADS, 0, s>>>(p);
    else
        mod_kernel<T, R, false, C><<<(unsigned)rows, MOD_THREADS, 0, s>>>(p);
}

template <typename T, int R>
static void mod_rows(cudaStream_t s, const mod_of<T> &p, int64_t rows, bool residual, enum dtype y)
{
    (y == DT_E4M3 ? mod_rows_as<T, R, as_e4m3>
     : y == DT_I8 ? mod_rows_as<T, R, as_integer>
                  : mod_rows_as<T, R, void>)(s, p, rows, residual);
}

template <typename T>
static void mod_any(cudaStream_t s, const mod_of<T> &p, int64_t rows, bool residual, enum dtype y)
{
    const int64_t r = ceil_div(p.n, MOD_STEP);
    (r <= 1   ? mod_rows<T, 1>
     : r <= 2 ? mod_rows<T, 2>
     : r <= 3 ? mod_rows<T, 3>
     : r <= 4 ? mod_rows<T, 4>
              : mod_rows<T, MOD_MOST>)(s, p, rows, residual, y);
}

// Rows of whole vectors, of the rows' own type.
static bool mod_takes(const struct modulation *m)
{
    const struct tensor all[] = {m->x, m->update, m->gate, m->scale, m->shift};
    for (struct tensor t : all)
        if (!tensor_none(t) && (t.dtype != m->x.dtype || !wide(t, MOD_V)))
            return false;
    return m->x.dtype != DT_F32 && m->x.n[1] % MOD_V == 0 && m->x.n[1] <= MOD_STEP * MOD_MOST && wide(m->y, MOD_V);
}

bool launch_modulate(cudaStream_t s, const struct modulation *m)
{
    if (!mod_takes(m))
        return false;
    with_type(m->x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if constexpr (sizeof(T) == 2) {
            bool residual = !tensor_none(m->update);
            mod_of<T> p = {(T *)m->x.data,
                           residual ? (const T *)m->update.data : nullptr,
                           residual ? (const T *)m->gate.data : nullptr,
                           (const T *)m->scale.data,
                           (const T *)m->shift.data,
                           m->y.data,
                           m->y.scale,
                           m->x.ld,
                           m->update.ld,
                           m->y.ld,
                           (int)m->x.n[1],
                           m->eps};
            mod_any<T>(s, p, m->x.n[0], residual, m->y.dtype);
        }
    });
    return true;
}

// ---- queries and keys

enum { QK_THREADS = 128, QK_HEADS = 3 }; // heads that a thread has under way

template <typename T> struct qk_of {
    T *x[2];
    row gamma[2];
    const float *rope;
    int64_t ld[2], rope_ld, rows;
    int heads, dim;
    float eps;
};

// What the numbers 2i and 2i+1 of a head are multiplied by: cosines with the number's own gamma, sines with the other's.
template <int V> struct turning {
    float own[V], other[V];
};

template <int V> __device__ static turning<V> turning_of(const float (&turn)[V], const float (&g)[V])
{
    turning<V> t;
#pragma unroll
    for (int j = 0; j < V; j += 2) {
        t.own[j] = turn[j] * g[j];
        t.other[j] = -turn[j + 1] * g[j + 1];
        t.own[j + 1] = turn[j] * g[j + 1];
        t.other[j + 1] = turn[j + 1] * g[j];
    }
    return t;
}

template <int V> __device__ static void normalise_and_turn(float (&v)[V], const turning<V> &t, float rstd)
{
#pragma unroll
    for (int j = 0; j < V; j += 2) {
        const float a = v[j] * rstd, b = v[j + 1] * rstd;
        v[j] = a * t.own[j] + b * t.other[j];
        v[j + 1] = b * t.own[j + 1] + a * t.other[j + 1];
    }
}

// 1 / sqrt(mean of squares + eps) of the head that L lanes share.
template <int V> __device__ static float head_rstd(const float (&v)[V], int L, int dim, float eps)
{
    float square = 0;
#pragma unroll
    for (int j = 0; j < V; j++)
        square += v[j] * v[j];
    for (int i = L / 2; i; i /= 2)
        square += __shfl_xor_sync(~0u, square, i);
    return rsqrtf(square / (float)dim + eps);
}

// A block takes the queries, or the keys, of a row, or of several where these have few heads. A thread looks at angles
// and gamma once for all its heads. L lanes take a head, V numbers each; `step` times as many a row.
template <typename T, int V> __global__ void __launch_bounds__(QK_THREADS, 7) qk_kernel(qk_of<T> p, int L, int step)
{
    typedef pack<T, V> vector;
    const int slot = (int)threadIdx.x / L, first = slot & (step - 1), at = ((int)threadIdx.x & (L - 1)) * V;
    const int64_t row = (int64_t)blockIdx.x * (QK_THREADS / L / step) + slot / step;
    const bool mine = at < p.dim && row < p.rows; // the others lend their lanes to the shuffles
    const bool keys = blockIdx.y > 0;
    T *const x = (keys ? p.x[1] : p.x[0]) + row * (keys ? p.ld[1] : p.ld[0]) + at;
    float turn[V] = {}, g[V] = {};
    if (mine) {
        load(turn, p.rope + row * p.rope_ld + at);
        load_row(g, keys ? p.gamma[1] : p.gamma[0], at);
    }
    const turning<V> of = turning_of(turn, g);
    for (int head = first; head - first < p.heads; head += QK_HEADS * step) {
        vector kept[QK_HEADS] = {};
#pragma unroll
        for (int h = 0; h < QK_HEADS; h++)
            if (mine && head + h * step < p.heads)
                kept[h] = *reinterpret_cast<const vector *>(x + (head + h * step) * p.dim);
#pragma unroll
        for (int h = 0; h < QK_HEADS; h++) {
            float v[V];
            load(v, kept[h].v);
            normalise_and_turn(v, of, head_rstd(v, L, p.dim, p.eps));
            if (mine && head + h * step < p.heads)
                store(x + (head + h * step) * p.dim, v);
        }
    }
}

// Heads of any size at any address: a warp takes a head of one row, a pair a lane.
template <typename T> __global__ void __launch_bounds__(WARP) qk_pairs_kernel(qk_of<T> p)
{
    const bool keys = blockIdx.z > 0;
    T *const x = (keys ? p.x[1] : p.x[0]) + blockIdx.x * (keys ? p.ld[1] : p.ld[0]) + (int64_t)blockIdx.y * p.dim;
    const row gamma = keys ? p.gamma[1] : p.gamma[0];
    const float *rope = p.rope + blockIdx.x * p.rope_ld;
    float square = 0;
    for (int i = (int)threadIdx.x; i < p.dim; i += WARP)
        square += to_f32(x[i]) * to_f32(x[i]);
    const float rstd = rsqrtf(warp_reduce<add>(square) / (float)p.dim + p.eps);
    for (int i = 2 * (int)threadIdx.x; i < p.dim; i += 2 * WARP) {
        const float a = to_f32(x[i]) * rstd * load_any(gamma.p, gamma.type, i),
                    b = to_f32(x[i + 1]) * rstd * load_any(gamma.p, gamma.type, i + 1);
        x[i] = from_f32<T>(a * rope[i] - b * rope[i + 1]);
        x[i + 1] = from_f32<T>(b * rope[i] + a * rope[i + 1]);
    }
}

void launch_qk_norm_rope(cudaStream_t s, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                         float eps, struct tensor rope)
{
    with_type(q.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 8;
        const qk_of<T> p = {{(T *)q.data, (T *)k.data}, {row_of(gamma_q), row_of(gamma_k)}, (const float *)rope.data,
                            {q.ld, k.ld},               rope.ld,                            q.n[0],
                            (int)q.n[1],                (int)q.n[2],                        eps};
        int lanes = 1;
        while (lanes < WARP && lanes * V < p.dim)
            lanes *= 2;
        int step = 1;
        while (step < QK_THREADS / lanes && step * QK_HEADS < p.heads)
            step *= 2;
        if (p.dim % V == 0 && p.dim <= WARP * V && wide(q, V) && wide(k, V) && wide(gamma_q, V) && wide(gamma_k, V) &&
            wide(rope, V))
            qk_kernel<T, V><<<dim3((unsigned)ceil_div(q.n[0], QK_THREADS / lanes / step), 2), QK_THREADS, 0, s>>>(
                p, lanes, step);
        else
            qk_pairs_kernel<T><<<dim3((unsigned)q.n[0], (unsigned)p.heads, 2), WARP, 0, s>>>(p);
    });
}

// ---- group norm

// Sums of x (h, w, c) in f32 over a few pixels, then in f64: as exact as f64 throughout to the last digit of f32.
enum { GROUP_THREADS = 256, F32_RUN = 8 };

// A block takes a row of the picture and `vectors` vectors of channels that hold whole groups. size: channels of one.
template <typename T, int V>
__global__ void __launch_bounds__(GROUP_THREADS)
    group_sums_kernel(double *sums, int64_t sums_ld, const T *x, int64_t ld, int64_t w, int64_t c, int vectors, int size)
{
    __shared__ double part[2][GROUP_THREADS];
    const T *from = x + blockIdx.y * ld;
    int lanes = GROUP_THREADS / vectors, lane = (int)threadIdx.x / vectors;
    int64_t channel = (blockIdx.x * (int64_t)vectors + threadIdx.x % vectors) * V;
    double sum = 0, square = 0;
    if (lane < lanes && channel < c)
        for (int64_t p = lane; p < w;) {
            float s = 0, q = 0, v[V];
            for (int run = 0; run < F32_RUN && p < w; run++, p += lanes) {
                load(v, from + p * c + channel);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    s += v[j];
                    q += v[j] * v[j];
                }
            }
            sum += (double)s;
            square += (double)q;
        }
    part[0][threadIdx.x] = sum;
    part[1][threadIdx.x] = square;
    __syncthreads();
    int group = (int)threadIdx.x / 2, which = (int)threadIdx.x % 2, per = size / V;
    int64_t number = blockIdx.x * (int64_t)(vectors / per) + group;
    if (group >= vectors / per || number >= c / size)
        return;
    double all = 0;
    for (int l = 0; l < lanes; l++)
        for (int i = 0; i < per; i++)
            all += part[which][l * vectors + group * per + i];
    sums[blockIdx.y * sums_ld + number * 2 + which] = all;
}

// Groups of any size: a block takes one group of one row.
template <typename T>
__global__ void __launch_bounds__(GROUP_THREADS)
    group_sum_kernel(double *sums, int64_t sums_ld, const T *x, int64_t ld, int64_t w, int64_t c, int64_t size)
{
    __shared__ double shared[GROUP_THREADS / WARP];
    const T *from = x + blockIdx.y * ld + blockIdx.x * size;
    double sum = 0, square = 0;
    for (int64_t i = threadIdx.x; i < w * size; i += GROUP_THREADS) {
        double v = (double)to_f32(from[i / size * c + i % size]);
        sum += v;
        square += v * v;
    }
    sum = block_reduce<add>(sum, shared);
    square = block_reduce<add>(square, shared);
    if (threadIdx.x == 0) {
        sums[blockIdx.y * sums_ld + blockIdx.x * 2] = sum;
        sums[blockIdx.y * sums_ld + blockIdx.x * 2 + 1] = square;
    }
}

template <typename T, int V> static bool group_sums_as(cudaStream_t s, struct tensor sums, struct tensor x)
{
    int64_t size = x.n[2] / sums.n[1], per = size / V, half = GROUP_THREADS / 2;
    // A thread adds up one of a group's two sums, so a block has room for half as many groups as threads.
    if (size % V || per > GROUP_THREADS || !wide(x, V))
        return false;
    int64_t groups = GROUP_THREADS / per < half ? GROUP_THREADS / per : half;
    groups = groups < sums.n[1] ? groups : sums.n[1];
    dim3 grid((unsigned)ceil_div(sums.n[1], groups), (unsigned)x.n[0]);
    group_sums_kernel<T, V><<<grid, GROUP_THREADS, 0, s>>>((double *)sums.data, sums.ld, (const T *)x.data, x.ld, x.n[1],
                                                          x.n[2], (int)(groups * per), (int)size);
    return true;
}

void launch_group_sums(cudaStream_t s, struct tensor sums, struct tensor x)
{
    with_type(x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if (group_sums_as<T, 16 / sizeof(T)>(s, sums, x) || group_sums_as<T, 8 / sizeof(T)>(s, sums, x))
            return;
        dim3 grid((unsigned)sums.n[1], (unsigned)x.n[0]);
        group_sum_kernel<T><<<grid, GROUP_THREADS, 0, s>>>((double *)sums.data, sums.ld, (const T *)x.data, x.ld, x.n[1],
                                                          x.n[2], x.n[2] / sums.n[1]);
    });
}

// A block a group; which thread adds which rows depends on the number of all rows alone.
__global__ void __launch_bounds__(GROUP_THREADS)
    group_scales_kernel(float *mean, float *scale, const double *sums, int64_t ld, int64_t rows, double count,
                        int64_t size, row gamma, float eps)
{
    __shared__ double shared[GROUP_THREADS / WARP];
    double sum = 0, square = 0;
    for (int64_t r = threadIdx.x; r < rows; r += GROUP_THREADS) {
        sum += sums[r * ld + blockIdx.x * 2];
        square += sums[r * ld + blockIdx.x * 2 + 1];
    }
    double m = block_reduce<add>(sum, shared) / count;
    double variance = block_reduce<add>(square, shared) / count - m * m;
    double rstd = 1 / sqrt((variance > 0 ? variance : 0) + (double)eps);
    for (int64_t c = blockIdx.x * size + threadIdx.x; c < (blockIdx.x + 1) * size; c += GROUP_THREADS) {
        mean[c] = (float)m;
        scale[c] = (float)(rstd * (double)load_any(gamma.p, gamma.type, c));
    }
}

void launch_group_scales(cudaStream_t s, float *mean, float *scale, struct tensor sums, int64_t pixels,
                         struct tensor gamma, float eps)
{
    int64_t size = tensor_count(gamma) / sums.n[1];
    group_scales_kernel<<<(unsigned)sums.n[1], GROUP_THREADS, 0, s>>>(
        mean, scale, (const double *)sums.data, sums.ld, sums.n[0], (double)(sums.n[0] * pixels * size), size,
        row_of(gamma), eps);
}

template <typename T> struct apply_of {
    T *y;
    const T *x;
    int64_t y_ld, x_ld, rows, n, c;
    const float *mean, *scale;
    row beta;
    enum act act;
};

template <typename T, int V> __global__ void __launch_bounds__(GROUP_THREADS) group_apply_kernel(apply_of<T> p)
{
    int64_t i = ((int64_t)blockIdx.x * GROUP_THREADS + threadIdx.x) * V, channel = i % p.c;
    if (i >= p.n)
        return;
    float mean[V], scale[V], beta[V], v[V];
    load(mean, p.mean + channel);
    load(scale, p.scale + channel);
    load_row(beta, p.beta, channel);
    for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
        load(v, p.x + r * p.x_ld + i);
#pragma unroll
        for (int j = 0; j < V; j++)
            v[j] = activated((v[j] - mean[j]) * scale[j] + beta[j], p.act);
        store(p.y + r * p.y_ld + i, v);
    }
}

void launch_group_apply(cudaStream_t s, struct tensor y, struct tensor x, const float *mean, const float *scale,
                        struct tensor beta, enum act act)
{
    with_type(x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 16 / sizeof(T);
        apply_of<T> p = {(T *)y.data, (const T *)x.data, y.ld,  x.ld,         x.n[0], x.n[1] * x.n[2],
                         x.n[2],      mean,              scale, row_of(beta), act};
        bool fast = p.c % V == 0 && wide(x, V) && wide(y, V) && wide(beta, V);
        dim3 grid((unsigned)ceil_div(p.n, GROUP_THREADS * (fast ? V : 1)),
                  (unsigned)(p.rows < MAX_GRID_Y ? p.rows : MAX_GRID_Y));
        if (fast)
            group_apply_kernel<T, V><<<grid, GROUP_THREADS, 0, s>>>(p);
        else
            group_apply_kernel<T, 1><<<grid, GROUP_THREADS, 0, s>>>(p);
    });
}
