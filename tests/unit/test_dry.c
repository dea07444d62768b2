// The dry backend: counts by hand, and every operation's shape mistakes by the words of the failure. cpu shares the
// checks, so a few of them are put to it as well.
#include "kernels/kernels.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static const struct kernels *const K = &kernels_dry;

static struct device *open_device(const struct kernels *k)
{
    struct device *d;
    assert_int_equal(k->open(&(struct device_options){.threads = 1}, &d, NULL), 0);
    return d;
}

static struct tensor f32(int dims, int64_t n0, int64_t n1, int64_t n2)
{
    return tensor_of((void *)0x1000, DT_F32, dims, n0, n1, n2, 1); // NOLINT(performance-no-int-to-ptr)
}

static void counts(void **state)
{
    (void)state;
    struct device *d = open_device(K);
    struct kernel_cost c;
    struct linear l;
    struct tensor w[2] = {f32(2, 6, 4, 1), f32(2, 2, 4, 1)}, b[2] = {f32(1, 6, 1, 1), f32(1, 2, 1, 1)};
    w[1].dtype = DT_BF16;
    assert_int_equal(linear_init(&l, 2, w, b, NULL), 0);
    K->linear(d, f32(2, 3, 8, 1), f32(2, 3, 4, 1), &l, ACT_NONE);
    K->cost(d, &c);
    assert_true(c.flops == 2.0 * 3 * 8 * 4 && c.bytes == 4.0 * (24 + 12 + 24 + 8) + 2.0 * 8);
    assert_true(c.attention == 0 && c.row_bytes == 0 && c.copied == 0 && c.calls == 1 && c.codes == 0);

    struct attention_opts o = {.scale = 1};
    K->attention(d, f32(3, 5, 2, 8), f32(3, 5, 2, 8), f32(3, 7, 2, 8), f32(3, 7, 2, 8), &o);
    K->cost(d, &c);
    assert_true(c.flops == 192 + 4.0 * 5 * 7 * 16);
    assert_true(c.attention == c.flops - 192 && c.calls == 2);
    double attended = c.flops, bytes = c.bytes;
    K->attention_part(d, f32(3, 5, 2, 8), f32(2, 5, 2, 1), f32(3, 5, 2, 8), f32(3, 3, 2, 8), f32(3, 3, 2, 8), &o);
    K->cost(d, &c);
    assert_true(c.flops == attended + 4.0 * 5 * 3 * 16 && c.bytes == bytes + 4.0 * (2 * 80 + 2 * 48 + 10));
    bytes = c.bytes;
    K->attention_merge(d, f32(3, 5, 2, 8), tensor_of(NULL, DT_F32, 4, 3, 5, 2, 8), f32(3, 3, 5, 2));
    K->cost(d, &c);
    assert_true(c.flops == attended + 4.0 * 5 * 3 * 16 && c.bytes == bytes + 4.0 * (80 + 3 * 80 + 3 * 10));
    assert_true(c.attention == c.flops - 192 && c.row_bytes == 4.0 * (80 + 3 * 80 + 3 * 10) && c.calls == 4);
    bytes = c.bytes;
    K->copy(d, f32(2, 3, 8, 1), f32(2, 3, 8, 1));
    K->cost(d, &c);
    assert_true(c.copied == 4.0 * 48 && c.bytes == bytes + 4.0 * 48 && c.row_bytes == 4.0 * (80 + 3 * 80 + 3 * 10));
    struct conv conv = {.w = tensor_of(NULL, DT_F32, 4, 5, 3, 3, 4), .b = f32(1, 5, 1, 1)};
    K->conv2d(d, f32(3, 6, 7, 5), f32(3, 8, 7, 4), &conv);
    double before = c.flops;
    K->cost(d, &c);
    assert_true(c.flops == before + 2.0 * 42 * 180);

    struct tensor i8 = f32(2, 8, 16, 1), x = f32(2, 5, 16, 1);
    i8.dtype = x.dtype = DT_I8;
    i8.scale = x.scale = i8.data;
    const struct linear codes = {.parts = 1, .w = {i8}, .n = 8, .k = 16};
    K->linear(d, f32(2, 5, 8, 1), x, &codes, ACT_NONE); // in 8 bits already
    K->cost(d, &c);
    assert_true(c.codes == 0);
    K->linear(d, f32(2, 3, 8, 1), f32(2, 3, 16, 1), &codes, ACT_NONE);
    K->linear(d, f32(2, 2, 8, 1), f32(2, 2, 16, 1), &codes, ACT_NONE);
    K->cost(d, &c);
    assert_true(c.codes == 3 * 16);
    struct kernel_cost sum = {.codes = 50};
    kernel_cost_add(&sum, &c, &c);
    assert_true(sum.codes == 50);
    assert_int_equal(K->sync(d, NULL), 0);
    K->close(d);
}

static void addresses(void **state)
{
    (void)state;
    struct device *d = open_device(K);
    void *a, *b, *c;
    assert_int_equal(K->alloc(d, 1000, &a, NULL), 0);
    assert_int_equal(K->alloc(d, SIZE_MAX, &b, NULL), 0);
    assert_int_equal(K->alloc(d, 1, &c, NULL), 0);
    assert_true((uintptr_t)b >= (uintptr_t)a + 1000 && (uintptr_t)c > (uintptr_t)b && (uintptr_t)c % 256 == 0);
    K->free(d, a);
    K->close(d);
}

// Each call below is wrong in one way; the failure starts with the operation's name and holds a shape it got.
#define WRONG(starts, shape, ...)                                                                                      \
    do {                                                                                                               \
        const struct kernels *both[] = {&kernels_dry, &kernels_cpu};                                                   \
        for (int i_ = 0; i_ < 2; i_++) {                                                                               \
            const struct kernels *k = both[i_];                                                                        \
            struct device *d = open_device(k);                                                                         \
            struct err err = {0};                                                                                      \
            __VA_ARGS__;                                                                                               \
            assert_int_equal(k->sync(d, &err), ERR_INVALID);                                                           \
            if (strncmp(err.text, starts, strlen(starts)) != 0 || !strstr(err.text, shape))                            \
                fail_msg("%s: %s", k->name, err.text);                                                                 \
            k->close(d);                                                                                               \
        }                                                                                                              \
    } while (0)

static void wrong_rows(void **state)
{
    (void)state;
    struct tensor x = f32(2, 4, 6, 1), y = f32(2, 4, 5, 1), v = f32(1, 5, 1, 1), none = {0}, half = x;
    half.dtype = DT_BF16;
    struct linear l = {.parts = 1, .w = {f32(2, 5, 7, 1)}, .n = 5, .k = 7};
    WRONG("copy needs", "dst F32 (4, 6), src F32 (4, 5)", k->copy(d, x, y));
    WRONG("copy needs", "src BF16 (4, 6)", k->copy(d, x, half));
    WRONG("zero needs", "t none", k->zero(d, none));
    WRONG("linear needs", "y F32 (4, 5), x F32 (4, 6), w F32 (5, 7)", k->linear(d, y, x, &l, ACT_NONE));
    WRONG("activate needs", "x BF16 (4, 6)", k->activate(d, half, ACT_SILU));
    WRONG("add needs", "(4, 5)", k->add(d, x, y));
    WRONG("mul needs", "(4, 5)", k->mul(d, x, y, ACT_NONE));
    WRONG("axpy needs", "(4, 5)", k->axpy(d, x, 1, y));
    WRONG("add_row needs", "row F32 (5)", k->add_row(d, x, v));
    WRONG("gate_add needs", "gate F32 (5)", k->gate_add(d, x, v, x));
    WRONG("layer_norm needs", "gamma none, beta F32 (5)", k->layer_norm(d, x, x, none, v, 1));
    WRONG("modulate needs", "shift F32 (5)", k->modulate(d, y, y, none, v, 1));
    WRONG("rms_norm needs", "gamma F32 (5)", k->rms_norm(d, x, x, v, 1));
    WRONG("qk_norm_rope needs", "q F32 (4, 2, 3)",
          k->qk_norm_rope(d, f32(3, 4, 2, 3), f32(3, 4, 2, 3), f32(1, 3, 1, 1), f32(1, 3, 1, 1), 1, f32(3, 4, 1, 2)));
    WRONG("embed needs", "ids F32 (5)", k->embed(d, y, y, v));
    WRONG("relative_bias needs", "buckets F32 (5)", k->relative_bias(d, f32(3, 2, 3, 3), x, v));
    WRONG("cfg_combine needs", "positive F32 (4, 5)", k->cfg_combine(d, x, x, y, 1));
}

static void wrong_pictures(void **state)
{
    (void)state;
    struct tensor p = f32(3, 4, 6, 8), q = f32(3, 4, 6, 9), none = {0};
    struct attention_opts causal = {.scale = 1, .causal = true}, bias = {.scale = 1, .bias = f32(3, 6, 4, 3)};
    struct conv conv = {.w = tensor_of((void *)0x1000, DT_F32, 4, 8, 3, 3, 8), .b = none};       // NOLINT
    struct tensor parts = tensor_of((void *)0x1000, DT_F32, 4, 2, 4, 6, 8);                      // NOLINT
    struct tensor sums = tensor_of((void *)0x1000, DT_F64, 3, 4, 3, 2, 1), u8 = f32(3, 4, 6, 8); // NOLINT
    WRONG("attention needs", "k F32 (4, 6, 9)", k->attention(d, p, p, q, q, &(struct attention_opts){.scale = 1}));
    WRONG("attention (causal) needs", "k F32 (5, 6, 8)",
          k->attention(d, p, p, f32(3, 5, 6, 8), f32(3, 5, 6, 8), &causal));
    WRONG("attention needs", "bias F32 (6, 4, 3)", k->attention(d, p, p, p, p, &bias));
    WRONG("attention_part needs", "lse F32 (4, 8)",
          k->attention_part(d, p, f32(2, 4, 8, 1), p, p, p, &(struct attention_opts){.scale = 1}));
    WRONG("attention_part (causal) needs", "lse F32 (4, 6)",
          k->attention_part(d, p, f32(2, 4, 6, 1), p, p, p, &causal));
    WRONG("attention_merge needs", "lse F32 (3, 4, 6)", k->attention_merge(d, p, parts, f32(3, 3, 4, 6)));
    WRONG("attention_merge needs", "out F32 (4, 6, 9)", k->attention_merge(d, q, parts, f32(3, 2, 4, 6)));
    WRONG("conv2d needs", "x F32 (4, 6, 8)", k->conv2d(d, p, p, &conv));
    WRONG("group_sums needs", "sums F64 (4, 3, 2)", k->group_sums(d, sums, p));
    WRONG("group_norm needs", "sums F64 (4, 3, 2)", k->group_norm(d, p, p, sums, none, none, 1, ACT_NONE));
    WRONG("upsample2x needs", "y F32 (4, 6, 9)", k->upsample2x(d, q, p));
    WRONG("unpack_latents needs", "tokens F32 (5, 32)", k->unpack_latents(d, p, f32(2, 5, 32, 1), 1, 0));
    WRONG("to_u8 needs", "y F32 (4, 6, 8)", k->to_u8(d, u8, p));
}

static void wrong_tensors(void **state)
{
    (void)state;
    struct tensor t = f32(2, 4, 6, 1), overlapping = t, negative = t, deep = t;
    overlapping.ld = 5;
    negative.n[1] = -1;
    deep.n[3] = 2;
    WRONG("zero: t is no tensor", "stride 5", k->zero(d, overlapping));
    WRONG("zero: t is no tensor", "(4, -1, 1, 1)", k->zero(d, negative));
    WRONG("zero: t is no tensor", "(4, 6, 1, 2)", k->zero(d, deep));
    WRONG("upload needs", "(4, 6)", k->upload(d, t, NULL));
}

// A forward pass on memory that is not there: nothing is read or written, nothing fails.
static void touches_nothing(void **state)
{
    (void)state;
    struct device *d = open_device(K);
    struct tensor x = f32(2, 64, 32, 1), p = f32(3, 8, 8, 32), h = f32(3, 64, 2, 16), v = f32(1, 32, 1, 1);
    struct tensor sums = tensor_of((void *)0x1000, DT_F64, 3, 8, 4, 2, 1); // NOLINT
    struct tensor ids = tensor_of((void *)0x1000, DT_I32, 1, 64, 1, 1, 1); // NOLINT
    float host[64 * 32] = {0};
    K->upload(d, x, host);
    K->download(d, host, x);
    K->copy(d, x, x);
    K->zero(d, x);
    K->activate(d, x, ACT_SILU);
    K->add(d, x, x);
    K->add_row(d, x, v);
    K->gate_add(d, x, v, x);
    K->layer_norm(d, x, x, v, v, 1);
    K->modulate(d, x, x, v, v, 1);
    K->rms_norm(d, x, x, v, 1);
    K->qk_norm_rope(d, h, h, f32(1, 16, 1, 1), f32(1, 16, 1, 1), 1, f32(3, 64, 8, 2));
    K->embed(d, x, x, ids);
    K->attention_part(d, h, f32(2, 64, 2, 1), h, h, h, &(struct attention_opts){.scale = 1});
    K->attention_merge(d, h, tensor_reshape(h, 4, 1, 64, 2, 16), f32(3, 1, 64, 2));
    K->group_sums(d, sums, p);
    K->group_norm(d, p, p, sums, v, v, 1, ACT_SILU);
    K->upsample2x(d, f32(3, 16, 16, 32), p);
    K->unpack_latents(d, f32(3, 16, 16, 8), x, 1, 0);
    K->cfg_combine(d, x, x, x, 1);
    struct err err;
    if (K->sync(d, &err))
        fail_msg("%s", err.text);
    K->close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counts),         cmocka_unit_test(addresses),     cmocka_unit_test(wrong_rows),
        cmocka_unit_test(wrong_pictures), cmocka_unit_test(wrong_tensors), cmocka_unit_test(touches_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
