// tune.c: which of cuBLASLt's algorithms a shape of products gets.
//
// A large product is measured on its own operands, once on a machine: the choice is kept on disk (kernels/algo_cache.h)
// for this GPU, driver and library. The candidates run in turns, round after round with no pause, so that all of them
// meet the same clock, which the power cap lowers under load; the best few meet once more. Nothing is measured while
// the stream is being captured; such a shape gets the library's first suggestion, and keeps it, as every shape keeps
// its algorithm for the device's life: the same operands give the same bits.
//
// On an exact device a row's bits are the same for any number of rows: those of what the library suggests for
// EXACT_ROWS of them with its sums in one part, so that they are added in one order; of some of a layer's outputs, what
// it suggests for the whole layer. Other algorithms may run there that give these bits: each that takes part in the
// race has to, for the operands at hand.
#include "kernels/cuda/candidates.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

enum { ROUNDS = 5, FINALISTS = 4, FINAL_ROUNDS = 10 };
static const double TIMED_FLOPS = 2e9; // smaller products gain less than the timing costs
static const int64_t EXACT_ROWS = 4096;
static const float HOPELESS = 1.1F; // times the best: not run again
static const float NOISE = 0.99F;   // a later candidate must be better by this, so that choices do not wander

// ---- measuring

struct race {
    struct device *d;
    struct shape *s;
    const struct product *p;
    const candidate *list;
    int count;
    cudaEvent_t event[CANDIDATES + 1];
    float best[CANDIDATES], total[CANDIDATES]; // milliseconds
    bool out[CANDIDATES];                      // does not run, or is too slow to be run again
};

// Each candidate that is still in it, once. False: the device has failed.
static bool run_round(struct race *r, bool timed)
{
    struct device *d = r->d;
    int ran[CANDIDATES], n = 0;
    cudaEventRecord(r->event[0], d->stream);
    for (int i = 0; i < r->count; i++) {
        if (r->out[i])
            continue;
        if (cuda_product_run(d, r->s, &r->list[i].algo, r->p)) {
            ran[n++] = i;
            cudaEventRecord(r->event[n], d->stream);
        } else {
            cudaGetLastError(); // a launch that was refused: no failure of the device
            r->out[i] = true;
        }
    }
    if (d->check.failure.code || !cuda_ok(d, cudaEventSynchronize(r->event[n]), "linear"))
        return false;
    for (int i = 0; timed && i < n; i++) {
        float ms = 0;
        if (!cuda_ok(d, cudaEventElapsedTime(&ms, r->event[i], r->event[i + 1]), "linear"))
            return false;
        if (r->best[ran[i]] == 0 || ms < r->best[ran[i]])
            r->best[ran[i]] = ms;
        r->total[ran[i]] += ms;
    }
    return true;
}

// The candidate of the lowest time; -1: none is left.
static int leader(const struct race *r, const float *time)
{
    int best = -1;
    for (int i = 0; i < r->count; i++)
        if (!r->out[i] && (best < 0 || time[i] < time[best] * NOISE))
            best = i;
    return best;
}

static void drop_slow(struct race *r)
{
    float best = 0;
    for (int i = 0; i < r->count; i++)
        if (!r->out[i] && (best == 0 || r->best[i] < best))
            best = r->best[i];
    for (int i = 0; i < r->count; i++)
        r->out[i] |= r->best[i] > best * HOPELESS;
}

static void keep_finalists(struct race *r)
{
    bool final[CANDIDATES] = {0};
    for (int n = 0; n < FINALISTS; n++) {
        const int i = leader(r, r->best);
        if (i < 0)
            break;
        final[i] = r->out[i] = true; // out of the way of the next
    }
    for (int i = 0; i < r->count; i++) {
        r->out[i] = !final[i];
        r->total[i] = 0;
    }
}

// The fastest candidate; -1: nothing could be measured.
static int race_of(struct race *r)
{
    bool ok = run_round(r, false); // loads the kernels
    for (int i = 0; ok && i < ROUNDS; i++) {
        ok = run_round(r, true);
        drop_slow(r);
    }
    if (!ok)
        return -1;
    keep_finalists(r);
    for (int i = 0; ok && i < FINAL_ROUNDS; i++)
        ok = run_round(r, true);
    return ok ? leader(r, r->total) : -1;
}

// Of what the algorithm gives; false: it does not run, or the device has failed.
static bool digest(struct race *r, const cublasLtMatmulAlgo_t *algo, unsigned long long *out)
{
    enum { UNIT = 2 };
    struct device *d = r->d;
    const struct product *p = r->p;
    const int64_t units = (int64_t)dtype_size(p->y_type) / UNIT;
    const struct bits bits = {p->y, p->batch, p->m, p->n * units, p->y_ld * units, p->y_stride * units};
    unsigned long long *sum = cuda_scratch(d, SLOT_DIGEST, sizeof *sum);
    if (!sum || !cuda_ok(d, cudaMemsetAsync(sum, 0, sizeof *sum, d->stream), "linear"))
        return false;
    if (!cuda_product_run(d, r->s, algo, p)) {
        cudaGetLastError();
        return false;
    }
    launch_digest(d->stream, &bits, sum);
    return cuda_ok(d, cudaGetLastError(), "linear") &&
           cuda_ok(d, cudaMemcpyAsync(out, sum, sizeof *sum, cudaMemcpyDeviceToHost, d->stream), "linear") &&
           cuda_ok(d, cudaStreamSynchronize(d->stream), "linear");
}

// Leaves those in it that give the bits of the shape's algorithm.
static void keep_exact(struct race *r)
{
    unsigned long long wanted = 0, got = 0;
    const bool known = digest(r, &r->s->algo, &wanted);
    for (int i = 0; i < r->count; i++)
        r->out[i] = !known || !digest(r, &r->list[i].algo, &got) || got != wanted;
}

static int fastest(struct device *d, struct shape *s, const struct product *p, const candidate *list, int found)
{
    struct race r = {.d = d, .s = s, .p = p, .list = list, .count = found};
    int events = 0, best = -1;
    while (events <= found && cudaEventCreate(&r.event[events]) == cudaSuccess)
        events++;
    if (events > found && d->exact)
        keep_exact(&r);
    if (events > found && !d->check.failure.code)
        best = race_of(&r);
    for (int i = 0; i < events; i++)
        cudaEventDestroy(r.event[i]);
    return best;
}

// ---- the cache on disk

struct algo_cache *cuda_cache(const struct device *d, const char *library, size_t version, int key_n)
{
    char folder[PATH_MAX], words[200];
    struct cudaDeviceProp gpu;
    int driver = 0;
    const bool told =
        cudaGetDeviceProperties(&gpu, d->gpu) == cudaSuccess && cudaDriverGetVersion(&driver) == cudaSuccess;
    snprintf(words, sizeof words, "%.100s with %d multiprocessors, CUDA driver %d, %.20s %zu", told ? gpu.name : "",
             d->processors, driver, library, version);
    return algo_cache_open(told && algo_cache_folder(folder, sizeof folder) ? folder : NULL, library, words, key_n);
}

// NULL: no memory for it.
static struct algo_cache *cache_of(struct device *d)
{
    if (!d->products->cache)
        d->products->cache = cuda_cache(d, "cublaslt-tiles", cublasLtGetVersion(), KEY_NUMBERS);
    return d->products->cache;
}

_Static_assert(sizeof(cublasLtMatmulAlgo_t) == ALGO_WORDS * sizeof(uint64_t), "an algorithm is the cache's words");
_Static_assert(sizeof(struct key) == KEY_NUMBERS * sizeof(int64_t) && (int)KEY_NUMBERS <= (int)ALGO_KEY_MAX,
               "a key fits the cache");

// False: s->algo is what it was.
static bool remembered(struct device *d, struct shape *s)
{
    const struct algo_cache *cache = cache_of(d);
    uint64_t words[ALGO_WORDS];
    cublasLtMatmulAlgo_t algo;
    if (!cache || !algo_cache_find(cache, (const int64_t *)&s->key, words))
        return false;
    memcpy(&algo, words, sizeof algo);
    if (!candidate_allowed(d, s, &algo))
        return false;
    s->algo = algo;
    return true;
}

static void remember(struct device *d, const struct shape *s)
{
    uint64_t words[ALGO_WORDS];
    struct algo_cache *cache = cache_of(d);
    memcpy(words, &s->algo, sizeof words);
    if (cache)
        algo_cache_put(cache, (const int64_t *)&s->key, words);
}

void products_keep(struct products *p)
{
    if (p->cache)
        algo_cache_save(p->cache);
}

// w's outputs are its matrix' columns: it is (k, n) there and transposed.
static bool with_size(struct shape *s, int64_t rows, int64_t outputs, int64_t y_ld, int64_t batch)
{
    const uint64_t m = (uint64_t)rows, n = (uint64_t)outputs;
    const int32_t count = (int32_t)batch;
    cublasLtMatrixLayoutOpaque_t *all[] = {&s->w, &s->x, &s->y};
    for (int i = 0; i < 3; i++)
        if (cublasLtMatrixLayoutSetAttribute(all[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count) != 0)
            return false;
    return cublasLtMatrixLayoutSetAttribute(&s->x, CUBLASLT_MATRIX_LAYOUT_COLS, &m, sizeof m) == 0 &&
           cublasLtMatrixLayoutSetAttribute(&s->y, CUBLASLT_MATRIX_LAYOUT_COLS, &m, sizeof m) == 0 &&
           cublasLtMatrixLayoutSetAttribute(&s->y, CUBLASLT_MATRIX_LAYOUT_ROWS, &n, sizeof n) == 0 &&
           cublasLtMatrixLayoutSetAttribute(&s->y, CUBLASLT_MATRIX_LAYOUT_LD, &y_ld, sizeof y_ld) == 0 &&
           cublasLtMatrixLayoutSetAttribute(&s->w, CUBLASLT_MATRIX_LAYOUT_COLS, &n, sizeof n) == 0;
}

// Sets the algorithm whose bits count.
static void suggest_exact(struct device *d, struct shape *s, const struct product *p)
{
    candidate list[SUGGESTED];
    const bool slice = p->of > 0;
    int found = with_size(s, EXACT_ROWS, slice ? p->of : p->n, slice ? p->of : p->y_ld, 1)
                    ? candidates_suggested(d, s, list)
                    : 0;
    if (!with_size(s, p->m, p->n, p->y_ld, p->batch))
        found = 0;
    for (int i = 0; i < found && !s->usable; i++) {
        s->algo = list[i].algo;
        s->usable =
            candidate_setting(&s->algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 &&
            candidate_setting(&s->algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) == CUBLASLT_REDUCTION_SCHEME_NONE &&
            candidate_allowed(d, s, &s->algo);
    }
}

static void suggest(struct device *d, struct shape *s)
{
    candidate list[SUGGESTED];
    s->usable = candidates_suggested(d, s, list) > 0;
    s->algo = list[0].algo;
}

// Another algorithm than the suggested one, where one is faster.
static void improve(struct device *d, struct shape *s, const struct product *p)
{
    candidate list[CANDIDATES];
    int found = candidates_of(d, s, list);
    if (d->exact) // which may be none of them
        list[found++] = (candidate){.algo = s->algo};
    const int best = fastest(d, s, p, list, found);
    if (best < 0)
        return;
    s->algo = list[best].algo;
    remember(d, s);
}

void cuda_product_choose(struct device *d, struct shape *s, const struct product *p)
{
    const double flops = 2.0 * (double)p->m * (double)p->n * (double)p->k * (double)p->batch;
    const bool large = flops >= TIMED_FLOPS && p->type != DT_F32, again = s->from_disk;
    s->from_disk = large && !again && remembered(d, s);
    s->usable = s->from_disk;
    if (s->usable)
        return;
    if (d->exact && (p->batch == 1 || p->of > 0))
        suggest_exact(d, s, p);
    else
        suggest(d, s);
    if (s->usable && large && !cuda_capturing(d))
        improve(d, s, p);
}
