// flash.cuh: what flash8.cu and flash16.cu have in common: the shape of the work, how it is dealt to blocks, and
// how results leave.
//
// A block stays on its multiprocessor and takes item after item: QUERIES queries of a head, with all keys or a part of
// them. Two warpgroups compute, GROUP_QUERIES queries each; of a third, two threads load tiles ahead, also those of the
// next item.
#ifndef DITFLEET_CUDA_HOPPER_FLASH_CUH
#define DITFLEET_CUDA_HOPPER_FLASH_CUH

#include "kernels/cuda/hopper/dealing.cuh"
#include "kernels/cuda/hopper/instructions.cuh"
#include "kernels/cuda/vec.cuh"

namespace flash_hopper
{

enum {
    DIM = HOPPER_HEAD,
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

enum { PART_PRICE = 2 }; // of a part beside its tiles, in tiles

// Where sums of parts meet. tickets: how many parts of a warp's rows are there, 0 before and after each kernel.
struct meeting {
    unsigned *tickets; // (processors, WARPS)
    float *sums;       // (parts of all, QUERIES, DIM)
    float2 *rows;      // (parts of all, QUERIES): what a weight of 1 stands for, as a logarithm, and the weights' sum
};

inline size_t lay_out(meeting &m, uint8_t *at, size_t parts, int processors)
{
    const size_t tickets = ((size_t)processors * WARPS * sizeof(unsigned) + 255) / 256 * 256;
    const size_t sums = parts * QUERIES * DIM * sizeof(float);
    m.tickets = (unsigned *)at;
    m.sums = (float *)(at + tickets);
    m.rows = (float2 *)(at + tickets + sums);
    return tickets + sums + parts * QUERIES * sizeof(float2);
}

template <typename T> struct place { // of rows up to `end`; row 0 would be there
    T *row0;
    int64_t ld;
    int end;
};

template <typename T> struct call {
    place<T> out[PEERS];
    float *lse; // (m, heads), rows of lse_ld, or NULL
    int64_t lse_ld;
    int m, s, heads, tiles;       // tiles: of keys
    int head_items, whole, parts; // items of a head; taken whole, of all heads; of each of the others
    int shares;                   // items and parts
    int dim;                      // of out's heads, DIM at most
    meeting parts_at;
};

// room: of flash_hopper_room bytes, or NULL: all are taken whole.
template <typename T>
call<T> call_of(const struct attention_out &out, struct tensor lse, struct tensor q, struct tensor k, int processors,
                void *room)
{
    call<T> c = {};
    for (int i = 0, row = 0; i < out.n; i++) {
        const struct tensor &t = out.t[i];
        c.out[i] = {(T *)t.data - row * t.ld, t.ld, row + (int)t.n[0]};
        row += (int)t.n[0];
    }
    c.lse = tensor_none(lse) ? nullptr : (float *)lse.data;
    c.lse_ld = lse.ld;
    c.m = (int)q.n[0];
    c.s = (int)k.n[0];
    c.heads = (int)q.n[1];
    c.tiles = (int)ceil_div(c.s, TILE);
    c.head_items = (int)ceil_div(c.m, QUERIES);
    c.dim = (int)q.n[2];
    const int items = c.head_items * c.heads;
    const dealing d = deal(items, c.tiles, processors, PART_PRICE, room);
    c.whole = d.whole;
    c.parts = d.parts;
    c.shares = d.shares;
    lay_out(c.parts_at, (uint8_t *)room, (size_t)(c.shares - c.whole), processors);
    return c;
}

// Whether counts fit and results can be stored, 8 numbers at once.
inline bool can_be(const struct attention_out &out, struct tensor q, struct tensor k, float scale)
{
    for (int i = 0; i < out.n; i++)
        if (!wide(out.t[i], 8))
            return false;
    return q.dtype != DT_F32 && q.n[2] % 8 == 0 && q.n[2] <= DIM && k.n[0] <= 1 << 20 &&
           ceil_div(q.n[0], QUERIES) * q.n[1] <= INT_MAX / 8 && scale > 0;
}

struct item {
    int head, query;  // query: the first
    int first, tiles; // places among the head's tiles
    int part, slot;   // slot: among the parts of all; below 0: whole
};

template <typename T> __device__ inline item item_of(const call<T> &c, int n)
{
    const share s = share_of(n, c.whole, c.parts, c.tiles);
    const int head = s.item / c.head_items;
    return {head, (s.item - head * c.head_items) * QUERIES, s.first, s.steps, s.part, s.slot};
}

// The last tile, which may have fewer keys, has the first place.
__device__ inline int tile_of(int place, int tiles)
{
    return place == 0 ? tiles - 1 : place - 1;
}

// How many of the first tile's columns from this thread's first on are keys.
template <typename T> __device__ inline int first_keys(const call<T> &c, item at)
{
    return at.first > 0 ? TILE : c.s - (c.tiles - 1) * TILE - (int)threadIdx.x % 4 * 2;
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
    for (int n = (int)blockIdx.x; n < c.shares; n += (int)gridDim.x, phase ^= 1) {
        const item it = item_of(c, n);
        begin(it, phase);
        for (int i = 0; i < it.tiles; i++, at.next()) {
            hopper::barrier_wait(&empty[at.stage], at.phase ^ 1);
            load(it, tile_of(it.first + i, c.tiles) * TILE, at.stage);
        }
    }
}

// A kernel: two threads load, and the warpgroups of 0 to GROUPS - 1 compute. Keys come apart from values, which are
// kept longer. load_queries(item), load_keys and load_values(item, first key, stage), compute(warpgroup).
template <int STAGES, typename T, typename Q, typename K, typename V, typename C>
__device__ void share_work(barriers<STAGES> &b, const call<T> &c, Q load_queries, K load_keys, V load_values, C compute)
{
    const auto begin = [&](item it, unsigned phase) {
        hopper::barrier_wait(&b.q_empty, phase ^ 1);
        load_queries(it);
    };
    const int group = __shfl_sync(~0u, (int)threadIdx.x / GROUP, 0); // the same for a warp, and known to be
    if (threadIdx.x == 0)
        b.init();
    __syncthreads();
    if (group == GROUPS) {
        hopper::registers_less<24>();
        if (threadIdx.x % GROUP == 0)
            load_tiles<STAGES>(c, b.k_empty, begin, load_keys);
        else if (threadIdx.x % GROUP == WARP)
            load_tiles<STAGES>(
                c, b.v_empty, [](item, unsigned) {}, load_values);
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
    T *from = reinterpret_cast<T *>(&room[warp_row + lane % 16][lane / 16 * 8]);
    int to = 0;
    __syncwarp(); // the last item's have been read
#pragma unroll
    for (int i = 0; i < VALUES; i += 8) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            pair_from_f32(reinterpret_cast<T *>(&word[j]), o[i + 2 * j] * scale[j % 2],
                          o[i + 2 * j + 1] * scale[j % 2]);
        hopper::matrices_store(from + 2 * i, word);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int r = 2 * i + lane / 16, column = lane % 16 * 8;
        if (first + r < c.m && column < c.dim) {
            while (first + r >= c.out[to].end)
                to++;
            *reinterpret_cast<uint4 *>(c.out[to].row0 + (first + r) * c.out[to].ld + at.head * c.dim + column) =
                *reinterpret_cast<const uint4 *>(&room[warp_row + r][column]);
        }
    }
}

// Leaves the warp's sums where those of the item's other parts are. True: all are there, and o, base and sum are
// theirs, added in their order.
template <typename T>
__device__ bool bring_together(const call<T> &c, float (&o)[VALUES], float (&base)[2], float (&sum)[2], int warp_row,
                               item at)
{
    const int lane = (int)threadIdx.x % WARP, row = warp_row + lane / 4, column = lane % 4 * 2;
    const meeting &m = c.parts_at;
    const auto sums = [&](int slot, int i) { // of this thread's o[i] and o[i + 1]
        return (float2 *)(m.sums + ((int64_t)slot * QUERIES + row + i % 4 / 2 * 8) * DIM + i / 4 * 8 + column);
    };
#pragma unroll
    for (int i = 0; i < VALUES; i += 2)
        *sums(at.slot, i) = make_float2(o[i], o[i + 1]);
    for (int r = 0; r < 2 && lane % 4 == 0; r++)
        m.rows[(int64_t)at.slot * QUERIES + row + 8 * r] = make_float2(base[r], sum[r]);
    __threadfence();
    __syncwarp();
    unsigned there = 0;
    if (lane == 0)
        there = atomicInc(&m.tickets[at.slot / c.parts * WARPS + warp_row / 16], (unsigned)c.parts - 1);
    if (__shfl_sync(~0u, there, 0) + 1 < (unsigned)c.parts)
        return false;
    __threadfence();
    const int first = at.slot - at.part;
    const auto row_of = [&](int part, int r) {
        return __ldcg(&m.rows[(int64_t)(first + part) * QUERIES + row + 8 * r]);
    };
#pragma unroll
    for (int r = 0; r < 2; r++) {
        base[r] = row_of(0, r).x;
        for (int p = 1; p < c.parts; p++)
            base[r] = fmaxf(base[r], row_of(p, r).x);
        sum[r] = 0;
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++)
        o[i] = 0;
    for (int p = 0; p < c.parts; p++) {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float2 theirs = row_of(p, r);
            factor[r] = exp2_fast(theirs.x - base[r]);
            sum[r] += theirs.y * factor[r];
        }
#pragma unroll
        for (int i = 0; i < VALUES; i += 2) {
            const float2 theirs = __ldcg(sums(first + p, i));
            o[i] += theirs.x * factor[i / 2 % 2];
            o[i + 1] += theirs.y * factor[i / 2 % 2];
        }
    }
    return true;
}

// o: sums of values times weights, of which those of this thread's columns add up to sum; a weight of 1 stands for
// 2^(base + unit), and a value of 1 for `value`. A base that is no number makes all of its row so.
template <typename T>
__device__ void finish(staging &room, const call<T> &c, float (&o)[VALUES], float (&base)[2], float (&sum)[2],
                       float value, float unit, int warp_row, item at)
{
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        for (int lanes = 1; lanes < 4; lanes *= 2)
            sum[r] += __shfl_xor_sync(~0u, sum[r], lanes);
    if (at.slot >= 0 && !bring_together(c, o, base, sum, warp_row, at))
        return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = at.query + warp_row + (int)threadIdx.x % WARP / 4 + 8 * r;
        scale[r] = value / sum[r] + base[r] * 0;
        if (c.lse && threadIdx.x % 4 == 0 && row < c.m)
            c.lse[(int64_t)row * c.lse_ld + at.head] = (base[r] + unit + log2f(sum[r])) * 0.6931471805599453f;
    }
    store_out(room, c, o, scale, warp_row, at);
}

} // namespace flash_hopper

#endif
