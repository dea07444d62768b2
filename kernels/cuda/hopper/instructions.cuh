// instructions.cuh: what compute capability 9.0a adds, one instruction a function: barriers that count bytes, copies by the
// tensor memory accelerator to several blocks at once, products of a warpgroup from shared memory (PTX ISA 8.0).
#ifndef DITFLEET_CUDA_HOPPER_INSTRUCTIONS_CUH
#define DITFLEET_CUDA_HOPPER_INSTRUCTIONS_CUH

#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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

// At the barrier that lies where b does in the shared memory of a block of this cluster. Orders no writes of this thread
// beyond its block (that takes a fence of the whole memory), so it may tell of reads.
__device__ inline void barrier_arrive(uint64_t *b, unsigned block)
{
    asm volatile("{\n\t"
                 ".reg .b32 there;\n\t"
                 "mapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t"
                 "}" ::"r"(shared_address(b)),
                 "r"(block)
                 : "memory");
}

__device__ inline void barriers_visible() // to the other blocks and to the copy engine, once a cluster has met
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A place among stages that are filled and emptied in turns, and the phase of its barriers.
template <int STAGES> struct ring {
    unsigned stage = 0, phase = 0;
    __device__ void next()
    {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};

// ---- clusters

__device__ inline unsigned cluster_rank()
{
    unsigned r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ inline void cluster_meet()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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

// To the same place in each block of the cluster whose bit is set, each told by its own barrier.
__device__ inline void tile_load_all(void *to, const CUtensorMap *map, int column, int row, uint64_t *b, uint16_t blocks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(blocks)
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

// ---- products: sums (64, N) += a (64, 32) b (N, 32)^T of 8-bit numbers, N 128 or 256. Rows of b lie 128 bytes apart in
// shared memory, swizzled over 8 of them, from a multiple of 1024 on; so do a's, or they are in registers. Thread t has rows
// t / 32 * 16 + t % 32 / 4 and 8 below, columns 8 j + t % 4 * 2 and the next: sums[4 j + 2 * (lower row) + column];
// of an a in registers the same rows, a word for columns t % 4 * 4 to 3 more: (row, row below, row 16 columns on, ...).

__device__ inline uint64_t operand(const void *p)
{
    const uint64_t rows_apart = 1024 >> 4, swizzle_128 = (uint64_t)1 << 62;
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)1 << 16 | rows_apart << 32 | swizzle_128;
}

// The b of product_turned: 64 of its columns are a row of 128 bytes, the next 64 lie `apart` bytes on.
__device__ inline uint64_t operand_turned(const void *p, unsigned apart)
{
    return (operand(p) & ~((uint64_t)0x3fff << 16)) | (uint64_t)(apart >> 4) << 16;
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
template <int N> __device__ inline void registers_settle(float (&v)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(v[i])::"memory");
}

template <typename T, int N> __device__ inline void registers_settle(T (&v)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(v[i])::"memory");
}

#define SUMS_8(c, i)                                                                                                   \
    c(s[i]), c(s[i + 1]), c(s[i + 2]), c(s[i + 3]), c(s[i + 4]), c(s[i + 5]), c(s[i + 6]), c(s[i + 7])
#define SUMS_64(c, i)                                                                                                  \
    SUMS_8(c, i), SUMS_8(c, i + 8), SUMS_8(c, i + 16), SUMS_8(c, i + 24), SUMS_8(c, i + 32), SUMS_8(c, i + 40),        \
        SUMS_8(c, i + 48), SUMS_8(c, i + 56)
#define NAMES_64                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                                      \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "  \
             "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
             "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "  \
             "%121, %122, %123, %124, %125, %126, %127"
#define PRODUCT(instruction, operands, more)                                                                           \
    "{\n\t.reg .pred more;\n\tsetp.ne.b32 more, " more ", 0;\n\twgmma.mma_async.sync.aligned." instruction " " operands ";\n\t}"

// Of integers, exact. more: else the sums begin at 0.
__device__ inline void product(int (&s)[64], uint64_t a, uint64_t b, bool more)
{
    asm volatile(PRODUCT("m64n128k32.s32.s8.s8", "{" NAMES_64 "}, %64, %65, more", "%66")
                 : SUMS_64("+r", 0)
                 : "l"(a), "l"(b), "r"((int)more));
}

__device__ inline void product(int (&s)[128], uint64_t a, uint64_t b, bool more)
{
    asm volatile(PRODUCT("m64n256k32.s32.s8.s8", "{" NAMES_128 "}, %128, %129, more", "%130")
                 : SUMS_64("+r", 0), SUMS_64("+r", 64)
                 : "l"(a), "l"(b), "r"((int)more));
}

// Of E4M3.
__device__ inline void product(float (&s)[64], const uint32_t *a, uint64_t b, bool more)
{
    asm volatile(PRODUCT("m64n128k32.f32.e4m3.e4m3", "{" NAMES_64 "}, {%64, %65, %66, %67}, %68, more, 1, 1", "%69")
                 : SUMS_64("+f", 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)more));
}

// Of 16-bit numbers T, sums (64, 128) += a (64, 16) b: b (128, 16)^T, or turned, (16, 128), as it lies.
template <typename T> __device__ void product(float (&s)[64], const uint32_t *a, uint64_t b, bool more);
template <typename T> __device__ void product_turned(float (&s)[64], const uint32_t *a, uint64_t b, bool more);

#define PRODUCT_16(name, T, types, turned)                                                                             \
    template <> __device__ inline void name<T>(float(&s)[64], const uint32_t *a, uint64_t b, bool more)                \
    {                                                                                                                  \
        asm volatile(PRODUCT("m64n128k16.f32." types,                                                                  \
                             "{" NAMES_64 "}, {%64, %65, %66, %67}, %68, more, 1, 1, " turned, "%69")                  \
                     : SUMS_64("+f", 0)                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)more));                            \
    }
PRODUCT_16(product, __nv_bfloat16, "bf16.bf16", "0")
PRODUCT_16(product, __half, "f16.f16", "0")
PRODUCT_16(product_turned, __nv_bfloat16, "bf16.bf16", "1")
PRODUCT_16(product_turned, __half, "f16.f16", "1")

#undef PRODUCT_16
#undef PRODUCT
#undef NAMES_128
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

__device__ inline void meet(int barrier, int threads) // of some of a block's threads, at one of 16 barriers
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same, and whether it is true for all of them.
__device__ inline bool all_agree(int barrier, int threads, bool yes)
{
    int all;
    asm volatile("{\n\t"
                 ".reg .pred mine, all;\n\t"
                 "setp.ne.b32 mine, %3, 0;\n\t"
                 "barrier.cta.red.and.pred all, %1, %2, mine;\n\t"
                 "selp.b32 %0, 1, 0, all;\n\t"
                 "}"
                 : "=r"(all)
                 : "r"(barrier), "r"(threads), "r"((int)yes)
                 : "memory");
    return all != 0;
}

// ---- host side

// A map for boxes of `high` rows of 128 bytes out of (rows, columns) bytes, whose rows begin ld bytes apart, laid out in
// shared memory as operands are. All at multiples of 16. False: the driver has none.
inline bool map_of(CUtensorMap *map, const void *p, int64_t rows, int64_t columns, int64_t ld, int high)
{
    const cuuint64_t n[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, apart = (cuuint64_t)ld;
    const cuuint32_t box[2] = {128, (cuuint32_t)high}, step[2] = {1, 1};
    decltype(&cuTensorMapEncodeTiled) encode = nullptr; // of the driver, which nothing here is linked to
    cudaDriverEntryPointQueryResult found;
    return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000, cudaEnableDefault,
                                            &found) == cudaSuccess &&
           encode &&
           encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void *>(p), n, &apart, box, step,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

} // namespace hopper

#endif
