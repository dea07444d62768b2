// bench_ceiling.c: what the device reaches at best, measured in the same run: a large product, a large copy, and
// attention of the run's own shape. Fractions of these say more than fractions of a data sheet: clocks and power
// differ.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/bench.h"
#include "proto/clock.h"

enum { MAX_BLOCKS = 16 };

struct bed {
    struct bench *b;
    const struct kernels *k;
    struct device *d;
    int64_t chunk; // numbers uploaded at once
    float *noise;  // (2 * chunk), deviation 1
    void *blocks[MAX_BLOCKS];
    int n_blocks;
    double budget;               // seconds for one measurement
    struct invention *invention; // what is multiplied
};

struct call {
    void (*run)(struct bed *bed, const struct call *c);
    struct tensor y, x;
    struct linear w;
    int64_t heads;
};

static int block(struct bed *bed, size_t bytes, void **out, struct err *err)
{
    TRY(bed->k->alloc(bed->d, bytes, out, err));
    bed->blocks[bed->n_blocks++] = *out;
    return 0;
}

static void clear(struct bed *bed)
{
    while (bed->n_blocks > 0)
        bed->k->free(bed->d, bed->blocks[--bed->n_blocks]);
}

// (m, n) of the activation type, of noise that does not repeat within a tile of a product.
static int make(struct bed *bed, int64_t m, int64_t n, struct tensor *out, struct err *err)
{
    struct tensor t = tensor_2d(NULL, bed->k->activation, m, n);
    TRY(block(bed, tensor_bytes(t), &t.data, err));
    const int64_t rows = bed->chunk / n;
    for (int64_t i = 0; i < m; i += rows)
        bed->k->upload(bed->d, tensor_rows(t, i, m - i < rows ? m - i : rows), bed->noise + i * 7919 % bed->chunk);
    *out = t;
    return 0;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct bench_spread bench_spread_of(double *values, int count)
{
    if (count == 0)
        return (struct bench_spread){0};
    qsort(values, (size_t)count, sizeof *values, ascending);
    const double middle = values[count / 2];
    return (struct bench_spread){.median = count % 2 ? middle : (middle + values[count / 2 - 1]) / 2,
                                 .min = values[0],
                                 .max = values[count - 1],
                                 .count = count};
}

// *out = seconds of one run: the median of batches that go on for the budget, so that clocks settle as in a real loop.
static int measure(struct bed *bed, const struct call *c, double *out, struct err *err)
{
    enum { WARM = 3, MOST = 400 };
    double batches[MOST], start = 0;
    for (int i = 0; i < WARM; i++) {
        TRY(bed->k->sync(bed->d, err));
        start = monotonic_seconds();
        c->run(bed, c);
    }
    TRY(bed->k->sync(bed->d, err));
    const double once = monotonic_seconds() - start, batch = bed->budget / 20;
    const int runs = once < batch ? (int)(batch / once) + 1 : 1;
    int n = 0;
    for (const double end = monotonic_seconds() + bed->budget; n < MOST && (n < 3 || monotonic_seconds() < end); n++) {
        start = monotonic_seconds();
        for (int i = 0; i < runs; i++)
            c->run(bed, c);
        TRY(bed->k->sync(bed->d, err));
        batches[n] = (monotonic_seconds() - start) / runs;
    }
    *out = bench_spread_of(batches, n).median;
    return 0;
}

static void run_linear(struct bed *bed, const struct call *c)
{
    bed->k->linear(bed->d, c->y, c->x, &c->w, ACT_NONE);
}

static void run_copy(struct bed *bed, const struct call *c)
{
    bed->k->copy(bed->d, c->y, c->x);
}

static void run_attention(struct bed *bed, const struct call *c)
{
    const int64_t rows = c->y.n[0], width = c->y.n[1], dim = width / c->heads;
    struct tensor head[3];
    for (int i = 0; i < 3; i++)
        head[i] = tensor_reshape(tensor_cols(c->x, i * width, width), 3, rows, c->heads, dim, 1);
    const struct attention_opts opts = {.scale = 1.0F / (float)dim, .eight_bits = bed->b->precision.codes == DT_I8};
    bed->k->attention(bed->d, tensor_reshape(c->y, 3, rows, c->heads, dim, 1), head[0], head[1], head[2], &opts);
}

// The input of a product of 8 bits, as a block of the model makes it: by the modulation before it.
static int quantise(struct bed *bed, struct tensor *x, struct err *err)
{
    struct tensor y = tensor_2d(NULL, bed->b->precision.codes, x->n[0], x->n[1]), scale;
    void *factors;
    TRY(make(bed, 1, x->n[1], &scale, err));
    TRY(block(bed, tensor_bytes(y), &y.data, err));
    TRY(block(bed, (size_t)y.n[0] * sizeof(float), &factors, err));
    y.scale = factors;
    scale = tensor_reshape(scale, 1, x->n[1], 1, 1, 1);
    bed->k->modulate(bed->d, y, *x, scale, scale, 1e-6F);
    *x = y;
    return 0;
}

static int product(struct bed *bed, struct err *err)
{
    struct bench *b = bed->b;
    const int64_t side = b->ceilings.product_side, shape[] = {side, side};
    struct call c = {.run = run_linear};
    struct tensor w;
    double seconds;
    TRY(invention_tensor(bed->invention, "the product's weight", 2, shape, &w, err));
    TRY(linear_init(&c.w, 1, &w, NULL, err));
    TRY(bed->k->place_linear(bed->d, &c.w, b->precision.codes, false, err));
    int rc = make(bed, side, side, &c.y, err);
    if (rc == 0)
        rc = make(bed, side, side, &c.x, err);
    if (rc == 0 && dtype_quantised(b->precision.codes))
        rc = quantise(bed, &c.x, err);
    if (rc == 0)
        rc = measure(bed, &c, &seconds, err);
    if (rc == 0)
        b->ceilings.product = 2.0 * (double)side * (double)side * (double)side / seconds;
    bed->k->sync(bed->d, &(struct err){0});
    for (int i = 0; i < c.w.parts; i++)
        bed->k->displace(bed->d, c.w.w[i]);
    return rc;
}

static int copy(struct bed *bed, struct err *err)
{
    const int64_t bytes = bed->k->memory ? 1 << 30 : 32 << 20, columns = 4096;
    const int64_t rows = bytes / (columns * (int64_t)dtype_size(bed->k->activation));
    struct call c = {.run = run_copy};
    double seconds;
    TRY(make(bed, rows, columns, &c.y, err));
    TRY(make(bed, rows, columns, &c.x, err));
    TRY(measure(bed, &c, &seconds, err));
    bed->b->ceilings.copy = 2.0 * (double)bytes / seconds;
    return 0;
}

static int attention(struct bed *bed, struct err *err)
{
    const struct bench *b = bed->b;
    const struct dit_info *info = &b->model->info;
    const int64_t rows = bench_rows(b);
    struct call c = {.run = run_attention, .heads = info->heads};
    double seconds;
    TRY(make(bed, rows, info->hidden, &c.y, err));
    TRY(make(bed, rows, 3 * info->hidden, &c.x, err));
    TRY(measure(bed, &c, &seconds, err));
    bed->b->ceilings.attention = 4.0 * (double)rows * (double)rows * (double)info->hidden / seconds;
    return 0;
}

// A device that has no room left for one of them goes without.
static int measure_all(struct bed *bed, struct err *err)
{
    static int (*const all[])(struct bed *, struct err *) = {product, copy, attention};
    const int64_t shape[] = {2 * bed->chunk};
    struct tensor noise;
    TRY(invention_tensor(bed->invention, "noise", 1, shape, &noise, err));
    bed->noise = malloc((size_t)(2 * bed->chunk) * sizeof *bed->noise);
    if (!bed->noise)
        return err_set(err, ERR_NO_MEMORY, "no memory to measure ceilings with");
    for (int64_t i = 0; i < 2 * bed->chunk; i++)
        bed->noise[i] = 50 * bf16_to_f32(((const uint16_t *)noise.data)[i]);
    for (int i = 0; i < 3; i++) {
        const int rc = all[i](bed, err);
        clear(bed);
        if (rc != 0 && rc != ERR_NO_MEMORY)
            return rc;
    }
    *err = (struct err){.code = ERR_NONE};
    return 0;
}

int bench_ceilings(struct bench *b, struct err *err)
{
    const bool own_memory = b->home.k->memory != NULL;
    struct bed bed = {.b = b,
                      .k = b->home.k,
                      .d = b->home.d,
                      .budget = own_memory ? 0.5 : 0.03,
                      .chunk = own_memory ? 1 << 22 : 1 << 18};
    b->ceilings.product_side = own_memory ? 8192 : 512;
    TRY(invention_new((size_t)(own_memory ? 128 : 1) << 20, b->threads, &bed.invention, err));
    const int rc = measure_all(&bed, err);
    free(bed.noise);
    invention_free(bed.invention);
    return rc;
}
