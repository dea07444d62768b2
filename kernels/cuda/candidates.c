// candidates.c: the algorithms of cuBLASLt that a shape of products may get.
//
// The library suggests few, often not the best: their tiles leave multiprocessors idle in the last round. So its first
// suggestion is also tried with other tiles: those that keep the GPU busy by their number and size.
#include "kernels/cuda/candidates.h"

#include <math.h>
#include <string.h>

static const float FEW_WAVES = 1.5F; // of blocks over the GPU: then splitting the sums may fill it
static const int SPLITS[] = {2, 3, 4, 6};
_Static_assert(sizeof SPLITS / sizeof SPLITS[0] == SPLIT, "one candidate a split");

int candidates_suggested(struct device *d, struct shape *s, candidate *out)
{
    cublasLtMatmulPreferenceOpaque_t want;
    uint64_t bytes = LIBRARY_BYTES;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; // parts of a sum in f32, never in the halves of y
    uint32_t w = (uint32_t)s->key.w_align, x = (uint32_t)s->key.x_align, y = (uint32_t)s->key.y_align;
    int found = 0;
    bool ok =
        cublasLtMatmulPreferenceInit(&want) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes) ==
            0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction,
                                             sizeof reduction) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w, sizeof w) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x, sizeof x) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &y, sizeof y) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &y, sizeof y) == 0;
    if (!ok || cublasLtMatmulAlgoGetHeuristic(d->blas, &s->desc, &s->w, &s->x, &s->y, &s->y, &want, SUGGESTED, out,
                                              &found) != CUBLAS_STATUS_SUCCESS)
        return 0;
    return found;
}

// ---- settings

uint32_t candidate_setting(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t which)
{
    uint32_t value = 0;
    size_t written;
    return cublasLtMatmulAlgoConfigGetAttribute(algo, which, &value, sizeof value, &written) == 0 ? value : 0;
}

// Whether c could be told.
static bool set(candidate *c, cublasLtMatmulAlgoConfigAttributes_t which, const void *value, size_t size)
{
    return cublasLtMatmulAlgoConfigSetAttribute(&c->algo, which, value, size) == CUBLAS_STATUS_SUCCESS;
}

// Whether an algorithm from elsewhere than the library's suggestions may run, and by the same rules as those; then
// wavesCount is its.
static bool check(struct device *d, struct shape *s, candidate *c)
{
    candidate result;
    memset(&result, 0, sizeof result);
    const uint32_t reduction = candidate_setting(&c->algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME);
    const bool good =
        (reduction == CUBLASLT_REDUCTION_SCHEME_NONE || reduction == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) &&
        cublasLtMatmulAlgoCheck(d->blas, &s->desc, &s->w, &s->x, &s->y, &s->y, &c->algo, &result) ==
            CUBLAS_STATUS_SUCCESS &&
        result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= LIBRARY_BYTES;
    c->wavesCount = result.wavesCount;
    return good;
}

bool candidate_allowed(struct device *d, struct shape *s, const cublasLtMatmulAlgo_t *algo)
{
    candidate c = {.algo = *algo};
    return check(d, s, &c);
}

// ---- the first suggestion in other ways

// The first suggestion with its sums in parts, where it leaves much of the GPU idle; returns how many there are now.
static int with_splits(struct device *d, struct shape *s, candidate *list, int found)
{
    if (list[0].wavesCount >= FEW_WAVES || candidate_setting(&list[0].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) > 1)
        return found;
    for (int i = 0; i < SPLIT; i++) {
        const int32_t split = SPLITS[i];
        const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        candidate *c = &list[found];
        *c = list[0];
        if (set(c, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split, sizeof split) &&
            set(c, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction, sizeof reduction) && check(d, s, c))
            found++;
    }
    return found;
}

// A run of tiles of so many outputs, by rows in steps of 8. Models' layers have multiples of these outputs; then for
// any number of rows there are tiles with little left over. first: number of the first in cublasLtMatmulTile_t, whose
// names CUDA's older headers have not; a library that does not know a number refuses it.
static const struct tiles {
    uint16_t outputs, rows, count, first;
} TILES[] = {{128, 64, 1, 18},   {128, 72, 3, 399},  {128, 96, 1, 33},   {128, 104, 3, 402}, {128, 128, 1, 20},
             {128, 136, 3, 405}, {128, 160, 1, 29},  {128, 168, 3, 408}, {128, 192, 1, 32},  {128, 200, 7, 411},
             {128, 256, 1, 23},  {128, 264, 4, 418}, {192, 48, 2, 453},  {192, 64, 1, 208},  {192, 72, 7, 455},
             {192, 128, 1, 31},  {192, 136, 7, 462}, {192, 192, 1, 209}, {192, 200, 4, 469}, {256, 40, 3, 489},
             {256, 64, 1, 21},   {256, 72, 7, 492},  {256, 128, 1, 24},  {256, 136, 4, 499}, {384, 32, 4, 540},
             {384, 64, 1, 263},  {384, 72, 6, 544}};
enum { TILE_KINDS = sizeof TILES / sizeof TILES[0], LARGE = 128 * 168, MOST_WAYS = 16 };
// Larger clusters were slower, but for one tile of one shape.
static const uint16_t PAIRS[2] = {CUBLASLT_CLUSTER_SHAPE_2x1x1, CUBLASLT_CLUSTER_SHAPE_1x2x1};

// What a multiprocessor has to do, in rounds of which the last is as long as a full one: products, operands that it
// reads, and the end of a tile, for which large ones alone make it wait. Fitted to the winners of 87 races on an H200:
// half of them are among the first two tiles by it, nine of ten among the first seven.
static float work(float waves, int outputs, int rows, int64_t k)
{
    const float area = (float)(outputs * rows), end = outputs * rows > LARGE ? 100 * area / (float)k : 0;
    return ceilf(waves) * (area + 8 * (float)(outputs + rows) + end);
}

struct ranking {
    candidate *best; // by work, the least first
    float work[TILED];
    int count;
};

static void rank(struct ranking *r, const candidate *c, float amount)
{
    if (r->count == TILED && amount >= r->work[TILED - 1])
        return;
    int at = r->count < TILED ? r->count++ : TILED - 1;
    for (; at > 0 && r->work[at - 1] > amount; at--) {
        r->best[at] = r->best[at - 1];
        r->work[at] = r->work[at - 1];
    }
    r->best[at] = *c;
    r->work[at] = amount;
}

// A tile comes in some ways that the library does not explain, by two multiprocessors that share rows or outputs.
static void rank_tile(struct device *d, struct shape *s, struct ranking *r, candidate c, uint32_t id, int outputs,
                      int rows)
{
    int32_t last = 0;
    size_t written;
    cublasLtMatmulAlgoCapGetAttribute(&c.algo, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX, &last, sizeof last, &written);
    if (!set(&c, CUBLASLT_ALGO_CONFIG_TILE_ID, &id, sizeof id))
        return;
    for (int pair = 0; pair < 2; pair++)
        for (int32_t way = 0; way <= last && way < MOST_WAYS; way++)
            if (set(&c, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, &PAIRS[pair], sizeof PAIRS[pair]) &&
                set(&c, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, &way, sizeof way) && check(d, s, &c))
                rank(r, &c, work(c.wavesCount, outputs, rows, s->key.k));
}

static int with_tiles(struct device *d, struct shape *s, candidate *list, int found)
{
    const uint32_t one = 1, none = CUBLASLT_REDUCTION_SCHEME_NONE;
    struct ranking r = {.best = list + found};
    candidate whole = list[0]; // its sums in one part
    if (!set(&whole, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &one, sizeof one) ||
        !set(&whole, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &none, sizeof none))
        return found;
    for (int i = 0; i < TILE_KINDS; i++)
        for (int j = 0; j < TILES[i].count; j++)
            rank_tile(d, s, &r, whole, TILES[i].first + (uint32_t)j, TILES[i].outputs, TILES[i].rows + 8 * j);
    return found + r.count;
}

int candidates_of(struct device *d, struct shape *s, candidate *list)
{
    const int found = candidates_suggested(d, s, list);
    return found == 0 ? 0 : with_tiles(d, s, list, with_splits(d, s, list, found));
}
