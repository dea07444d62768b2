// linear8.cu: a linear layer of integers of 8 bits on compute capability 9.0: y = act(x_scale * w_scale * (x w^T) + bias), whose
// sums are exact. No library has it with a factor for each row and column in one pass.
//
// Two blocks of a cluster make two tiles of 128 rows, one below the other: each loads its own rows of x, and half of the
// rows of w for both. One thread loads, as far ahead as there are stages; two warpgroups multiply, 64 rows each, and go on to
// the next tile each for itself, so that one multiplies while the other is busy with its sums. Blocks stay, and take tile
// after tile. What is left over after whole rounds is split by depth: sums of integers are the same in any order.
#include "kernels/cuda/hopper/dealing.cuh"
#include "kernels/cuda/hopper/instructions.cuh"
#include "kernels/cuda/vec.cuh"

enum {
    CLUSTER = 2,
    TILE_M = 128,
    TILE_N = 256,
    DEPTH = 128, // numbers of a row of a stage
    STAGES = 4,
    STEPS = DEPTH / 32,
    WARP = 32,
    GROUP = 128, // threads of a warpgroup
    GROUPS = 2,
    GROUP_M = TILE_M / GROUPS,
    THREADS = GROUP * (1 + GROUPS),
    SUMS = GROUP_M * TILE_N / GROUP, // of a thread
    PAIRS = TILE_N / 8,              // of them, in a row
    PART_PRICE = 8,          // of a part of a tile beside its stages, in stages
    BAND = 8, // tiles of a cluster one below the other that are done before the next column of them: in the L2
};

struct stage {
    int8_t x[TILE_M * DEPTH], w[TILE_N * DEPTH];
};

struct shared {
    stage at[STAGES];
    float2 bias[GROUPS][TILE_N / 2], factor[GROUPS][TILE_N / 2]; // of a tile's columns
    unsigned there[GROUPS];                                      // parts of a tile's rows
    uint64_t full[STAGES], empty[STAGES];
};

struct tiles {
    int down, across, depth; // of a cluster, two below each other; in stages
    int whole, parts, shares; // tiles that are taken whole; parts of each other; both
    // Where parts meet: how many of a warpgroup's rows are there, 0 before and after each kernel; their sums.
    unsigned *tickets; // (tiles in parts, CLUSTER, GROUPS)
    int4 *sums;        // (parts of all, CLUSTER, GROUPS, SUMS / 4, GROUP)
};

// Tickets have their place whatever the product.
static size_t lay_out(tiles &t, uint8_t *at, int processors)
{
    const size_t parts = (size_t)(t.shares - t.whole);
    const size_t tickets = ((size_t)processors * GROUPS * sizeof(unsigned) + 255) / 256 * 256;
    t.tickets = (unsigned *)at;
    t.sums = (int4 *)(at + tickets);
    return tickets + parts * CLUSTER * GROUPS * SUMS * GROUP * sizeof(int);
}

// Where w has a column of y: runs of columns follow each other in y, and not in w.
struct columns {
    int run, gap;

    __device__ int operator()(int column) const { return column + column / run * gap; }
};

template <typename T> struct result {
    T *y;
    int64_t ld;
    int m, n;
    const T *bias;                  // or NULL
    const float *x_scale, *w_scale; // of rows and columns
    columns at;
};

typedef hopper::ring<STAGES> ring;

__device__ static void place(const tiles &t, int i, int *down, int *across)
{
    const int band = i / (BAND * t.across), first = band * BAND, high = min(BAND, t.down - first);
    const int within = i - band * BAND * t.across;
    *down = first + within % high;
    *across = within / high;
}

// ---- sums to numbers in memory

// Four threads that have four words each of one row: word i of all of them comes to thread i.
__device__ static void turn(uint32_t (&v)[4], int lane)
{
    const bool odd = lane & 1, high = lane & 2;
    const uint32_t a = __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
    v[0] = odd ? a : v[0];
    v[1] = odd ? v[1] : a;
    v[2] = odd ? b : v[2];
    v[3] = odd ? v[3] : b;
    const uint32_t c = __shfl_xor_sync(~0u, high ? v[0] : v[2], 2), d = __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
    v[0] = high ? c : v[0];
    v[1] = high ? d : v[1];
    v[2] = high ? v[2] : c;
    v[3] = high ? v[3] : d;
}

// Good to the precision of halves: the GPU's own tangent.
__device__ static float gelu_tanh(float x)
{
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * (0.7978845608028654f + 0.0356774081363001f * x * x)));
    return 0.5f * x + 0.5f * x * t;
}

// Bias and w's factors of the tile's columns, asked for before the product; a thread has two columns.
template <typename T> struct columns_ahead {
    float2 bias = {0, 0}, factor;

    __device__ columns_ahead(const result<T> &p, int column)
    {
        const int at = min(column + (int)threadIdx.x % GROUP * 2, p.n - 2);
        float t[2];
        if (p.bias) {
            load(t, p.bias + p.at(at));
            bias = {t[0], t[1]};
        }
        load(t, p.w_scale + p.at(at));
        factor = {t[0], t[1]};
    }

    __device__ void share(shared &sh, int group) const
    {
        const int i = (int)threadIdx.x % GROUP;
        hopper::meet(1 + group, GROUP); // those of the last tile have been read
        sh.bias[group][i] = bias;
        sh.factor[group][i] = factor;
        hopper::meet(1 + group, GROUP);
    }
};
static_assert(GROUP == TILE_N / 2, "two columns a thread");

// Row `row` of the sums, or the one 8 below.
template <typename T, bool GELU>
__device__ static void put_row(const shared &sh, const result<T> &p, const int (&s)[SUMS], int lower, int row, int column,
                               float x_scale, int group)
{
    const int lane = (int)threadIdx.x % WARP;
    T *y = p.y + (int64_t)row * p.ld;
#pragma unroll
    for (int j = 0; j < PAIRS; j += 4) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 b = sh.bias[group][4 * (j + i) + lane % 4], f = sh.factor[group][4 * (j + i) + lane % 4];
            float first = (float)s[4 * (j + i) + 2 * lower] * (x_scale * f.x) + b.x,
                  second = (float)s[4 * (j + i) + 2 * lower + 1] * (x_scale * f.y) + b.y;
            if (GELU) {
                first = gelu_tanh(first);
                second = gelu_tanh(second);
            }
            pair_from_f32(reinterpret_cast<T *>(&word[i]), first, second);
        }
        turn(word, lane);
        const int at = column + 8 * (j + lane % 4);
        if (row < p.m && at < p.n)
            *reinterpret_cast<uint4 *>(y + at) = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// ---- the product

// One thread: stages to this block's shared memory, half of w's to the other's, too.
__device__ static void load_all(shared &sh, const CUtensorMap *x, const CUtensorMap *w, const tiles &t, columns at,
                                int block)
{
    enum { HALF = TILE_N / CLUSTER };
    ring r;
    for (int i = (int)blockIdx.x / CLUSTER; i < t.shares; i += (int)gridDim.x / CLUSTER) {
        int down, across;
        const share s = share_of(i, t.whole, t.parts, t.depth);
        place(t, s.item, &down, &across);
        for (int k = s.first; k < s.first + s.steps; k++, r.next()) {
            stage &to = sh.at[r.stage];
            hopper::barrier_wait(&sh.empty[r.stage], r.phase ^ 1);
            hopper::barrier_expect(&sh.full[r.stage], sizeof to);
            hopper::tile_load(to.x, x, k * DEPTH, (down * CLUSTER + block) * TILE_M, &sh.full[r.stage]);
            hopper::tile_load_all(to.w + block * HALF * DEPTH, w, k * DEPTH, at(across * TILE_N) + block * HALF,
                                  &sh.full[r.stage], (1 << CLUSTER) - 1);
        }
    }
}

// All of this warp's reads of a stage are done: told to both blocks, which both write it.
__device__ static void let_go(shared &sh, unsigned stage)
{
    if (threadIdx.x % WARP < CLUSTER)
        hopper::barrier_arrive(&sh.empty[stage], threadIdx.x % WARP);
}

// Leaves the warpgroup's sums where those of the tile's other parts are. True: all are there, and s is theirs.
__device__ static bool bring_together(shared &sh, const tiles &t, int (&s)[SUMS], const share &at, int block, int group)
{
    const int thread = (int)threadIdx.x % GROUP, mine = block * GROUPS + group, first = at.slot - at.part;
    const auto sums = [&](int slot, int i) { // of this thread's s[4 * i] and on
        return t.sums + ((int64_t)(slot * CLUSTER * GROUPS + mine) * (SUMS / 4) + i) * GROUP + thread;
    };
#pragma unroll
    for (int i = 0; i < SUMS / 4; i++)
        *sums(at.slot, i) = make_int4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
    __threadfence();
    hopper::meet(1 + group, GROUP);
    if (thread == 0)
        sh.there[group] =
            atomicInc(&t.tickets[(at.item - t.whole) * CLUSTER * GROUPS + mine], (unsigned)t.parts - 1) + 1;
    hopper::meet(1 + group, GROUP);
    if (sh.there[group] < (unsigned)t.parts)
        return false;
    __threadfence();
    for (int p = 0; p < t.parts; p++) {
        if (p == at.part)
            continue;
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++) {
            const int4 theirs = __ldcg(sums(first + p, i));
            s[4 * i] += theirs.x;
            s[4 * i + 1] += theirs.y;
            s[4 * i + 2] += theirs.z;
            s[4 * i + 3] += theirs.w;
        }
    }
    return true;
}

template <typename T, bool GELU>
__device__ static void multiply_all(shared &sh, const tiles &t, const result<T> &p, int block, int group)
{
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x % GROUP / WARP;
    ring r;
    for (int i = (int)blockIdx.x / CLUSTER; i < t.shares; i += (int)gridDim.x / CLUSTER) {
        int s[SUMS], down, across;
        const share at = share_of(i, t.whole, t.parts, t.depth);
        place(t, at.item, &down, &across);
        const int row = (down * CLUSTER + block) * TILE_M + group * GROUP_M + warp * 16 + lane / 4;
        const columns_ahead<T> columns(p, across * TILE_N);
        for (int k = 0; k < at.steps; k++, r.next()) {
            hopper::barrier_wait(&sh.full[r.stage], r.phase);
            const uint64_t a = hopper::operand(sh.at[r.stage].x + group * GROUP_M * DEPTH),
                           b = hopper::operand(sh.at[r.stage].w);
            hopper::products_begin();
#pragma unroll
            for (int step = 0; step < STEPS; step++) // addresses count in 16 bytes
                hopper::product(s, a + 2 * step, b + 2 * step, k > 0 || step > 0);
            hopper::products_commit();
            hopper::products_wait<1>();
            if (k > 0)
                let_go(sh, (r.stage + STAGES - 1) % STAGES);
        }
        columns.share(sh, group);
        const float upper = p.x_scale[min(row, p.m - 1)], lower = p.x_scale[min(row + 8, p.m - 1)];
        hopper::products_wait<0>();
        hopper::registers_settle(s);
        let_go(sh, (r.stage + STAGES - 1) % STAGES);
        if (at.slot >= 0 && !bring_together(sh, t, s, at, block, group))
            continue;
        put_row<T, GELU>(sh, p, s, 0, row, across * TILE_N, upper, group);
        put_row<T, GELU>(sh, p, s, 1, row + 8, across * TILE_N, lower, group);
    }
}

template <typename T, bool GELU>
__global__ void __launch_bounds__(THREADS, 1)
    linear8_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const tiles t,
                   const result<T> p)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    shared &sh = *reinterpret_cast<shared *>(memory);
    const int block = (int)hopper::cluster_rank(), group = __shfl_sync(~0u, (int)threadIdx.x / GROUP, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            hopper::barrier_init(&sh.full[i], 1);
            hopper::barrier_init(&sh.empty[i], CLUSTER * GROUPS * GROUP / WARP);
        }
        hopper::barriers_visible();
    }
    hopper::cluster_meet();
    if (group == GROUPS) {
        hopper::registers_less<24>();
        if (threadIdx.x % GROUP == 0)
            load_all(sh, &x, &w, t, p.at, block);
    } else {
        hopper::registers_more<240>();
        multiply_all<T, GELU>(sh, t, p, block, group);
    }
    hopper::cluster_meet(); // the other block tells this one's barriers until it is through
}

// ---- host side

template <typename T, bool GELU>
static void launch(cudaStream_t s, int processors, const CUtensorMap &x, const CUtensorMap &w, const tiles &t,
                   const result<T> &p)
{
    cudaFuncSetAttribute(linear8_kernel<T, GELU>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(shared));
    const int clusters = processors / CLUSTER;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {CLUSTER, 1, 1};
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)(clusters < t.shares ? clusters : t.shares) * CLUSTER);
    how.blockDim = dim3(THREADS);
    how.dynamicSmemBytes = sizeof(shared);
    how.stream = s;
    how.attrs = &cluster;
    how.numAttrs = 1;
    cudaLaunchKernelEx(&how, linear8_kernel<T, GELU>, x, w, t, p);
}

static tiles tiles_of(int processors, int64_t m, int64_t n, int64_t k, bool in_parts)
{
    tiles t = {};
    t.down = (int)ceil_div(m, TILE_M * CLUSTER);
    t.across = (int)ceil_div(n, TILE_N);
    t.depth = (int)ceil_div(k, DEPTH);
    const dealing d = deal(t.down * t.across, t.depth, processors / CLUSTER, PART_PRICE, in_parts);
    t.whole = d.whole;
    t.parts = d.parts;
    t.shares = d.shares;
    return t;
}

size_t linear8_room(int processors, int64_t m, int64_t n, int64_t k)
{
    tiles t = tiles_of(processors, m, n, k, true);
    return t.parts > 1 ? lay_out(t, nullptr, processors) : 0;
}

bool launch_linear8(cudaStream_t s, int processors, struct tensor y, struct tensor x, struct tensor w, struct tensor bias,
                    int64_t apart, enum act act, void *room)
{
    const int64_t m = y.n[0], n = y.n[1], k = x.n[1], run = w.n[0], runs = n / run;
    CUtensorMap x_map, w_map;
    if (runs > 1 && (run % TILE_N || apart < run))
        return false;
    if ((act != ACT_NONE && act != ACT_GELU_TANH) || y.dtype == DT_F32 || m > 1 << 24 || !wide(y, 8) || !wide(x, 16) ||
        !wide(w, 16) || n % 8 || k % 16 || (!tensor_none(bias) && bias.dtype != y.dtype) ||
        !hopper::map_of(&x_map, x.data, m, k, x.ld, TILE_M) ||
        !hopper::map_of(&w_map, w.data, (runs - 1) * apart + run, k, w.ld, TILE_N / CLUSTER))
        return false;
    tiles t = tiles_of(processors, m, n, k, room);
    lay_out(t, (uint8_t *)room, processors);
    with_type(y.dtype, [&](auto *type) {
        typedef std::remove_pointer_t<decltype(type)> T;
        if constexpr (sizeof(T) == 2) {
            const result<T> p = {(T *)y.data, y.ld,   (int)m, (int)n, tensor_none(bias) ? nullptr : (const T *)bias.data,
                                 x.scale,     w.scale, {(int)run, runs > 1 ? (int)(apart - run) : 0}};
            (act == ACT_NONE ? launch<T, false> : launch<T, true>)(s, processors, x_map, w_map, t, p);
        }
    });
    return true;
}
