// digest.cu: a number that tells whether two results have the same bits, without keeping either.
#include "kernels/cuda/vec.cuh"

enum { THREADS = 256, BLOCKS = 1024 };

// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
__device__ static unsigned long long mixed(unsigned long long x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

__global__ void __launch_bounds__(THREADS) digest_kernel(struct bits b, unsigned long long *sum)
{
    const int64_t each = b.rows * b.columns, step = (int64_t)gridDim.x * THREADS;
    unsigned long long mine = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < b.batch * each; i += step) {
        const int64_t at = i / each * b.stride + i % each / b.columns * b.row + i % b.columns;
        mine += mixed((unsigned long long)i << 16 | ((const uint16_t *)b.y)[at]);
    }
    atomicAdd(sum, mine);
}

void launch_digest(cudaStream_t s, const struct bits *b, unsigned long long *sum)
{
    digest_kernel<<<BLOCKS, THREADS, 0, s>>>(*b, sum);
}
