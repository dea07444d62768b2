// test_rng.c: our normals against torch's own (tests/golden/rng.json) and Philox against its published vectors.
#include "worker/rng.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

// The CPU kinds must be equal to the bit. CUDA's fast sine is only good to 2^-21 or so, times a radius of up to 6.7.
static const struct {
    const char *name;
    enum rng_kind kind;
    double tolerance;
} kinds[] = {
    {"cpu-f32", RNG_CPU_F32, 0},
    {"cpu-bf16", RNG_CPU_BF16, 0},
    {"cpu-f16", RNG_CPU_F16, 0},
    {"cpu-bf16-torch-2.12", RNG_CPU_BF16_TORCH_2_12, 0},
    {"cpu-f16-torch-2.12", RNG_CPU_F16_TORCH_2_12, 0},
    {"cuda", RNG_CUDA, 4e-6},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

static void check_case(const json_t *c, int k)
{
    json_int_t n = json_integer_value(json_object_get(c, "n"));
    uint64_t seed = strtoull(json_string_value(json_object_get(c, "seed")), NULL, 10);
    int sm_count = (int)json_integer_value(json_object_get(c, "sm_count")); // 0 where it does not matter
    float *x = calloc((size_t)n, sizeof *x);
    struct err e = {0};
    assert_int_equal(rng_randn(kinds[k].kind, seed, sm_count, x, n, &e), 0);

    const json_t *index = json_object_get(c, "index"), *value = json_object_get(c, "value");
    for (size_t i = 0; i < json_array_size(index); i++) {
        json_int_t at = json_integer_value(json_array_get(index, i));
        double want = json_number_value(json_array_get(value, i));
        if (!(fabs(x[at] - want) <= kinds[k].tolerance))
            fail_msg("%s seed %llu n %lld: element %lld is %.9g, torch has %.9g", kinds[k].name,
                     (unsigned long long)seed, (long long)n, (long long)at, (double)x[at], want);
    }
    double sum = 0, want = json_number_value(json_object_get(c, "sum"));
    for (json_int_t i = 0; i < n; i++)
        sum += fabs((double)x[i]) * (double)(i % 7);
    if (!(fabs(sum - want) <= 1e-6 * want + 1e-9))
        fail_msg("%s n %lld: weighted sum %.9g, torch has %.9g", kinds[k].name, (long long)n, sum, want);
    free(x);
}

static void test_torch(void **state)
{
    (void)state;
    json_t *cases = json_load_file("tests/golden/rng.json", 0, NULL);
    assert_non_null(cases);
    int seen[KINDS] = {0};
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        const char *name = json_string_value(json_object_get(c, "kind"));
        int k = 0;
        while (k < KINDS && strcmp(kinds[k].name, name) != 0)
            k++;
        assert_in_range(k, 0, KINDS - 1);
        seen[k]++;
        check_case(c, k);
    }
    for (int k = 0; k < KINDS; k++)
        assert_in_range(seen[k], 10, 1000);
    json_decref(cases);
}

static void test_philox_known_answers(void **state) // Random123's kat_vectors, philox4x32 of 10 rounds
{
    (void)state;
    static const uint32_t vectors[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
         0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
        uint32_t out[4];
        rng_philox4x32(vectors[i], vectors[i] + 4, out);
        assert_memory_equal(out, vectors[i] + 6, sizeof out);
    }
}

static void test_refusals(void **state)
{
    (void)state;
    struct err e = {0};
    float x[4] = {7, 7, 7, 7};
    assert_int_equal(rng_randn(RNG_CUDA, 1, 0, x, 4, &e), ERR_INVALID);
    assert_non_null(strstr(e.text, "sm_count"));
    assert_int_equal(rng_randn(RNG_CPU_F32, 1, 0, x, -1, &e), ERR_INVALID);
    assert_int_equal(rng_randn(RNG_CUDA, 1, 132, x, INT64_C(1) << 31, &e), ERR_INVALID);
    assert_int_equal(rng_randn(RNG_KINDS, 1, 132, x, 4, &e), ERR_INVALID);
    for (int k = 0; k < RNG_KINDS; k++)
        assert_int_equal(rng_randn((enum rng_kind)k, 1, 132, x, 0, &e), 0);
    assert_true(x[0] == 7);
}

static void test_fresh_seeds_differ(void **state)
{
    (void)state;
    struct err e = {0};
    uint64_t a = 0, b = 0;
    assert_int_equal(rng_fresh_seed(&a, &e), 0);
    assert_int_equal(rng_fresh_seed(&b, &e), 0);
    assert_true(a != b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_torch),
        cmocka_unit_test(test_philox_known_answers),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_fresh_seeds_differ),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
