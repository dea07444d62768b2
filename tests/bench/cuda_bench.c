// cuda_bench.c: the hot operations of a FLUX.1 step at 1024 x 1024 on one GPU: time, rate, and the part of the ceiling
// that a large product and a large copy reach in the same run. Random data; median and range of single runs.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/launch.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROWS = 4608, DIM = 3072, HEADS = 24, HEAD = 128, RUNS = 40, WARM = 5 };
static const struct kernels *const G = &kernels_cuda;

struct bench {
    struct device *d;
    float *noise; // host
    size_t noise_n;
    const char *only;    // part of the names of what is measured
    double flops, bytes; // ceilings, a second; 0: not measured yet
};

static struct tensor make(struct bench *b, int64_t m, int64_t n, float size)
{
    struct tensor t = tensor_2d(NULL, DT_BF16, m, n);
    struct err err = {0};
    if (G->alloc(b->d, tensor_bytes(t), &t.data, &err)) {
        printf("%s\n", err.text);
        exit(1);
    }
    const int64_t block = (int64_t)b->noise_n / n;
    for (int64_t i = 0; i < m; i += block)
        G->upload(b->d, tensor_rows(t, i, m - i < block ? m - i : block), b->noise);
    if (size < 1)
        G->axpy(b->d, t, size - 1, t);
    return t;
}

struct call {
    void (*run)(struct bench *b, const struct call *c);
    struct tensor y, x, z, u;
    struct linear w;
    enum act act;
};

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

// Times batches of runs between two syncs: launches of one hide behind the work of another, as in a forward pass.
// The first product and the first copy measured are the ceilings.
static void measure(struct bench *b, const char *name, const struct call *c, double flops, double bytes)
{
    float ms[RUNS];
    struct timespec from, to;
    enum { BATCH = 10 };
    if (!strstr(name, b->only))
        return;
    for (int i = 0; i < WARM; i++)
        c->run(b, c);
    struct err err = {0};
    if (G->sync(b->d, &err)) {
        printf("%s: %s\n", name, err.text);
        exit(1);
    }
    cudaStreamSynchronize(0);
    for (int i = 0; i < RUNS; i++) {
        clock_gettime(CLOCK_MONOTONIC, &from);
        for (int j = 0; j < BATCH; j++)
            c->run(b, c);
        G->sync(b->d, NULL);
        cudaStreamSynchronize(0);
        clock_gettime(CLOCK_MONOTONIC, &to);
        ms[i] = (float)((double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) / 1e6) / BATCH;
    }
    qsort(ms, RUNS, sizeof *ms, ascending);
    double s = (double)ms[RUNS / 2] / 1e3, rate = flops > 0 ? flops / s / 1e12 : bytes / s / 1e12;
    double ceiling = flops > 0 ? b->flops : b->bytes;
    printf("%-34s %8.4f ms [%.4f-%.4f] %7.2f %s", name, (double)ms[RUNS / 2], (double)ms[0], (double)ms[RUNS - 1], rate,
           flops > 0 ? "TFLOP/s" : "TB/s");
    if (ceiling > 0)
        printf("  %3.0f %% of the ceiling", 100 * rate * 1e12 / ceiling);
    printf("\n");
    fflush(stdout);
    if (flops > 0 && b->flops == 0)
        b->flops = flops / s;
    if (bytes > 0 && b->bytes == 0)
        b->bytes = bytes / s;
}

static void run_linear(struct bench *b, const struct call *c)
{
    G->linear(b->d, c->y, c->x, &c->w, c->act);
}

static void run_copy(struct bench *b, const struct call *c)
{
    G->copy(b->d, c->y, c->x);
}

static void run_modulate(struct bench *b, const struct call *c)
{
    G->modulate(b->d, c->y, c->x, c->z, c->u, 1e-6F);
}

static void run_gate_add_modulate(struct bench *b, const struct call *c)
{
    G->gate_add_modulate(b->d, c->x, c->z, c->w.w[0], c->y, c->z, c->u, 1e-6F);
}

static void run_gate_add(struct bench *b, const struct call *c)
{
    G->gate_add(b->d, c->y, c->z, c->x);
}

static struct tensor heads_of(struct tensor qkv, int which)
{
    return tensor_reshape(tensor_cols(qkv, which * DIM, DIM), 3, qkv.n[0], HEADS, HEAD, 1);
}

static void run_rope(struct bench *b, const struct call *c)
{
    G->qk_norm_rope(b->d, heads_of(c->x, 0), heads_of(c->x, 1), c->z, c->z, 1e-6F, c->u);
}

static void attend(struct bench *b, const struct call *c, bool eight_bits)
{
    const struct attention_opts opts = {.scale = 0.08838834764831845F, .eight_bits = eight_bits};
    G->attention(b->d, tensor_reshape(c->y, 3, c->y.n[0], HEADS, HEAD, 1), heads_of(c->x, 0), heads_of(c->x, 1),
                 heads_of(c->x, 2), &opts);
}

static void run_attention(struct bench *b, const struct call *c)
{
    attend(b, c, false);
}

static void run_attention_in_eight_bits(struct bench *b, const struct call *c)
{
    attend(b, c, true);
}

static const struct shape {
    const char *name;
    int64_t k, n;
    enum act act;
} shapes[] = {{"3072 -> 9216", DIM, 3 * DIM, ACT_NONE},  {"3072 -> 12288 gelu", DIM, 4 * DIM, ACT_GELU_TANH},
              {"3072 -> 21504", DIM, 7 * DIM, ACT_NONE}, {"12288 -> 3072", 4 * DIM, DIM, ACT_NONE},
              {"15360 -> 3072", 5 * DIM, DIM, ACT_NONE}, {"3072 -> 3072", DIM, DIM, ACT_NONE}};

// T5-XXL's
static const struct shape text[] = {{"4096 -> 12288", 4096, 12288, ACT_NONE},
                                    {"4096 -> 4096", 4096, 4096, ACT_NONE},
                                    {"4096 -> 20480", 4096, 20480, ACT_NONE},
                                    {"10240 -> 4096", 10240, 4096, ACT_NONE}};

static void linears(struct bench *b, int64_t rows, const struct shape *shapes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        int64_t n = shapes[i].n, k = shapes[i].k;
        char name[64];
        struct call c = {.run = run_linear, .y = make(b, rows, n, 1), .x = make(b, rows, k, 1), .act = shapes[i].act};
        struct tensor w = make(b, n, k, 0.02F), bias = tensor_reshape(make(b, 1, n, 1), 1, n, 1, 1, 1);
        bias.ld = 1;
        linear_init(&c.w, 1, &w, &bias, NULL);
        snprintf(name, sizeof name, "linear %lld x %s", (long long)rows, shapes[i].name);
        measure(b, name, &c, 2.0 * (double)rows * (double)n * (double)k, 0);
        G->free(b->d, c.y.data), G->free(b->d, c.x.data), G->free(b->d, w.data), G->free(b->d, bias.data);
    }
}

static void ceilings(struct bench *b)
{
    const int64_t n = 8192;
    struct call c = {.run = run_linear, .y = make(b, n, n, 1), .x = make(b, n, n, 1)};
    struct tensor w = make(b, n, n, 1);
    linear_init(&c.w, 1, &w, NULL, NULL);
    measure(b, "product 8192^3", &c, 2.0 * (double)n * (double)n * (double)n, 0);
    struct call copy = {.run = run_copy, .y = make(b, 8 * n, 2 * n, 1), .x = make(b, 8 * n, 2 * n, 1)};
    measure(b, "copy of 2 GiB", &copy, 0, 2.0 * (double)tensor_bytes(copy.x));
    struct tensor all[] = {c.y, c.x, w, copy.y, copy.x};
    for (int i = 0; i < 5; i++)
        G->free(b->d, all[i].data);
}

// ---- 8 bits

static struct tensor codes_room(struct bench *b, enum dtype type, int64_t m, int64_t n)
{
    struct tensor t = tensor_2d(NULL, type, m, n);
    struct err err = {0};
    if (G->alloc(b->d, tensor_bytes(t), &t.data, &err) ||
        G->alloc(b->d, (size_t)m * sizeof(float), (void **)&t.scale, &err)) {
        printf("%s\n", err.text);
        exit(1);
    }
    return t;
}

// t as E4M3 or I8; t is given back.
static struct tensor codes_of(struct bench *b, enum dtype type, struct tensor t)
{
    struct tensor q = codes_room(b, type, t.n[0], t.n[1]);
    G->sync(b->d, NULL);
    launch_quantise(0, q, t);
    cudaStreamSynchronize(0);
    G->free(b->d, t.data);
    return q;
}

static void free_codes(struct bench *b, struct tensor t)
{
    G->free(b->d, t.data);
    G->free(b->d, t.scale);
}

// bf16: x is given as such, and quantised on the way.
static void linear_codes(struct bench *b, enum dtype type, int64_t rows, const struct shape *s, bool bf16)
{
    char name[64];
    struct tensor w = codes_of(b, type, make(b, s->n, s->k, 1)), x = make(b, rows, s->k, 1);
    struct tensor bias = tensor_reshape(make(b, 1, s->n, 1), 1, s->n, 1, 1, 1);
    struct call c = {
        .run = run_linear, .y = make(b, rows, s->n, 1), .x = bf16 ? x : codes_of(b, type, x), .act = s->act};
    bias.ld = 1;
    c.w = (struct linear){.parts = 1, .n = s->n, .k = s->k, .w = {w}, .b = {bias}};
    snprintf(name, sizeof name, "%s linear %lld x %s%s", type == DT_I8 ? "I8" : "E4M3", (long long)rows, s->name,
             bf16 ? ", of bf16" : "");
    measure(b, name, &c, 2.0 * (double)rows * (double)s->n * (double)s->k, 0);
    free_codes(b, w);
    if (bf16)
        G->free(b->d, c.x.data);
    else
        free_codes(b, c.x);
    G->free(b->d, c.y.data), G->free(b->d, bias.data);
}

// On the null stream: no operation of the table does it alone.
static void run_quantise(struct bench *b, const struct call *c)
{
    (void)b;
    launch_quantise(0, c->y, c->x);
}

static void quantising(struct bench *b, int64_t rows, int64_t n)
{
    char name[64];
    struct call c = {.run = run_quantise, .y = codes_room(b, DT_E4M3, rows, n), .x = make(b, rows, n, 1)};
    snprintf(name, sizeof name, "quantise %lld x %lld", (long long)rows, (long long)n);
    measure(b, name, &c, 0, (double)tensor_bytes(c.x) + (double)tensor_bytes(c.y));
    free_codes(b, c.y);
    G->free(b->d, c.x.data);
}

// What the sums of an E4M3 product lose against those of the same numbers in f32: relative L2. f: a device of f32.
static void accuracy(struct bench *b, struct device *f, int64_t k)
{
    enum { M = 512, N = 512 };
    struct tensor x = codes_of(b, DT_E4M3, make(b, M, k, 1)), w = codes_of(b, DT_E4M3, make(b, N, k, 1)), wide[4];
    float *host[2] = {malloc(sizeof(float) * M * N), malloc(sizeof(float) * M * N)},
          *factors = malloc(sizeof(float) * (M + N));
    for (int i = 0; i < 4; i++) { // x, w and two results
        wide[i] = tensor_2d(NULL, DT_F32, i == 1 ? N : M, i < 2 ? k : N);
        if (G->alloc(f, tensor_bytes(wide[i]), &wide[i].data, NULL)) {
            fputs("no memory on the device\n", stderr);
            exit(1);
        }
    }
    launch_codes(0, wide[0], x);
    launch_codes(0, wide[1], w);
    cudaStreamSynchronize(0);
    G->linear(f, wide[2], x, &(struct linear){.parts = 1, .n = N, .k = k, .w = {w}}, ACT_NONE);
    G->linear(f, wide[3], wide[0], &(struct linear){.parts = 1, .n = N, .k = k, .w = {wide[1]}}, ACT_NONE);
    G->download(f, host[0], wide[2]);
    G->download(f, host[1], wide[3]);
    G->download(f, factors, tensor_1d(x.scale, DT_F32, M));
    G->download(f, factors + M, tensor_1d(w.scale, DT_F32, N));
    double apart = 0, all = 0;
    for (int64_t i = 0; i < (int64_t)M * N; i++) {
        const double want = (double)host[1][i] * (double)factors[i / N] * (double)factors[M + i % N];
        apart += pow((double)host[0][i] - want, 2);
        all += want * want;
    }
    printf("E4M3 sums over %lld: relative L2 error %.2e\n", (long long)k, sqrt(apart / all));
    for (int i = 0; i < 4; i++)
        G->free(f, wide[i].data);
    free_codes(b, x), free_codes(b, w);
    free(host[0]), free(host[1]), free(factors);
}

static void eight_bits(struct bench *b)
{
    static const struct shape large = {"8192 -> 8192", 8192, 8192, ACT_NONE};
    struct device *f;
    for (int k = 0; k < 2; k++) {
        const enum dtype type = k ? DT_I8 : DT_E4M3;
        b->flops = 0; // the first product is the ceiling of those that follow
        linear_codes(b, type, 8192, &large, false);
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            linear_codes(b, type, ROWS, &shapes[i], false);
            linear_codes(b, type, ROWS, &shapes[i], true);
        }
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
            linear_codes(b, type, 512, &shapes[i], false);
    }
    quantising(b, ROWS, DIM);
    quantising(b, ROWS, 4 * DIM);
    quantising(b, ROWS, 5 * DIM);
    if (!strstr("E4M3 sums", b->only) || G->open(&(struct device_options){.activation = DT_F32}, &f, NULL))
        return;
    accuracy(b, f, DIM);
    accuracy(b, f, 5 * DIM);
    G->close(f);
}

static void blocks(struct bench *b, int64_t rows)
{
    struct tensor h = make(b, rows, DIM, 1), y = make(b, rows, DIM, 1), other = make(b, rows, DIM, 1),
                  mod = make(b, 2, DIM, 0.1F);
    struct tensor qkv = make(b, rows, 3 * DIM, 1), gamma = tensor_reshape(make(b, 1, HEAD, 1), 1, HEAD, 1, 1, 1);
    struct tensor rope = tensor_of(NULL, DT_F32, 3, rows, HEAD / 2, 2, 1);
    struct tensor scale = tensor_rows(mod, 0, 1), shift = tensor_rows(mod, 1, 1);
    char name[64];
    gamma.ld = 1;
    G->alloc(b->d, tensor_bytes(rope), &rope.data, NULL);
    G->upload(b->d, rope, b->noise);
    const double bytes = (double)tensor_bytes(h), s = (double)rows;
    snprintf(name, sizeof name, "attention %lld, 24 heads of 128", (long long)rows);
    measure(b, name, &(struct call){.run = run_attention, .y = y, .x = qkv}, 4 * s * s * DIM, 0);
    measure(b, "the same in 8 bits", &(struct call){.run = run_attention_in_eight_bits, .y = y, .x = qkv},
            4 * s * s * DIM, 0);
    measure(b, "modulate", &(struct call){.run = run_modulate, .y = y, .x = h, .z = scale, .u = shift}, 0, 2 * bytes);
    measure(b, "qk_norm_rope", &(struct call){.run = run_rope, .x = qkv, .z = gamma, .u = rope}, 0,
            4 * bytes + (double)tensor_bytes(rope));
    measure(b, "gate_add_modulate",
            &(struct call){.run = run_gate_add_modulate, .y = y, .x = h, .z = scale, .u = shift, .w.w[0] = other}, 0,
            4 * bytes);
    measure(b, "gate_add", &(struct call){.run = run_gate_add, .y = h, .x = y, .z = scale}, 0, 3 * bytes);
}

// Argument: part of the names of what to measure.
int main(int argc, char **argv)
{
    struct bench b = {.noise_n = (size_t)1 << 22, .only = argc > 1 ? argv[1] : ""};
    struct err err = {0};
    if (G->open(&(struct device_options){.activation = DT_BF16}, &b.d, &err)) {
        printf("%s\n", err.text);
        return 1;
    }
    uint32_t seed = 1;
    b.noise = malloc(b.noise_n * sizeof *b.noise);
    for (size_t i = 0; b.noise && i < b.noise_n; i++) { // uniform, -1 to 1
        seed = seed * 1664525u + 1013904223u;
        b.noise[i] = (float)(seed >> 8) / (1 << 23) - 1;
    }
    ceilings(&b);
    linears(&b, ROWS, shapes, sizeof shapes / sizeof shapes[0]);
    linears(&b, 512, shapes, sizeof shapes / sizeof shapes[0]);
    linears(&b, 512, text, sizeof text / sizeof text[0]);
    blocks(&b, ROWS);
    eight_bits(&b);
    int code = G->sync(b.d, &err);
    if (code)
        printf("%s\n", err.text);
    G->close(b.d);
    free(b.noise);
    return code;
}
