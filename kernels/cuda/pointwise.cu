// pointwise.cu: operations on single numbers, and those that only move them. All are bound by memory: a thread takes 16
// bytes of each operand, and which operation it is is one branch that all threads take alike.
#include "kernels/cuda/vec.cuh"

enum { THREADS = 128 };

static dim3 grid_over(int64_t rows, int64_t n)
{
    return dim3((unsigned)ceil_div(n, THREADS), (unsigned)(rows < MAX_GRID_Y ? rows : MAX_GRID_Y));
}

// ---- arithmetic

template <typename T> struct points_of {
    enum point op;
    enum act act;
    T *x;
    const T *from, *y; // x itself, unless the operation writes elsewhere
    row r;
    int64_t x_ld, from_ld, y_ld, rows, n, row_n;
    float a;
};

// x op= y; CFG finds negative in x and positive in y
template <int V>
__device__ static void point(enum point op, enum act act, float a, float (&x)[V], const float (&y)[V],
                             const float (&g)[V])
{
#pragma unroll
    for (int j = 0; j < V; j++)
        switch (op) {
        case POINT_ADD:
            x[j] += y[j];
            break;
        case POINT_MUL:
            x[j] = activated(x[j], act) * y[j];
            break;
        case POINT_AXPY:
            x[j] += a * y[j];
            break;
        case POINT_GATE_ADD:
            x[j] += g[j] * y[j];
            break;
        case POINT_CFG:
            x[j] += a * (y[j] - x[j]);
            break;
        case POINT_ACT:
            x[j] = activated(x[j] + g[j], act);
            break;
        }
}

template <typename T, int V> __global__ void __launch_bounds__(THREADS) points_kernel(points_of<T> p)
{
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i >= p.n)
        return;
    float g[V] = {};
    if (p.r.p)
        load_row(g, p.r, p.n == p.row_n ? i : i % p.row_n);
    for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
        float x[V], y[V];
        load(x, p.from + r * p.from_ld + i);
        if (p.op != POINT_ACT)
            load(y, p.y + r * p.y_ld + i);
        point(p.op, p.act, p.a, x, y, g);
        store(p.x + r * p.x_ld + i, x);
    }
}

static bool without_gaps(struct tensor t)
{
    return tensor_none(t) || t.dims == 1 || t.n[0] < 2 || t.ld == t.n[1] * t.n[2] * t.n[3];
}

void launch_points(cudaStream_t s, const struct points *p)
{
    grid_of g = rows_of(p->x);
    if (tensor_none(p->row) && without_gaps(p->x) && without_gaps(p->y) && without_gaps(p->z))
        g = {1, g.rows * g.n};
    with_type(p->x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 16 / sizeof(T);
        bool cfg = p->op == POINT_CFG;
        struct tensor from = cfg ? p->y : p->x, y = cfg ? p->z : p->y;
        points_of<T> q = {p->op,   p->act,  (T *)p->x.data, (const T *)from.data, (const T *)y.data, row_of(p->row),
                          p->x.ld, from.ld, y.ld,           g.rows,               g.n,               p->row_n,
                          p->a};
        if (g.n % V == 0 && p->row_n % V == 0 && wide(p->x, V) && wide(p->y, V) && wide(p->z, V) && wide(p->row, V))
            points_kernel<T, V><<<grid_over(g.rows, g.n / V), THREADS, 0, s>>>(q);
        else
            points_kernel<T, 1><<<grid_over(g.rows, g.n), THREADS, 0, s>>>(q);
    });
}

// ---- moving

template <typename D, typename S, int V>
__global__ void __launch_bounds__(THREADS)
    convert_kernel(D *dst, int64_t dst_ld, const S *src, int64_t src_ld, int64_t rows, int64_t n)
{
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    for (int64_t r = blockIdx.y; i < n && r < rows; r += gridDim.y) {
        float v[V];
        load(v, src + r * src_ld + i);
        store(dst + r * dst_ld + i, v);
    }
}

void launch_convert(cudaStream_t s, struct tensor dst, struct tensor src)
{
    grid_of g = rows_of(dst);
    with_type(dst.dtype, [&](auto *to) {
        with_type(src.dtype, [&](auto *from) {
            typedef std::remove_pointer_t<decltype(to)> D;
            typedef std::remove_pointer_t<decltype(from)> S;
            if (g.n % 8 == 0 && wide(dst, 8) && wide(src, 8))
                convert_kernel<D, S, 8><<<grid_over(g.rows, g.n / 8), THREADS, 0, s>>>((D *)dst.data, dst.ld,
                                                                                      (S *)src.data, src.ld, g.rows, g.n);
            else
                convert_kernel<D, S, 1><<<grid_over(g.rows, g.n), THREADS, 0, s>>>((D *)dst.data, dst.ld, (S *)src.data,
                                                                                  src.ld, g.rows, g.n);
        });
    });
}

// Rows of n units of type U, ld units apart; src NULL: zeros.
template <typename U>
__global__ void __launch_bounds__(THREADS)
    copy_kernel(U *dst, int64_t dst_ld, const U *src, int64_t src_ld, int64_t rows, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    for (int64_t r = blockIdx.y; i < n && r < rows; r += gridDim.y)
        dst[r * dst_ld + i] = src ? src[r * src_ld + i] : U{};
}

template <typename U> static bool copy_as(cudaStream_t s, struct tensor dst, struct tensor src)
{
    grid_of g = rows_of(dst);
    if (without_gaps(dst) && without_gaps(src))
        g = {1, g.rows * g.n};
    int64_t size = (int64_t)dtype_size(dst.dtype), unit = sizeof(U);
    bool strides = g.rows == 1 || (dst.ld * size % unit == 0 && src.ld * size % unit == 0);
    if ((uintptr_t)dst.data % sizeof(U) || (uintptr_t)src.data % sizeof(U) || g.n * size % unit || !strides)
        return false;
    int64_t n = g.n * size / unit;
    copy_kernel<U><<<grid_over(g.rows, n), THREADS, 0, s>>>((U *)dst.data, dst.ld * size / unit, (U *)src.data,
                                                           src.ld * size / unit, g.rows, n);
    return true;
}

void launch_copy(cudaStream_t s, struct tensor dst, struct tensor src)
{
    if (!copy_as<uint4>(s, dst, src) && !copy_as<uint32_t>(s, dst, src) && !copy_as<uint16_t>(s, dst, src))
        copy_as<uint8_t>(s, dst, src);
}

// ---- tables

template <typename T>
__global__ void embed_kernel(T *y, int64_t ld, int64_t n, row table, int64_t table_ld, int64_t table_rows,
                             const int32_t *ids, int *bad)
{
    int32_t id = ids[blockIdx.x];
    bool within = id >= 0 && id < table_rows;
    if (!within && threadIdx.x == 0)
        *bad = 1;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        y[blockIdx.x * ld + i] = from_f32<T>(within ? load_any(table.p, table.type, id * table_ld + i) : 0);
}

void launch_embed(cudaStream_t s, struct tensor y, struct tensor table, struct tensor ids, int *bad)
{
    with_type(y.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        embed_kernel<T><<<(unsigned)y.n[0], 256, 0, s>>>((T *)y.data, y.ld, y.n[1], row_of(table), table.ld, table.n[0],
                                                        (const int32_t *)ids.data, bad);
    });
}

__global__ void __launch_bounds__(THREADS)
    relative_kernel(float *y, int64_t ld, int64_t heads, int64_t m, int64_t s, row table, int64_t table_ld,
                    int64_t table_rows, const int32_t *buckets, int *bad)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, q = i / s, k = i % s;
    if (i >= m * s)
        return;
    int32_t id = buckets[k - q + m - 1];
    bool within = id >= 0 && id < table_rows;
    if (!within)
        *bad = 1;
    for (int64_t h = blockIdx.y; h < heads; h += gridDim.y)
        y[h * ld + i] = within ? load_any(table.p, table.type, id * table_ld + h) : 0;
}

void launch_relative_bias(cudaStream_t s, struct tensor y, struct tensor table, struct tensor buckets, int *bad)
{
    relative_kernel<<<grid_over(y.n[0], y.n[1] * y.n[2]), THREADS, 0, s>>>(
        (float *)y.data, y.ld, y.n[0], y.n[1], y.n[2], row_of(table), table.ld, table.n[0],
        (const int32_t *)buckets.data, bad);
}

// ---- pictures

template <typename U>
__global__ void __launch_bounds__(THREADS)
    upsample_kernel(U *y, int64_t y_ld, const U *x, int64_t x_ld, int64_t rows, int64_t w, int64_t c)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= w * c)
        return;
    for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
        U v = x[r * x_ld + i], *to = y + 2 * r * y_ld + i / c * 2 * c + i % c;
        to[0] = to[c] = to[y_ld] = to[y_ld + c] = v;
    }
}

template <typename U> static bool upsample_as(cudaStream_t s, struct tensor y, struct tensor x)
{
    int64_t size = (int64_t)dtype_size(x.dtype), unit = sizeof(U);
    if ((uintptr_t)y.data % sizeof(U) || (uintptr_t)x.data % sizeof(U) || x.n[2] * size % unit || x.ld * size % unit ||
        y.ld * size % unit)
        return false;
    int64_t c = x.n[2] * size / unit;
    upsample_kernel<U><<<grid_over(x.n[0], x.n[1] * c), THREADS, 0, s>>>(
        (U *)y.data, y.ld * size / unit, (U *)x.data, x.ld * size / unit, x.n[0], x.n[1], c);
    return true;
}

void launch_upsample2x(cudaStream_t s, struct tensor y, struct tensor x)
{
    if (!upsample_as<uint4>(s, y, x) && !upsample_as<uint32_t>(s, y, x))
        upsample_as<uint16_t>(s, y, x);
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    unpack_kernel(T *y, int64_t y_ld, const T *x, int64_t x_ld, int64_t rows, int64_t w, int64_t c, float scale,
                  float shift)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, pixel = i / c, channel = i % c;
    for (int64_t r = blockIdx.y; i < w * c && r < rows; r += gridDim.y) {
        int64_t token = r / 2 * (w / 2) + pixel / 2;
        float v = to_f32(x[token * x_ld + channel * 4 + r % 2 * 2 + pixel % 2]);
        y[r * y_ld + i] = from_f32<T>(v / scale + shift);
    }
}

void launch_unpack_latents(cudaStream_t s, struct tensor latent, struct tensor tokens, float scale, float shift)
{
    with_type(latent.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        unpack_kernel<T><<<grid_over(latent.n[0], latent.n[1] * latent.n[2]), THREADS, 0, s>>>(
            (T *)latent.data, latent.ld, (const T *)tokens.data, tokens.ld, latent.n[0], latent.n[1], latent.n[2], scale,
            shift);
    });
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    u8_kernel(uint8_t *y, int64_t y_ld, const T *x, int64_t x_ld, int64_t rows, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    for (int64_t r = blockIdx.y; i < n && r < rows; r += gridDim.y) {
        float v = to_f32(x[r * x_ld + i]) * 0.5f + 0.5f;
        v = v > 0 ? v : 0; // NaN becomes 0
        v = v < 1 ? v : 1;
        y[r * y_ld + i] = (uint8_t)rintf(v * 255);
    }
}

void launch_to_u8(cudaStream_t s, struct tensor y, struct tensor x)
{
    grid_of g = rows_of(x);
    with_type(x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        u8_kernel<T><<<grid_over(g.rows, g.n), THREADS, 0, s>>>((uint8_t *)y.data, y.ld, (const T *)x.data, x.ld, g.rows,
                                                               g.n);
    });
}
