// Every operation of the cuda backend against the cpu one, in F32, BF16 and F16, over odd, strided and empty shapes. An
// operand has the same numbers on both sides, exact in its type there. Gaps of strided views and outputs not yet
// written hold NaN: read, they spoil the result; written, they are found. Without a GPU the program says so and
// ends with 77, which CTest counts as skipped.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/launch.h"

#include <dirent.h>
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static const struct kernels *const C = &kernels_cpu, *const G = &kernels_cuda;
enum { TYPES = 3, BLOCKS = 4096, SKIPPED = 77 };
static const enum dtype types[TYPES] = {DT_F32, DT_BF16, DT_F16};

struct fix {
    struct device *cpu, *gpu[TYPES], *d; // d: of the type under test
    enum dtype type;
    uint32_t seed;
    void *host[BLOCKS], *device[BLOCKS];
    int used;
    enum dtype codes; // numbers of 8 bits under test
};

// One operand on both sides. whole: the GPU's memory as one vector, gaps included.
struct pair {
    struct tensor c, g, whole;
};

static const struct pair none;

static int setup(void **state)
{
    struct fix *f = calloc(1, sizeof *f);
    struct err err = {0};
    *state = f;
    f->seed = 4711;
    int code = C->open(&(struct device_options){.threads = 2}, &f->cpu, &err);
    for (int i = 0; i < TYPES && code == 0; i++)
        code = G->open(&(struct device_options){.activation = types[i]}, &f->gpu[i], &err);
    if (code)
        printf("%s\n", err.text);
    return code;
}

static void release(struct fix *f)
{
    for (int i = 0; i < f->used; i++) {
        free(f->host[i]);
        G->free(f->d, f->device[i]);
    }
    f->used = 0;
}

static int teardown(void **state)
{
    struct fix *f = *state;
    f->d = f->gpu[0];
    release(f);
    for (int i = 0; i < TYPES; i++)
        G->close(f->gpu[i]);
    C->close(f->cpu);
    free(f);
    return 0;
}

// Runs body for each activation type.
#define EACH_TYPE(f)                                                                                                   \
    for (int type_ = 0; type_ < TYPES && (release_if(f), (f)->type = types[type_], (f)->d = (f)->gpu[type_], true);    \
         type_++)

static void release_if(struct fix *f)
{
    if (f->d)
        release(f);
}

// By activation type.
static double tolerance(const struct fix *f, double f32, double bf16, double f16)
{
    return f->type == DT_F32 ? f32 : f->type == DT_BF16 ? bf16 : f16;
}

static double uniform(struct fix *f) // -1 to 1
{
    f->seed = f->seed * 1664525u + 1013904223u;
    return (double)(f->seed >> 8) / (1 << 23) - 1;
}

static float rounded(float v, enum dtype type)
{
    return type == DT_BF16 ? bf16_to_f32(f32_to_bf16(v)) : type == DT_F16 ? f16_to_f32(f32_to_f16(v)) : v;
}

static void put(struct tensor t, int64_t i, float v)
{
    if (t.dtype == DT_F32)
        ((float *)t.data)[i] = v;
    else if (t.dtype == DT_F64)
        ((double *)t.data)[i] = (double)v;
    else if (t.dtype == DT_U8)
        ((uint8_t *)t.data)[i] = 0xa5;
    else
        ((uint16_t *)t.data)[i] = t.dtype == DT_BF16 ? f32_to_bf16(v) : f32_to_f16(v);
}

static double get(struct tensor t, int64_t i)
{
    switch (t.dtype) {
    case DT_F32:
        return (double)((float *)t.data)[i];
    case DT_F64:
        return ((double *)t.data)[i];
    case DT_BF16:
        return (double)bf16_to_f32(((uint16_t *)t.data)[i]);
    case DT_F16:
        return (double)f16_to_f32(((uint16_t *)t.data)[i]);
    default:
        return (double)((uint8_t *)t.data)[i];
    }
}

// c and g: types on either side. size 0: an output, NaN throughout. shift: elements that the GPU's tensor lies past a
// 256-byte boundary.
static struct pair make(struct fix *f, enum dtype c, enum dtype g, int dims, const int64_t *n, int64_t gap, double size,
                        int64_t shift)
{
    struct pair p = {.c =
                         tensor_of(NULL, c, dims, n[0], dims > 1 ? n[1] : 1, dims > 2 ? n[2] : 1, dims > 3 ? n[3] : 1)};
    int64_t row = dims == 1 ? n[0] : p.c.ld;
    p.c.ld = dims == 1 ? 1 : row + gap;
    int64_t total = dims == 1 ? row : p.c.ld * p.c.n[0];
    assert_true(f->used < BLOCKS);
    p.c.data = f->host[f->used] = malloc((size_t)total * dtype_size(c) + 1);
    assert_int_equal(G->alloc(f->d, (size_t)(total + shift) * dtype_size(g), &f->device[f->used], NULL), 0);
    p.g = p.c;
    p.g.dtype = g;
    p.g.data = (char *)f->device[f->used++] + shift * (int64_t)dtype_size(g);
    p.whole = tensor_1d(p.g.data, g, total);
    float *same = malloc((size_t)total * sizeof *same + 1);
    for (int64_t i = 0; i < total; i++) {
        bool gap_here = dims > 1 && i % p.c.ld >= row;
        same[i] = gap_here || size == 0 ? NAN : rounded((float)(uniform(f) * size), g);
        put(p.c, i, same[i]);
    }
    G->upload(f->d, p.whole, c == g && c != DT_F32 && c != DT_BF16 && c != DT_F16 ? p.c.data : (void *)same);
    free(same);
    return p;
}

#define SHAPE(...)                                                                                                     \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / 8), (int64_t[])                                                           \
    {                                                                                                                  \
        __VA_ARGS__                                                                                                    \
    }
// An activation, an output and a weight.
#define ACTIVE(f, gap, size, ...) make(f, DT_F32, (f)->type, SHAPE(__VA_ARGS__), gap, size, 0)
#define OUTPUT(f, gap, ...)       make(f, DT_F32, (f)->type, SHAPE(__VA_ARGS__), gap, 0, 0)
#define WEIGHT(f, dtype, ...)     make(f, dtype, dtype, SHAPE(__VA_ARGS__), 0, 1, 0)

static struct pair ids_of(struct fix *f, const int32_t *ids, int64_t n)
{
    struct pair p = make(f, DT_F32, DT_F32, 1, &n, 0, 1, 0); // room of the same size
    memcpy(p.c.data, ids, (size_t)n * sizeof *ids);
    p.c.dtype = p.g.dtype = DT_I32;
    G->upload(f->d, p.g, p.c.data);
    return p;
}

// The GPU's numbers within tolerance * (1 + |the cpu's|), and its gaps untouched.
static void same(struct fix *f, const char *what, struct pair p, double tolerance)
{
    struct err err = {0};
    if (C->sync(f->cpu, &err) || G->sync(f->d, &err))
        fail_msg("%s: %s", what, err.text);
    bool half = p.g.dtype == DT_BF16 || p.g.dtype == DT_F16;
    int64_t total = p.whole.n[0], row = p.c.dims == 1 ? total : p.c.n[1] * p.c.n[2] * p.c.n[3];
    struct tensor got = tensor_1d(malloc((size_t)total * 8 + 1), half ? DT_F32 : p.g.dtype, total);
    G->download(f->d, got.data, p.whole);
    assert_int_equal(G->sync(f->d, NULL), 0);
    int64_t i = 0;
    double g = 0, c = 0;
    for (; i < total; i++) {
        g = get(got, i);
        c = get(p.c, i);
        if (p.c.dims > 1 && i % p.c.ld >= row
                ? p.c.dtype != DT_U8 && !isnan(g)
                : g != c && !(isnan(c) && isnan(g)) && !(fabs(g - c) <= tolerance * (1 + fabs(c))))
            break;
    }
    free(got.data);
    if (i < total)
        fail_msg("%s in %s, (%lld, %lld, %lld): element %lld of row %lld is %.9g, not %.9g", what, dtype_name(f->type),
                 (long long)p.c.n[0], (long long)p.c.n[1], (long long)p.c.n[2],
                 (long long)(p.c.dims == 1 ? i : i % p.c.ld), (long long)(p.c.dims == 1 ? 0 : i / p.c.ld), g, c);
}

static enum dtype weight_type(const struct fix *f, int i) // mostly the activation's, as in a checkpoint
{
    return i % 4 == 3 ? types[i / 4 % TYPES] : f->type;
}

// ---- memory

static void transfers(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        struct pair x = ACTIVE(f, 3, 100, 37, 5, 11), v = ACTIVE(f, 0, 1, 1000);
        float host[37 * 55], back[37 * 55];
        for (int i = 0; i < 37 * 55; i++)
            host[i] = rounded((float)uniform(f), f->type);
        C->upload(f->cpu, x.c, host);
        G->upload(f->d, x.g, host);
        same(f, "upload", x, 0);
        G->download(f->d, back, x.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        for (int i = 0; i < 37 * 55; i++)
            assert_true(host[i] == back[i]);
        C->upload(f->cpu, v.c, host);
        G->upload(f->d, v.g, host);
        same(f, "upload of a vector", v, 0);
    }
}

static void copies(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        const int64_t widths[] = {1, 7, 60, 64, 256};
        for (int i = 0; i < 15; i++) {
            int64_t w = widths[i % 5], gap = i / 5 * 4;
            struct pair x = ACTIVE(f, gap, 1, 50, 3, w), y = OUTPUT(f, i % 3, 50, 3, w);
            C->copy(f->cpu, y.c, x.c);
            G->copy(f->d, y.g, x.g);
            same(f, "copy", y, 0);
            C->zero(f->cpu, tensor_rows(x.c, 3, 20));
            G->zero(f->d, tensor_rows(x.g, 3, 20));
            G->zero(f->d, tensor_rows(x.g, 3, 0));
            same(f, "zero", x, 0);
        }
    }
}

static void placing(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        for (int i = 0; i < TYPES; i++) {
            struct tensor t, w = WEIGHT(f, types[i], 33, 50).c, v = tensor_1d(w.data, w.dtype, 50);
            w.ld = 50;
            assert_int_equal(G->place(f->d, w, &t, NULL), 0);
            assert_int_equal(t.dtype, f->type);
            float back[33 * 50];
            G->download(f->d, back, t);
            assert_int_equal(G->sync(f->d, NULL), 0);
            for (int j = 0; j < 33 * 50; j++)
                assert_true(back[j] == rounded((float)get(w, j), f->type));
            assert_int_equal(G->place(f->d, v, &t, NULL), 0);
            assert_int_equal(t.dtype, v.dtype);
            assert_int_equal(C->place(f->cpu, w, &t, NULL), 0);
            assert_true(t.data == w.data);
        }
    }
}

static void placed_linear(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        for (int bias = 0; bias < 3; bias++) { // none, all, all but one
            const int64_t n[] = {24, 8, 40};
            struct tensor w[3], b[3] = {{0}};
            for (int i = 0; i < 3; i++) {
                w[i] = WEIGHT(f, f->type, n[i], 64).c;
                if (bias && (bias == 1 || i != 1))
                    b[i] = WEIGHT(f, f->type, n[i]).c;
            }
            struct linear lc, lg;
            assert_int_equal(linear_init(&lc, 3, w, b, NULL), 0);
            lg = lc;
            assert_int_equal(C->place_linear(f->cpu, &lc, DT_F32, false, NULL), 0);
            assert_int_equal(G->place_linear(f->d, &lg, f->type, false, NULL), 0);
            assert_int_equal(lg.parts, 1);
            struct pair x = ACTIVE(f, 0, 1, 50, 64), y = OUTPUT(f, 0, 50, 72);
            C->linear(f->cpu, y.c, x.c, &lc, ACT_GELU_TANH);
            G->linear(f->d, y.g, x.g, &lg, ACT_GELU_TANH);
            same(f, "linear in one part", y, tolerance(f, 2e-5, 1e-2, 2e-3));
        }
    }
}

// ---- rows

static void linear_case(struct fix *f, int64_t m, int64_t k, int parts, const int64_t *n, enum dtype type, bool bias,
                        enum act act)
{
    struct tensor wc[4], wg[4], bc[4], bg[4];
    int64_t total = 0, gap = m % 3;
    for (int i = 0; i < parts; i++) {
        struct pair w = make(f, type, type, SHAPE(n[i], k), gap, 1, 0), b = WEIGHT(f, i == 2 ? DT_F32 : type, n[i]);
        wc[i] = w.c, wg[i] = w.g, bc[i] = b.c, bg[i] = b.g;
        total += n[i];
    }
    struct linear lc, lg;
    assert_int_equal(linear_init(&lc, parts, wc, bias ? bc : NULL, NULL), 0);
    assert_int_equal(linear_init(&lg, parts, wg, bias ? bg : NULL, NULL), 0);
    struct pair x = ACTIVE(f, gap, 1, m, k), y = OUTPUT(f, gap, m, total);
    C->linear(f->cpu, y.c, x.c, &lc, act);
    G->linear(f->d, y.g, x.g, &lg, act);
    // Sums of k products of size 1. Halves: the result's rounding, before and after the activation; a weight of another
    // type is rounded to theirs.
    double own = type == f->type ? 1 : 1 + sqrt((double)k) / 4;
    same(f, "linear", y, tolerance(f, 2e-6 * sqrt((double)k) + 2e-6, 1e-2 * own, 2e-3 * own));
}

static void linear(void **state)
{
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 2, 5, 16, 77}, ks[] = {1, 7, 16, 64, 100}, n[] = {1, 17, 33, 64};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 30; i++)
            linear_case(f, ms[i % 6], ks[i % 5], 1 + i % 4, n + (i % 4 == 3 ? 0 : i % 2), weight_type(f, i), i % 2 == 0,
                        (enum act)(i / 2 % 5));
        for (int act = ACT_NONE; act <= ACT_QUICK_GELU; act++)
            linear_case(f, 150, 320, 2, (int64_t[]){304, 96}, f->type, act != ACT_SILU, (enum act)act);
        linear_case(f, 28, 3072, 1, (int64_t[]){512}, f->type, true, ACT_NONE);
        linear_case(f, 1, 320, 1, (int64_t[]){1000}, f->type, true, ACT_SILU);
        linear_case(f, 1024, 1024, 1, (int64_t[]){1024}, f->type, true, ACT_GELU_TANH); // large enough to be timed
    }
}

static void columns_of_one(void **state) // outputs and inputs that are blocks of columns
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        struct pair x = ACTIVE(f, 0, 1, 20, 64), y = ACTIVE(f, 0, 1, 20, 104), w = WEIGHT(f, f->type, 40, 32);
        struct linear lc, lg;
        assert_int_equal(linear_init(&lc, 1, &w.c, NULL, NULL) + linear_init(&lg, 1, &w.g, NULL, NULL), 0);
        for (int64_t at = 0; at < 4; at++) {
            C->linear(f->cpu, tensor_cols(y.c, 50 + at, 40), tensor_cols(x.c, 8 * at, 32), &lc, ACT_NONE);
            G->linear(f->d, tensor_cols(y.g, 50 + at, 40), tensor_cols(x.g, 8 * at, 32), &lg, ACT_NONE);
            same(f, "linear of columns", y, tolerance(f, 1e-5, 1e-2, 2e-3));
        }
    }
}

static void activations(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        for (int act = ACT_NONE; act <= ACT_QUICK_GELU; act++)
            for (int i = 0; i < 4; i++) {
                struct pair x = i == 0 ? ACTIVE(f, 0, 10, 40001) : ACTIVE(f, i, i == 2 ? 200 : 8, 9, 3, 5 + 11 * i);
                C->activate(f->cpu, x.c, (enum act)act);
                G->activate(f->d, x.g, (enum act)act);
                same(f, "activate", x, tolerance(f, 2e-6, 5e-3, 6e-4));
            }
    }
}

static void pair_op(const struct kernels *k, struct device *d, int op, struct tensor x, struct tensor y,
                    struct tensor z, struct tensor v)
{
    if (op == 0)
        k->add(d, x, y);
    else if (op == 1)
        k->mul(d, x, y, x.n[0] % 2 ? ACT_GELU_TANH : ACT_NONE);
    else if (op == 2)
        k->axpy(d, x, 0.3f, y);
    else if (op == 3)
        k->add_row(d, x, v);
    else if (op == 4)
        k->gate_add(d, x, v, y);
    else
        k->cfg_combine(d, x, y, z, 3.5f);
}

static void pairs(void **state)
{
    struct fix *f = *state;
    const int64_t rows[] = {0, 1, 3, 200}, columns[] = {1, 5, 16, 35, 256};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 4 * 5 * 6; i++) {
            int64_t m = rows[i % 4], n = columns[i / 4 % 5];
            int op = i / 20;
            struct pair x = ACTIVE(f, op % 3 * 8, 2, m, n), y = ACTIVE(f, i % 2, 2, m, n), z = ACTIVE(f, 1, 2, m, n),
                        v = WEIGHT(f, types[i % 3], n);
            pair_op(C, f->cpu, op, x.c, y.c, z.c, v.c);
            pair_op(G, f->d, op, x.g, y.g, z.g, v.g);
            same(f, "pair", x, tolerance(f, 1e-6, 5e-3, 6e-4));
        }
        struct pair x = ACTIVE(f, 0, 1, 9, 16), y = ACTIVE(f, 0, 1, 9, 16);
        C->cfg_combine(f->cpu, x.c, x.c, y.c, 2);
        G->cfg_combine(f->d, x.g, x.g, y.g, 2);
        same(f, "cfg_combine in place", x, tolerance(f, 1e-6, 5e-3, 6e-4));
    }
}

static void norms(void **state)
{
    struct fix *f = *state;
    const int64_t rows[] = {0, 1, 7, 90}, columns[] = {1, 8, 31, 256, 1000, 3072, 5000, 40000};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 4 * 8 * 4; i++) {
            int64_t m = rows[i % 4], n = columns[i / 4 % 8];
            int op = i / 32; // layer_norm, the same without gamma and beta, modulate, rms_norm
            if (n > 3072 && m > 7)
                continue;
            struct pair x = ACTIVE(f, i % 2 * 8, 3, m, n), y = OUTPUT(f, i % 3, m, n), g = WEIGHT(f, types[i % 3], n),
                        b = WEIGHT(f, types[i / 3 % 3], n), o = op == 1 ? none : g, p = op == 1 ? none : b;
            if (op < 2) {
                C->layer_norm(f->cpu, y.c, x.c, o.c, p.c, 1e-5f);
                G->layer_norm(f->d, y.g, x.g, o.g, p.g, 1e-5f);
            } else if (op == 2) {
                C->modulate(f->cpu, y.c, x.c, g.c, b.c, 1e-6f);
                G->modulate(f->d, y.g, x.g, g.g, b.g, 1e-6f);
            } else {
                C->rms_norm(f->cpu, y.c, x.c, g.c, 1e-6f);
                G->rms_norm(f->d, y.g, x.g, g.g, 1e-6f);
            }
            same(f, "norm", y, tolerance(f, 1e-5, 5e-3, 6e-4));
        }
    }
}

#define EACH_CODES(f) for (int codes_ = 0; codes_ < 2 && ((f)->codes = codes_ ? DT_I8 : DT_E4M3, true); codes_++)

static double of_e4m3(uint8_t code)
{
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const double size = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);
    return (code & 127) == 127 ? NAN : code & 128 ? -size : size;
}

static double of_code(enum dtype type, uint8_t code)
{
    return type == DT_I8 ? (double)(int8_t)code : of_e4m3(code);
}

static double most_of(enum dtype type)
{
    return type == DT_I8 ? 127 : 448;
}

// y in 8 bits against the CPU's numbers: half a step of the format, and what bf16 or f16 lost before.
static void same_codes(struct fix *f, const char *what, struct tensor y, const struct tensor want, double tolerance)
{
    const int64_t m = y.n[0], n = y.n[1];
    uint8_t *codes = malloc((size_t)(m * n) + 1);
    float *scale = malloc((size_t)(m + 1) * sizeof *scale);
    G->download(f->d, codes, y);
    G->download(f->d, scale, tensor_1d(y.scale, DT_F32, m));
    assert_int_equal(G->sync(f->d, NULL), 0);
    for (int64_t r = 0; r < m; r++) {
        double top = 0;
        for (int64_t i = 0; i < n; i++) {
            const double is = of_code(y.dtype, codes[r * n + i]) * (double)scale[r],
                         should = get(want, r * want.ld + i);
            const double step =
                y.dtype == DT_I8 ? (double)scale[r] / 2 : fmax(fabs(should) / 16, (double)scale[r] / 512);
            const double room = step * 1.001 + tolerance * (1 + fabs(should));
            if (!(fabs(is - should) <= room))
                fail_msg("%s: row %lld of %lld, column %lld of %lld: %g, not %g", what, (long long)r, (long long)m,
                         (long long)i, (long long)n, is, should);
            top = fmax(top, fabs(should));
        }
        if (!(fabs((double)scale[r] * most_of(y.dtype) - top) <= tolerance * (1 + top)))
            fail_msg("%s: row %lld: factor %g for a largest of %g", what, (long long)r, (double)scale[r], top);
    }
    free(codes);
    free(scale);
}

// The residual and the norm in one pass, rows with a mean away from 0, results of both kinds.
static void modulations(void **state)
{
    struct fix *f = *state;
    const int64_t rows[] = {0, 1, 3, 1500}, columns[] = {8, 33, 64, 256, 1000, 3072, 8200};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 4 * 7 * 3; i++) {
            const int64_t m = rows[i % 4], n = columns[i / 4 % 7];
            const bool codes = i / 28 > 0 && n % 8 == 0 && f->type != DT_F32;
            if (n > 256 && m > 3 && n != 3072)
                continue;
            struct pair x = ACTIVE(f, i % 2 * 8, 3, m, n), u = ACTIVE(f, i % 3 * 8, 2, m, n), y = OUTPUT(f, 0, m, n),
                        gate = WEIGHT(f, f->type, n), scale = WEIGHT(f, f->type, n), shift = WEIGHT(f, f->type, n);
            struct tensor quantised = tensor_2d(NULL, i / 28 == 1 ? DT_E4M3 : DT_I8, m, n);
            C->gate_add_modulate(f->cpu, x.c, gate.c, u.c, y.c, scale.c, shift.c, 1e-6f);
            if (codes) {
                quantised.data = OUTPUT(f, 0, m, n).g.data;
                quantised.scale = make(f, DT_F32, DT_F32, SHAPE(m), 0, 0, 0).g.data;
            }
            G->gate_add_modulate(f->d, x.g, gate.g, u.g, codes ? quantised : y.g, scale.g, shift.g, 1e-6f);
            same(f, "residual of gate_add_modulate", x, tolerance(f, 2e-6, 5e-3, 6e-4));
            if (codes)
                same_codes(f, "gate_add_modulate in 8 bits", quantised, y.c, tolerance(f, 0, 2e-2, 3e-3));
            else
                same(f, "gate_add_modulate", y, tolerance(f, 2e-5, 1e-2, 2e-3));
            release(f);
        }
    }
}

// ---- numbers of 8 bits

// The nearest code, ties to the even one; what is larger than all becomes the largest.
static uint8_t to_e4m3(float v)
{
    const uint8_t sign = signbit(v) ? 128 : 0;
    const double size = fabs((double)v);
    uint8_t low = 0, high = 126;
    if (isnan(v))
        return 127;
    if (size >= of_e4m3(high))
        return sign | high;
    while (high - low > 1) {
        const uint8_t middle = (uint8_t)((low + high) / 2);
        if (of_e4m3(middle) <= size)
            low = middle;
        else
            high = middle;
    }
    const double below = size - of_e4m3(low), above = of_e4m3(high) - size;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

static float quantise_row(enum dtype type, uint8_t *codes, const float *x, int64_t n)
{
    float top = 0;
    for (int64_t i = 0; i < n; i++)
        top = type == DT_I8 && !isfinite(x[i]) ? INFINITY : fmaxf(top, fabsf(x[i]));
    float factor = top > 0 ? fmaxf(top / (float)most_of(type), FLT_MIN) : 1;
    if (type == DT_I8 && isinf(top)) { // integers say it by their factor
        memset(codes, 0, (size_t)n);
        return NAN;
    }
    for (int64_t i = 0; i < n; i++)
        codes[i] = type == DT_I8 ? (uint8_t)(int8_t)rintf(x[i] * (1 / factor)) : to_e4m3(x[i] * (1 / factor));
    return factor;
}

// c (m, n) f32 on the host in 8 bits on both sides: codes and factors in f->host blocks, *on_host and the result.
static struct tensor codes_of(struct fix *f, struct tensor c, struct tensor *on_host)
{
    const int64_t m = c.n[0], n = c.n[1];
    struct pair codes = make(f, DT_U8, DT_U8, SHAPE(m, n), 0, 1, 0), scale = make(f, DT_F32, DT_F32, SHAPE(m), 0, 1, 0);
    for (int64_t r = 0; r < m; r++)
        ((float *)scale.c.data)[r] =
            quantise_row(f->codes, (uint8_t *)codes.c.data + r * n, (const float *)c.data + r * c.ld, n);
    codes.c.dtype = codes.g.dtype = f->codes;
    codes.c.scale = scale.c.data;
    codes.g.scale = scale.g.data;
    G->upload(f->d, codes.g, codes.c.data);
    G->upload(f->d, scale.g, scale.c.data);
    *on_host = codes.c;
    return codes.g;
}

static void spoil_rows(struct fix *f, struct pair *x) // rows of zeros, with NaN, with infinity, of tiny numbers
{
    float *v = x->c.data;
    const int64_t n = x->c.n[1], ld = x->c.ld;
    if (x->c.n[0] < 6)
        return;
    for (int64_t i = 0; i < n; i++) {
        v[ld + i] = i % 2 ? -0.0f : 0;
        v[4 * ld + i] = rounded(v[4 * ld + i] * (f->type == DT_F16 ? 1e-7f : 1e-39f), f->type);
    }
    v[2 * ld + n / 2] = NAN;
    v[3 * ld + n - 1] = -INFINITY;
    for (int64_t i = 0; i < n; i++) // all codes, as they are: 448 is among them where there is room
        v[5 * ld + i] = i % 256 % 128 == 127 ? 448 : (float)of_e4m3((uint8_t)(i % 256));
    G->upload(f->d, x->whole, v);
}

static void quantise(void **state)
{
    struct fix *f = *state;
    const int64_t rows[] = {1, 9, 300}, columns[] = {1, 7, 64, 256, 1000, 3072, 12288, 15360, 40000, 70000};
    EACH_TYPE(f)
    EACH_CODES(f)
    {
        for (int i = 0; i < 3 * 10; i++) {
            const int64_t m = rows[i % 3], n = columns[i / 3], gap = i % 4 * 8 + (i % 5 == 4), y_gap = i % 2 * 16;
            if (m * n > 1000000)
                continue;
            struct pair x = ACTIVE(f, gap, 3, m, n), codes = make(f, DT_U8, DT_U8, SHAPE(m, n), y_gap, 1, 0),
                        scale = make(f, DT_F32, DT_F32, SHAPE(m), 0, 0, 0);
            spoil_rows(f, &x);
            for (int64_t r = 0; r < m; r++)
                ((float *)scale.c.data)[r] = quantise_row(f->codes, (uint8_t *)codes.c.data + r * codes.c.ld,
                                                          (const float *)x.c.data + r * x.c.ld, n);
            struct tensor y = codes.g;
            y.dtype = f->codes;
            y.scale = scale.g.data;
            assert_int_equal(G->sync(f->d, NULL), 0);
            launch_quantise(0, y, x.g);
            assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
            const int64_t total = codes.whole.n[0];
            uint8_t *got = malloc((size_t)total);
            float *factor = malloc((size_t)m * sizeof *factor);
            G->download(f->d, got, codes.whole);
            G->download(f->d, factor, scale.g);
            assert_int_equal(G->sync(f->d, NULL), 0);
            for (int64_t j = 0; j < total; j++) { // gaps hold what they held
                const uint8_t want = ((uint8_t *)codes.c.data)[j];
                const bool nan = f->codes == DT_E4M3 && (want & 127) == 127 && (got[j] & 127) == 127;
                if (got[j] != want && !(nan && j % codes.c.ld < n))
                    fail_msg("quantise of %s to %s (%lld, %lld): code %lld of row %lld is %02x, not %02x",
                             dtype_name(f->type), dtype_name(f->codes), (long long)m, (long long)n,
                             (long long)(j % codes.c.ld), (long long)(j / codes.c.ld), got[j], want);
            }
            for (int64_t r = 0; r < m; r++)
                assert_true(factor[r] == ((float *)scale.c.data)[r] ||
                            (isnan(factor[r]) && isnan(((float *)scale.c.data)[r])));
            free(got);
            free(factor);
            release(f);
        }
    }
}

static double acted(double v, enum act act)
{
    switch (act) {
    case ACT_SILU:
        return v / (1 + exp(-v));
    case ACT_GELU_TANH:
        return 0.5 * v * (1 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
    case ACT_GELU_ERF:
        return 0.5 * v * (1 + erf(v * 0.7071067811865476));
    case ACT_QUICK_GELU:
        return v / (1 + exp(-1.702 * v));
    default:
        return v;
    }
}

// *y = the layer in f64 on operands of 8 bits, all on the host; returns the largest of the sums on the way, with
// factors.
static double linear_f64(struct tensor y, struct tensor x, struct tensor w, struct tensor b, enum act act)
{
    const int64_t m = y.n[0], n = y.n[1], k = w.n[1];
    double value[256], largest = 0;
    for (int i = 0; i < 256; i++)
        value[i] = of_code(w.dtype, (uint8_t)i);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            const uint8_t *p = (const uint8_t *)x.data + i * k, *q = (const uint8_t *)w.data + j * k;
            const double factor = (double)x.scale[i] * (double)w.scale[j];
            double sum = 0, top = 0;
            for (int64_t l = 0; l < k; l++) {
                sum += value[p[l]] * value[q[l]];
                top = fmax(top, fabs(sum));
            }
            largest = fmax(largest, top * factor);
            ((float *)y.data)[i * y.ld + j] = (float)acted(sum * factor + (tensor_none(b) ? 0 : get(b, j)), act);
        }
    return largest;
}

struct codes_case {
    int64_t m, k, n, gap;
    bool quantised, bias; // x is in 8 bits; there is a bias
    int64_t first;        // x and y are the rows from this one
    enum act act;
};

static void linear_codes_one(struct fix *f, struct codes_case c, enum dtype bias)
{
    struct pair x = ACTIVE(f, 0, 1, c.m, c.k), y = OUTPUT(f, c.gap, c.m, c.n),
                w = make(f, DT_F32, DT_F32, SHAPE(c.n, c.k), 0, sqrt(3.0 / (double)c.k), 0),
                b = c.bias ? WEIGHT(f, bias, c.n) : none;
    for (int64_t i = 0; i < c.n * c.k; i++) // rows of different sizes
        ((float *)w.c.data)[i] *= (float)(1 + i / c.k % 5) / 2;
    struct tensor hx, hw, gx = codes_of(f, x.c, &hx), gw = codes_of(f, w.c, &hw);
    const struct linear l = {.parts = 1, .n = c.n, .k = c.k, .w = {gw}, .b = {b.g}};
    const double top = linear_f64(y.c, hx, hw, b.c, c.act);
    for (int64_t i = 0; i < c.first; i++) // rows before the first stay as they were
        for (int64_t j = 0; j < c.n; j++)
            ((float *)y.c.data)[i * y.c.ld + j] = NAN;
    const int64_t rows = c.m - c.first;
    G->linear(f->d, tensor_rows(y.g, c.first, rows), tensor_rows(c.quantised ? gx : x.g, c.first, rows), &l, c.act);
    // The result's rounding, before and after the activation; and of E4M3 13 bits or so of the tensor cores' own sums,
    // which take 32 products at a time.
    const double sums = f->codes == DT_E4M3 ? (floor((double)c.k / 32) + 1) * top / 8192 : 0;
    same(f, f->codes == DT_E4M3 ? "linear of E4M3" : "linear of I8", y, tolerance(f, 1e-5, 1e-2, 2e-3) + sums);
    release(f);
}

static void linear_codes(void **state)
{
    struct fix *f = *state;
    const int64_t shapes[][3] = {{1, 64, 32},  {5, 64, 48}, {77, 256, 64}, {150, 320, 304},  {33, 17, 9},
                                 {16, 16, 16}, {0, 64, 64}, {9, 48, 20},   {130, 3072, 192}, {3, 100, 64}};
    EACH_TYPE(f)
    EACH_CODES(f)
    {
        for (int i = 0; i < 10 * 4; i++) {
            const int64_t *n = shapes[i % 10];
            linear_codes_one(f,
                             (struct codes_case){.m = n[0],
                                                 .k = n[1],
                                                 .n = n[2],
                                                 .gap = i % 3 * 8 + (i % 7 == 6),
                                                 .quantised = i / 10 % 2 == 0,
                                                 .bias = i / 20 == 0,
                                                 .first = n[0] > 3 && i % 2 ? 3 : 0,
                                                 .act = (enum act)(i % 5)},
                             i % 4 == 3 ? DT_F32 : f->type);
        }
        for (int act = ACT_NONE; act <= ACT_GELU_TANH; act++)
            linear_codes_one(f, (struct codes_case){.m = 333, .k = 512, .n = 256, .bias = true, .act = (enum act)act},
                             f->type);
        // Many tiles, the last of them narrow and low; large enough to be timed
        linear_codes_one(f, (struct codes_case){.m = 600, .k = 208, .n = 528, .bias = true, .act = ACT_GELU_TANH},
                         f->type);
        linear_codes_one(f, (struct codes_case){.m = 1025, .k = 1024, .n = 1024, .bias = true, .act = ACT_GELU_TANH},
                         f->type);
    }
}

// Some columns of each third of a layer, as one rank of several has them, beside the same columns of all.
// limit 0: to the bit.
static void slices_of(struct fix *f, const char *what, const struct linear *l, struct tensor x, double limit)
{
    const int64_t m = x.n[0], run = l->n / 3, counts[] = {run / 2, 64, 16}, starts[] = {run / 2, 320, 0};
    struct pair whole = OUTPUT(f, 0, m, l->n);
    float *a = malloc((size_t)(m * l->n) * sizeof *a), *b = malloc((size_t)(m * l->n) * sizeof *b);
    G->linear(f->d, whole.g, x, l, ACT_NONE);
    G->download(f->d, a, whole.g);
    for (int s = 0; s < 3; s++) {
        const int64_t count = counts[s], n = 3 * count;
        const struct linear slice = linear_slice(l, 3, starts[s], count);
        struct pair y = OUTPUT(f, 8 * s, m, n);
        G->linear(f->d, y.g, x, &slice, ACT_NONE);
        G->download(f->d, b, y.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        double off = 0;
        for (int64_t i = 0; i < m * n; i++)
            off = fmax(off, fabs((double)b[i] - (double)a[i / n * l->n + i % n / count * run + starts[s] + i % count]));
        if (off > limit)
            fail_msg("%s in %s, %lld outputs from %lld on: %.3g off", what, dtype_name(f->type), (long long)count,
                     (long long)starts[s], off);
    }
    free(a);
    free(b);
}

// What w[0]'s numbers, or the second ones, stand for.
static void numbers_of(struct fix *f, const struct linear *l, bool second, float *out)
{
    const struct tensor w = l->w[0];
    const int64_t n = w.n[0], k = w.n[1];
    uint8_t *codes = malloc((size_t)(n * k));
    float *factors = malloc((size_t)n * sizeof *factors);
    G->download(f->d, codes, tensor_2d((char *)w.data + (second ? l->second : 0), DT_U8, n, k));
    G->download(f->d, factors, tensor_1d(w.scale, DT_F32, n));
    for (int64_t i = 0; i < n * k; i++)
        out[i] = (float)of_code(w.dtype, codes[i]) * factors[i / k];
    free(codes);
    free(factors);
}

// Weights placed twice: the mean of both roundings is never farther from a weight than the first is, and of all half as
// far; take_second says which of them a layer computes with.
static void placed_twice(void **state)
{
    enum { N = 96, K = 128 };
    static float numbers[2][N * K], result[2][N * K], eye[K * K];
    struct fix *f = *state;
    for (int i = 0; i < K; i++)
        eye[i * K + i] = 1;
    EACH_TYPE(f)
    EACH_CODES(f)
    {
        struct tensor w = make(f, DT_F32, DT_F32, SHAPE(N, K), 0, 1, 0).c;
        struct linear l;
        double off[2] = {0};
        assert_int_equal(linear_init(&l, 1, &w, NULL, NULL), 0);
        if (f->type == DT_F32) // which has no numbers of 8 bits
            continue;
        assert_int_equal(G->place_linear(f->d, &l, f->codes, true, NULL), 0);
        struct tensor x = make(f, DT_F32, f->type, SHAPE(K, K), 0, 1, 0).g, y = OUTPUT(f, 0, K, N).g;
        G->upload(f->d, x, eye);
        for (int second = 0; second < 2; second++) {
            numbers_of(f, &l, second, numbers[second]);
            G->take_second(f->d, second);
            G->linear(f->d, y, x, &l, ACT_NONE);
            G->download(f->d, result[second], y);
        }
        G->take_second(f->d, false);
        for (int i = 0; i < N * K; i++) {
            const double should = get(w, i), one = fabs(numbers[0][i] - should),
                         mean = fabs(((double)numbers[0][i] + numbers[1][i]) / 2 - should);
            assert_true(mean <= one + 1e-6);
            off[0] += one * one;
            off[1] += mean * mean;
            for (int second = 0; second < 2; second++) // halves round
                assert_true(fabsf(result[second][i % K * N + i / K] - numbers[second][i]) <=
                            fabsf(numbers[second][i]) / 128);
        }
        assert_true(sqrt(off[1]) < 0.6 * sqrt(off[0]));
        release(f);
    }
}

static struct linear in_thirds(struct fix *f, int64_t n, int64_t k)
{
    struct tensor w[3], b[3];
    struct linear l;
    for (int i = 0; i < 3; i++) {
        w[i] = WEIGHT(f, f->type, n / 3, k).c;
        b[i] = WEIGHT(f, f->type, n / 3).c;
    }
    assert_int_equal(linear_init(&l, 3, w, b, NULL), 0);
    assert_int_equal(G->place_linear(f->d, &l, f->type, false, NULL), 0);
    return l;
}

// Of an exact device to the bit, also at the size of FLUX.1.
static void exact_slices(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        struct device *usual = f->d;
        assert_int_equal(G->open(&(struct device_options){.activation = f->type, .exact = true}, &f->d, NULL), 0);
        for (int i = 0; i < 3; i++) {
            const int64_t k = (int64_t[]){256, 384, 3072}[i], n = (i < 2 ? 6 : 3) * k;
            const struct linear l = in_thirds(f, n, k);
            slices_of(f, "an exact layer", &l, ACTIVE(f, 0, 1, 130 + 300 * i, k).g, 0);
            release(f);
        }
        G->close(f->d);
        f->d = usual;
    }
}

static void linear_slices(void **state)
{
    struct fix *f = *state;
    const int64_t m = 300, k = 256, n = 3 * 512;
    EACH_TYPE(f)
    {
        struct pair x = ACTIVE(f, 0, 1, m, k), b = WEIGHT(f, f->type, n);
        const struct linear l = in_thirds(f, n, k);
        slices_of(f, "a layer", &l, x.g, tolerance(f, 1e-4, 8e-2, 1e-2));
        EACH_CODES(f)
        {
            struct tensor hx, hw, gx = codes_of(f, x.c, &hx);
            struct pair rows = make(f, DT_F32, DT_F32, SHAPE(n, k), 0, 0.1, 0);
            const struct linear codes = {.parts = 1, .n = n, .k = k, .w = {codes_of(f, rows.c, &hw)}, .b = {b.g}};
            slices_of(f, dtype_name(f->codes), &codes, gx, f->codes == DT_I8 ? 0 : tolerance(f, 1e-4, 2e-2, 2e-3));
        }
    }
}

// A row of the layer gets the same bits however many rows are beside it.
static void same_rows(struct fix *f, const struct linear *l, struct tensor x)
{
    const int64_t m = x.n[0], n = l->n;
    struct pair whole = OUTPUT(f, 0, m, n), some = OUTPUT(f, 0, m, n);
    float *a = malloc((size_t)(m * n) * sizeof *a), *b = malloc((size_t)(m * n) * sizeof *b);
    G->linear(f->d, whole.g, x, l, ACT_GELU_TANH);
    for (int64_t first = 0, count = 1; first < m; first += count, count = count * 3 + 1) {
        const int64_t now = count < m - first ? count : m - first;
        G->linear(f->d, tensor_rows(some.g, first, now), tensor_rows(x, first, now), l, ACT_GELU_TANH);
    }
    G->download(f->d, a, whole.g);
    G->download(f->d, b, some.g);
    assert_int_equal(G->sync(f->d, NULL), 0);
    assert_memory_equal(a, b, (size_t)(m * n) * sizeof *a);
    free(a);
    free(b);
}

// More tiles than multiprocessors, deep enough for sums to be split, large enough for algorithms to be raced.
enum { MANY_ROWS = 2200, DEPTH = 3072, OUTPUTS = 2304 };

static void same_integer_rows(struct fix *f)
{
    f->codes = DT_I8;
    struct pair x = ACTIVE(f, 0, 1, MANY_ROWS, DEPTH), w = make(f, DT_F32, DT_F32, SHAPE(OUTPUTS, DEPTH), 0, 0.1, 0);
    struct tensor hx, hw, gx = codes_of(f, x.c, &hx), gw = codes_of(f, w.c, &hw);
    const struct linear l = {.parts = 1, .n = OUTPUTS, .k = DEPTH, .w = {gw}};
    if (f->type != DT_F32)
        same_rows(f, &l, gx);
}

static void linear_integer_rows(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        same_integer_rows(f);
    }
}

static void linear_exact_rows(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        struct device *usual = f->d;
        assert_int_equal(G->open(&(struct device_options){.activation = f->type, .exact = true}, &f->d, NULL), 0);
        const struct linear l = {.parts = 1,
                                 .n = OUTPUTS,
                                 .k = DEPTH,
                                 .w = {WEIGHT(f, f->type, OUTPUTS, DEPTH).g},
                                 .b = {WEIGHT(f, f->type, OUTPUTS).g}};
        same_integer_rows(f); // its scratch memory is to outlive the race
        same_rows(f, &l, ACTIVE(f, 0, 1, MANY_ROWS, DEPTH).g);
        same_integer_rows(f);
        release(f);
        G->close(f->d);
        f->d = usual;
    }
}

// ---- the cache of algorithms, in main's folder

static void file_of_products(char *out, size_t size)
{
    char folder[256];
    snprintf(folder, sizeof folder, "%s/ditfleet", getenv("XDG_CACHE_HOME"));
    DIR *d = opendir(folder);
    assert_true(d != NULL);
    out[0] = 0;
    for (struct dirent *e; d && (e = readdir(d));)
        if (strncmp(e->d_name, "cublaslt-", 9) == 0)
            snprintf(out, size, "%s/%s", folder, e->d_name);
    if (d)
        closedir(d);
    assert_true(out[0] != 0);
}

// A device of its own does one large product of the numbers in host.
static void one_product(float *out, const float *host, int64_t n)
{
    struct device *d;
    struct tensor t[3];
    assert_int_equal(G->open(&(struct device_options){.activation = DT_BF16}, &d, NULL), 0);
    for (int i = 0; i < 3; i++) {
        t[i] = tensor_2d(NULL, DT_BF16, n, n);
        assert_int_equal(G->alloc(d, tensor_bytes(t[i]), &t[i].data, NULL), 0);
        G->upload(d, t[i], host);
    }
    const struct linear l = {.parts = 1, .n = n, .k = n, .w = {t[1]}};
    G->linear(d, t[2], t[0], &l, ACT_NONE);
    G->download(d, out, t[2]);
    assert_int_equal(G->sync(d, NULL), 0);
    for (int i = 0; i < 3; i++)
        G->free(d, t[i].data);
    G->close(d);
}

static void algorithms_kept(void **state)
{
    struct fix *f = *state;
    enum { N = 1152 }; // 3 GFLOP, of a shape that no other test has
    struct stat first, second;
    char path[600];
    float *host = malloc(sizeof(float) * N * N), *a = malloc(sizeof(float) * N * N), *b = malloc(sizeof(float) * N * N);
    for (int i = 0; i < N * N; i++)
        host[i] = (float)uniform(f);
    one_product(a, host, N);
    file_of_products(path, sizeof path);
    assert_int_equal(stat(path, &first), 0);
    one_product(b, host, N);
    assert_int_equal(stat(path, &second), 0);
    assert_true(first.st_ino == second.st_ino); // nothing was measured that would have to be written
    assert_memory_equal(a, b, sizeof(float) * N * N);
    FILE *file = fopen(path, "w"); // no cache any more: measured again
    assert_true(file && fputs("ditfleet-algorithms?\n1 2 3\n", file) > 0 && fclose(file) == 0);
    one_product(b, host, N);
    assert_int_equal(stat(path, &second), 0);
    assert_true(first.st_ino != second.st_ino || second.st_size > 100);
    free(host);
    free(a);
    free(b);
}

static void qk_norm_rope(void **state)
{
    struct fix *f = *state;
    const int64_t shapes[][3] = {{0, 2, 8}, {1, 1, 2}, {5, 3, 32}, {33, 24, 128}, {7, 2, 48}, {9, 1, 600}, {40, 5, 6}};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 21; i++) {
            int64_t m = shapes[i % 7][0], heads = shapes[i % 7][1], dim = shapes[i % 7][2];
            struct pair q = ACTIVE(f, i / 7 * 8, 2, m, heads, dim), k = ACTIVE(f, i / 7 * 3, 2, m, heads, dim),
                        gq = WEIGHT(f, types[i % 3], dim), gk = WEIGHT(f, f->type, dim),
                        rope = make(f, DT_F32, DT_F32, SHAPE(m, dim / 2, 2), i / 7, 1, 0);
            C->qk_norm_rope(f->cpu, q.c, k.c, gq.c, gk.c, 1e-6f, rope.c);
            G->qk_norm_rope(f->d, q.g, k.g, gq.g, gk.g, 1e-6f, rope.g);
            same(f, "q of qk_norm_rope", q, tolerance(f, 5e-6, 5e-3, 6e-4));
            same(f, "k of qk_norm_rope", k, tolerance(f, 5e-6, 5e-3, 6e-4));
        }
    }
}

static void embed(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        for (int i = 0; i < TYPES; i++) {
            struct pair table = make(f, types[i], types[i], SHAPE(11, 37), i, 1, 0), y = OUTPUT(f, 2, 4, 37),
                        ids = ids_of(f, (int32_t[]){10, 0, 3, 3}, 4);
            C->embed(f->cpu, y.c, table.c, ids.c);
            G->embed(f->d, y.g, table.g, ids.g);
            same(f, "embed", y, tolerance(f, 0, 4e-3, 5e-4));
        }
    }
}

static void relative_bias(void **state)
{
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 5, 40}, ss[] = {1, 7, 40};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 12; i++) {
            int64_t m = ms[i % 4], s = ss[i / 4], heads = 1 + i % 3;
            struct pair table = make(f, types[i % 3], types[i % 3], SHAPE(13, heads), 1, 1, 0),
                        y = make(f, DT_F32, DT_F32, SHAPE(heads, m, s), 3, 0, 0);
            int32_t buckets[80];
            for (int64_t j = 0; j < m + s - 1; j++)
                buckets[j] = (int32_t)(j * 7 % 13);
            struct pair ids = ids_of(f, buckets, m + s - 1);
            C->relative_bias(f->cpu, y.c, table.c, ids.c);
            G->relative_bias(f->d, y.g, table.g, ids.g);
            same(f, "relative_bias", y, 0);
        }
    }
}

// ---- across rows

struct attention_case {
    int64_t m, s, heads, dim;
    bool causal, bias, hidden; // hidden: the bias hides keys with -inf, all of them for query 0
    int64_t gap;
};

static void hide(struct pair *bias, struct fix *f)
{
    int64_t s = bias->c.n[2];
    for (int64_t h = 0; h < bias->c.n[0]; h++)
        for (int64_t i = 0; i < bias->c.n[1] * s; i++)
            if (i < s || i % 5 == 2)
                ((float *)bias->c.data)[h * bias->c.ld + i] = -INFINITY;
    G->upload(f->d, bias->whole, bias->c.data);
}

// own: through launch_flash, whatever else may take it.
static void attention_way(struct fix *f, struct attention_case c, bool own)
{
    struct pair q = ACTIVE(f, c.gap, 1.5, c.m, c.heads, c.dim), k = ACTIVE(f, 2 * c.gap, 1.5, c.s, c.heads, c.dim),
                v = ACTIVE(f, 0, 1, c.s, c.heads, c.dim), out = OUTPUT(f, c.gap, c.m, c.heads, c.dim), bias = none,
                part = OUTPUT(f, c.gap, c.m, c.heads, c.dim),
                lse = make(f, DT_F32, DT_F32, SHAPE(c.m, c.heads), c.gap % 3, 0, 0);
    if (c.bias)
        bias = make(f, DT_F32, DT_F32, SHAPE(c.heads, c.m, c.s), c.gap ? 7 : 0, 2, 0);
    if (c.hidden)
        hide(&bias, f);
    struct attention_opts oc = {.scale = 0.5f, .causal = c.causal, .bias = bias.c}, og = oc;
    og.bias = bias.g;
    C->attention(f->cpu, out.c, q.c, k.c, v.c, &oc);
    if (own) {
        assert_int_equal(G->sync(f->d, NULL), 0);
        assert_true(launch_flash(0, out.g, none.g, q.g, k.g, v.g, &og));
        assert_true(launch_flash(0, part.g, lse.g, q.g, k.g, v.g, &og));
        assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
    } else {
        G->attention(f->d, out.g, q.g, k.g, v.g, &og);
    }
    // Scores up to 0.5 * 2.25 * dim carry that many units of 2^-24. Halves round the weights, too.
    const double allowed = tolerance(f, 2e-6 + 4e-7 * (double)c.dim, 1.5e-2, 2e-3);
    same(f, own ? "flash attention" : "attention", out, allowed);
    if (c.causal)
        return; // parts are not
    C->attention_part(f->cpu, part.c, lse.c, q.c, k.c, v.c, &oc);
    if (!own)
        G->attention_part(f->d, part.g, lse.g, q.g, k.g, v.g, &og);
    same(f, "attention_part", part, allowed);
    same(f, "the logarithms of attention_part", lse, tolerance(f, 2e-6 + 4e-7 * (double)c.dim, 2e-3, 1e-3));
}

static void attention_one(struct fix *f, struct attention_case c)
{
    attention_way(f, c, false);
}

static void attention(void **state)
{
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 13, 40, 100}, ss[] = {1, 31, 64, 130}, dims[] = {1, 17, 40, 100};
    const struct attention_case fused[] = {
        {128, 128, 4, 128, false, false, false, 0},  {77, 77, 12, 64, true, false, false, 0},
        {333, 200, 3, 128, false, false, false, 64}, {1, 64, 2, 64, false, false, false, 8},
        {1030, 1030, 2, 128, true, false, false, 0}, {50, 1100, 1, 32, false, false, false, 0},
        {300, 300, 2, 256, false, false, false, 0},  {65, 9, 5, 16, false, false, false, 16}};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 20; i++) {
            struct attention_case c = {ms[i % 5],  ss[i / 5],  1 + i % 3,  dims[i % 4],
                                       i % 4 == 1, i % 3 == 1, i % 6 == 4, i % 3};
            if (c.causal)
                c.s = c.m;
            attention_one(f, c);
        }
        for (size_t i = 0; i < sizeof fused / sizeof fused[0]; i++)
            attention_one(f, fused[i]);
        attention_one(f, (struct attention_case){30, 1100, 2, 16, false, true, true, 0});
        attention_one(f, (struct attention_case){200, 200, 8, 64, false, true, false, 0});
        attention_one(f, (struct attention_case){9, 0, 2, 8, false, false, false, 0}); // no keys: zeros
    }
}

// Heads for which nobody has a fused engine: rows kept in registers and rows that are not, one pass and two.
static void attention_in_products(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        attention_one(f, (struct attention_case){20, 300, 1, 512, false, false, false, 0});
        attention_one(f, (struct attention_case){300, 20, 2, 512, false, true, true, 8});
        attention_one(f, (struct attention_case){150, 150, 1, 512, true, true, false, 0});
        attention_one(f, (struct attention_case){5, 32768, 1, 512, false, false, false, 0});
        attention_one(f, (struct attention_case){3, 32775, 2, 264, false, true, true, 0});
        attention_one(f, (struct attention_case){2, 70001, 1, 264, false, false, false, 0});
        attention_one(f, (struct attention_case){1000, 9000, 8, 7, false, false, false, 0});
        attention_one(f, (struct attention_case){3000, 3000, 8, 7, true, false, false, 0});
    }
}

static void attention_merge(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        for (int i = 0; i < 12; i++) {
            const int64_t n = 1 + i % 4, m = 1 + i * 7, heads = 1 + i % 3, dim = i % 2 ? 8 * i : 7 + i;
            struct pair parts = ACTIVE(f, i % 3 * 8, 1, n, m, heads, dim), out = OUTPUT(f, i % 2 * 8, m, heads, dim);
            struct pair lse = make(f, DT_F32, DT_F32, SHAPE(n, m, heads), i % 3, 3, 0);
            for (int64_t p = 0; p < n; p++) // of query 0 no part saw a key; of others, some did not
                for (int64_t j = 0; j < m * heads; j++)
                    if (j < heads || (j + p) % 5 == 0)
                        ((float *)lse.c.data)[p * lse.c.ld + j] = -INFINITY;
            G->upload(f->d, lse.whole, lse.c.data);
            C->attention_merge(f->cpu, out.c, parts.c, lse.c);
            G->attention_merge(f->d, out.g, parts.g, lse.g);
            same(f, "attention_merge", out, tolerance(f, 2e-6, 8e-3, 1e-3));
        }
    }
}

// Our own kernel: every head size with bias, causal, both and neither, over whole, partial and many tiles.
static void flash_attention(void **state)
{
    struct fix *f = *state;
    const int64_t dims[] = {8, 16, 24, 40, 64, 72, 96, 104, 128};
    const int64_t counts[] = {1, 2, 7, 31, 63, 64, 65, 77, 100, 127, 128, 129, 150, 199, 200};
    enum { DIMS = sizeof dims / sizeof dims[0], COUNTS = sizeof counts / sizeof counts[0] };
    EACH_TYPE(f)
    {
        for (int i = 0; f->type != DT_F32 && i < 8 * DIMS; i++) {
            const int way = i / DIMS; // bits: causal, bias, hidden keys or other counts
            struct attention_case c = {.m = counts[i * 4 % COUNTS], .s = counts[i * 7 % COUNTS], .heads = 1 + i % 4};
            c.dim = dims[i % DIMS];
            c.causal = way & 1;
            c.bias = way & 2;
            c.hidden = way >= 6;
            c.gap = (i + way) % 3 * 8;
            if (c.causal)
                c.s = c.m;
            attention_way(f, c, true);
            attention_way(f, c, false);
        }
        if (f->type == DT_F32)
            continue;
        attention_way(f, (struct attention_case){77, 77, 12, 64, true, false, false, 0}, true);
        attention_way(f, (struct attention_case){512, 512, 8, 64, false, true, false, 0}, true);
        attention_way(f, (struct attention_case){1000, 1030, 2, 128, false, false, false, 8}, true);
        attention_way(f, (struct attention_case){1, 1030, 3, 128, false, true, true, 8}, true);
    }
}

// Queries by themselves get the bits that they get among others, out of rows that hold q, k and v side by side; what
// flash does not take is refused.
static void flash_rows(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        const int64_t m = 200, heads = 3, dim = 64, n = heads * dim;
        struct pair rows = ACTIVE(f, 0, 1.5, m, 3 * n), whole = OUTPUT(f, 0, m, heads, dim),
                    some = OUTPUT(f, 0, m, heads, dim);
        struct tensor t[3];
        float *a = malloc((size_t)(m * n) * sizeof *a), *b = malloc((size_t)(m * n) * sizeof *b);
        for (int i = 0; i < 3; i++)
            t[i] = tensor_reshape(tensor_cols(rows.g, i * n, n), 3, m, heads, dim, 1);
        struct attention_opts opts = {.scale = 0.1f};
        assert_int_equal(G->sync(f->d, NULL), 0);
        assert_int_equal(launch_flash(0, whole.g, none.g, t[0], t[1], t[2], &opts), f->type != DT_F32);
        for (int64_t first = 0, count = 1; first < m; first += count, count = count * 3 + 1)
            launch_flash(0, tensor_rows(some.g, first, count < m - first ? count : m - first), none.g,
                         tensor_rows(t[0], first, count < m - first ? count : m - first), t[1], t[2], &opts);
        opts.scale = -1;
        assert_false(launch_flash(0, whole.g, none.g, t[0], t[1], t[2], &opts));
        assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
        if (f->type != DT_F32) {
            G->download(f->d, a, whole.g);
            G->download(f->d, b, some.g);
            assert_int_equal(G->sync(f->d, NULL), 0);
            for (int64_t i = 0; i < m * n; i++)
                assert_true(a[i] == b[i]);
        }
        free(a);
        free(b);
    }
}

// ---- in 16 bits on Hopper

static bool hopper(void)
{
    int major = 0;
    assert_int_equal(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    return major == 9;
}

// A tensor's rows as `parts` places, as even as can be, of which there may be fewer than rows.
static struct attention_out places(struct tensor t, int parts)
{
    struct attention_out out = {0};
    for (int i = 0; i < parts; i++) {
        const int64_t from = t.n[0] * i / parts, to = t.n[0] * (i + 1) / parts;
        if (to > from)
            out.t[out.n++] = tensor_rows(t, from, to - from);
    }
    return out;
}

// rise: how much longer than the one before a key is, but for the last ones, which are the first to be looked at: so
// that scores outgrow what weights were made against, again and again.
static void flash16_case(struct fix *f, int64_t m, int64_t s, int64_t heads, double scale, double rise, void *room)
{
    enum { DIM = 128 };
    const int processors = 3; // so that one does several heads, and keys are split
    struct pair q = ACTIVE(f, 8, 1.5, m, heads, DIM), k = ACTIVE(f, 16, 1.5, s, heads, DIM),
                v = ACTIVE(f, 0, 1, s, heads, DIM), out = OUTPUT(f, 8, m, heads, DIM),
                lse = make(f, DT_F32, DT_F32, SHAPE(m, heads), 1, 0, 0);
    float *longer = k.c.data;
    for (int64_t i = 0; i < k.whole.n[0] && rise > 0; i++) {
        const int64_t row = i / k.c.ld;
        longer[i] = rounded(longer[i] * (float)(1 + rise * (double)(row < s - 130 ? row : 0)), f->type);
    }
    G->upload(f->d, k.whole, longer);
    const struct attention_opts opts = {.scale = (float)scale};
    C->attention_part(f->cpu, out.c, lse.c, q.c, k.c, v.c, &opts);
    assert_int_equal(G->sync(f->d, NULL), 0);
    assert_true(flash_hopper_room(processors, q.g, k.g) <= 4 << 20);
    const struct attention_out to = places(out.g, 1 + (int)(m % 4));
    assert_true(launch_flash16(0, processors, &to, lse.g, q.g, k.g, v.g, (float)scale, room));
    assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
    same(f, "attention of heads of 128", out, tolerance(f, 0, 1.5e-2, 2e-3));
    same(f, "its logarithms", lse, tolerance(f, 0, 2e-3, 1e-3));
}

static void flash16(void **state)
{
    struct fix *f = *state;
    const int64_t counts[] = {1, 5, 64, 77, 127, 128, 129, 255, 256, 257, 300, 512, 1030};
    if (!hopper())
        skip();
    void *room;
    assert_int_equal(cudaMalloc(&room, 4 << 20), cudaSuccess);
    assert_int_equal(cudaMemset(room, 0, 4 << 20), cudaSuccess);
    EACH_TYPE(f)
    {
        for (int i = 0; f->type != DT_F32 && i < 52; i++)
            flash16_case(f, counts[i * 5 % 13], counts[i * 7 % 13], 1 + i % 4, i % 4 == 3 ? 0.7 : 0.09, 0,
                         i % 26 < 13 ? room : NULL);
        for (int i = 0; f->type != DT_F32 && i < 12; i++)
            flash16_case(f, 150 + i, 600 + 200 * (i / 2), 2, 0.09, 0.01 + 0.005 * i, i % 2 ? room : NULL);
    }
    cudaFree(room);
}

// A query alone gets the bits that it gets among others, and so does a head, also where scores are far apart.
static void flash16_rows(void **state)
{
    struct fix *f = *state;
    if (!hopper())
        skip();
    EACH_TYPE(f)
    {
        const int64_t m = 300, heads = 3, dim = 128, n = heads * dim;
        struct pair rows = ACTIVE(f, 0, 1.5, m, 3 * n), whole = OUTPUT(f, 0, m, heads, dim),
                    some = OUTPUT(f, 0, m, heads, dim), one = OUTPUT(f, 0, m, 1, dim);
        struct tensor t[3], h[3];
        for (int i = 0; i < 3; i++) {
            t[i] = tensor_reshape(tensor_cols(rows.g, i * n, n), 3, m, heads, dim, 1);
            h[i] = tensor_reshape(tensor_cols(rows.g, i * n + dim, dim), 3, m, 1, dim, 1); // the second head
        }
        assert_int_equal(G->sync(f->d, NULL), 0);
        const struct attention_out whole_out = places(whole.g, 1), one_out = places(one.g, 1);
        assert_int_equal(launch_flash16(0, 132, &whole_out, none.g, t[0], t[1], t[2], 3, NULL), f->type != DT_F32);
        for (int64_t first = 0, count = 1; first < m; first += count, count = count * 3 + 1) {
            const int64_t now = count < m - first ? count : m - first;
            const struct attention_out some_out = places(tensor_rows(some.g, first, now), 1);
            launch_flash16(0, 132, &some_out, none.g, tensor_rows(t[0], first, now), t[1], t[2], 3, NULL);
        }
        launch_flash16(0, 132, &one_out, none.g, h[0], h[1], h[2], 3, NULL);
        assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
        float *a = malloc((size_t)(m * n) * sizeof *a), *b = malloc((size_t)(m * n) * sizeof *b);
        G->download(f->d, a, whole.g);
        G->download(f->d, b, some.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        if (f->type != DT_F32)
            assert_memory_equal(a, b, (size_t)(m * n) * sizeof *a);
        G->download(f->d, b, one.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        for (int64_t i = 0; i < m * dim && f->type != DT_F32; i++)
            assert_true(b[i] == a[i / dim * n + dim + i % dim]);
        free(a);
        free(b);
    }
}

// What is not finite spoils its own rows, and a row of them nothing else.
static void flash16_not_finite(void **state)
{
    struct fix *f = *state;
    if (!hopper())
        skip();
    EACH_TYPE(f)
    {
        const int64_t m = 200, dim = 128;
        struct pair q = ACTIVE(f, 0, 1, m, 1, dim), k = ACTIVE(f, 0, 1, m, 1, dim), v = ACTIVE(f, 0, 1, m, 1, dim),
                    out = OUTPUT(f, 0, m, 1, dim);
        if (f->type == DT_F32)
            continue;
        float *x = malloc((size_t)(m * dim) * sizeof *x), bad[] = {NAN, INFINITY, -INFINITY};
        for (int i = 0; i < 3; i++)
            G->upload(f->d, tensor_cols(tensor_reshape(tensor_rows(q.g, 7 + 50 * i, 1), 2, 1, dim, 1, 1), 3, 1),
                      &bad[i]);
        assert_int_equal(G->sync(f->d, NULL), 0);
        const struct attention_out to = places(out.g, 1);
        assert_true(launch_flash16(0, 132, &to, none.g, q.g, k.g, v.g, 0.1f, NULL));
        assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
        G->download(f->d, x, out.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        for (int64_t i = 0; i < m; i++)
            assert_int_equal(isfinite(x[i * dim]), i % 50 != 7 || i > 107);
        G->upload(f->d, tensor_cols(tensor_reshape(tensor_rows(k.g, 150, 1), 2, 1, dim, 1, 1), 0, 1), &bad[1]);
        assert_int_equal(G->sync(f->d, NULL), 0);
        assert_true(launch_flash16(0, 132, &to, none.g, q.g, k.g, v.g, 0.1f, NULL));
        assert_int_equal(cudaStreamSynchronize(0), cudaSuccess);
        G->download(f->d, x, out.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        for (int64_t i = 0; i < m; i++) // a score of infinity, or of minus infinity, which is no weight
            assert_int_equal(isfinite(x[i * dim]), (i % 50 != 7 || i > 107) && get(q.c, i * dim) < 0);
        free(x);
    }
}

// ---- in 8 bits

static double apart(struct fix *f, struct pair p) // relative L2
{
    const int64_t row = p.c.n[1] * p.c.n[2];
    float *got = malloc((size_t)p.whole.n[0] * sizeof *got + 1);
    double difference = 0, all = 0;
    G->download(f->d, got, p.whole);
    assert_int_equal(G->sync(f->d, NULL), 0);
    for (int64_t i = 0; i < p.whole.n[0]; i++)
        if (i % p.c.ld < row) {
            const double c = get(p.c, i);
            difference += ((double)got[i] - c) * ((double)got[i] - c);
            all += c * c;
        }
    free(got);
    return sqrt(difference / all);
}

// scale: of scores; where they are far apart, the weights are those of few keys and lose more.
static void eight_bits_case(struct fix *f, struct attention_case c, double scale)
{
    struct pair q = ACTIVE(f, c.gap, 1.5, c.m, c.heads, c.dim), k = ACTIVE(f, 2 * c.gap, 1.5, c.s, c.heads, c.dim),
                v = ACTIVE(f, 0, 1, c.s, c.heads, c.dim), out = OUTPUT(f, c.gap, c.m, c.heads, c.dim),
                part = OUTPUT(f, 0, c.m, c.heads, c.dim),
                lse = make(f, DT_F32, DT_F32, SHAPE(c.m, c.heads), c.gap % 3, 0, 0);
    const struct attention_opts opts = {.scale = (float)scale, .eight_bits = true};
    C->attention_part(f->cpu, part.c, lse.c, q.c, k.c, v.c, &opts);
    C->attention(f->cpu, out.c, q.c, k.c, v.c, &opts);
    G->attention(f->d, out.g, q.g, k.g, v.g, &opts);
    G->attention_part(f->d, part.g, lse.g, q.g, k.g, v.g, &opts);
    const double sharp = scale * (double)c.dim > 20 ? 2.5 : 1;
    same(f, "attention in 8 bits", out, 0.08 * sharp); // and nothing beside it
    same(f, "attention_part in 8 bits", part, 0.08 * sharp);
    same(f, "the logarithms of attention_part in 8 bits", lse, 0.015 * scale * sqrt((double)c.dim));
    if (c.m * c.heads * c.dim > 1000 && (apart(f, out) > 0.045 * sharp || apart(f, part) > 0.045 * sharp))
        fail_msg("attention in 8 bits, (%lld, %lld, %lld): off by %.2f %%", (long long)c.m, (long long)c.s,
                 (long long)c.dim, 100 * apart(f, out));
}

static void eight_bits(void **state)
{
    struct fix *f = *state;
    const int64_t counts[] = {1, 5, 64, 77, 127, 128, 129, 255, 256, 257, 300, 512, 1030},
                  dims[] = {8, 32, 64, 96, 128};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 26; i++) {
            const struct attention_case c = {.m = counts[i * 5 % 13],
                                             .s = counts[i * 7 % 13],
                                             .heads = 1 + i % 3,
                                             .dim = dims[i % 5],
                                             .gap = i % 3 * 8};
            eight_bits_case(f, c, (i % 4 == 3 ? 8 : 1) / sqrt((double)c.dim));
        }
        eight_bits_case(f, (struct attention_case){0, 5, 2, 64, false, false, false, 0}, 1);
        eight_bits_case(f, (struct attention_case){5, 0, 2, 64, false, false, false, 0}, 1);
        eight_bits_case(f, (struct attention_case){20, 40, 2, 7, false, false, false, 0}, 0.3); // not of 8 bits
        eight_bits_case(f, (struct attention_case){9, 200, 2, 200, false, false, false, 0}, 0.07);
        eight_bits_case(f, (struct attention_case){200, 4500, 2, 128, false, false, false, 0}, 0.09);
        eight_bits_case(f, (struct attention_case){40, 90000, 13, 8, false, false, false, 0}, 0.3); // heads in turns
    }
}

// A query alone gets the bits that it gets among others; and 8 bits are used where they can be.
static void eight_bits_rows(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        const int64_t m = 200, heads = 3, dim = 128, n = heads * dim;
        struct pair rows = ACTIVE(f, 0, 1.5, m, 3 * n), whole = OUTPUT(f, 0, m, heads, dim),
                    some = OUTPUT(f, 0, m, heads, dim), plain = OUTPUT(f, 0, m, heads, dim);
        struct tensor t[3];
        float *a = malloc((size_t)(m * n) * sizeof *a), *b = malloc((size_t)(m * n) * sizeof *b);
        for (int i = 0; i < 3; i++)
            t[i] = tensor_reshape(tensor_cols(rows.g, i * n, n), 3, m, heads, dim, 1);
        struct attention_opts opts = {.scale = 0.1f, .eight_bits = true};
        G->attention(f->d, whole.g, t[0], t[1], t[2], &opts);
        for (int64_t first = 0, count = 1; first < m; first += count, count = count * 3 + 1) {
            const int64_t now = count < m - first ? count : m - first;
            G->attention(f->d, tensor_rows(some.g, first, now), tensor_rows(t[0], first, now), t[1], t[2], &opts);
        }
        opts.eight_bits = false;
        G->attention(f->d, plain.g, t[0], t[1], t[2], &opts);
        G->download(f->d, a, whole.g);
        G->download(f->d, b, some.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        if (f->type != DT_F32)
            assert_memory_equal(a, b, (size_t)(m * n) * sizeof *a);
        G->download(f->d, b, plain.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        bool differ = false;
        for (int64_t i = 0; i < m * n; i++)
            differ |= a[i] != b[i];
        assert_int_equal(differ, f->type != DT_F32 && hopper());
        free(a);
        free(b);
    }
}

// Heads by themselves, copied together as ranks that share heads have them, get the bits that they get among others.
static void eight_bits_heads(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        const int64_t m = 384, dim = 32, heads = 8, all = heads * dim, some = all / 2;
        struct pair rows = ACTIVE(f, 0, 1.5, m, 3 * all), whole = OUTPUT(f, 0, m, all), half[4];
        const struct attention_opts opts = {.scale = 0.2f, .eight_bits = f->type != DT_F32};
        float *a = malloc((size_t)(m * all) * sizeof *a), *b = malloc((size_t)(m * some) * sizeof *b);
        struct tensor t[4];
        for (int i = 0; i < 3; i++)
            t[i] = tensor_reshape(tensor_cols(rows.g, i * all, all), 3, m, heads, dim, 1);
        G->attention(f->d, tensor_reshape(whole.g, 3, m, heads, dim, 1), t[0], t[1], t[2], &opts);
        G->download(f->d, a, whole.g);
        for (int h = 0; f->type != DT_F32 && h < 2; h++) {
            for (int i = 0; i < 4; i++) {
                half[i] = OUTPUT(f, 0, m, some);
                t[i] = tensor_reshape(half[i].g, 3, m, heads / 2, dim, 1);
                if (i < 3)
                    G->copy(f->d, half[i].g, tensor_cols(rows.g, i * all + h * some, some));
            }
            G->attention(f->d, t[3], t[0], t[1], t[2], &opts);
            G->download(f->d, b, half[3].g);
            assert_int_equal(G->sync(f->d, NULL), 0);
            for (int64_t r = 0; r < m; r++)
                assert_memory_equal(a + r * all + h * some, b + r * some, (size_t)some * sizeof *a);
        }
        free(a);
        free(b);
    }
}

// What is not finite is seen: in a query's numbers by the query, in a key's by all, in a value's in its column.
static void eight_bits_not_finite(void **state)
{
    struct fix *f = *state;
    const float wrong[] = {NAN, INFINITY, -INFINITY};
    enum { M = 70, S = 300, DIM = 64 };
    EACH_TYPE(f)
    {
        for (int which = 0; which < 3; which++)
            for (int w = 0; w < 3; w++) {
                struct pair t[3], out = OUTPUT(f, 0, M, 2, DIM);
                const struct attention_opts opts = {.scale = 0.1f, .eight_bits = true};
                float got[M * 2 * DIM];
                for (int i = 0; i < 3; i++) {
                    t[i] = ACTIVE(f, 0, 1, i ? S : M, 2, DIM);
                    if (i == which) // row 33, head 1, number 10
                        ((float *)t[i].c.data)[33 * 2 * DIM + DIM + 10] = wrong[w];
                    G->upload(f->d, t[i].g, t[i].c.data);
                }
                G->attention(f->d, out.g, t[0].g, t[1].g, t[2].g, &opts);
                G->download(f->d, got, out.g);
                assert_int_equal(G->sync(f->d, NULL), 0);
                for (int i = 0; i < M * 2 * DIM; i++) {
                    const bool head = i / DIM % 2 == 1, query = i / (2 * DIM) == 33, column = i % DIM == 10;
                    if (!head || (which == 0 && !query))
                        assert_true(isfinite(got[i]));
                    else if (which == 2 ? column : isnan(wrong[w]))
                        assert_false(isfinite(got[i]));
                }
            }
    }
}

static void conv_case(struct fix *f, int64_t h, int64_t w, int64_t c_in, int64_t c_out, int64_t kh, int64_t kw,
                      int64_t gap, enum dtype type, bool bias)
{
    struct pair x = ACTIVE(f, gap, 1, h + kh - 1, w, c_in), y = OUTPUT(f, gap, h, w, c_out),
                weight = WEIGHT(f, type, c_out, kh, kw, c_in), b = bias ? WEIGHT(f, type, c_out) : none;
    C->conv2d(f->cpu, y.c, x.c, &(struct conv){weight.c, b.c});
    G->conv2d(f->d, y.g, x.g, &(struct conv){weight.g, b.g});
    double terms = sqrt((double)(kh * kw * c_in));
    same(f, "conv2d", y, tolerance(f, 1e-6 * terms + 1e-6, 1e-2, 2e-3));
}

static void conv2d(void **state)
{
    struct fix *f = *state;
    const int64_t hs[] = {0, 1, 2, 7}, ws[] = {1, 2, 13, 16, 43}, cs[] = {1, 3, 16, 33}, os[] = {3, 20, 32};
    const int64_t ks[][2] = {{3, 3}, {1, 1}, {3, 1}, {5, 5}};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 24; i++) // odd channels: own kernel, or a slow engine
            if (f->type == DT_F32 || i % 4 == 1)
                conv_case(f, hs[i % 4], ws[i % 5], cs[i / 2 % 4], os[i % 3], ks[i / 7][0], ks[i / 7][1], i % 3,
                          weight_type(f, i), i % 5 != 0);
        conv_case(f, 20, 40, 96, 96, 3, 3, 0, f->type, true);
        conv_case(f, 16, 16, 16, 512, 3, 3, 0, f->type, true);
        conv_case(f, 32, 24, 128, 3, 3, 3, 0, f->type, true);
        conv_case(f, 9, 24, 256, 128, 1, 1, 0, f->type, true);
        conv_case(f, 12, 10, 32, 64, 3, 3, 64, f->type, false);
    }
}

static void groups(void **state)
{
    struct fix *f = *state;
    const int64_t sizes[][4] = {{0, 5, 8, 4}, {3, 1, 32, 32},   {5, 17, 96, 32},  {40, 33, 64, 32}, {2, 9, 300, 20},
                                {4, 6, 6, 1}, {3, 70, 128, 32}, {2, 40, 512, 32}, {2, 5, 8192, 2},  {300, 2, 256, 32}};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 20; i++) {
            int64_t h = sizes[i / 2][0], w = sizes[i / 2][1], c = sizes[i / 2][2], g = sizes[i / 2][3];
            struct pair x = ACTIVE(f, i % 2 * 8, 2, h, w, c), y = OUTPUT(f, 2, h, w, c),
                        sums = make(f, DT_F64, DT_F64, SHAPE(h, g, 2), 0, 0, 0), gamma = WEIGHT(f, types[i % 3], c),
                        beta = WEIGHT(f, DT_F32, c);
            enum act act = i % 2 ? ACT_SILU : ACT_NONE;
            C->group_sums(f->cpu, sums.c, x.c);
            G->group_sums(f->d, sums.g, x.g);
            // Runs of up to 64 numbers are summed in f32, at +-2 each: 64 * 2^-24 * 2 a run, of which most cancel.
            same(f, "group_sums", sums, 1e-5);
            G->upload(f->d, sums.whole, sums.c.data);
            C->group_norm(f->cpu, y.c, x.c, sums.c, gamma.c, beta.c, 1e-6f, act);
            G->group_norm(f->d, y.g, x.g, sums.g, gamma.g, beta.g, 1e-6f, act);
            same(f, "group_norm", y, tolerance(f, 3e-6, 5e-3, 6e-4));
            C->group_norm(f->cpu, x.c, x.c, sums.c, gamma.c, beta.c, 1e-6f, act);
            G->group_norm(f->d, x.g, x.g, sums.g, gamma.g, beta.g, 1e-6f, act);
            same(f, "group_norm in place", x, tolerance(f, 3e-6, 5e-3, 6e-4));
        }
    }
}

// ---- pictures

static void pictures(void **state)
{
    struct fix *f = *state;
    const int64_t shapes[][3] = {{5, 7, 6}, {8, 8, 64}, {3, 5, 1}, {0, 4, 8}, {4, 1, 3}};
    EACH_TYPE(f)
    {
        for (int i = 0; i < 10; i++) {
            int64_t h = shapes[i / 2][0], w = shapes[i / 2][1], c = shapes[i / 2][2];
            struct pair x = ACTIVE(f, i % 2 * 8, 1, h, w, c), y = OUTPUT(f, i % 2, 2 * h, 2 * w, c);
            C->upsample2x(f->cpu, y.c, x.c);
            G->upsample2x(f->d, y.g, x.g);
            same(f, "upsample2x", y, 0);
            struct pair tokens = ACTIVE(f, i % 2, 1, h * w, 4 * c), latent = OUTPUT(f, 1, 2 * h, 2 * w, c);
            C->unpack_latents(f->cpu, latent.c, tokens.c, 0.36f, 0.11f);
            G->unpack_latents(f->d, latent.g, tokens.g, 0.36f, 0.11f);
            same(f, "unpack_latents", latent, tolerance(f, 1e-6, 5e-3, 6e-4));
            struct pair p = ACTIVE(f, i % 2, 1.5, h, w, c), u = make(f, DT_U8, DT_U8, SHAPE(h, w, c), 1, 1, 0);
            C->to_u8(f->cpu, u.c, p.c);
            G->to_u8(f->d, u.g, p.g);
            same(f, "to_u8", u, 0);
        }
    }
}

// ---- errors

// A block's operations, recorded and replayed on new numbers, give the bits that they give when launched.
static void recordings(void **state)
{
    struct fix *f = *state;
    EACH_TYPE(f)
    {
        const int64_t m = 96, dim = 256;
        struct pair x = ACTIVE(f, 0, 1, m, dim), u = ACTIVE(f, 0, 1, m, dim), y = OUTPUT(f, 0, m, dim),
                    z = OUTPUT(f, 0, m, dim), v = WEIGHT(f, f->type, dim), w = WEIGHT(f, f->type, dim, dim);
        struct linear l;
        struct recording *r = NULL;
        assert_int_equal(linear_init(&l, 1, &w.g, NULL, NULL), 0);
        const struct attention_opts opts = {.scale = 0.1f};
        struct tensor heads = tensor_reshape(z.g, 3, m, 4, 64, 1), of = tensor_reshape(y.g, 3, m, 4, 64, 1);
        float *launched = malloc((size_t)(m * dim) * sizeof *launched), *replayed = malloc((size_t)(m * dim) * 4);
        for (int pass = 0; pass < 3; pass++) { // launched, recorded, replayed on other numbers: launched again
            if (pass == 1)
                assert_true(G->record(f->d));
            G->gate_add_modulate(f->d, x.g, v.g, u.g, y.g, v.g, v.g, 1e-6f);
            G->linear(f->d, z.g, y.g, &l, ACT_GELU_TANH);
            G->attention(f->d, of, heads, heads, heads, &opts);
            if (pass == 1) {
                r = G->recorded(f->d);
                assert_true(r != NULL);
                G->copy(f->d, x.g, u.g);
                assert_true(G->replay(f->d, r));
                G->download(f->d, replayed, y.g);
                G->copy(f->d, x.g, u.g);
            }
        }
        G->download(f->d, launched, y.g);
        assert_int_equal(G->sync(f->d, NULL), 0);
        assert_memory_equal(launched, replayed, (size_t)(m * dim) * sizeof *launched);
        G->forget(f->d, r);
        free(launched);
        free(replayed);
    }
}

static void first_failure_stays(void **state)
{
    struct fix *f = *state;
    struct device *d;
    struct err err;
    void *p;
    assert_int_equal(G->open(&(struct device_options){.activation = DT_BF16}, &d, &err), 0);
    assert_int_equal(G->alloc(d, 4096, &p, &err), 0);
    struct tensor x = tensor_2d(p, DT_BF16, 4, 6), y = tensor_2d(p, DT_BF16, 4, 5);
    assert_int_equal(G->sync(d, &err), 0);
    G->add(d, x, y);
    G->mul(d, y, x, ACT_NONE);
    assert_int_equal(G->sync(d, &err), ERR_INVALID);
    assert_true(strstr(err.text, "add needs two activations of one shape") != NULL);
    G->free(d, p);
    G->close(d);
    (void)f;
}

static void ids_outside(void **state)
{
    struct device *d;
    struct err err;
    void *p;
    (void)state;
    assert_int_equal(G->open(&(struct device_options){.activation = DT_F32}, &d, &err), 0);
    assert_int_equal(G->alloc(d, 4096, &p, &err), 0);
    struct tensor table = tensor_2d(p, DT_F32, 3, 4), y = tensor_2d((char *)p + 1024, DT_F32, 2, 4),
                  ids = tensor_1d((char *)p + 2048, DT_I32, 2);
    G->zero(d, table);
    G->upload(d, ids, (int32_t[]){1, 3});
    G->embed(d, y, table, ids);
    assert_int_equal(G->sync(d, &err), ERR_INVALID);
    assert_true(strstr(err.text, "outside its table") != NULL);
    G->free(d, p);
    G->close(d);
}

static void bad_devices(void **state)
{
    struct fix *f = *state;
    struct device *d;
    struct err err;
    void *p;
    assert_int_equal(G->open(&(struct device_options){.gpu = 4096}, &d, &err), ERR_INVALID);
    assert_int_equal(G->open(&(struct device_options){.gpu = -1}, &d, &err), ERR_INVALID);
    assert_int_equal(G->open(&(struct device_options){.activation = DT_I32}, &d, &err), ERR_UNSUPPORTED);
    assert_int_equal(C->open(&(struct device_options){.threads = 1, .activation = DT_BF16}, &d, &err), ERR_UNSUPPORTED);
    assert_int_equal(G->alloc(f->gpu[0], (size_t)1 << 45, &p, &err), ERR_NO_MEMORY);
    assert_int_equal(G->alloc(f->gpu[0], SIZE_MAX, &p, &err), ERR_NO_MEMORY);
    assert_int_equal(G->alloc(f->gpu[0], 0, &p, &err), 0);
    assert_true((uintptr_t)p % 256 == 0);
    G->free(f->gpu[0], p);
    assert_int_equal(G->sync(f->gpu[0], &err), 0); // a refused allocation is no failure of the device
}

// test_cuda [PATTERN]: the tests whose names match it.
int main(int argc, char **argv)
{
    struct device *d;
    struct err err = {0};
    cmocka_set_test_filter(argc > 1 ? argv[1] : NULL);
    int code = G->open(&(struct device_options){.activation = DT_BF16}, &d, &err);
    if (code == ERR_UNAVAILABLE || code == ERR_UNSUPPORTED) {
        printf("skipped: no GPU here: %s\n", err.text);
        return SKIPPED;
    }
    if (code == 0)
        G->close(d);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(transfers),
        cmocka_unit_test(copies),
        cmocka_unit_test(placing),
        cmocka_unit_test(pairs),
        cmocka_unit_test(activations),
        cmocka_unit_test(norms),
        cmocka_unit_test(modulations),
        cmocka_unit_test(qk_norm_rope),
        cmocka_unit_test(embed),
        cmocka_unit_test(relative_bias),
        cmocka_unit_test(groups),
        cmocka_unit_test(pictures),
        cmocka_unit_test(linear),
        cmocka_unit_test(columns_of_one),
        cmocka_unit_test(placed_linear),
        cmocka_unit_test(placed_twice),
        cmocka_unit_test(attention),
        cmocka_unit_test(attention_in_products),
        cmocka_unit_test(attention_merge),
        cmocka_unit_test(flash_attention),
        cmocka_unit_test(flash_rows),
        cmocka_unit_test(flash16),
        cmocka_unit_test(flash16_rows),
        cmocka_unit_test(flash16_not_finite),
        cmocka_unit_test(eight_bits),
        cmocka_unit_test(eight_bits_rows),
        cmocka_unit_test(eight_bits_heads),
        cmocka_unit_test(eight_bits_not_finite),
        cmocka_unit_test(conv2d),
        cmocka_unit_test(recordings),
        cmocka_unit_test(first_failure_stays),
        cmocka_unit_test(ids_outside),
        cmocka_unit_test(bad_devices),
        cmocka_unit_test(quantise),
        cmocka_unit_test(linear_codes),
        cmocka_unit_test(linear_integer_rows),
        cmocka_unit_test(linear_exact_rows),
        cmocka_unit_test(linear_slices),
        cmocka_unit_test(exact_slices),
        cmocka_unit_test(algorithms_kept),
    };
    // Algorithms are measured by this run, and forgotten after it.
    char cache[] = "/tmp/ditfleet-cache-XXXXXX", command[64];
    if (!mkdtemp(cache) || setenv("XDG_CACHE_HOME", cache, 1) != 0)
        return 1;
    code = cmocka_run_group_tests(tests, setup, teardown);
    snprintf(command, sizeof command, "rm -rf '%s'", cache);
    return system(command) == 0 ? code : 1;
}
