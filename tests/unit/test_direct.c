// test_direct.c: jobs by ranks that see each other's memory, as GPUs of one host do: inputs and shards fetched, results
// written where the ranks have their rows, keys and values of the ring fetched around. On threads of the CPU
// (thread_link.h), for any number of ranks; test_gpus.c has two, of GPUs.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/ranks.h"
#include "tests/unit/thread_link.h"

#define ODD                                                                                                            \
    FIELDS("prompt", "a red ring on a blue background", "seed", "5", "width", SANITIZED ? "80" : "176", "height",      \
           SANITIZED ? "112" : "208", "num_inference_steps", SANITIZED ? "2" : "3", "max_sequence_length", "19")
#define GUIDED                                                                                                         \
    FIELDS("prompt", "a red ring", "negative_prompt", "blue", "true_cfg_scale", "3", "seed", "5", "width",             \
           SANITIZED ? "80" : "128", "height", SANITIZED ? "48" : "96", "num_inference_steps", "2")

static void by(const struct model *m, const char *const *fields, struct plan want)
{
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct outcome *one = outcome_new();
    struct group g = {.model = m, .job = job, .want = PLAN(1, 1, 1, 1), .outcome = one, .work = whole_job};
    run_group_of_threads(&g);
    expect_success(one, 1);
    for (int late = 0; late < 2; late++) {
        struct outcome *all = outcome_new();
        const struct kernels linked = thread_kernels(late);
        g.kernels = &linked, g.want = want, g.outcome = all;
        g.apart = want.weights == PLAN_SHARDED;
        run_group_of_threads(&g);
        expect_success(all, want.ranks);
        assert_true(all->direct);
        printf("%s, %s: at most %.2g off one rank\n", plan_text(&all->plan), late ? "late" : "early",
               compare(all, one));
        outcome_free(all);
    }
    outcome_free(one);
    job_free(job);
}

static void heads_are_shared(void **state)
{
    by(*state, ODD, (struct plan)PLAN(4, 1, 4, 1));
    if (SANITIZED)
        return;
    by(*state, ODD, (struct plan)PLAN(2, 1, 2, 1));
    by(*state, ODD, (struct plan)PLAN(8, 1, 8, 1));
}

static void keys_go_round(void **state)
{
    by(*state, ODD, (struct plan)PLAN(3, 1, 1, 3));
    if (SANITIZED)
        return;
    by(*state, ODD, (struct plan)PLAN(2, 1, 1, 2));
    by(*state, ODD, (struct plan)PLAN(5, 1, 1, 5));
}

static void both(void **state)
{
    by(*state, ODD, (struct plan)PLAN(4, 1, 2, 2));
    if (!SANITIZED)
        by(*state, ODD, (struct plan)PLAN(6, 1, 2, 3));
}

static void branches_are_apart(void **state)
{
    by(*state, GUIDED, (struct plan)PLAN(4, 2, 1, 2));
    if (!SANITIZED)
        by(*state, GUIDED, (struct plan)PLAN(4, 2, 2, 1));
}

// With warm-up steps only, which are exact.
static void stages_follow_each_other(void **state)
{
    struct plan want = PLAN(4, 1, 2, 1);
    want.pipe = 2, want.patches = 2, want.warmup = 3;
    by(*state, ODD, want);
}

static void weights_are_fetched(void **state)
{
    struct plan heads = PLAN(4, 1, 4, 1), keys = PLAN(3, 1, 1, 3);
    heads.weights = keys.weights = PLAN_SHARDED;
    by(*state, ODD, keys);
    if (!SANITIZED)
        by(*state, ODD, heads);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heads_are_shared),
        cmocka_unit_test(keys_go_round),
        cmocka_unit_test(both),
        cmocka_unit_test(branches_are_apart),
        cmocka_unit_test(stages_follow_each_other),
        cmocka_unit_test(weights_are_fetched),
    };
    return cmocka_run_group_tests(tests, ranks_set_up, ranks_tear_down);
}
