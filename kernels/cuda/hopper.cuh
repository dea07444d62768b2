// hopper.cuh: what compute capability 9.0a adds, one instruction a function: barriers that count bytes, copies by the
// tensor memory accelerator to several blocks at once, products of a warpgroup from shared memory (PTX ISA 8.0).
#ifndef DITFLEET_CUDA_HOPPER_CUH
#define DITFLEET_CUDA_HOPPER_CUH

#include <cstdint>
#include <cuda.h>

namespace hopper
{

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

// ---- barriers in shared memory: a phase ends when all have arrived and all bytes expected are there

__device__ inline void barrier_init(uint64_t *b, unsigned arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals));
}

__device__ inline void barrier_expect(uint64_t *b, unsigned bytes) // arrives, too
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}

__device__ inline void barrier_wait(uint64_t *b, unsigned phase)
{
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra again;\n\t"
                 "}" ::"r"(shared_address(b)),
                 "r"(phase)
                 : "memory");
}

__device__ inline void barrier_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

__device__ inline void barriers_visible() // to the other blocks and to the copy engine, once a cluster has met
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---- tiles of a matrix to shared memory: the box of the map at (column, row), zeros outside the matrix

__device__ inline void tile_load(void *to, const CUtensorMap *map, int column, int row, uint64_t *b)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
        : "memory");
}

// ---- registers of a warpgroup

template <int N> __device__ inline void registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ inline void registers_less()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- products: sums (64, 128) += a (64, 32) b (128, 32)^T of 8-bit numbers. Rows of b lie 128 bytes apart in shared
// memory, swizzled over 8 of them, from a multiple of 1024 on; so do a's, or they are in registers. Thread t has rows
// t / 32 * 16 + t % 32 / 4 and 8 below, columns 8 j + t % 4 * 2 and the next: sums[4 j + 2 * (lower row) + column];
// of an a in registers the same rows, a word for columns t % 4 * 4 to 3 more: (row, row below, row 16 columns on, ...).

__device__ inline uint64_t operand(const void *p)
{
    const uint64_t rows_apart = 1024 >> 4, swizzle_128 = (uint64_t)1 << 62;
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)1 << 16 | rows_apart << 32 | swizzle_128;
}

__device__ inline void products_begin() // before the first; registers and shared memory are as written until here
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> __device__ inline void products_wait() // until at most N committed groups go on
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving what it does with registers across the wait for products that have them.
template <typename T, int N> __device__ inline void registers_settle(T (&v)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        if constexpr (sizeof(T) == sizeof(float) && T(0.5f) != T(0))
            asm volatile("" : "+f"(v[i])::"memory");
        else
            asm volatile("" : "+r"(v[i])::"memory");
}

#define SUMS_8(c, i) c(s[i]), c(s[i + 1]), c(s[i + 2]), c(s[i + 3]), c(s[i + 4]), c(s[i + 5]), c(s[i + 6]), c(s[i + 7])
#define SUMS_64(c)                                                                                                     \
    SUMS_8(c, 0), SUMS_8(c, 8), SUMS_8(c, 16), SUMS_8(c, 24), SUMS_8(c, 32), SUMS_8(c, 40), SUMS_8(c, 48), SUMS_8(c, 56)
#define NAMES_64                                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// Of integers, exact. more: else the sums begin at 0.
__device__ inline void product(int (&s)[64], uint64_t a, uint64_t b, bool more)
{
    asm volatile("{\n\t"
                 ".reg .pred more;\n\t"
                 "setp.ne.b32 more, %66, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " NAMES_64 ", %64, %65, more;\n\t"
                 "}"
                 : SUMS_64("+r")
                 : "l"(a), "l"(b), "r"((int)more));
}

// Of E4M3.
__device__ inline void product(float (&s)[64], const uint32_t *a, uint64_t b, bool more)
{
    asm volatile("{\n\t"
                 ".reg .pred more;\n\t"
                 "setp.ne.b32 more, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " NAMES_64
                 ", {%64, %65, %66, %67}, %68, more, 1, 1;\n\t"
                 "}"
                 : SUMS_64("+f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)more));
}

#undef NAMES_64
#undef SUMS_64
#undef SUMS_8

// Sums of 16 rows and 16 columns of a warp as pairs of 16-bit numbers: (rows 0 to 7, columns 0 to 7), the rows below,
// then the columns beside. Lane l gives the address of 8 numbers of row l % 16, columns l / 16 * 8.
__device__ inline void matrices_store(void *p, const uint32_t (&v)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

} // namespace hopper

#endif
