// flash16.cu: attention of heads of 128 numbers in bf16 or f16, on compute capability 9.0.
//
// The kernel is a FlashAttention (Dao et al. 2022; for Hopper Shah et al. 2024): while the tensor cores multiply the
// weights of one tile with its values, after the scores of the next, the warps make weights of these.
//
// At a GPU's power cap an instruction is energy, and energy is time. So a row's weights are made against the highest
// score of its first tile, which bf16, f16 and f32 have exponents enough for, instead of looking for a higher one in
// each tile: only a row whose weights of a tile add up to more than REACH is weighed again, by its warp alone.
#include "kernels/cuda/hopper/flash.cuh"
#include "kernels/cuda/mma.cuh"

using namespace flash_hopper;

namespace
{

enum {
    STAGES = 2,
    HALF = 64, // numbers of a row of 128 bytes, as operands lie
    STEPS = DIM / 16,
};

typedef uint16_t tile[2][TILE][HALF];

struct shared {
    tile q, k[STAGES], v[STAGES];
    alignas(16) staging out;
    float last[GROUPS * GROUP];
    barriers<STAGES> b;
};

typedef hopper::ring<STAGES> ring;

__device__ void load_tile(tile &to, uint64_t *full, const CUtensorMap *map, int row, int head)
{
    hopper::barrier_expect(full, sizeof to);
    for (int half = 0; half < 2; half++)
        hopper::tile_load(to[half], map, (head * DIM + half * HALF) * 2, row, full);
}

// One warpgroup's work: what a thread has in registers.
struct work {
    float s[VALUES];        // scores, which become weights
    float o[VALUES];        // sums of weighted values
    uint32_t p[VALUES / 2]; // weights, as an operand
    uint32_t q[STEPS][4];
    uint64_t keys, values; // operands in shared memory; of the first stage
    ring k, v;
    int warp_row; // first of the warp's 16 rows in the block

    // Of a thread's two queries, 8 rows apart: a score's weight is 2^(score * scale - base).
    float base[2], sum[2];
};

__device__ float highest_of(const float (&s)[VALUES], int r)
{
    float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
    for (int i = 2 * r; i < VALUES; i += 4)
#pragma unroll
        for (int c = 0; c < 2; c++)
            top[i / 4 % 4] = fmaxf(top[i / 4 % 4], s[i + c]);
    const float all = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
    const float two = fmaxf(all, __shfl_xor_sync(~0u, all, 1));
    return fmaxf(two, __shfl_xor_sync(~0u, two, 2));
}

// The scores of row r become weights, whose sum over this thread's columns it returns.
__device__ float weigh(float (&s)[VALUES], int r, float scale, float base)
{
    float sum[4] = {};
#pragma unroll
    for (int i = 2 * r; i < VALUES; i += 4)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            s[i + c] = exp2_fast(s[i + c] * scale - base);
            sum[i / 4 % 2 * 2 + c] += s[i + c];
        }
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

// The first tile's, of which the last `keys` columns from this thread's first on are none.
__device__ void soften_first(work &x, float scale, int keys)
{
#pragma unroll
    for (int i = 0; i < VALUES; i++)
        if (i / 4 * 8 + i % 2 >= keys)
            x.s[i] = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        x.base[r] = highest_of(x.s, r) * scale;
        x.sum[r] = weigh(x.s, r, scale, x.base[r]);
    }
}

// Scores of the rows that are marked, once more: the products of a warp by itself.
template <typename T> __device__ void score_again(work &x, const tile &k, const bool (&again)[2])
{
    const int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
        float c[4] = {};
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const uint16_t *row = k[i / 4][j * 8 + lane / 4] + lane % 4 * 2;
            const auto at = [&](int eight) { return (eight % 8 ^ lane / 4) * 8; }; // where the swizzle has put them
            multiply((T *)nullptr, c, x.q[i], *reinterpret_cast<const uint32_t *>(row + at(2 * i)),
                     *reinterpret_cast<const uint32_t *>(row + at(2 * i + 1)));
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 2 && again[r]; i++)
                x.s[4 * j + 2 * r + i] = c[2 * r + i];
    }
}

static constexpr float REACH = 16384; // f16 ends at 65504

// Returns whether sums so far have to shrink, by factors that belong to the rows.
template <typename T> __device__ bool soften(work &x, const tile &k, float scale, float (&shrink)[2])
{
    float sum[2];
    bool again[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = weigh(x.s, r, scale, x.base[r]);
        again[r] = !(sum[r] < REACH); // also for NaN
    }
    const bool some = __any_sync(~0u, again[0] || again[1]);
    if (some) {
#pragma unroll
        for (int r = 0; r < 2; r++)
            for (int lanes = 1; lanes < 4; lanes *= 2)
                again[r] |= (bool)__shfl_xor_sync(~0u, (int)again[r], lanes);
        score_again<T>(x, k, again);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float base = fmaxf(x.base[r], highest_of(x.s, r) * scale);
            shrink[r] = again[r] ? exp2_fast(x.base[r] - base) : 1;
            if (again[r]) {
                x.base[r] = base;
                x.sum[r] *= shrink[r];
                sum[r] = weigh(x.s, r, scale, base);
            }
        }
    }
    x.sum[0] += sum[0];
    x.sum[1] += sum[1];
    return some;
}

template <typename T> __device__ void pack_weights(work &x)
{
#pragma unroll
    for (int i = 0; i < VALUES / 2; i++)
        pair_from_f32(reinterpret_cast<T *>(&x.p[i]), x.s[2 * i], x.s[2 * i + 1]);
}

__device__ void load_queries(shared &sh, work &x, unsigned phase)
{
    const int lane = (int)threadIdx.x % WARP, row = x.warp_row + lane % 16;
    hopper::barrier_wait(&sh.b.q_full, phase);
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        load_matrices(x.q[i], hopper::shared_address(&sh.q[i / 4][row][((2 * i + lane / 16) % 8 ^ row % 8) * 8]));
    if (lane == 0)
        hopper::barrier_arrive(&sh.b.q_empty);
}

template <typename T> __device__ void begin_scores(shared &sh, work &x)
{
    constexpr unsigned APART = sizeof sh.k[0] / 16, HALVES = sizeof sh.k[0][0] / 16; // as addresses of operands count
    hopper::barrier_wait(&sh.b.k_full[x.k.stage], x.k.phase);
    hopper::products_begin();
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        hopper::product<T>(x.s, x.q[i], x.keys + x.k.stage * APART + i / 4 * HALVES + i % 4 * 2, i > 0);
    hopper::products_commit();
}

template <typename T> __device__ void begin_values(shared &sh, work &x, bool more)
{
    constexpr unsigned APART = sizeof sh.v[0] / 16, STEP = sizeof sh.v[0][0] / STEPS / 16;
    hopper::barrier_wait(&sh.b.v_full[x.v.stage], x.v.phase);
    hopper::products_begin();
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        hopper::product_turned<T>(x.o, x.p + 4 * i, x.values + x.v.stage * APART + i * STEP, more || i > 0);
    hopper::products_commit();
}

// All but the last LATER products are done.
template <int LATER> __device__ void end_scores(work &x)
{
    hopper::products_wait<LATER>();
    hopper::registers_settle(x.s);
}

__device__ void leave(uint64_t *empty, ring &at)
{
    __syncwarp(); // a warp may have read by itself
    if (threadIdx.x % WARP == 0)
        hopper::barrier_arrive(&empty[at.stage]);
    at.next();
}

__device__ void end_values(shared &sh, work &x)
{
    hopper::products_wait<0>();
    hopper::registers_settle(x.o);
    hopper::registers_settle(x.p);
    leave(sh.b.v_empty, x.v);
}

template <typename T> __device__ void attend(shared &sh, const call<T> &c, work &x, float scale, item at)
{
    begin_scores<T>(sh, x);
    end_scores<0>(x);
    leave(sh.b.k_empty, x.k);
    soften_first(x, scale, first_keys(c, at));
    pack_weights<T>(x);
    for (int i = 1; i < at.tiles; i++) {
        float shrink[2];
        begin_scores<T>(sh, x);
        begin_values<T>(sh, x, i > 1);
        end_scores<1>(x);
        const bool less = soften<T>(x, sh.k[x.k.stage], scale, shrink);
        leave(sh.b.k_empty, x.k);
        soften_before_values(sh.last[threadIdx.x], x.sum[0] + x.sum[1]);
        end_values(sh, x);
        if (less)
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                x.o[j] *= shrink[j / 2 % 2];
        pack_weights<T>(x);
    }
    begin_values<T>(sh, x, at.tiles > 1);
    end_values(sh, x);
    finish(sh.out, c, x.o, x.base, x.sum, 1, 0, x.warp_row, at);
}

template <typename T> __device__ void attend_all(shared &sh, const call<T> &c, float scale, int group)
{
    work x;
    x.keys = hopper::operand(sh.k[0]);
    x.values = hopper::operand_turned(sh.v[0], sizeof sh.v[0][0]);
    x.warp_row = group * GROUP_QUERIES + (int)threadIdx.x % GROUP / WARP * 16;
    hopper::ring<1> once;
    for (int n = (int)blockIdx.x; n < c.shares; n += (int)gridDim.x, once.next()) {
        load_queries(sh, x, once.phase);
        attend(sh, c, x, scale, item_of(c, n));
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    flash16_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                   const __grid_constant__ CUtensorMap v, const call<T> c, const float scale)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    shared &sh = *reinterpret_cast<shared *>(memory);
    share_work(
        sh.b, c, [&](item it) { load_tile(sh.q, &sh.b.q_full, &q, it.query, it.head); },
        [&](item it, int key, unsigned i) { load_tile(sh.k[i], &sh.b.k_full[i], &k, key, it.head); },
        [&](item it, int key, unsigned i) { load_tile(sh.v[i], &sh.b.v_full[i], &v, key, it.head); },
        [&](int group) { attend_all(sh, c, scale, group); });
}

bool map_of(CUtensorMap *map, struct tensor t)
{
    return hopper::map_of(map, t.data, t.n[0], t.n[1] * DIM * 2, t.ld * 2, TILE);
}

} // namespace

// ---- host side

size_t flash_hopper_room(int processors, struct tensor q, struct tensor k)
{
    const int items = (int)(ceil_div(q.n[0], QUERIES) * q.n[1]);
    const dealing d = deal(items, (int)ceil_div(k.n[0], TILE), processors, PART_PRICE, true);
    meeting m;
    return d.parts > 1 ? lay_out(m, nullptr, (size_t)(d.shares - d.whole), processors) : 0;
}

bool launch_flash16(cudaStream_t s, int processors, const struct attention_out *out, struct tensor lse, struct tensor q,
                    struct tensor k, struct tensor v, float scale, void *room)
{
    CUtensorMap maps[3];
    if (!can_be(*out, q, k, scale) || q.n[2] != DIM || !wide(q, 8) || !wide(k, 8) || !wide(v, 8) ||
        !map_of(&maps[0], q) || !map_of(&maps[1], k) || !map_of(&maps[2], v))
        return false;
    with_type(q.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if constexpr (sizeof(T) == 2) {
            cudaFuncSetAttribute(flash16_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(shared));
            const call<T> c = call_of<T>(*out, lse, q, k, processors, room);
            flash16_kernel<T><<<(unsigned)min(c.shares, processors), THREADS, sizeof(shared), s>>>(
                maps[0], maps[1], maps[2], c, scale * 1.4426950408889634f);
        }
    });
    return true;
}
