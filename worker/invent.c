#include "worker/invent.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { QUANTILES = 1 << 16, MAX_THREADS = 64, LINE = 64 }; // windows begin at a cache line
static const double DEVIATION = 0.02;
static const size_t SLACK = 32 << 20; // beyond the largest tensor, so that it too may begin in many places

struct invention {
    uint16_t *block; // bf16
    size_t count;    // of numbers, a multiple of 4
};

// splitmix64 (Steele et al. 2014) as a function of a counter: any part of the block can be made alone.
static uint64_t mix(uint64_t z)
{
    z = (z + 1) * 0x9E3779B97F4A7C15U;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    return z ^ z >> 31;
}

// table[i] = the quantile (i + 0.5) / QUANTILES of the normal distribution, by Newton's method outwards from the
// median.
static void make_quantiles(uint16_t table[QUANTILES])
{
    const int half = QUANTILES / 2;
    double x = 0;
    for (int i = 0; i < half; i++) {
        const double p = (i + 0.5) / QUANTILES; // above one half
        for (int round = 0; round < 4; round++)
            x += (p - 0.5 * erf(x * M_SQRT1_2)) * sqrt(2 * M_PI) * exp(x * x / 2);
        table[half + i] = f32_to_bf16((float)(x * DEVIATION));
        table[half - 1 - i] = f32_to_bf16((float)(-x * DEVIATION));
    }
}

struct share {
    pthread_t thread;
    const uint16_t *quantiles;
    uint16_t *block;
    size_t from, to;
};

static void *fill(void *arg)
{
    const struct share *s = arg;
    for (size_t i = s->from; i < s->to; i += 4) {
        uint64_t bits = mix(i);
        for (int j = 0; j < 4; j++, bits >>= 16)
            s->block[i + (size_t)j] = s->quantiles[bits & 0xFFFF];
    }
    return NULL;
}

static void fill_all(const struct invention *v, const uint16_t *quantiles, int threads)
{
    struct share shares[MAX_THREADS];
    const int n = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
    const size_t each = (v->count / (size_t)n + 4) & ~(size_t)3;
    bool running[MAX_THREADS];
    for (int i = 0; i < n; i++) {
        const size_t from = each * (size_t)i, to = from + each;
        shares[i] = (struct share){.quantiles = quantiles,
                                   .block = v->block,
                                   .from = from < v->count ? from : v->count,
                                   .to = to < v->count ? to : v->count};
        running[i] = pthread_create(&shares[i].thread, NULL, fill, &shares[i]) == 0;
        if (!running[i])
            fill(&shares[i]);
    }
    for (int i = 0; i < n; i++)
        if (running[i])
            pthread_join(shares[i].thread, NULL);
}

int invention_new(size_t room, int threads, struct invention **out, struct err *err)
{
    struct invention *v = calloc(1, sizeof *v);
    uint16_t *quantiles = malloc(QUANTILES * sizeof *quantiles);
    *out = NULL;
    if (v) {
        v->count = (room + (room < SLACK ? room : SLACK) + LINE) / sizeof *v->block & ~(size_t)3;
        void *map = mmap(NULL, v->count * sizeof *v->block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        v->block = map == MAP_FAILED ? NULL : map;
    }
    if (!v || !v->block || !quantiles) {
        invention_free(v);
        free(quantiles);
        return err_set(err, ERR_NO_MEMORY, "no memory for invented weights, %zu bytes", room);
    }
    madvise(v->block, v->count * sizeof *v->block, MADV_HUGEPAGE);
    make_quantiles(quantiles);
    fill_all(v, quantiles, threads);
    free(quantiles);
    *out = v;
    return 0;
}

void invention_free(struct invention *v)
{
    if (v && v->block)
        munmap(v->block, v->count * sizeof *v->block);
    free(v);
}

static uint64_t hash(const char *text)
{
    uint64_t h = 0;
    for (; *text; text++)
        h = mix(h ^ (uint8_t)*text);
    return h;
}

int invention_tensor(const struct invention *v, const char *name, int dims, const int64_t *n, struct tensor *out,
                     struct err *err)
{
    const size_t line = LINE / sizeof *v->block;
    struct tensor t =
        tensor_of(NULL, DT_BF16, dims, n[0], dims > 1 ? n[1] : 1, dims > 2 ? n[2] : 1, dims > 3 ? n[3] : 1);
    const size_t count = (size_t)tensor_count(t);
    if (count > v->count)
        return err_set(err, ERR_INVALID, "tensor %s of %zu numbers is larger than the %zu that were invented", name,
                       count, v->count);
    t.data = v->block + hash(name) % ((v->count - count) / line + 1) * line;
    *out = t;
    return 0;
}

void invent_ids(const char *text, int64_t vocabulary, int32_t *ids, int64_t n)
{
    const uint64_t seed = hash(text);
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(mix(seed + (uint64_t)i) % (uint64_t)vocabulary);
    if (n > 0)
        ids[n - 1] = (int32_t)(vocabulary - 1);
}
