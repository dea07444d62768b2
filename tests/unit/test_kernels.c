// Every operation of the cpu backend against a plain loop in double precision, over odd shapes, strided views, every
// weight type and 1 and 2 threads. Gaps of strided views hold NaN: read, they spoil the result; written, they are
// found.
#include "kernels/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static const struct kernels *const K = &kernels_cpu;

struct fix {
    struct device *d;
    uint32_t seed;
    void *blocks[4096]; // freed after each test
    int used;
};

static int setup(void **state, int threads)
{
    struct fix *f = calloc(1, sizeof *f);
    f->seed = 12345;
    *state = f;
    return K->open(&(struct device_options){.threads = threads}, &f->d, NULL);
}

static int setup1(void **state)
{
    return setup(state, 1);
}

static int setup2(void **state)
{
    return setup(state, 2);
}

static int teardown(void **state)
{
    struct fix *f = *state;
    for (int i = 0; i < f->used; i++)
        free(f->blocks[i]);
    K->close(f->d);
    free(f);
    return 0;
}

static double uniform(struct fix *f) // -1 to 1
{
    f->seed = f->seed * 1664525u + 1013904223u;
    return (double)(f->seed >> 8) / (1 << 23) - 1;
}

// A tensor of `gap` spare elements after each row: random numbers within +-size, exact in dtype; NaN in the gaps.
static struct tensor make(struct fix *f, enum dtype dtype, int dims, const int64_t *n, int64_t gap, double size)
{
    struct tensor t = tensor_of(NULL, dtype, dims, n[0], dims > 1 ? n[1] : 1, dims > 2 ? n[2] : 1, dims > 3 ? n[3] : 1);
    int64_t row = t.ld;
    if (dims > 1)
        t.ld += gap;
    int64_t total = t.ld * t.n[0];
    // Exactly as large as the view, so that a sanitizer sees what runs over.
    t.data = malloc((size_t)total * dtype_size(dtype) + 1);
    assert_true(f->used < 4096);
    f->blocks[f->used++] = t.data;
    for (int64_t i = 0; i < total; i++) {
        float v = i % t.ld < row ? (float)(uniform(f) * size) : NAN;
        if (dtype == DT_F32)
            ((float *)t.data)[i] = v;
        else if (dtype == DT_F64)
            ((double *)t.data)[i] = (double)v;
        else if (dtype == DT_U8)
            ((uint8_t *)t.data)[i] = 0xa5;
        else
            ((uint16_t *)t.data)[i] = dtype == DT_BF16 ? f32_to_bf16(v) : f32_to_f16(v);
    }
    return t;
}

#define MAKE(f, dtype, gap, size, ...)                                                                                 \
    make(f, dtype, sizeof((int64_t[]){__VA_ARGS__}) / 8, (int64_t[]){__VA_ARGS__}, gap, size)

static double at(struct tensor t, int64_t i0, int64_t i1, int64_t i2, int64_t i3)
{
    int64_t i = i0 * t.ld + (i1 * t.n[2] + i2) * t.n[3] + i3;
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

// A copy as contiguous doubles.
static double *values(struct fix *f, struct tensor t)
{
    double *v = malloc((size_t)tensor_count(t) * sizeof *v + 1), *p = v;
    f->blocks[f->used++] = v;
    for (int64_t a = 0; a < t.n[0]; a++)
        for (int64_t b = 0; b < t.n[1]; b++)
            for (int64_t c = 0; c < t.n[2]; c++)
                for (int64_t e = 0; e < t.n[3]; e++)
                    *p++ = at(t, a, b, c, e);
    return v;
}

// |got - want| <= tolerance * (1 + |want|) everywhere, and the gaps untouched.
static void same(struct fix *f, struct tensor got, const double *want, double tolerance, const char *what)
{
    struct err err;
    if (K->sync(f->d, &err))
        fail_msg("%s: %s", what, err.text);
    double *v = values(f, got);
    for (int64_t i = 0; i < tensor_count(got); i++)
        if (!(fabs(v[i] - want[i]) <= tolerance * (1 + fabs(want[i]))))
            fail_msg("%s (%lld, %lld, %lld): element %lld is %.9g, not %.9g", what, (long long)got.n[0],
                     (long long)got.n[1], (long long)got.n[2], (long long)i, v[i], want[i]);
    if (got.dtype != DT_F32)
        return;
    int64_t row = got.n[1] * got.n[2] * got.n[3];
    for (int64_t r = 0; r < got.n[0]; r++)
        for (int64_t i = row; i < got.ld; i++)
            assert_true(isnan(((float *)got.data)[r * got.ld + i]));
}

static double *room(struct fix *f, int64_t n)
{
    double *v = calloc((size_t)n + 1, sizeof *v);
    f->blocks[f->used++] = v;
    return v;
}

static double ref_act(double x, enum act act)
{
    switch (act) {
    case ACT_SILU:
        return x / (1 + exp(-x));
    case ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case ACT_GELU_ERF:
        return 0.5 * x * (1 + erf(x / sqrt(2)));
    case ACT_QUICK_GELU:
        return x / (1 + exp(-1.702 * x));
    case ACT_NONE:
        break;
    }
    return x;
}

static const enum dtype weight_types[] = {DT_F32, DT_BF16, DT_F16};

// ---- formats

static void conversions(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        uint32_t sign = h >> 15, e = h >> 10 & 31, m = h & 1023;
        double value = e == 0 ? ldexp(m, -24) : ldexp(1024 + m, (int)e - 25);
        float f = f16_to_f32((uint16_t)h), b = bf16_to_f32((uint16_t)h);
        if (e == 31) {
            assert_true(m ? isnan(f) != 0 : isinf(f) && (f < 0) == (sign != 0));
        } else {
            assert_true((double)f == (sign ? -value : value) && (signbit(f) != 0) == (sign != 0));
        }
        if (!isnan(f))
            assert_int_equal(f32_to_f16(f), h);
        else
            assert_true(isnan(f16_to_f32(f32_to_f16(f))));
        if (!isnan(b))
            assert_int_equal(f32_to_bf16(b), h);
        else
            assert_true(isnan(bf16_to_f32(f32_to_bf16(b))));
    }
}

// Between any two neighbours: nearest, and the even one of both at the middle.
static void rounding(void **state)
{
    (void)state;
    for (uint16_t h = 0; h < 0x7bff; h++) {
        double low = (double)f16_to_f32(h), high = (double)f16_to_f32((uint16_t)(h + 1)), middle = (low + high) / 2;
        assert_int_equal(f32_to_f16((float)middle), h % 2 ? h + 1 : h);
        assert_int_equal(f32_to_f16(nextafterf((float)middle, 0)), h);
        assert_int_equal(f32_to_f16(nextafterf((float)middle, INFINITY)), h + 1);
        assert_int_equal(f32_to_f16((float)-middle), 0x8000 | (h % 2 ? h + 1 : h));
    }
    for (uint16_t h = 0; h < 0x7f7f; h++) {
        float low = bf16_to_f32(h), high = bf16_to_f32((uint16_t)(h + 1));
        float middle = (float)(((double)low + (double)high) / 2);
        assert_int_equal(f32_to_bf16(middle), h % 2 ? h + 1 : h);
        assert_int_equal(f32_to_bf16(nextafterf(middle, 0)), h);
        assert_int_equal(f32_to_bf16(nextafterf(middle, INFINITY)), h + 1);
    }
    assert_int_equal(f32_to_f16(65519.99f), 0x7bff);
    assert_int_equal(f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(f32_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(f32_to_f16(1e-10f), 0);
    assert_int_equal(f32_to_bf16(3.4e38f), 0x7f80);
    assert_int_equal(f32_to_bf16(-INFINITY), 0xff80);
}

static void transfers(void **state)
{
    struct fix *f = *state;
    for (int i = 0; i < 3; i++) {
        struct tensor t = MAKE(f, weight_types[i], 3, 2, 5, 19);
        float host[95], back[95];
        for (int j = 0; j < 95; j++)
            host[j] = (float)uniform(f);
        K->upload(f->d, t, host);
        K->download(f->d, back, t);
        for (int j = 0; j < 95; j++) {
            uint16_t b = f32_to_bf16(host[j]), h = f32_to_f16(host[j]);
            assert_true(back[j] == (i == 0 ? host[j] : i == 1 ? bf16_to_f32(b) : f16_to_f32(h)));
        }
    }
    int32_t ids[3] = {1, -2, 3}, copy[3], memory[3];
    struct tensor t = tensor_1d(memory, DT_I32, 3);
    K->upload(f->d, t, ids);
    K->download(f->d, copy, t);
    assert_memory_equal(ids, copy, sizeof ids);
    assert_int_equal(K->sync(f->d, NULL), 0);
}

// ---- rows

static void linear_case(struct fix *f, int64_t m, int64_t k, int parts, const int64_t *n, enum dtype type, bool bias,
                        enum act act)
{
    struct tensor w[4], b[4];
    int64_t total = 0, gap = m % 3;
    for (int i = 0; i < parts; i++) {
        w[i] = MAKE(f, type, gap, 1, n[i], k);
        b[i] = MAKE(f, weight_types[i % 3], 0, 1, n[i]);
        total += n[i];
    }
    struct linear linear;
    assert_int_equal(linear_init(&linear, parts, w, bias ? b : NULL, NULL), 0);
    assert_int_equal(linear.n, total);
    struct tensor x = MAKE(f, DT_F32, gap, 1, m, k), y = MAKE(f, DT_F32, gap, 1, m, total);
    K->linear(f->d, y, x, &linear, act);
    double *want = room(f, m * total), *p = want, *xs = values(f, x), *ws[4];
    for (int i = 0; i < parts; i++)
        ws[i] = values(f, w[i]);
    for (int64_t r = 0; r < m; r++)
        for (int i = 0; i < parts; i++)
            for (int64_t c = 0; c < n[i]; c++) {
                double sum = bias ? at(b[i], c, 0, 0, 0) : 0;
                for (int64_t j = 0; j < k; j++)
                    sum += xs[r * k + j] * ws[i][c * k + j];
                *p++ = ref_act(sum, act);
            }
    same(f, y, want, 2e-6 * sqrt((double)k) + 1e-6, "linear"); // sums of k products of size 1
}

static void linear(void **state)
{
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 2, 3, 4, 5, 13, 14, 15, 29, 77}, ks[] = {1, 7, 16, 64, 100};
    const int64_t n[] = {1, 17, 33, 64};
    int i = 0;
    for (size_t m = 0; m < sizeof ms / 8; m++)
        for (size_t k = 0; k < sizeof ks / 8; k++, i++)
            linear_case(f, ms[m], ks[k], 1 + i % 4, n + (i % 4 == 3 ? 0 : i % 2), weight_types[i % 3], i % 2 == 0,
                        (enum act)(i % 5));
    linear_case(f, 150, 320, 2, (int64_t[]){300, 96}, DT_BF16, true, ACT_GELU_TANH);
    linear_case(f, 20, 2000, 1, (int64_t[]){260}, DT_F16, true, ACT_NONE);
    linear_case(f, 1, 300, 1, (int64_t[]){1000}, DT_BF16, true, ACT_SILU);
}

// A row's result is the same to the bit whatever rows are beside it and however many threads there are.
static void linear_rows_alone(void **state)
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 0, 1, 100, 96), w = MAKE(f, DT_BF16, 0, 1, 200, 96);
    struct tensor all = MAKE(f, DT_F32, 0, 1, 100, 200), part = MAKE(f, DT_F32, 0, 1, 100, 200);
    struct linear l;
    assert_int_equal(linear_init(&l, 1, &w, NULL, NULL), 0);
    K->linear(f->d, all, x, &l, ACT_NONE);
    for (int64_t i = 0; i < 100; i += 10)
        K->linear(f->d, tensor_rows(part, i, 10), tensor_rows(x, i, 10), &l, ACT_NONE);
    assert_memory_equal(all.data, part.data, tensor_bytes(all));
}

// Some columns of each third of a layer in three parts or in one have the bits that they have among all.
static void linear_slices(void **state)
{
    struct fix *f = *state;
    enum { M = 23, K_ = 40, RUN = 48, START = 16, COUNT = 20 };
    struct tensor whole = MAKE(f, DT_BF16, 0, 1, 3 * RUN, K_), bias = MAKE(f, DT_F32, 0, 1, 3 * RUN), w[3], b[3];
    for (int i = 0; i < 3; i++) {
        w[i] = tensor_rows(whole, i * RUN, RUN);
        b[i] = tensor_rows(bias, i * RUN, RUN);
    }
    struct tensor x = MAKE(f, DT_F32, 0, 1, M, K_), all = MAKE(f, DT_F32, 0, 1, M, 3 * RUN),
                  some = MAKE(f, DT_F32, 0, 1, M, 3 * COUNT);
    for (int parts = 1; parts <= 3; parts += 2) {
        struct linear l;
        assert_int_equal(linear_init(&l, parts, parts == 1 ? &whole : w, parts == 1 ? &bias : b, NULL), 0);
        const struct linear same = linear_slice(&l, 3, 0, RUN), slice = linear_slice(&l, 3, START, COUNT);
        assert_int_equal(same.parts, parts);
        assert_int_equal(slice.n, 3 * COUNT);
        K->linear(f->d, all, x, &l, ACT_NONE);
        K->linear(f->d, some, x, &slice, ACT_NONE);
        for (int64_t r = 0; r < M; r++)
            for (int64_t c = 0; c < 3 * COUNT; c++)
                assert_true(((float *)some.data)[r * 3 * COUNT + c] ==
                            ((float *)all.data)[r * 3 * RUN + c / COUNT * RUN + START + c % COUNT]);
    }
}

static void columns_of_one(void **state) // outputs and inputs that are blocks of columns
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 0, 1, 20, 60), y = MAKE(f, DT_F32, 0, 1, 20, 100),
                  w = MAKE(f, DT_F32, 0, 1, 40, 30);
    double *want = values(f, y);
    struct linear l;
    assert_int_equal(linear_init(&l, 1, &w, NULL, NULL), 0);
    K->linear(f->d, tensor_cols(y, 50, 40), tensor_cols(x, 10, 30), &l, ACT_NONE);
    for (int64_t r = 0; r < 20; r++)
        for (int64_t c = 0; c < 40; c++) {
            want[r * 100 + 50 + c] = 0;
            for (int64_t j = 0; j < 30; j++)
                want[r * 100 + 50 + c] += at(x, r, 10 + j, 0, 0) * at(w, c, j, 0, 0);
        }
    same(f, y, want, 1e-5, "linear of columns");
}

static void activations(void **state)
{
    struct fix *f = *state;
    for (int act = ACT_NONE; act <= ACT_QUICK_GELU; act++) {
        struct tensor x = tensor_1d(malloc(40001 * 4), DT_F32, 40001);
        f->blocks[f->used++] = x.data;
        for (int i = 0; i <= 40000; i++) // dense around 0, and far out
            ((float *)x.data)[i] = i <= 30000 ? (float)(i - 15000) / 1000 : (float)(i - 35000) / 20;
        double *want = values(f, x);
        for (int i = 0; i <= 40000; i++)
            want[i] = ref_act(want[i], (enum act)act);
        K->activate(f->d, x, (enum act)act);
        same(f, x, want, 4e-7, "activate");
    }
    struct tensor x = MAKE(f, DT_F32, 2, 1, 2, 3, 5);
    ((float *)x.data)[1] = NAN;
    K->activate(f->d, x, ACT_SILU);
    assert_true(isnan(((float *)x.data)[1]) && !isnan(((float *)x.data)[0]));
}

static void pairs(void **state)
{
    struct fix *f = *state;
    const int64_t rows[] = {0, 1, 3, 200}, columns[] = {1, 5, 16, 35, 256};
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 5; c++)
            for (int op = 0; op < 6; op++) {
                int64_t m = rows[r], n = columns[c];
                struct tensor x = MAKE(f, DT_F32, op % 3, 2, m, n), y = MAKE(f, DT_F32, c % 2, 2, m, n);
                struct tensor z = MAKE(f, DT_F32, 1, 2, m, n), v = MAKE(f, weight_types[c % 3], 0, 1, n);
                double *want = values(f, x), *b = values(f, y), *p = values(f, z);
                for (int64_t i = 0; i < m * n; i++) {
                    double row = at(v, i % n, 0, 0, 0), a = want[i];
                    double results[] = {a + b[i], a * b[i],       a + 0.3 * b[i],
                                        a + row,  a + row * b[i], b[i] + 3.5 * (p[i] - b[i])};
                    want[i] = results[op];
                }
                if (op == 0)
                    K->add(f->d, x, y);
                else if (op == 1)
                    K->mul(f->d, x, y, ACT_NONE);
                else if (op == 2)
                    K->axpy(f->d, x, 0.3f, y);
                else if (op == 3)
                    K->add_row(f->d, x, v);
                else if (op == 4)
                    K->gate_add(f->d, x, v, y);
                else
                    K->cfg_combine(f->d, x, y, z, 3.5f);
                same(f, x, want, 1e-6, "pair");
            }
}

static void in_place_cfg(void **state)
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 0, 1, 9, 9), y = MAKE(f, DT_F32, 0, 1, 9, 9);
    double *a = values(f, x), *b = values(f, y), *want = room(f, 81);
    for (int i = 0; i < 81; i++)
        want[i] = a[i] + 2 * (b[i] - a[i]);
    struct tensor out = MAKE(f, DT_F32, 0, 1, 9, 9);
    K->copy(f->d, out, x);
    K->cfg_combine(f->d, out, out, y, 2);
    same(f, out, want, 1e-6, "cfg into negative");
    K->cfg_combine(f->d, y, x, y, 2);
    same(f, y, want, 1e-6, "cfg into positive");
}

static void norms(void **state)
{
    struct fix *f = *state;
    const int64_t rows[] = {0, 1, 7, 90}, columns[] = {1, 8, 31, 256, 1000};
    for (int i = 0; i < 4 * 5 * 4; i++) {
        int64_t m = rows[i % 4], n = columns[i / 4 % 5];
        int op = i / 20; // layer_norm, layer_norm without gamma and beta, modulate, rms_norm
        struct tensor x = MAKE(f, DT_F32, 2, 3, m, n), y = MAKE(f, DT_F32, 1, 1, m, n);
        struct tensor g = MAKE(f, weight_types[i % 3], 0, 1, n), b = MAKE(f, weight_types[i / 3 % 3], 0, 1, n), o = {0};
        double *want = room(f, m * n), *xs = values(f, x);
        for (int64_t r = 0; r < m; r++) {
            double mean = 0, square = 0;
            for (int64_t c = 0; c < n; c++)
                mean += (xs[r * n + c] += op == 3 ? 0 : 5) / (double)n; // a mean away from 0
            for (int64_t c = 0; c < n; c++)
                square += pow(xs[r * n + c] - (op == 3 ? 0 : mean), 2) / (double)n;
            for (int64_t c = 0; c < n; c++) {
                double gamma = at(g, c, 0, 0, 0), beta = at(b, c, 0, 0, 0), v = xs[r * n + c];
                v = (v - (op == 3 ? 0 : mean)) / sqrt(square + 1e-5);
                want[r * n + c] = op == 0   ? v * gamma + beta
                                  : op == 1 ? v
                                  : op == 2 ? v * (1 + gamma) + beta
                                            : v * gamma;
                ((float *)x.data)[r * x.ld + c] = (float)xs[r * n + c];
            }
        }
        if (op == 0)
            K->layer_norm(f->d, y, x, g, b, 1e-5f);
        else if (op == 1)
            K->layer_norm(f->d, y, x, o, o, 1e-5f);
        else if (op == 2)
            K->modulate(f->d, y, x, g, b, 1e-5f);
        else
            K->rms_norm(f->d, y, x, g, 1e-5f);
        // x + 5 is rounded to float (2^-22) and then divided by a deviation of about 1.7; one column: by sqrt(eps)
        same(f, y, want, n == 1 ? 2e-4 : 2e-6, "norm");
    }
}

static void gate_add_modulate(void **state) // one pass gives the bits of two
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 2, 3, 40, 72), u = MAKE(f, DT_F32, 2, 1, 40, 72),
                  y = MAKE(f, DT_F32, 1, 1, 40, 72), x2 = MAKE(f, DT_F32, 2, 0, 40, 72),
                  y2 = MAKE(f, DT_F32, 1, 1, 40, 72), gate = MAKE(f, DT_F32, 0, 1, 72),
                  scale = MAKE(f, DT_F32, 0, 1, 72), shift = MAKE(f, DT_F32, 0, 1, 72);
    K->copy(f->d, x2, x);
    K->gate_add_modulate(f->d, x, gate, u, y, scale, shift, 1e-6f);
    K->gate_add(f->d, x2, gate, u);
    K->modulate(f->d, y2, x2, scale, shift, 1e-6f);
    for (int64_t r = 0; r < 40; r++) {
        assert_memory_equal((float *)x.data + r * x.ld, (float *)x2.data + r * x2.ld, 72 * sizeof(float));
        assert_memory_equal((float *)y.data + r * y.ld, (float *)y2.data + r * y2.ld, 72 * sizeof(float));
    }
}

static void qk_norm_rope(void **state)
{
    struct fix *f = *state;
    const int64_t dims[] = {2, 8, 18, 32, 128};
    for (int i = 0; i < 15; i++) {
        int64_t m = i % 3 * 20, heads = 1 + i % 4, dim = dims[i % 5];
        struct tensor qk[2] = {MAKE(f, DT_F32, 5, 2, m, heads, dim), MAKE(f, DT_F32, 0, 2, m, heads, dim)};
        struct tensor g[2] = {MAKE(f, weight_types[i % 3], 0, 1, dim), MAKE(f, DT_BF16, 0, 1, dim)};
        struct tensor rope = MAKE(f, DT_F32, i % 2, 1, m, dim / 2, 2);
        double *want[2];
        for (int t = 0; t < 2; t++) {
            want[t] = values(f, qk[t]);
            for (int64_t r = 0; r < m * heads; r++) {
                double square = 0, *x = want[t] + r * dim;
                for (int64_t c = 0; c < dim; c++)
                    square += x[c] * x[c] / (double)dim;
                for (int64_t c = 0; c < dim; c++)
                    x[c] *= at(g[t], c, 0, 0, 0) / sqrt(square + 1e-6);
                for (int64_t c = 0; c < dim; c += 2) {
                    double a = x[c], b = x[c + 1], co = at(rope, r / heads, c / 2, 0, 0),
                           s = at(rope, r / heads, c / 2, 1, 0);
                    x[c] = a * co - b * s;
                    x[c + 1] = b * co + a * s;
                }
            }
        }
        K->qk_norm_rope(f->d, qk[0], qk[1], g[0], g[1], 1e-6f, rope);
        same(f, qk[0], want[0], 1e-6, "rope of q");
        same(f, qk[1], want[1], 1e-6, "rope of k");
    }
}

static void embed(void **state)
{
    struct fix *f = *state;
    for (int i = 0; i < 3; i++) {
        struct tensor table = MAKE(f, weight_types[i], i, 1, 11, 37), y = MAKE(f, DT_F32, 2, 1, 4, 37);
        int32_t ids[] = {10, 0, 3, 3};
        K->embed(f->d, y, table, tensor_1d(ids, DT_I32, 4));
        double *want = room(f, 4 * 37L);
        for (int64_t j = 0; j < 4 * 37L; j++)
            want[j] = at(table, ids[j / 37], j % 37, 0, 0);
        same(f, y, want, 0, "embed");
    }
    struct tensor table = MAKE(f, DT_F32, 0, 1, 3, 4), y = MAKE(f, DT_F32, 0, 1, 2, 4);
    int32_t ids[] = {1, 3};
    struct err err;
    K->embed(f->d, y, table, tensor_1d(ids, DT_I32, 2));
    assert_int_equal(K->sync(f->d, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "table of 3 rows"));
}

static void relative_bias(void **state)
{
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 5, 40}, ss[] = {1, 7, 40};
    for (int i = 0; i < 12; i++) {
        int64_t m = ms[i % 4], s = ss[i / 4], heads = 1 + i % 3;
        struct tensor table = MAKE(f, weight_types[i % 3], 1, 1, 13, heads), y = MAKE(f, DT_F32, 3, 1, heads, m, s);
        int32_t buckets[80];
        for (int64_t j = 0; j < m + s - 1; j++)
            buckets[j] = (int32_t)(j * 7 % 13);
        K->relative_bias(f->d, y, table, tensor_1d(buckets, DT_I32, m + s - 1));
        double *want = room(f, heads * m * s), *p = want;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t q = 0; q < m; q++)
                for (int64_t k = 0; k < s; k++)
                    *p++ = at(table, buckets[k - q + m - 1], h, 0, 0);
        same(f, y, want, 0, "relative_bias");
    }
}

// ---- across rows

struct attention_case {
    int64_t m, s, heads, dim;
    bool causal, bias, hidden; // hidden: the bias hides keys with -inf, all of them for query 0
};

static void attention_reference(const struct attention_case *c, const double *q, const double *k, const double *v,
                                const double *bias, double *out)
{
    double *w = calloc((size_t)c->s + 1, sizeof *w);
    int64_t row = c->heads * c->dim;
    for (int64_t h = 0; h < c->heads; h++)
        for (int64_t i = 0; i < c->m; i++) {
            double top = -INFINITY, sum = 0;
            int64_t seen = c->causal ? i + 1 : c->s;
            for (int64_t j = 0; j < seen; j++) {
                w[j] = bias ? bias[(h * c->m + i) * c->s + j] : 0;
                for (int64_t e = 0; e < c->dim; e++)
                    w[j] += 0.5 * q[i * row + h * c->dim + e] * k[j * row + h * c->dim + e];
                top = fmax(top, w[j]);
            }
            for (int64_t j = 0; j < seen; j++)
                sum += w[j] = top == -INFINITY ? 0 : exp(w[j] - top);
            for (int64_t e = 0; e < c->dim; e++) {
                double o = 0;
                for (int64_t j = 0; j < seen; j++)
                    o += w[j] * v[j * row + h * c->dim + e];
                out[i * row + h * c->dim + e] = sum > 0 ? o / sum : 0;
            }
        }
    free(w);
}

static void attention_one(struct fix *f, struct attention_case c)
{
    struct tensor q = MAKE(f, DT_F32, 3, 1.5, c.m, c.heads, c.dim), k = MAKE(f, DT_F32, 5, 1.5, c.s, c.heads, c.dim);
    struct tensor v = MAKE(f, DT_F32, 0, 1, c.s, c.heads, c.dim), out = MAKE(f, DT_F32, 1, 1, c.m, c.heads, c.dim);
    struct tensor bias = {0};
    if (c.bias)
        bias = MAKE(f, DT_F32, 7, 2, c.heads, c.m, c.s);
    for (int64_t h = 0; c.hidden && h < c.heads; h++)
        for (int64_t i = 0; i < c.m * c.s; i++)
            if (i < c.s || i % 5 == 2)
                ((float *)bias.data)[h * bias.ld + i] = -INFINITY;
    for (int64_t i = 0; i < c.m * out.ld; i++)
        ((float *)out.data)[i] = NAN; // what was there before must not matter
    struct attention_opts opts = {.scale = 0.5f, .causal = c.causal, .bias = bias};
    K->attention(f->d, out, q, k, v, &opts);
    double *want = room(f, tensor_count(out));
    attention_reference(&c, values(f, q), values(f, k), values(f, v), c.bias ? values(f, bias) : NULL, want);
    // Scores up to 0.5 * 2.25 * dim carry that many units of 2^-24.
    same(f, out, want, 2e-6 + 4e-7 * (double)c.dim, "attention");
}

static void attention(void **state)
{
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 13, 14, 40, 100}, ss[] = {1, 31, 33, 64, 130}, dims[] = {1, 8, 16, 17, 32, 40, 64, 96};
    for (int i = 0; i < 60; i++) {
        struct attention_case c = {ms[i % 6], ss[i % 5], 1 + i % 3, dims[i % 8], i % 4 == 1, i % 3 == 1, i % 6 == 4};
        if (c.causal)
            c.s = c.m;
        attention_one(f, c);
    }
    attention_one(f, (struct attention_case){50, 1100, 1, 32, false, false, false}); // several blocks of keys
    attention_one(f, (struct attention_case){30, 1100, 2, 16, false, true, true});
    attention_one(f, (struct attention_case){600, 600, 1, 8, true, false, false});
    attention_one(f, (struct attention_case){20, 300, 1, 512, false, false, false});
    attention_one(f, (struct attention_case){9, 0, 2, 8, false, false, false}); // no keys: zeros
}

static void attention_rows_alone(void **state)
{
    struct fix *f = *state;
    struct tensor q = MAKE(f, DT_F32, 0, 1, 100, 2, 32), k = MAKE(f, DT_F32, 0, 1, 700, 2, 32);
    struct tensor all = MAKE(f, DT_F32, 0, 1, 100, 2, 32), part = MAKE(f, DT_F32, 0, 1, 100, 2, 32);
    struct attention_opts opts = {.scale = 0.2f};
    K->attention(f->d, all, q, k, k, &opts);
    for (int64_t i = 0; i < 100; i += 25)
        K->attention(f->d, tensor_rows(part, i, 25), tensor_rows(q, i, 25), k, k, &opts);
    assert_memory_equal(all.data, part.data, tensor_bytes(all));
}

// lse (m, heads) of every query over the keys given
static void lse_reference(const struct attention_case *c, const double *q, const double *k, const double *bias,
                          double *lse)
{
    int64_t row = c->heads * c->dim;
    for (int64_t i = 0; i < c->m; i++)
        for (int64_t h = 0; h < c->heads; h++) {
            double sum = 0; // scores are small here
            for (int64_t j = 0; j < c->s; j++) {
                double score = bias ? bias[(h * c->m + i) * c->s + j] : 0;
                for (int64_t e = 0; e < c->dim; e++)
                    score += 0.5 * q[i * row + h * c->dim + e] * k[j * row + h * c->dim + e];
                sum += exp(score);
            }
            lse[i * c->heads + h] = log(sum);
        }
}

// One of the parts: keys first.. of all; checks its lse.
static void attention_one_part(struct fix *f, const struct attention_case *all, struct tensor out, struct tensor lse,
                               struct tensor q, struct tensor k, struct tensor v, struct tensor bias, int64_t first)
{
    struct attention_case c = *all;
    struct attention_opts opts = {.scale = 0.5f};
    c.s = k.n[0];
    if (c.bias) {
        opts.bias = MAKE(f, DT_F32, 3, 1, c.heads, c.m, c.s);
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t i = 0; i < c.m; i++)
                memcpy((float *)opts.bias.data + h * opts.bias.ld + i * c.s,
                       (float *)bias.data + h * bias.ld + i * all->s + first, (size_t)c.s * sizeof(float));
    }
    K->attention_part(f->d, out, lse, q, k, v, &opts);
    double *want = room(f, c.m * c.heads);
    lse_reference(&c, values(f, q), values(f, k), c.bias ? values(f, opts.bias) : NULL, want);
    for (int64_t i = 0; i < c.m; i++)
        for (int64_t h = 0; h < c.heads; h++) {
            double got = (double)((float *)lse.data)[i * lse.ld + h], hoped = want[i * c.heads + h];
            if (!(got == hoped || fabs(got - hoped) <= 2e-6 * (1 + fabs(hoped)) + 4e-7 * (double)c.dim))
                fail_msg("lse of query %d: %g, not %g", (int)i, got, hoped);
        }
}

// cuts[parts + 1]: where the keys are cut.
static void attention_in_parts(struct fix *f, struct attention_case c, int parts, const int64_t *cuts)
{
    struct tensor q = MAKE(f, DT_F32, 3, 1.5, c.m, c.heads, c.dim), k = MAKE(f, DT_F32, 5, 1.5, c.s, c.heads, c.dim);
    struct tensor v = MAKE(f, DT_F32, 0, 1, c.s, c.heads, c.dim), out = MAKE(f, DT_F32, 1, 1, c.m, c.heads, c.dim);
    struct tensor part = MAKE(f, DT_F32, 7, 1, parts, c.m, c.heads, c.dim), bias = {0};
    struct tensor lse = MAKE(f, DT_F32, 2, 1, parts, c.m, c.heads);
    if (c.bias)
        bias = MAKE(f, DT_F32, 7, 2, c.heads, c.m, c.s);
    for (int64_t i = 0; c.hidden && i < c.heads * c.m * c.s; i++) // every key of query 0; of others, one in three
        if (i / c.s % c.m == 0 || i % 3 == 1)
            ((float *)bias.data)[i / (c.m * c.s) * bias.ld + i % (c.m * c.s)] = -INFINITY;
    for (int64_t i = 0; i < c.m * out.ld; i++)
        ((float *)out.data)[i] = NAN; // what was there before must not matter
    for (int i = 0; i < parts; i++) {
        const int64_t keys = cuts[i + 1] - cuts[i];
        attention_one_part(f, &c, tensor_reshape(tensor_rows(part, i, 1), 3, c.m, c.heads, c.dim, 1),
                           tensor_reshape(tensor_rows(lse, i, 1), 2, c.m, c.heads, 1, 1), q,
                           tensor_rows(k, cuts[i], keys), tensor_rows(v, cuts[i], keys), bias, cuts[i]);
    }
    K->attention_merge(f->d, out, part, lse);
    double *want = room(f, tensor_count(out));
    attention_reference(&c, values(f, q), values(f, k), values(f, v), c.bias ? values(f, bias) : NULL, want);
    same(f, out, want, 2e-6 + 4e-7 * (double)c.dim, "attention in parts");
}

static void attention_parts(void **state)
{
    enum { MOST = 9 };
    struct fix *f = *state;
    const int64_t ms[] = {0, 1, 13, 14, 40}, ss[] = {0, 1, 31, 64, 130}, dims[] = {1, 8, 17, 32, 64};
    for (int i = 0; i < 50; i++) {
        struct attention_case c = {.m = ms[i % 5], .s = ss[i / 5 % 5], .heads = 1 + i % 3, .dim = dims[i * 7 % 5]};
        c.bias = i % 3 == 1, c.hidden = i % 6 == 4;
        int parts = 1 + i % MOST;
        int64_t cuts[MOST + 1] = {0};
        for (int p = 1; p < parts; p++) // anywhere after the one before: some parts are empty
            cuts[p] = cuts[p - 1] + (int64_t)(fabs(uniform(f)) * (double)(c.s - cuts[p - 1] + 1));
        cuts[parts] = c.s;
        attention_in_parts(f, c, parts, cuts);
    }
    struct attention_case blocks = {.m = 30, .s = 1300, .heads = 2, .dim = 32}; // several blocks of keys
    attention_in_parts(f, blocks, 3, (const int64_t[]){0, 600, 601, 1300});
    attention_in_parts(f, blocks, 4, (const int64_t[]){0, 0, 1300, 1300, 1300});
}

// One part is the whole: the same bits.
static void attention_part_of_all(void **state)
{
    struct fix *f = *state;
    struct tensor q = MAKE(f, DT_F32, 0, 1, 50, 2, 40), k = MAKE(f, DT_F32, 0, 1, 700, 2, 40);
    struct tensor all = MAKE(f, DT_F32, 0, 1, 50, 2, 40), part = MAKE(f, DT_F32, 0, 1, 1, 50, 2, 40);
    struct tensor merged = MAKE(f, DT_F32, 0, 1, 50, 2, 40), lse = MAKE(f, DT_F32, 0, 1, 1, 50, 2);
    struct attention_opts opts = {.scale = 0.2f};
    K->attention(f->d, all, q, k, k, &opts);
    K->attention_part(f->d, tensor_reshape(part, 3, 50, 2, 40, 1), tensor_reshape(lse, 2, 50, 2, 1, 1), q, k, k, &opts);
    K->attention_merge(f->d, merged, part, lse);
    assert_memory_equal(all.data, part.data, tensor_bytes(all));
    assert_memory_equal(all.data, merged.data, tensor_bytes(all));
}

static void conv_case(struct fix *f, int64_t h, int64_t w, int64_t c_in, int64_t c_out, int64_t kh, int64_t kw,
                      enum dtype type)
{
    struct tensor x = MAKE(f, DT_F32, h % 3, 1, h + kh - 1, w, c_in), y = MAKE(f, DT_F32, h % 2, 1, h, w, c_out);
    struct conv conv = {MAKE(f, type, 0, 1, c_out, kh, kw, c_in), MAKE(f, type, 0, 1, c_out)};
    K->conv2d(f->d, y, x, &conv);
    double *want = room(f, h * w * c_out), *p = want, *xs = values(f, x), *ws = values(f, conv.w);
    for (int64_t i = 0; i < h * w * c_out; i++) {
        int64_t o = i % c_out, px = i / c_out % w, py = i / c_out / w;
        double sum = at(conv.b, o, 0, 0, 0);
        for (int64_t ky = 0; ky < kh; ky++)
            for (int64_t kx = 0; kx < kw; kx++) {
                int64_t sx = px + kx - kw / 2;
                for (int64_t c = 0; sx >= 0 && sx < w && c < c_in; c++)
                    sum += xs[((py + ky) * w + sx) * c_in + c] * ws[((o * kh + ky) * kw + kx) * c_in + c];
            }
        *p++ = sum;
    }
    same(f, y, want, 1e-6 * sqrt((double)(kh * kw * c_in)) + 1e-6, "conv2d");
}

static void conv2d(void **state)
{
    struct fix *f = *state;
    const int64_t hs[] = {0, 1, 2, 7}, ws[] = {1, 2, 13, 14, 16, 43}, cs[] = {1, 3, 4, 16, 33, 48},
                  os[] = {3, 16, 20, 32, 65};
    const int64_t ks[][2] = {{3, 3}, {1, 1}, {3, 1}, {5, 5}};
    for (int i = 0; i < 72; i++)
        conv_case(f, hs[i % 4], ws[i % 6], cs[i / 2 % 6], os[i % 5], ks[i % 4 == 3 ? 0 : i / 7 % 4][0],
                  ks[i % 4 == 3 ? 0 : i / 7 % 4][1], weight_types[i % 3]);
    conv_case(f, 20, 40, 96, 96, 3, 3, DT_BF16);
}

static void groups(void **state)
{
    struct fix *f = *state;
    const int64_t sizes[][4] = {{0, 5, 8, 4},     {3, 1, 32, 32},  {5, 17, 96, 32},
                                {40, 33, 64, 32}, {2, 9, 300, 20}, {4, 6, 6, 1}};
    for (int i = 0; i < 12; i++) {
        int64_t h = sizes[i / 2][0], w = sizes[i / 2][1], c = sizes[i / 2][2], g = sizes[i / 2][3], per = c / g;
        struct tensor x = MAKE(f, DT_F32, i % 2, 2, h, w, c), sums = MAKE(f, DT_F64, 0, 1, h, g, 2);
        struct tensor y = MAKE(f, DT_F32, 2, 1, h, w, c), gamma = MAKE(f, DT_BF16, 0, 1, c),
                      beta = MAKE(f, DT_F32, 0, 1, c);
        double *xs = values(f, x), *want_sums = room(f, h * g * 2), *want = room(f, h * w * c);
        double *mean = room(f, g), *square = room(f, g), count = (double)(h * w * per);
        for (int64_t j = 0; j < h * w * c; j++) {
            int64_t group = j % c / per, row = j / c / w;
            want_sums[(row * g + group) * 2] += xs[j];
            want_sums[(row * g + group) * 2 + 1] += xs[j] * xs[j];
            mean[group] += xs[j] / count;
            square[group] += xs[j] * xs[j] / count;
        }
        for (int64_t j = 0; j < h * w * c; j++) {
            int64_t group = j % c / per;
            double v = (xs[j] - mean[group]) / sqrt(square[group] - mean[group] * mean[group] + 1e-6);
            want[j] = ref_act(v * at(gamma, j % c, 0, 0, 0) + at(beta, j % c, 0, 0, 0), i % 2 ? ACT_SILU : ACT_NONE);
        }
        K->group_sums(f->d, sums, x);
        same(f, sums, want_sums, 1e-14, "group_sums"); // doubles, up to the order of the sum
        if (i % 4 == 0) {                              // rows apart, with the sums of all
            K->group_norm(f->d, tensor_rows(y, 0, h / 2), tensor_rows(x, 0, h / 2), sums, gamma, beta, 1e-6f, i % 2);
            K->group_norm(f->d, tensor_rows(y, h / 2, h - h / 2), tensor_rows(x, h / 2, h - h / 2), sums, gamma, beta,
                          1e-6f, i % 2);
            same(f, y, want, 2e-6, "group_norm of rows apart");
        }
        K->group_norm(f->d, x, x, sums, gamma, beta, 1e-6f, i % 2);
        same(f, x, want, 2e-6, "group_norm in place");
    }
}

// ---- pictures

static void pictures(void **state)
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 3, 1, 5, 7, 6), y = MAKE(f, DT_F32, 1, 1, 10, 14, 6);
    K->upsample2x(f->d, y, x);
    double *want = room(f, 840);
    for (int64_t i = 0; i < 840; i++)
        want[i] = at(x, i / 84 / 2, i / 6 % 14 / 2, i % 6, 0);
    same(f, y, want, 0, "upsample2x");

    struct tensor tokens = MAKE(f, DT_F32, 2, 1, 12, 20), latent = MAKE(f, DT_F32, 1, 1, 6, 8, 5);
    K->unpack_latents(f->d, latent, tokens, 0.36f, 0.11f);
    for (int64_t i = 0; i < 240; i++) {
        int64_t c = i % 5, px = i / 5 % 8, py = i / 40;
        want[i] = at(tokens, py / 2 * 4 + px / 2, c * 4 + py % 2 * 2 + px % 2, 0, 0) / 0.36 + 0.11;
    }
    same(f, latent, want, 1e-6, "unpack_latents");

    struct tensor p = MAKE(f, DT_F32, 1, 1.5, 9, 11, 3), u = MAKE(f, DT_U8, 0, 0, 9, 11, 3);
    ((float *)p.data)[0] = NAN;
    K->to_u8(f->d, u, p);
    assert_int_equal(((uint8_t *)u.data)[0], 0);
    for (int64_t i = 1; i < 297; i++) {
        float v = fminf(fmaxf((float)at(p, i / 33, i / 3 % 11, i % 3, 0) * 0.5f + 0.5f, 0), 1) * 255;
        assert_true(fabsf(v - (float)((uint8_t *)u.data)[i]) <= 0.5001f);
    }
}

static void copies(void **state)
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 4, 1, 50, 7, 60), y = MAKE(f, DT_F32, 1, 1, 50, 7, 60);
    double *zeros = room(f, 50 * 420L);
    K->copy(f->d, y, x);
    same(f, y, values(f, x), 0, "copy");
    K->zero(f->d, y);
    same(f, y, zeros, 0, "zero");
    K->zero(f->d, tensor_rows(y, 3, 0));
}

// ---- errors

static void first_failure_stays(void **state)
{
    struct fix *f = *state;
    struct tensor x = MAKE(f, DT_F32, 0, 1, 4, 6), y = MAKE(f, DT_F32, 0, 1, 4, 5), z = MAKE(f, DT_F32, 0, 1, 4, 6);
    double *before = values(f, z);
    struct err err;
    assert_int_equal(K->sync(f->d, &err), 0);
    K->add(f->d, x, y);
    K->mul(f->d, y, x, ACT_NONE);
    K->zero(f->d, z); // does nothing any more
    assert_int_equal(K->sync(f->d, &err), ERR_INVALID);
    assert_string_equal(err.text, "add needs two activations of one shape; got x F32 (4, 6), y F32 (4, 5)");
    double *after = values(f, z);
    assert_memory_equal(before, after, 24 * sizeof *before);
}

static void bad_devices(void **state)
{
    (void)state;
    struct device *d;
    struct err err;
    assert_int_equal(K->open(&(struct device_options){.threads = 0}, &d, &err), ERR_INVALID);
    assert_null(d);
    assert_int_equal(K->open(&(struct device_options){.threads = 3}, &d, &err), 0);
    void *p;
    assert_int_equal(K->alloc(d, SIZE_MAX, &p, &err), ERR_NO_MEMORY);
    assert_int_equal(K->alloc(d, 0, &p, &err), 0);
    assert_true((uintptr_t)p % 256 == 0);
    K->free(d, p);
    K->add(d, tensor_2d(NULL, DT_F32, 2, 2), tensor_2d(NULL, DT_F32, 2, 2));
    assert_int_equal(K->sync(d, &err), ERR_INVALID);
    K->close(d);
}

static void bad_linears(void **state)
{
    (void)state;
    float m[8];
    struct tensor w[2] = {tensor_2d(m, DT_F32, 2, 4), tensor_2d(m, DT_F32, 4, 2)}, b = tensor_1d(m, DT_F32, 3);
    struct linear l;
    struct err err;
    assert_int_equal(linear_init(&l, 2, w, NULL, &err), ERR_INVALID);
    assert_int_equal(linear_init(&l, 1, w, &b, &err), ERR_INVALID);
    assert_int_equal(linear_init(&l, 0, w, NULL, &err), ERR_INVALID);
    assert_int_equal(linear_init(&l, 5, w, NULL, &err), ERR_INVALID);
    w[0].dtype = DT_I32;
    assert_int_equal(linear_init(&l, 1, w, NULL, &err), ERR_INVALID);
}

static void views(void **state)
{
    (void)state;
    float m[64];
    struct tensor t = tensor_2d(m, DT_F32, 4, 16), c = tensor_cols(t, 4, 8), r = tensor_rows(c, 2, 1);
    assert_ptr_equal(r.data, m + 36);
    assert_int_equal(r.ld, 16);
    struct tensor h = tensor_reshape(c, 3, 4, 2, 4, 1);
    assert_int_equal(h.ld, 16);
    assert_int_equal(tensor_count(h), 32);
    assert_int_equal(tensor_bytes(h), 128);
    assert_int_equal(tensor_count((struct tensor){0}), 0);
    assert_string_equal(dtype_name(DT_BF16), "BF16");
}

#ifdef __SANITIZE_ADDRESS__
enum { ADDRESSES_WATCHED = 1 };
#else
enum { ADDRESSES_WATCHED = 0 };
#endif

// A linear layer, with one number too few in x, w or y; 3: in none.
static void linear_of_too_few(int shortened)
{
    enum { ROWS = 30, INNER = 37, COLUMNS = 70 };
    const size_t counts[] = {ROWS * INNER, COLUMNS * INNER, ROWS * COLUMNS};
    struct device *d;
    struct linear l;
    float *operands[3];
    for (int i = 0; i < 3; i++)
        operands[i] = calloc(counts[i] - (i == shortened), sizeof(float));
    const struct tensor x = tensor_2d(operands[0], DT_F32, ROWS, INNER),
                        w = tensor_2d(operands[1], DT_F32, COLUMNS, INNER),
                        y = tensor_2d(operands[2], DT_F32, ROWS, COLUMNS);
    if (K->open(&(struct device_options){.threads = 1}, &d, NULL) != 0 || linear_init(&l, 1, &w, NULL, NULL) != 0)
        return;
    K->linear(d, y, x, &l, ACT_NONE);
    K->close(d);
    for (int i = 0; i < 3; i++)
        free(operands[i]);
}

// AddressSanitizer ends a process in which tile.c, which is compiled without it, leaves its operands.
static void tiles_are_watched(void **state)
{
    (void)state;
    if (!ADDRESSES_WATCHED)
        skip();
    for (int shortened = 0; shortened <= 3; shortened++) {
        int status = 0;
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            freopen("/dev/null", "w", stderr);
            linear_of_too_few(shortened);
            _exit(0);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status == 0, shortened == 3);
    }
}

#define BOTH(test)                                                                                                     \
    {#test " 1 thread", test, setup1, teardown, NULL},                                                                 \
    {                                                                                                                  \
#test " 2 threads", test, setup2, teardown, NULL                                                               \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(conversions),
        cmocka_unit_test(rounding),
        cmocka_unit_test(bad_devices),
        cmocka_unit_test(bad_linears),
        cmocka_unit_test(views),
        cmocka_unit_test(tiles_are_watched),
        BOTH(transfers),
        BOTH(linear),
        BOTH(linear_rows_alone),
        BOTH(linear_slices),
        BOTH(columns_of_one),
        BOTH(activations),
        BOTH(pairs),
        BOTH(in_place_cfg),
        BOTH(norms),
        BOTH(gate_add_modulate),
        BOTH(qk_norm_rope),
        BOTH(embed),
        BOTH(relative_bias),
        BOTH(attention),
        BOTH(attention_rows_alone),
        BOTH(attention_parts),
        BOTH(attention_part_of_all),
        BOTH(conv2d),
        BOTH(groups),
        BOTH(pictures),
        BOTH(copies),
        BOTH(first_failure_stays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
