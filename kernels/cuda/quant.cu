// quant.cu: numbers of 8 bits and their factors.
#include "kernels/cuda/codes.cuh"

enum { WARP = 32, MAX_THREADS = 1024, POINT_THREADS = 128 };

static dim3 grid_over(int64_t rows, int64_t n)
{
    return dim3((unsigned)ceil_div(n, POINT_THREADS), (unsigned)(rows < MAX_GRID_Y ? rows : MAX_GRID_Y));
}

template <typename T> struct quant_of {
    uint8_t *y;
    float *scale;
    const T *x;
    int64_t y_ld, x_ld;
    int n;
};

template <typename C, typename T, int V> __device__ static float magnitude(float top, const pack<T, V> &x)
{
#pragma unroll
    for (int j = 0; j < V; j++)
        top = fmaxf(top, C::magnitude(to_f32(x.v[j])));
    return top;
}

template <typename C, typename T, int V> __device__ static void store_pack(uint8_t *y, const pack<T, V> &x, float inverse)
{
    float v[V];
#pragma unroll
    for (int j = 0; j < V; j++)
        v[j] = to_f32(x.v[j]);
    store_codes<C>(y, v, inverse);
}

// A block a row. R: vectors a thread keeps in registers, 0: the row is too long and is read again.
template <typename C, typename T, int V, int R>
__global__ void __launch_bounds__(MAX_THREADS) quant_kernel(quant_of<T> p)
{
    typedef pack<T, V> vec;
    const T *x = p.x + blockIdx.x * p.x_ld;
    uint8_t *y = p.y + blockIdx.x * p.y_ld;
    const int first = (int)threadIdx.x * V, step = (int)blockDim.x * V;
    vec kept[R ? R : 1];
    float top = 0;
    if constexpr (R > 0) {
#pragma unroll
        for (int r = 0; r < R; r++) // all asked for before the first is used
            if (first + r * step < p.n)
                kept[r] = *reinterpret_cast<const vec *>(x + first + r * step);
#pragma unroll
        for (int r = 0; r < R; r++)
            if (first + r * step < p.n)
                top = magnitude<C>(top, kept[r]);
    } else {
        for (int i = first; i < p.n; i += step)
            top = magnitude<C>(top, *reinterpret_cast<const vec *>(x + i));
    }
    top = block_largest(top);
    const float factor = C::factor(top), inverse = 1 / factor;
    if (threadIdx.x == 0)
        p.scale[blockIdx.x] = factor;
    if constexpr (R > 0) {
#pragma unroll
        for (int r = 0; r < R; r++)
            if (first + r * step < p.n) {
                keep_packed(kept[r]);
                store_pack<C>(y + first + r * step, kept[r], inverse);
            }
    } else {
        for (int i = first; i < p.n; i += step)
            store_pack<C>(y + i, *reinterpret_cast<const vec *>(x + i), inverse);
    }
}

template <typename C, typename T, int V> static void quant_rows(cudaStream_t s, int64_t rows, const quant_of<T> &p)
{
    int64_t vectors = ceil_div(p.n, V), r = vectors <= 256 ? 1 : vectors <= 512 ? 2 : vectors <= 1024 ? 4 : 8;
    unsigned blocks = (unsigned)rows, threads = (unsigned)(ceil_div(ceil_div(vectors, r), WARP) * WARP);
    if (threads > MAX_THREADS)
        quant_kernel<C, T, V, 0><<<blocks, MAX_THREADS, 0, s>>>(p);
    else if (r == 1)
        quant_kernel<C, T, V, 1><<<blocks, threads, 0, s>>>(p);
    else if (r == 2)
        quant_kernel<C, T, V, 2><<<blocks, threads, 0, s>>>(p);
    else if (r == 4)
        quant_kernel<C, T, V, 4><<<blocks, threads, 0, s>>>(p);
    else
        quant_kernel<C, T, V, 8><<<blocks, threads, 0, s>>>(p);
}

void launch_quantise(cudaStream_t s, struct tensor y, struct tensor x)
{
    with_type(x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 16 / sizeof(T);
        const quant_of<T> p = {(uint8_t *)y.data, y.scale, (const T *)x.data, y.ld, x.ld, (int)x.n[1]};
        with_codes(y.dtype, [&](auto *way) {
            typedef std::remove_pointer_t<decltype(way)> C;
            if (p.n % V == 0 && wide(x, V) && wide(y, V))
                quant_rows<C, T, V>(s, x.n[0], p);
            else
                quant_rows<C, T, 1>(s, x.n[0], p);
        });
    });
}

// 2 x - y, rounded: y when x is within a quarter of a step of it, else its neighbour on x's side.
template <typename C, typename T>
__global__ void __launch_bounds__(POINT_THREADS)
    quant_again_kernel(uint8_t *again, const uint8_t *y, int64_t y_ld, const float *scale, const T *x, int64_t x_ld, int64_t rows,
                       int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * POINT_THREADS + threadIdx.x;
    for (int64_t r = blockIdx.y; i < n && r < rows; r += gridDim.y)
        again[r * y_ld + i] =
            C::code(2 * (to_f32(x[r * x_ld + i]) * (1 / scale[r])) - C::number(y[r * y_ld + i]));
}

void launch_quantise_again(cudaStream_t s, void *again, struct tensor y, struct tensor x)
{
    const dim3 grid = grid_over(y.n[0], y.n[1]);
    with_type(x.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        with_codes(y.dtype, [&](auto *way) {
            typedef std::remove_pointer_t<decltype(way)> C;
            quant_again_kernel<C, T><<<grid, POINT_THREADS, 0, s>>>((uint8_t *)again, (const uint8_t *)y.data, y.ld, y.scale,
                                                                    (const T *)x.data, x.ld, y.n[0], y.n[1]);
        });
    });
}

// ---- back to floats

template <typename C, typename T, int V>
__global__ void __launch_bounds__(POINT_THREADS)
    codes_kernel(T *y, int64_t y_ld, const uint8_t *x, int64_t x_ld, int64_t rows, int64_t n)
{
    int64_t i = ((int64_t)blockIdx.x * POINT_THREADS + threadIdx.x) * V;
    for (int64_t r = blockIdx.y; i < n && r < rows; r += gridDim.y) {
        const pack<uint8_t, V> t = *reinterpret_cast<const pack<uint8_t, V> *>(x + r * x_ld + i);
        float v[V];
#pragma unroll
        for (int j = 0; j < V; j++)
            v[j] = C::number(t.v[j]);
        store(y + r * y_ld + i, v);
    }
}

void launch_codes(cudaStream_t s, struct tensor y, struct tensor x)
{
    const int64_t rows = x.n[0], n = x.n[1];
    const uint8_t *from = (const uint8_t *)x.data;
    with_type(y.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        with_codes(x.dtype, [&](auto *way) {
            typedef std::remove_pointer_t<decltype(way)> C;
            if (n % 8 == 0 && wide(x, 8) && wide(y, 8))
                codes_kernel<C, T, 8>
                    <<<grid_over(rows, n / 8), POINT_THREADS, 0, s>>>((T *)y.data, y.ld, from, x.ld, rows, n);
            else
                codes_kernel<C, T, 1><<<grid_over(rows, n), POINT_THREADS, 0, s>>>((T *)y.data, y.ld, from, x.ld, rows, n);
        });
    });
}

// ---- factors for bare sums

template <typename T> struct factored_of {
    T *y;
    const float *sums, *x_scale, *w_scale;
    row bias;
    int64_t y_ld, rows, n;
    enum act act;
};

template <typename T, int V> __global__ void __launch_bounds__(POINT_THREADS) factored_kernel(factored_of<T> p)
{
    int64_t i = ((int64_t)blockIdx.x * POINT_THREADS + threadIdx.x) * V;
    if (i >= p.n)
        return;
    float w[V], b[V] = {};
    load(w, p.w_scale + i);
    if (p.bias.p)
        load_row(b, p.bias, i);
    for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
        float v[V], x = p.x_scale[r];
        load(v, p.sums + r * p.n + i);
#pragma unroll
        for (int j = 0; j < V; j++)
            v[j] = activated(v[j] * x * w[j] + b[j], p.act);
        store(p.y + r * p.y_ld + i, v);
    }
}

void launch_factored(cudaStream_t s, struct tensor y, const float *sums, const float *x_scale, const float *w_scale,
                     struct tensor bias, enum act act)
{
    with_type(y.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        constexpr int V = 16 / sizeof(T);
        factored_of<T> p = {(T *)y.data, sums, x_scale, w_scale, row_of(bias), y.ld, y.n[0], y.n[1], act};
        if (p.n % V == 0 && wide(y, V) && wide(bias, V) && (uintptr_t)w_scale % 16 == 0)
            factored_kernel<T, V><<<grid_over(p.rows, p.n / V), POINT_THREADS, 0, s>>>(p);
        else
            factored_kernel<T, 1><<<grid_over(p.rows, p.n), POINT_THREADS, 0, s>>>(p);
    });
}
