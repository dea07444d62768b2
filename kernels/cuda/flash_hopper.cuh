// flash_hopper.cuh: what flash8.cu and flash16.cu have in common: the shape of the work, how it is dealt to blocks, and
// how results leave.
//
// A block stays on its multiprocessor and takes item after item, QUERIES queries of a head with all keys. Two warpgroups
// compute, GROUP_QUERIES queries each; of a third, two threads load tiles ahead, also those of the next item.
#ifndef DITFLEET_CUDA_FLASH_HOPPER_CUH
#define DITFLEET_CUDA_FLASH_HOPPER_CUH

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/vec.cuh"

namespace flash_hopper
{

enum {
    DIM = 128,  // of a head
    TILE = 128, // keys
    WARP = 32,
    GROUP = 128, // threads of a warpgroup
    GROUPS = 2,
    GROUP_QUERIES = 64,
    QUERIES = GROUPS * GROUP_QUERIES,
    THREADS = (GROUPS + 1) * GROUP,
    WARPS = GROUPS * GROUP / WARP,         // that compute
    VALUES = GROUP_QUERIES * TILE / GROUP, // of a thread: scores of a tile, sums of the result
};
static_assert(DIM == TILE && QUERIES == TILE, "tiles of queries, of keys and of values are alike");

template <typename T> struct call {
    T *out;
    float *lse; // (m, heads), rows of lse_ld, or NULL
    int64_t out_ld, lse_ld;
    int m, s, heads, tiles; // tiles: of keys
    int head_items, items;  // of a head; of all heads
    int dim;                // of out's heads, DIM at most
};

template <typename T>
call<T> call_of(struct tensor out, struct tensor lse, struct tensor q, struct tensor k)
{
    call<T> c = {};
    c.out = (T *)out.data;
    c.lse = tensor_none(lse) ? nullptr : (float *)lse.data;
    c.out_ld = out.ld;
    c.lse_ld = lse.ld;
    c.m = (int)q.n[0];
    c.s = (int)k.n[0];
    c.heads = (int)q.n[1];
    c.tiles = (int)ceil_div(c.s, TILE);
    c.head_items = (int)ceil_div(c.m, QUERIES);
    c.items = c.head_items * c.heads;
    c.dim = (int)q.n[2];
    return c;
}

// Whether counts fit and results can be stored, 8 numbers at once.
inline bool can_be(struct tensor out, struct tensor q, struct tensor k, float scale)
{
    return out.dtype != DT_F32 && wide(out, 8) && q.n[2] % 8 == 0 && q.n[2] <= DIM && k.n[0] <= 1 << 20 &&
           ceil_div(q.n[0], QUERIES) * q.n[1] <= INT_MAX && scale > 0;
}

struct item {
    int head, query; // query: the first
};

template <typename T> __device__ inline item item_of(const call<T> &c, int i)
{
    const int head = i / c.head_items;
    return {head, (i - head * c.head_items) * QUERIES};
}

// The last tile, which may have fewer keys, comes first.
__device__ inline int tile_of(int i, int tiles)
{
    return i == 0 ? tiles - 1 : i - 1;
}

template <int STAGES> struct barriers {
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];

    __device__ void init()
    {
        hopper::barrier_init(&q_full, 1);
        hopper::barrier_init(&q_empty, WARPS);
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(&k_full[i], 1);
            hopper::barrier_init(&v_full[i], 1);
            hopper::barrier_init(&k_empty[i], WARPS);
            hopper::barrier_init(&v_empty[i], WARPS);
        }
        hopper::barriers_visible();
    }
};

// Of a thread that loads: begin(item, phase), then load(item, first key, stage) for its tiles, as stages get empty.
template <int STAGES, typename T, typename B, typename L>
__device__ void load_tiles(const call<T> &c, uint64_t *empty, B begin, L load)
{
    hopper::ring<STAGES> at;
    unsigned phase = 0;
    for (int n = (int)blockIdx.x; n < c.items; n += (int)gridDim.x, phase ^= 1) {
        const item it = item_of(c, n);
        begin(it, phase);
        for (int i = 0; i < c.tiles; i++, at.next()) {
            hopper::barrier_wait(&empty[at.stage], at.phase ^ 1);
            load(it, tile_of(i, c.tiles) * TILE, at.stage);
        }
    }
}

// A kernel: two threads load, and the warpgroups of 0 to GROUPS - 1 compute. Keys come apart from values, which are
// kept longer.
template <int STAGES, typename K, typename V, typename C>
__device__ void share_work(barriers<STAGES> &b, K load_keys, V load_values, C compute)
{
    const int group = __shfl_sync(~0u, (int)threadIdx.x / GROUP, 0); // the same for a warp, and known to be
    if (threadIdx.x == 0)
        b.init();
    __syncthreads();
    if (group == GROUPS) {
        hopper::registers_less<24>();
        if (threadIdx.x % GROUP == 0)
            load_keys();
        else if (threadIdx.x % GROUP == WARP)
            load_values();
    } else {
        hopper::registers_more<240>();
        compute(group);
    }
}

__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The assembler is free to let the warps wait for the products with the values before they soften the scores, and does,
// unless there is a store of what comes last.
__device__ inline void soften_before_values(float &place, float last)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(hopper::shared_address(&place)), "f"(last) : "memory");
}

typedef uint16_t staging[QUERIES][DIM + 8]; // eight rows' 16 bytes meet no bank twice

// A warp's 16 rows, whose first is warp_row of the item's: sums times a factor of each of a thread's two queries.
template <typename T>
__device__ void store_out(staging &room, const call<T> &c, const float (&o)[VALUES], const float (&scale)[2],
                          int warp_row, item at)
{
    const int lane = (int)threadIdx.x % WARP, first = at.query + warp_row;
    T *to = reinterpret_cast<T *>(&room[warp_row + lane % 16][lane / 16 * 8]);
    __syncwarp(); // the last item's have been read
#pragma unroll
    for (int i = 0; i < VALUES; i += 8) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            pair_from_f32(reinterpret_cast<T *>(&word[j]), o[i + 2 * j] * scale[j % 2],
                          o[i + 2 * j + 1] * scale[j % 2]);
        hopper::matrices_store(to + 2 * i, word);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int r = 2 * i + lane / 16, column = lane % 16 * 8;
        if (first + r < c.m && column < c.dim)
            *reinterpret_cast<uint4 *>(c.out + (first + r) * c.out_ld + at.head * c.dim + column) =
                *reinterpret_cast<const uint4 *>(&room[warp_row + r][column]);
    }
}

// The sum of a row's weights over its four threads; log2_unit: the logarithm of what a weight of 1 stands for.
template <typename T>
__device__ float row_sum(const call<T> &c, float sum, float log2_unit, int row, int head)
{
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (c.lse && threadIdx.x % 4 == 0 && row < c.m)
        c.lse[(int64_t)row * c.lse_ld + head] = (log2_unit + log2f(sum)) * 0.6931471805599453f;
    return sum;
}

} // namespace flash_hopper

#endif
