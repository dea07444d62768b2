// test_gpus.c: one job on several GPUs of this machine gives what one GPU gives. Exit status 77 where there are not
// two.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/backend.h"
#include "tests/unit/ranks.h"

enum { SKIPPED = 77, GPUS = 2 };

static const struct kernels *cuda; // not opened here: a process that did could not fork its ranks

static bool opens(int gpu)
{
    const pid_t pid = fork();
    int status = 0;
    if (pid == 0) {
        struct err err = {.code = ERR_NONE};
        struct device *d;
        const int rc = cuda->open(&(struct device_options){.gpu = gpu, .activation = DT_F32}, &d, &err);
        if (rc != 0)
            printf("%s\n", err.text);
        fflush(stdout);
        _exit(rc != 0);
    }
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static double worst_of(const struct outcome *o, const struct outcome *one)
{
    double worst = 0;
    assert_int_equal(o->entries, one->entries);
    for (int i = 0; i < one->entries; i++) {
        assert_string_equal(o->entry[i].name, one->entry[i].name);
        const double found =
            relative_l2(o->values + o->entry[i].at, one->values + one->entry[i].at, one->entry[i].count);
        worst = found > worst ? found : worst;
    }
    return worst;
}

static bool same_bits(const struct outcome *o, const struct outcome *one)
{
    return o->used == one->used && memcmp(o->values, one->values, (size_t)one->used * sizeof *one->values) == 0;
}

enum { EXACT = -1 };

// limit 0: float32, whose bounds are those of CPU ranks (ranks.h). EXACT: in exact mode, to the bit. type: of
// activations; I8: of layers, activations are bf16.
static void job_by(const struct model *m, const char *const *fields, struct plan want, enum dtype type, double limit)
{
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct outcome *one = outcome_new(), *all = outcome_new();
    struct group g = {.model = m, .job = job, .want = PLAN(1, 1, 1, 1), .outcome = one, .work = whole_job};
    g.kernels = cuda, g.activation = type == DT_I8 ? DT_BF16 : type, g.codes = type, g.exact = limit == EXACT;
    run_group(&g);
    expect_success(one, 1);
    g.want = want, g.outcome = all, g.apart = true;
    run_group(&g);
    expect_success(all, want.ranks);
    // NVLink, or PCIe from GPU to GPU.
    assert_int_equal(all->direct, cuda->link_export != NULL);
    if (want.data > 1) { // of several parts, the first one's picture is shown
        one->entries = all->entries;
        assert_int_equal(pixels_off(all->pixels, one->pixels, (int64_t)one->pixel_bytes / 3), 0);
    }
    const double found = limit == 0 ? compare(all, one) : worst_of(all, one);
    printf("%s %s: at most %.2g off one GPU%s\n", dtype_name(type), plan_text(&all->plan), found,
           same_bits(all, one) ? ", the same bits" : "");
    assert_true(limit <= 0 || found <= limit);
    if (limit == EXACT) {
        assert_true(same_bits(all, one));
        assert_memory_equal(all->pixels, one->pixels, one->pixel_bytes);
    }
    outcome_free(one);
    outcome_free(all);
    job_free(job);
}

#define PLAIN                                                                                                          \
    FIELDS("prompt", "a red ring on a blue background", "seed", "5", "width", "176", "height", "240",                  \
           "num_inference_steps", "5", "max_sequence_length", "51")
#define PIPE(patches_, warmup_)                                                                                        \
    {                                                                                                                  \
        .ranks = GPUS, .cfg = 1, .ulysses = 1, .ring = 1, .pipe = GPUS, .patches = (patches_), .warmup = (warmup_),    \
        .data = 1                                                                                                      \
    }

// Hosts of which no GPU sees another's memory, or several hosts: through NCCL.
static void without_peers(void **state)
{
    static struct kernels apart;
    const struct kernels *all = cuda;
    apart = *cuda;
    apart.link_export = NULL;
    cuda = &apart;
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, GPUS, 1), DT_F32, 0);
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, 1, GPUS), DT_BF16, 5e-2);
    job_by(*state, PLAIN, (struct plan)PIPE(3, 1), DT_F32, 0.5);
    struct plan sharded = PLAN(GPUS, 1, GPUS, 1);
    sharded.weights = PLAN_SHARDED;
    job_by(*state, PLAIN, sharded, DT_BF16, EXACT);
    cuda = all;
}

static void heads_are_shared(void **state)
{
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, GPUS, 1), DT_F32, 0);
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, GPUS, 1), DT_BF16, 5e-2);
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, GPUS, 1), DT_F16, 1e-2);
}

static void keys_go_round(void **state)
{
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, 1, GPUS), DT_F32, 0);
    job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, 1, GPUS), DT_BF16, 5e-2);
}

static void stages_follow_each_other(void **state)
{
    job_by(*state, PLAIN, (struct plan)PIPE(2, 5), DT_F32, 0); // warm-up alone is exact
    job_by(*state, PLAIN, (struct plan)PIPE(3, 1), DT_F32, 0.5);
    job_by(*state, PLAIN, (struct plan)PIPE(2, 5), DT_BF16, 5e-2);
}

static void exact_is_to_the_bit(void **state)
{
    const char *const *large = FIELDS("prompt", "a red ring on a blue background", "seed", "5", "width", "768",
                                      "height", "640", "num_inference_steps", "4");
    const char *const *guided = FIELDS("prompt", "a red ring", "negative_prompt", "blue", "true_cfg_scale", "3", "seed",
                                       "5", "width", "256", "height", "192", "num_inference_steps", "4");
    const enum dtype types[] = {DT_BF16, DT_F16, DT_F32, DT_I8};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        job_by(*state, PLAIN, (struct plan)PLAN(GPUS, 1, GPUS, 1), types[i], EXACT);
        job_by(*state, large, (struct plan)PLAN(GPUS, 1, GPUS, 1), types[i], EXACT);
        job_by(*state, guided, (struct plan)PLAN(GPUS, 2, 1, 1), types[i], EXACT);
    }
}

static void weights_are_gathered(void **state)
{
    struct plan want = PLAN(GPUS, 1, GPUS, 1);
    want.weights = PLAN_SHARDED;
    job_by(*state, PLAIN, want, DT_F32, 0);
    job_by(*state, PLAIN, want, DT_BF16, 5e-2);
    job_by(*state, PLAIN, want, DT_BF16, EXACT);
    // Two predictions a step, by one rank after the other and by each its own.
    const char *const *guided = FIELDS("prompt", "a red ring", "negative_prompt", "blue", "true_cfg_scale", "3", "seed",
                                       "5", "width", "256", "height", "192", "num_inference_steps", "12");
    job_by(*state, guided, want, DT_BF16, EXACT);
    want = (struct plan)PLAN(GPUS, 2, 1, 1);
    want.weights = PLAN_SHARDED;
    job_by(*state, guided, want, DT_BF16, EXACT);
}

// What was open for it is closed, and opened again.
static void stopped_and_done_again(void **state)
{
    Ditfleet__V1__Job *job = demo_job(*state, PLAIN);
    struct outcome *once = outcome_new(), *again = outcome_new();
    struct group g = {.model = *state, .job = job, .want = PLAN(GPUS, 1, GPUS, 1), .outcome = once, .work = whole_job};
    g.kernels = cuda, g.activation = DT_BF16, g.apart = true;
    for (int sharded = 0; sharded < 2; sharded++) {
        g.want.weights = sharded ? PLAN_SHARDED : PLAN_REPLICATED;
        g.stop_at = 0, g.outcome = once;
        run_group(&g);
        expect_success(once, GPUS);
        g.stop_at = 3, g.outcome = again;
        run_group(&g);
        expect_success(again, GPUS);
        assert_int_equal(again->direct, cuda->link_export != NULL);
        assert_true(same_bits(again, once));
        once->entries = again->entries = 0, once->used = again->used = 0; // for the next
    }
    outcome_free(once);
    outcome_free(again);
    job_free(job);
}

static void branches_are_apart(void **state)
{
    const char *const *guided = FIELDS("prompt", "a red ring", "negative_prompt", "blue", "true_cfg_scale", "3", "seed",
                                       "5", "width", "128", "height", "96", "num_inference_steps", "4");
    job_by(*state, guided, (struct plan)PLAN(GPUS, 2, 1, 1), DT_F32, 0);
}

static void images_are_dealt(void **state)
{
    struct plan want = PLAN(GPUS, 1, 1, 1);
    want.data = GPUS;
    job_by(*state,
           FIELDS("prompt", "a red ring", "seed", "5", "width", "96", "height", "96", "num_inference_steps", "3",
                  "num_images", "2"),
           want, DT_F32, 1e-4);
}

int main(void)
{
    struct err err = {.code = ERR_NONE};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heads_are_shared),         cmocka_unit_test(keys_go_round),
        cmocka_unit_test(stages_follow_each_other), cmocka_unit_test(without_peers),
        cmocka_unit_test(exact_is_to_the_bit),      cmocka_unit_test(weights_are_gathered),
        cmocka_unit_test(stopped_and_done_again),   cmocka_unit_test(branches_are_apart),
        cmocka_unit_test(images_are_dealt),
    };
    if (backend_find("cuda", &cuda, &err) != 0 || !opens(0) || !opens(1)) {
        printf("skipped: two GPUs are needed%s%s\n", *err.text ? ": " : "", err.text);
        return SKIPPED;
    }
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    setvbuf(stdout, NULL, _IOLBF, 0); // ranks are forked from here
    return cmocka_run_group_tests(tests, ranks_set_up, ranks_tear_down);
}
