// norm.cu: normalisations. A row stays in registers between the passes over it; sums are taken in an
// order that depends on the row's length alone, so a row's result does not depend on the rows beside it.
#include "kernels/cuda/vec.cuh"

#include <cfloat>
#include <cuda_fp8.h>

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

enum { MOD_THREADS = 1024, MOD_V = 8 };

template <typename T> struct mod_of {
    T *x;
    const T *update, *gate, *scale, *shift;
    void *y;
    float *y_scale;
    int64_t x_ld, update_ld, y_ld;
    float eps;
};

struct moments { // of some numbers: their mean, the sum of squared distances from it
    float mean, m2;
};

// Moments of a row to which every thread brings as many numbers, `own`: merged pairwise (Chan, Golub & LeVeque 1979),
// which loses nothing to a mean far from 0, in one exchange between the warps. shared holds a moments a warp.
__device__ static moments merge_block(moments m, float own, moments *shared)
{
    for (int i = 1; i < WARP; i *= 2, own *= 2) {
        float mean = __shfl_xor_sync(~0u, m.mean, i), m2 = __shfl_xor_sync(~0u, m.m2, i), apart = m.mean - mean;
        m = {0.5f * (m.mean + mean), m.m2 + m2 + apart * apart * (0.5f * own)};
    }
    if (threadIdx.x % WARP == 0)
        shared[threadIdx.x / WARP] = m;
    __syncthreads();
    int warps = (int)blockDim.x / WARP;
    float mean = 0, m2 = 0;
    for (int i = 0; i < warps; i++)
        mean += shared[i].mean;
    mean /= (float)warps;
    for (int i = 0; i < warps; i++)
        m2 += shared[i].m2 + (shared[i].mean - mean) * (shared[i].mean - mean) * own;
    return {mean, m2};
}

__device__ static moments moments_of(const float (&v)[MOD_V])
{
    moments m = {0, 0};
#pragma unroll
    for (int j = 0; j < MOD_V; j++)
        m.mean += v[j];
    m.mean *= 1.f / MOD_V;
#pragma unroll
    for (int j = 0; j < MOD_V; j++)
        m.m2 += (v[j] - m.mean) * (v[j] - m.mean);
    return m;
}

// The row's numbers as E4M3, its largest magnitude at the type's largest, 448.
__device__ static void store_e4m3(uint8_t *y, float *scale, const float (&v)[MOD_V], float *shared)
{
    float top = 0;
#pragma unroll
    for (int j = 0; j < MOD_V; j++)
        top = fmaxf(top, fabsf(v[j]));
    top = block_reduce<largest>(top, shared);
    float factor = top > 0 ? fmaxf(top / 448, FLT_MIN) : 1, inverse = 1 / factor;
    if (threadIdx.x == 0)
        *scale = factor;
    pack<__nv_fp8x2_storage_t, MOD_V / 2> out;
#pragma unroll
    for (int j = 0; j < MOD_V; j += 2)
        out.v[j / 2] = __nv_cvt_float2_to_fp8x2({v[j] * inverse, v[j + 1] * inverse}, __NV_SATFINITE, __NV_E4M3);
    *reinterpret_cast<decltype(out) *>(y) = out;
}

// A block a row, a vector a thread. All that a thread reads is asked for before anything is used.
template <typename T, bool UPDATE, bool E4M3> __global__ void __launch_bounds__(MOD_THREADS) mod_kernel(mod_of<T> p)
{
    __shared__ moments shared[MOD_THREADS / WARP];
    __shared__ float tops[MOD_THREADS / WARP];
    typedef pack<T, MOD_V> vector;
    const int64_t r = blockIdx.x;
    const int at = (int)threadIdx.x * MOD_V;
    vector x = *reinterpret_cast<const vector *>(p.x + r * p.x_ld + at), u, g;
    if (UPDATE) {
        u = *reinterpret_cast<const vector *>(p.update + r * p.update_ld + at);
        g = *reinterpret_cast<const vector *>(p.gate + at);
    }
    const vector scale = *reinterpret_cast<const vector *>(p.scale + at),
                 shift = *reinterpret_cast<const vector *>(p.shift + at);
    float v[MOD_V];
#pragma unroll
    for (int j = 0; j < MOD_V; j++) {
        if (UPDATE) // rounded as the residual is kept
            x.v[j] = from_f32<T>(to_f32(x.v[j]) + to_f32(g.v[j]) * to_f32(u.v[j]));
        v[j] = to_f32(x.v[j]);
    }
    if (UPDATE)
        *reinterpret_cast<vector *>(p.x + r * p.x_ld + at) = x;
    moments m = merge_block(moments_of(v), MOD_V, shared);
    float rstd = rsqrtf(m.m2 / (float)(blockDim.x * MOD_V) + p.eps);
#pragma unroll
    for (int j = 0; j < MOD_V; j++)
        v[j] = (v[j] - m.mean) * rstd * (1 + to_f32(scale.v[j])) + to_f32(shift.v[j]);
    if (E4M3)
        store_e4m3((uint8_t *)p.y + r * p.y_ld + at, p.y_scale + r, v, tops);
    else
        store((T *)p.y + r * p.y_ld + at, v);
}

template <typename T>
static void mod_rows(cudaStream_t s, const mod_of<T> &p, int64_t rows, int64_t n, bool residual, bool e4m3)
{
    unsigned blocks = (unsigned)rows, threads = (unsigned)(n / MOD_V);
    if (residual && e4m3)
        mod_kernel<T, true, true><<<blocks, threads, 0, s>>>(p);
    else if (residual)
        mod_kernel<T, true, false><<<blocks, threads, 0, s>>>(p);
    else if (e4m3)
        mod_kernel<T, false, true><<<blocks, threads, 0, s>>>(p);
    else
        mod_kernel<T, false, false><<<blocks, threads, 0, s>>>(p);
}

// Rows that whole warps share out evenly, and vectors of the rows' own type.
static bool mod_takes(const struct modulation *m)
{
    const struct tensor all[] = {m->x, m->update, m->gate, m->scale, m->shift};
    for (struct tensor t : all)
        if (!tensor_none(t) && (t.dtype != m->x.dtype || !wide(t, MOD_V)))
            return false;
    return m->x.dtype != DT_F32 && m->x.n[1] % (MOD_V * WARP) == 0 && m->x.n[1] <= MOD_THREADS * MOD_V &&
           wide(m->y, MOD_V);
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
                           m->eps};
            mod_rows<T>(s, p, m->x.n[0], m->x.n[1], residual, m->y.dtype == DT_E4M3);
        }
    });
    return true;
}

// ---- queries and keys

template <typename T> struct qk_of {
    T *x[2];
    row gamma[2];
    const float *rope;
    int64_t ld[2], rope_ld;
    int heads, dim;
    float eps;
};

// Pairs that may lie at any address are read number by number.
template <typename T, int V> __device__ static void load_pairs(float (&v)[V], const T *x)
{
    if constexpr (V > 2)
        load(v, x);
    else
        for (int j = 0; j < V; j++)
            v[j] = to_f32(x[j]);
}

// V numbers of a head, normalised and turned, go back to where they came from.
template <typename T, int V>
__device__ static void turn_pairs(T *x, const float (&v)[V], float rstd, const float (&g)[V], const float (&turn)[V])
{
    float out[V];
#pragma unroll
    for (int j = 0; j < V; j += 2) {
        float a = v[j] * rstd * g[j], b = v[j + 1] * rstd * g[j + 1];
        out[j] = a * turn[j] - b * turn[j + 1];
        out[j + 1] = b * turn[j] + a * turn[j + 1];
    }
    if constexpr (V > 2)
        store(x, out);
    else
        for (int j = 0; j < V; j++)
            x[j] = from_f32<T>(out[j]);
}

template <int V> __device__ static void load_gamma(float (&g)[V], row gamma, int i)
{
    if constexpr (V > 2)
        load_row(g, gamma, i);
    else
        for (int j = 0; j < V; j++)
            g[j] = load_any(gamma.p, gamma.type, i + j);
}

// L lanes take a head of a row, its query and its key together: twice the loads under way, and one look at the angles.
template <typename T, int V> __global__ void __launch_bounds__(256) qk_kernel(qk_of<T> p, int L)
{
    int head = (int)((blockIdx.y * blockDim.x + threadIdx.x) / (unsigned)L), lane = (int)threadIdx.x & (L - 1);
    bool here = head < p.heads; // the others lend their lanes to the shuffles
    int64_t r = blockIdx.x, at = here ? (int64_t)head * p.dim : 0;
    T *q = p.x[0] + (here ? r * p.ld[0] : 0) + at, *k = p.x[1] + (here ? r * p.ld[1] : 0) + at;
    const float *rope = p.rope + r * p.rope_ld;
    float vq[V], vk[V], turn[V], gq[V], gk[V], q2 = 0, k2 = 0;
    for (int i = lane * V; here && i < p.dim; i += L * V) {
        load_pairs(vq, q + i);
        load_pairs(vk, k + i);
        load_pairs(turn, rope + i);
        load_gamma(gq, p.gamma[0], i);
        load_gamma(gk, p.gamma[1], i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            q2 += vq[j] * vq[j];
            k2 += vk[j] * vk[j];
        }
    }
    for (int i = L / 2; i; i /= 2) {
        q2 += __shfl_xor_sync(~0u, q2, i);
        k2 += __shfl_xor_sync(~0u, k2, i);
    }
    float q_rstd = 1 / sqrtf(q2 / (float)p.dim + p.eps), k_rstd = 1 / sqrtf(k2 / (float)p.dim + p.eps);
    for (int i = lane * V; here && i < p.dim; i += L * V) {
        if (p.dim > L * V) { // more than one round: read again
            load_pairs(vq, q + i);
            load_pairs(vk, k + i);
            load_pairs(turn, rope + i);
            load_gamma(gq, p.gamma[0], i);
            load_gamma(gk, p.gamma[1], i);
        }
        turn_pairs(q + i, vq, q_rstd, gq, turn);
        turn_pairs(k + i, vk, k_rstd, gk, turn);
    }
}

template <typename T, int V> static void qk_rows(cudaStream_t s, int64_t rows, const qk_of<T> &p)
{
    int lanes = 1;
    while (lanes < WARP && lanes * V < p.dim)
        lanes *= 2;
    int64_t wanted = ceil_div(p.heads * lanes, WARP) * WARP, threads = wanted < 256 ? wanted : 256;
    // Blocks of the size that leaves the fewest threads without a head.
    if (wanted > 256 && wanted % 192 == 0)
        threads = 192;
    dim3 grid((unsigned)rows, (unsigned)ceil_div(wanted, threads));
    qk_kernel<T, V><<<grid, (unsigned)threads, 0, s>>>(p, lanes);
}

void launch_qk_norm_rope(cudaStream_t s, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                         float eps, struct tensor rope)
{
    with_type(q.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 16 / sizeof(T);
        qk_of<T> p = {{(T *)q.data, (T *)k.data}, {row_of(gamma_q), row_of(gamma_k)}, (const float *)rope.data,
                      {q.ld, k.ld},               rope.ld,                            (int)q.n[1],
                      (int)q.n[2],                eps};
        if (p.dim % V == 0 && wide(q, V) && wide(k, V) && wide(gamma_q, V) && wide(gamma_k, V) && wide(rope, V))
            qk_rows<T, V>(s, q.n[0], p);
        else
            qk_rows<T, 2>(s, q.n[0], p);
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
