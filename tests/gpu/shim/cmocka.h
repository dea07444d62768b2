// cmocka.h: the few parts of cmocka that tests/unit/test_cuda.c uses, for GPU hosts where cmocka is not installed.
#ifndef DITFLEET_SHIM_CMOCKA_H
#define DITFLEET_SHIM_CMOCKA_H

#include <fnmatch.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

struct CMUnitTest {
    const char *name;
    void (*run)(void **state);
};

#define cmocka_unit_test(f)                                                                                            \
    {                                                                                                                  \
#f, f                                                                                                          \
    }

static jmp_buf shim_failed;
static const char *shim_filter; // NULL: all tests

static void cmocka_set_test_filter(const char *pattern)
{
    shim_filter = pattern;
}

#define fail_msg(...)                                                                                                  \
    do {                                                                                                               \
        printf("%s:%d: ", __FILE__, __LINE__);                                                                         \
        printf(__VA_ARGS__);                                                                                           \
        printf("\n");                                                                                                  \
        longjmp(shim_failed, 1);                                                                                       \
    } while (0)
#define assert_true(x)                                                                                                 \
    do {                                                                                                               \
        if (!(x))                                                                                                      \
            fail_msg("not true: %s", #x);                                                                              \
    } while (0)
#define assert_false(x) assert_true(!(x))
#define assert_memory_equal(a, b, n)                                                                                   \
    do {                                                                                                               \
        if (memcmp(a, b, n) != 0)                                                                                      \
            fail_msg("%s is not %s", #a, #b);                                                                          \
    } while (0)
#define skip() longjmp(shim_failed, 2)
#define assert_int_equal(a, b)                                                                                         \
    do {                                                                                                               \
        long long shim_a_ = (long long)(a), shim_b_ = (long long)(b);                                                  \
        if (shim_a_ != shim_b_)                                                                                        \
            fail_msg("%s is %lld, not %lld", #a, shim_a_, shim_b_);                                                    \
    } while (0)

static int shim_run(const struct CMUnitTest *tests, int count, int (*setup)(void **), int (*teardown)(void **))
{
    void *state = NULL;
    volatile int passed = 0, failed = 0;
    if (setup && setup(&state))
        return 1;
    for (volatile int i = 0; i < count; i++) {
        if (shim_filter && fnmatch(shim_filter, tests[i].name, 0) != 0)
            continue;
        printf("[ RUN      ] %s\n", tests[i].name);
        fflush(stdout);
        switch (setjmp(shim_failed)) {
        case 0:
            tests[i].run(&state);
            printf("[       OK ] %s\n", tests[i].name);
            passed++;
            break;
        case 2:
            printf("[  SKIPPED ] %s\n", tests[i].name);
            break;
        default:
            printf("[  FAILED  ] %s\n", tests[i].name);
            failed++;
        }
        fflush(stdout);
    }
    if (teardown && teardown(&state))
        failed++;
    printf("%d tests passed, %d failed\n", passed, failed);
    return failed;
}

#define cmocka_run_group_tests(tests, setup, teardown)                                                                 \
    shim_run(tests, (int)(sizeof(tests) / sizeof(tests)[0]), setup, teardown)

#endif
