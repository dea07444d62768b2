// The arena: views that do not overlap, two stacks, the peak, and failure with figures instead of a crash.
#include "kernels/arena.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static struct tensor bytes(struct arena *a, int64_t n)
{
    return arena_tensor(a, DT_U8, 1, n, 1, 1, 1);
}

static void stacks_and_marks(void **state)
{
    (void)state;
    struct device *d;
    struct arena *a;
    assert_int_equal(kernels_cpu.open(&(struct device_options){.threads = 1}, &d, NULL), 0);
    assert_int_equal(arena_new(&kernels_cpu, d, 2048 + 100, &a, NULL), 0);
    struct tensor x = arena_tensor(a, DT_F32, 2, 5, 7, 1, 1), y = bytes(a, 300);
    assert_int_equal(x.ld, 7);
    assert_true((char *)y.data - (char *)x.data == 256 && (uintptr_t)x.data % 256 == 0);
    assert_int_equal(arena_peak(a), 768);
    size_t mark = arena_mark(a);
    arena_flip(a);
    assert_int_equal(arena_mark(a), 0);
    struct tensor z = bytes(a, 1024);
    assert_true((char *)z.data - (char *)x.data == 1024);
    memset(z.data, 1, 1024);
    arena_flip(a);
    assert_int_equal(arena_mark(a), mark);
    arena_release(a, 256);
    assert_ptr_equal(bytes(a, 1).data, y.data);
    assert_int_equal(arena_peak(a), 1792);
    assert_int_equal(arena_check(a, NULL), 0);
    assert_int_equal(bytes(a, 0).n[0], 0);

    struct err err;
    assert_int_equal(bytes(a, 513).n[0], 0); // 512 left
    assert_int_equal(arena_check(a, &err), ERR_NO_MEMORY);
    assert_string_equal(err.text, "activations need 768 bytes more, but 1536 of the 2048 bytes set aside are in use");
    assert_int_equal(bytes(a, 1).n[0], 0); // failed for good
    assert_int_equal(arena_peak(a), 1792);
    arena_free(a);
    arena_free(NULL);
    kernels_cpu.close(d);
}

static void absurd_shapes(void **state)
{
    (void)state;
    struct device *d;
    struct arena *a;
    assert_int_equal(kernels_dry.open(&(struct device_options){.threads = 1}, &d, NULL), 0);
    assert_int_equal(arena_new(&kernels_dry, d, ARENA_UNBOUNDED, &a, NULL), 0);
    assert_int_equal(arena_tensor(a, DT_F32, 4, INT64_MAX, INT64_MAX, INT64_MAX, 1).n[0], 0);
    assert_int_equal(arena_check(a, NULL), ERR_NO_MEMORY);
    arena_free(a);
    assert_int_equal(arena_new(&kernels_dry, d, ARENA_UNBOUNDED, &a, NULL), 0);
    assert_int_equal(arena_tensor(a, DT_F32, 1, -1, 1, 1, 1).n[0], 0);
    assert_int_equal(arena_check(a, NULL), ERR_NO_MEMORY);
    arena_free(a);
    kernels_dry.close(d);

    struct err err;
    assert_int_equal(kernels_cpu.open(&(struct device_options){.threads = 1}, &d, NULL), 0);
    assert_int_equal(arena_new(&kernels_cpu, d, SIZE_MAX, &a, &err), ERR_NO_MEMORY);
    assert_null(a);
    kernels_cpu.close(d);
}

static void dry_predicts(void **state)
{
    (void)state;
    struct device *d;
    struct arena *a;
    assert_int_equal(kernels_dry.open(&(struct device_options){.threads = 1}, &d, NULL), 0);
    assert_int_equal(arena_new(&kernels_dry, d, ARENA_UNBOUNDED, &a, NULL), 0);
    arena_tensor(a, DT_F32, 3, 1 << 20, 64, 64, 1); // 16 GiB
    arena_flip(a);
    struct tensor t = bytes(a, 1);
    assert_true(t.data != NULL && arena_peak(a) == ((size_t)1 << 34) + 256);
    assert_int_equal(arena_check(a, NULL), 0);
    arena_free(a);
    kernels_dry.close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stacks_and_marks),
        cmocka_unit_test(absurd_shapes),
        cmocka_unit_test(dry_predicts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
