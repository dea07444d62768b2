// flash8.cu: attention in numbers of 8 bits, on compute capability 9.0: scores from integers, weights and values as
// E4M3, sums in f32. Which are good enough for what is from SageAttention2 (Zhang et al. 2024); E4M3 for q and k would
// lose about twice as much (kernels/NOTES.md).
//
// The kernel is a FlashAttention (Dao et al. 2022; for Hopper Shah et al. 2024): while the tensor cores multiply the
// weights of one tile with its values, after the scores of the next, the warps make weights of these. What is not finite
// becomes NaN.
#include "kernels/cuda/hopper/flash8.cuh"

using namespace flash8;
using namespace flash_hopper;

enum { STAGES = 4, STEPS = TILE / 32 };

struct shared {
    int8_t q[QUERIES * DIM];
    int8_t k[STAGES][TILE * DIM];
    uint8_t v[STAGES][DIM * TILE];
    alignas(16) staging out;
    float last[GROUPS * GROUP];
    barriers<STAGES> b;
};

typedef hopper::ring<STAGES> ring;

template <typename N, int SIZE>
__device__ static void load_tile(N (&to)[SIZE], uint64_t *full, const CUtensorMap *map, int column, int row)
{
    hopper::barrier_expect(full, sizeof to);
    hopper::tile_load(to, map, column, row, full);
}

// What a thread knows of its two queries, 8 rows apart. Scores are in units of log2.
struct softmax_of {
    float factor[2], highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];
    uint32_t highest_fixed[2]; // in fixed point, modulo 2^32
};

// Weights up to 2^SLACK are let be before all is set to a new highest score; the largest weight is E4M3's 256.
static constexpr float SLACK = 3, WEIGHT_POWER = 8 - SLACK;

// A weight is 2^x as f16, made by integers: x + 15 in fixed point has the exponent and the mantissa of an f16 in its
// upper half, if the mantissa may go straight from one power to the next, up to 6 % too high between (Schraudolph
// 1999). Two of them, half a power apart, add up to 2^(x + UNIT_POWER) within 0.8 %, a third of what E4M3 loses;
// with the GPU's own exponentials the kernel takes 7 % longer.
static constexpr int POINT = 26, BIAS = 15, HALF_POWER = 0x02000200; // of two f16
static constexpr float UNIT_POWER = 1.0552f, MARGIN = 0.0625f; // more than rounding makes of 2^21 units of a score

__device__ static int fixed(float x)
{
    return __float2int_rn(x * (1 << POINT));
}

// The highest of a row's scores among the four threads that have them. Chains, since a long one takes its time.
template <bool FULL> __device__ static int highest_of(const int (&s)[VALUES], int r, int keys)
{
    int top[4] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN};
#pragma unroll
    for (int i = 2 * r; i < VALUES; i += 4)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (FULL || i / 4 * 8 + c < keys)
                top[i / 4 % 4] = max(top[i / 4 % 4], s[i + c]);
    int all = max(max(top[0], top[1]), max(top[2], top[3]));
    all = max(all, __shfl_xor_sync(~0u, all, 1));
    return max(all, __shfl_xor_sync(~0u, all, 2));
}

// s: scores of a tile as integers. w: its weights, pairs of f16, times 2^(WEIGHT_POWER + power). keys: how many columns
// of the tile from this thread's first on are keys, unless it is full.
template <bool FULL>
__device__ static void soften(softmax_of &f, __half2 (&w)[VALUES / 2], const int (&s)[VALUES], float k_factor,
                              int power, int keys)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int top = highest_of<FULL>(s, r, keys);
        const float factor = f.factor[r] * k_factor, score = factor < 32 ? (float)top * factor : NAN;
        const uint32_t slope = (uint32_t)fixed(factor);
        f.shrink[r] = 1;
        if (!(score <= f.highest[r] + SLACK)) { // also for NaN
            f.shrink[r] = exp2_fast(f.highest[r] - score);
            f.highest[r] = score;
            f.highest_fixed[r] = (uint32_t)top * slope;
        }
        const float above = BIAS + WEIGHT_POWER - UNIT_POWER + (float)power; // below the highest by so much: 0
        const uint32_t base = (uint32_t)fixed(above) - f.highest_fixed[r];
        const int least = __float2int_ru(__fdividef(f.highest[r] - above + MARGIN, factor));
        __half2 sum[2] = {};
#pragma unroll
        for (int i = 2 * r; i < VALUES; i += 4) {
            const uint32_t first = (uint32_t)max(s[i], least) * slope + base,
                           second = (uint32_t)max(s[i + 1], least) * slope + base;
            uint32_t low = __byte_perm(first, second, 0x7632), high = low + HALF_POWER;
            if (!FULL) {
                const uint32_t seen = (i / 4 * 8 < keys ? 0xffff : 0) | (i / 4 * 8 + 1 < keys ? 0xffff0000 : 0);
                low &= seen;
                high &= seen;
            }
            w[i / 2] = __hfma2(*reinterpret_cast<__half2 *>(&high), __float2half2_rn(0.70710678f),
                               *reinterpret_cast<__half2 *>(&low));
            sum[i / 4 % 2] = __hadd2(sum[i / 4 % 2], w[i / 2]);
        }
        const float2 both = __half22float2(__hadd2(sum[0], sum[1]));
        f.sum[r] = f.sum[r] * f.shrink[r] + (both.x + both.y) * exp2_fast((float)-power);
    }
}

__device__ static uint32_t two_e4m3(__half2 two)
{
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(codes) : "r"(*reinterpret_cast<uint32_t *>(&two)));
    return codes;
}

// Weights as an operand: columns 8 apart, as a thread has sums, become neighbours in a word.
__device__ static void pack_weights(uint32_t (&p)[VALUES / 4], const __half2 (&w)[VALUES / 2])
{
#pragma unroll
    for (int i = 0; i < VALUES / 4; i++) { // word i: 16 columns i / 2, row i % 2
        const __half2 *from = w + i / 2 * 4 + i % 2;
        p[i] = two_e4m3(from[0]) | two_e4m3(from[2]) << 16;
    }
}

// The largest power of the head's values. Those of a tile are as much less, and its weights that much smaller.
__device__ static int highest_power(const tile_factors *tile, int tiles)
{
    int top = INT_MIN;
    for (int i = (int)threadIdx.x % WARP; i < tiles; i += WARP)
        top = max(top, tile[i].v_power);
    return __reduce_max_sync(~0u, top);
}

__device__ static void multiply_scores(int (&s)[VALUES], uint64_t q, uint64_t k)
{
#pragma unroll
    for (int i = 0; i < STEPS; i++) // addresses count in 16 bytes
        hopper::product(s, q + 2 * i, k + 2 * i, i > 0);
    hopper::products_commit();
}

__device__ static void multiply_values(float (&o)[VALUES], const uint32_t (&p)[VALUES / 4], uint64_t v, bool more)
{
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        hopper::product(o, p + 4 * i, v + 2 * i, more || i > 0);
    hopper::products_commit();
}

// One warpgroup's work: what it has in registers besides the softmax.
struct products {
    int s[VALUES];            // scores
    float o[VALUES];          // sums of weighted values
    uint32_t p[VALUES / 4];   // weights
    uint64_t q, keys, values; // operands in shared memory; of the first stage
    ring k, v;
};

__device__ static void begin_scores(shared &sh, products &x)
{
    constexpr unsigned APART = sizeof sh.k[0] / 16; // as addresses of operands count
    hopper::barrier_wait(&sh.b.k_full[x.k.stage], x.k.phase);
    hopper::products_begin();
    multiply_scores(x.s, x.q, x.keys + x.k.stage * APART);
}

__device__ static void begin_values(shared &sh, products &x, bool more)
{
    constexpr unsigned APART = sizeof sh.v[0] / 16;
    hopper::barrier_wait(&sh.b.v_full[x.v.stage], x.v.phase);
    hopper::products_begin();
    multiply_values(x.o, x.p, x.values + x.v.stage * APART, more);
}

// All but the last LATER products are done: the scores.
template <int LATER> __device__ static void end_scores(shared &sh, products &x)
{
    hopper::products_wait<LATER>();
    hopper::registers_settle(x.s);
    if (threadIdx.x % WARP == 0)
        hopper::barrier_arrive(&sh.b.k_empty[x.k.stage]);
    x.k.next();
}

__device__ static void end_values(shared &sh, products &x)
{
    hopper::products_wait<0>();
    hopper::registers_settle(x.o);
    hopper::registers_settle(x.p);
    if (threadIdx.x % WARP == 0)
        hopper::barrier_arrive(&sh.b.v_empty[x.v.stage]);
    x.v.next();
}

template <typename T>
__device__ static void attend(shared &sh, const eight &e, const call<T> &c, products &x, item at, int warp_row)
{
    const int lane = (int)threadIdx.x % WARP, query = at.query + warp_row + lane / 4;
    const tile_factors *tile = e.tile + at.head * c.tiles, first = tile[tile_of(at.first, c.tiles)];
    const int top = highest_power(tile, c.tiles);
    const auto power_of = [&](const tile_factors &t) { return max(t.v_power - top, -24); }; // less makes all weights 0
    softmax_of f;
#pragma unroll
    for (int r = 0; r < 2; r++)
        f.factor[r] = query + 8 * r < c.m ? e.q_factor[(int64_t)(query + 8 * r) * c.heads + at.head] : 0;
    __half2 w[VALUES / 2];

    begin_scores(sh, x);
    end_scores<0>(sh, x);
    soften<false>(f, w, x.s, first.k, power_of(first), first_keys(c, at));
    pack_weights(x.p, w);
    tile_factors next = tile[at.first]; // loaded a tile ahead
    for (int i = 1; i < at.tiles; i++) {
        const tile_factors now = next;
        next = tile[at.first + i];
        begin_scores(sh, x);
        begin_values(sh, x, i > 1);
        end_scores<1>(sh, x);
        soften<true>(f, w, x.s, now.k, power_of(now), TILE);
        soften_before_values(sh.last[threadIdx.x], f.sum[0] + f.sum[1]);
        end_values(sh, x);
        if (__any_sync(~0u, f.shrink[0] != 1 || f.shrink[1] != 1))
#pragma unroll
            for (int j = 0; j < VALUES; j++)
                x.o[j] *= f.shrink[j / 2 % 2];
        pack_weights(x.p, w);
    }
    if (lane == 0)
        hopper::barrier_arrive(&sh.b.q_empty);
    begin_values(sh, x, at.tiles > 1);
    end_values(sh, x);
    finish(sh.out, c, x.o, f.highest, f.sum, exp2f((float)top), -WEIGHT_POWER, warp_row, at);
}

template <typename T> __device__ static void attend_all(shared &sh, const eight &e, const call<T> &c, int group)
{
    products x;
    x.q = hopper::operand(sh.q + group * GROUP_QUERIES * DIM);
    x.keys = hopper::operand(sh.k[0]);
    x.values = hopper::operand(sh.v[0]);
    hopper::ring<1> once;
    for (int n = (int)blockIdx.x; n < c.shares; n += (int)gridDim.x, once.next()) {
        hopper::barrier_wait(&sh.b.q_full, once.phase);
        attend(sh, e, c, x, item_of(c, n), group * GROUP_QUERIES + (int)threadIdx.x % GROUP / WARP * 16);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    flash8_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap v, const eight e, const call<T> c)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    shared &sh = *reinterpret_cast<shared *>(memory);
    share_work(
        sh.b, c, [&](item it) { load_tile(sh.q, &sh.b.q_full, &q, it.head * DIM, it.query); },
        [&](item it, int key, unsigned i) { load_tile(sh.k[i], &sh.b.k_full[i], &k, it.head * DIM, key); },
        [&](item it, int key, unsigned i) { load_tile(sh.v[i], &sh.b.v_full[i], &v, key, it.head * DIM); },
        [&](int group) { attend_all(sh, e, c, group); });
}

// ---- host side

// Lays out e's arrays in the bytes at p; returns how many they are.
static size_t layout(eight &e, uint8_t *p)
{
    const size_t heads = (size_t)e.heads, tiles = heads * (size_t)e.tiles, queries = heads * (size_t)e.m;
    size_t used = 0;
    const auto take = [&](size_t bytes) {
        uint8_t *at = p + used;
        used += (bytes + 255) / 256 * 256;
        return at;
    };
    e.q = (int8_t *)take(queries * DIM);
    e.k = (int8_t *)take(heads * (size_t)e.s * DIM);
    e.v = take(tiles * TILE * DIM);
    e.q_factor = (float *)take(queries * sizeof(float));
    e.tile = (tile_factors *)take(tiles * sizeof(tile_factors));
    return used;
}

static eight eight_of(struct tensor q, struct tensor k)
{
    eight e = {};
    e.m = (int)q.n[0];
    e.s = (int)k.n[0];
    e.heads = (int)q.n[1];
    e.tiles = (int)ceil_div(e.s, TILE);
    return e;
}

size_t flash8_scratch(struct tensor q, struct tensor k)
{
    eight e = eight_of(q, k);
    return layout(e, nullptr);
}

bool launch_flash8(cudaStream_t s, int processors, const struct attention_out *out, struct tensor lse, struct tensor q,
                   struct tensor k, struct tensor v, float scale, void *scratch, void *room)
{
    if (!can_be(*out, q, k, scale) || !wide(q, 8) || !wide(k, 8) || !wide(v, 8) || q.n[0] > 1 << 20)
        return false;
    eight e = eight_of(q, k);
    layout(e, (uint8_t *)scratch);
    const int64_t width = (int64_t)e.heads * DIM, keys = (int64_t)e.tiles * TILE;
    CUtensorMap maps[3];
    if (!hopper::map_of(&maps[0], e.q, e.m, width, width, QUERIES) ||
        !hopper::map_of(&maps[1], e.k, e.s, width, width, TILE) ||
        !hopper::map_of(&maps[2], e.v, width, keys, keys, DIM))
        return false;
    make(s, e, q, k, v, scale);
    with_type(q.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if constexpr (sizeof(T) == 2) {
            cudaFuncSetAttribute(flash8_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(shared));
            const call<T> c = call_of<T>(*out, lse, q, k, processors, room);
            flash8_kernel<T><<<(unsigned)min(c.shares, processors), THREADS, sizeof(shared), s>>>(maps[0], maps[1],
                                                                                                maps[2], e, c);
        }
    });
    return true;
}
