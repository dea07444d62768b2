// product.cu: products of any type, stride and size in f32 arithmetic: for what cuBLASLt and cuDNN have no engine for.
#include "kernels/cuda/vec.cuh"

enum { TILE = 64, DEPTH = 16, SIDE = 16, EACH = TILE / SIDE };

// A block of 256 threads makes a tile of 64 x 64; a thread 4 x 4 of it. a(i, k) and b(k, j) give the operands, 0
// outside; put(i, j, sum) takes the result.
template <typename A, typename B, typename P>
__device__ static void tile_product(int64_t i0, int64_t j0, int64_t depth, A a, B b, P put)
{
    __shared__ float as[DEPTH][TILE + 1], bs[DEPTH][TILE + 1];
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    float sum[EACH][EACH] = {};
    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
        for (int e = (int)threadIdx.x; e < TILE * DEPTH; e += SIDE * SIDE) {
            as[e % DEPTH][e / DEPTH] = a(i0 + e / DEPTH, k0 + e % DEPTH);
            bs[e % DEPTH][e / DEPTH] = b(k0 + e % DEPTH, j0 + e / DEPTH);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    sum[i][j] += as[k][ty + i * SIDE] * bs[k][tx + j * SIDE];
        __syncthreads();
    }
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++)
            put(i0 + ty + i * SIDE, j0 + tx + j * SIDE, sum[i][j]);
}

__global__ void __launch_bounds__(SIDE *SIDE) product_kernel(struct plain_product p)
{
    int64_t x0 = blockIdx.z * p.x_stride, w0 = blockIdx.z * p.w_stride, y0 = blockIdx.z * p.y_stride;
    int64_t i0 = (int64_t)blockIdx.x * TILE, j0 = (int64_t)blockIdx.y * TILE;
    tile_product(
        i0, j0, p.k,
        [&](int64_t i, int64_t k) { return i < p.m && k < p.k ? load_any(p.x, p.x_type, x0 + i * p.x_ld + k) : 0.f; },
        [&](int64_t k, int64_t j) {
            return j < p.n && k < p.k ? load_any(p.w, p.w_type, w0 + k * p.w_k + j * p.w_n) : 0.f;
        },
        [&](int64_t i, int64_t j, float v) {
            if (i < p.m && j < p.n)
                store_any(p.y, p.y_type, y0 + i * p.y_ld + j, v);
        });
}

void launch_product(cudaStream_t s, const struct plain_product *p)
{
    dim3 grid((unsigned)ceil_div(p->m, TILE), (unsigned)ceil_div(p->n, TILE), (unsigned)p->batch);
    product_kernel<<<grid, SIDE * SIDE, 0, s>>>(*p);
}

struct conv_of {
    struct tensor y, x, w;
    row b;
};

// The product of pixels by output channels over (kh, kw, c_in).
__global__ void __launch_bounds__(SIDE *SIDE) conv_kernel(conv_of c)
{
    int64_t i0 = (int64_t)blockIdx.x * TILE, j0 = (int64_t)blockIdx.y * TILE;
    int64_t width = c.x.n[1], channels = c.x.n[2], taps = c.w.n[2] * channels, pixels = c.y.n[0] * width;
    tile_product(
        i0, j0, c.w.n[1] * taps,
        [&](int64_t i, int64_t k) {
            int64_t row = i / width + k / taps, column = i % width + k % taps / channels - c.w.n[2] / 2;
            bool inside = i < pixels && k < c.w.n[1] * taps && column >= 0 && column < width;
            return inside ? load_any(c.x.data, c.x.dtype, row * c.x.ld + column * channels + k % channels) : 0.f;
        },
        [&](int64_t k, int64_t j) {
            return j < c.w.n[0] && k < c.w.n[1] * taps ? load_any(c.w.data, c.w.dtype, j * c.w.ld + k) : 0.f;
        },
        [&](int64_t i, int64_t j, float v) {
            if (i >= pixels || j >= c.w.n[0])
                return;
            v += c.b.p ? load_any(c.b.p, c.b.type, j) : 0;
            store_any(c.y.data, c.y.dtype, i / width * c.y.ld + i % width * c.y.n[2] + j, v);
        });
}

void launch_conv(cudaStream_t s, struct tensor y, struct tensor x, struct tensor w, struct tensor b)
{
    dim3 grid((unsigned)ceil_div(y.n[0] * y.n[1], TILE), (unsigned)ceil_div(y.n[2], TILE));
    conv_kernel<<<grid, SIDE * SIDE, 0, s>>>(conv_of{y, x, w, row_of(b)});
}
