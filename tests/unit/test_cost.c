// What plans there are and what they cost: every way to deal out the ranks, counts of a step by hand, prices that move
// the way they must, and a group whose leader chooses by them.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/ranks.h"
#include "worker/tuned.h"

#define PROMPT            "prompt", "a red circle", "seed", "7", "max_sequence_length", "40"
#define GUIDED            PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3"
#define SIZE(side, steps) "width", side, "height", side, "num_inference_steps", steps

static const struct machine middling = {.products = 1e11,
                                        .attention = 6e10,
                                        .rows = 1e10,
                                        .copies = 2e10,
                                        .operation = 1e-6,
                                        .exchange = 5e9,
                                        .collective = 2e-5,
                                        .beside = 0.28};

// ---- the plans there are

// Whether cfg * pipe * ulysses * ring ranks can be dealt out so, by the rules of the README alone.
static bool possible(const struct model *m, const struct plan *want, int cfg, int u, int ring, bool true_cfg,
                     bool parts)
{
    const int pipe = want->pipe ? want->pipe : 1;
    return cfg * pipe * u * ring == want->ranks && m->info.heads % u == 0 && (cfg == 1 || true_cfg) &&
           (ring == 1 || (parts && pipe == 1 && want->patches <= 1));
}

static void expect_choices(const struct model *m, const struct plan *want, bool true_cfg, bool parts)
{
    struct plan_choice choices[PLAN_MAX_CHOICES];
    struct kernels k = kernels_cpu;
    struct plan chosen;
    struct err err;
    if (!parts)
        k.attention_part = NULL;
    const int n = plan_choices(&m->info, &k, want, true_cfg, choices);
    int legal = 0, expected = 0;
    bool first = true;
    for (int i = 0; i < n; i++) {
        const struct plan *p = &choices[i].plan;
        if (choices[i].why.code != ERR_NONE) {
            assert_true(choices[i].why.text[0] != '\0');
            continue;
        }
        assert_true(possible(m, want, p->cfg, p->ulysses, p->ring, true_cfg, parts));
        assert_int_equal(p->cfg * p->pipe * p->ulysses * p->ring, want->ranks);
        for (int j = 0; j < i; j++)
            assert_memory_not_equal(&choices[j].plan, p, sizeof *p);
        if (first && plan_make(&m->info, &k, want, true_cfg, &chosen, &err) == 0)
            assert_memory_equal(&chosen, p, sizeof *p);
        first = false;
        legal++;
    }
    for (int cfg = 1; cfg <= 2; cfg++)
        for (int u = 1; u <= 8; u++)
            for (int ring = 1; ring <= 8; ring++)
                expected += possible(m, want, cfg, u, ring, true_cfg, parts);
    assert_int_equal(legal, expected);
}

static void every_plan(void **state)
{
    static const int ranks[] = {1, 2, 3, 4, 6, 8};
    static const struct plan pipes[] = {{0}, {.pipe = 2}, {.pipe = 2, .patches = 5}, {.patches = 3}};
    const struct model *m = *state;
    assert_int_equal(m->info.heads, 8);
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++)
        for (size_t j = 0; j < sizeof pipes / sizeof *pipes; j++)
            for (int bits = 0; bits < 4; bits++) {
                struct plan want = pipes[j];
                want.ranks = ranks[i];
                expect_choices(m, &want, bits & 1, bits & 2);
            }
}

static void asked_for(void **state)
{
    const struct model *m = *state;
    struct plan_choice c[PLAN_MAX_CHOICES];
    assert_int_equal(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 8, .ring = 2}, true, c), 2);
    assert_true(c[0].plan.cfg == 2 && c[0].plan.ulysses == 2 && c[1].plan.cfg == 1 && c[1].plan.ulysses == 4);
    assert_int_equal(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 8, .cfg = 1}, true, c), 4);
    assert_int_equal(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 8, .ulysses = 8}, true, c), 1);
    assert_int_equal(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 6, .ring = 4}, true, c), 0);
    assert_int_equal(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 0}, true, c), 0);
    assert_int_equal(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 64}, true, c), 13);
    assert_true(plan_choices(&m->info, &kernels_cpu, &(struct plan){.ranks = 60}, true, c) <= PLAN_MAX_CHOICES);
}

static void taken(void **state)
{
    (void)state;
    assert_int_equal(cost_pick((double[]){3, 2, 1}, 3), 2);
    assert_int_equal(cost_pick((double[]){1.04, 1, 0.9999}, 3), 0); // as good as the cheapest, and before it
    assert_int_equal(cost_pick((double[]){-1, 5, 4.99}, 3), 1);
    assert_int_equal(cost_pick((double[]){-1, -1}, 2), -1);
    assert_int_equal(cost_pick(NULL, 0), -1);
}

// ---- what they cost

static struct price price_of(const struct model *m, const struct machine *c, struct plan want,
                             const char *const *fields)
{
    struct err err = {.code = ERR_NONE};
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct plan plan;
    struct price p;
    if (plan_make(&m->info, &kernels_cpu, &want, job_true_cfg(job), &plan, &err) != 0 ||
        cost_of(c, m, job, &plan, &kernels_cpu, &p, &err) != 0)
        fail_msg("%s", err.text);
    job_free(job);
    return p;
}

// Against the table of shared knowledge: bytes a layer and rank of Ulysses 4 SD/P (P - 1)/P, of a ring 2 SD/P (P - 1).
// Two ranks that share heads send rows instead of q, k and v: SD/P (P - 1) for 3 SD/P (P - 1)/P.
static void a_step_counted(void **state)
{
    const struct model *m = *state;
    const double rows = 16 * 16 + 40, each = rows * (double)m->info.hidden * 4, blocks = m->info.blocks;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, SIZE("256", "3")));
    struct engine_estimate one, e;
    struct err err;
    assert_int_equal(engine_predict_rank(m, job, &(struct plan)PLAN(1, 1, 1, 1), 0, &kernels_cpu, &one, &err), 0);
    assert_true(one.loop.sent == 0 && one.loop.collectives == 0);
    assert_true(one.loop.cost.attention == 3 * blocks * 4 * rows * rows * (double)m->info.hidden);
    assert_true(one.loop.cost.flops < one.cost.flops && one.loop.cost.calls < one.cost.calls);
    assert_true(one.loop.cost.row_bytes < one.loop.cost.bytes);
    for (int p = 2; p <= 8; p *= 2) { // rows are not dealt quite evenly: of all ranks
        double by_heads = 0, around = 0, attention = 0;
        for (int r = 0; r < p; r++) {
            assert_int_equal(engine_predict_rank(m, job, &(struct plan)PLAN(p, 1, p, 1), r, &kernels_cpu, &e, &err), 0);
            by_heads += e.loop.sent;
            assert_true(e.loop.collectives == 3 * blocks * 2);
            assert_true(e.loop.cost.attention == one.loop.cost.attention / p);
            assert_int_equal(engine_predict_rank(m, job, &(struct plan)PLAN(p, 1, 1, p), r, &kernels_cpu, &e, &err), 0);
            around += e.loop.sent;
            assert_true(e.loop.collectives == 3 * blocks * (p - 1));
            attention += e.loop.cost.attention;
            assert_in_range(e.loop.cost.attention * p / one.loop.cost.attention * 1000, 850, 1150);
        }
        assert_true(by_heads == 3 * blocks * (p == 2 ? p + 1 : 4) * each * (p - 1) / p);
        assert_true(around == 3 * blocks * 2 * each * (p - 1));
        assert_true(attention == one.loop.cost.attention);
    }
    job_free(job);
}

// Linked devices take rows as they lie: the same words, and nothing packed for them.
static int no_link(struct device *d, const void *name, int rank, int ranks, int timeout_ms, struct link **out,
                   struct err *err)
{
    (void)d, (void)name, (void)rank, (void)ranks, (void)timeout_ms, (void)out, (void)err;
    return ERR_UNSUPPORTED;
}

static void linked_devices_pack_nothing(void **state)
{
    const struct model *m = *state;
    const struct plan ulysses = PLAN(4, 1, 4, 1), ring = PLAN(4, 1, 1, 4);
    struct kernels linked = kernels_cpu;
    linked.link = no_link;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, SIZE("256", "3")));
    struct engine_estimate packed, direct, of_ring;
    struct err err;
    assert_int_equal(engine_predict_rank(m, job, &ulysses, 1, &kernels_cpu, &packed, &err), 0);
    assert_int_equal(engine_predict_rank(m, job, &ulysses, 1, &linked, &direct, &err), 0);
    assert_int_equal(engine_predict_rank(m, job, &ring, 1, &linked, &of_ring, &err), 0);
    assert_true(direct.loop.sent == packed.loop.sent && direct.loop.collectives == packed.loop.collectives);
    assert_true(direct.loop.cost.flops == packed.loop.cost.flops);
    assert_true(direct.loop.cost.copied < packed.loop.cost.copied);
    assert_true(direct.loop.cost.copied <= of_ring.loop.cost.copied);
    job_free(job);
}

// On the CPU each word of a shard is waited for.
static void shards_come_beside(void **state)
{
    const struct model *m = *state;
    const struct plan ulysses = PLAN(2, 1, 2, 1);
    struct plan sharded = ulysses;
    sharded.weights = PLAN_SHARDED;
    struct kernels linked = kernels_cpu;
    linked.link = no_link;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, SIZE("256", "3")));
    struct price whole, waited, beside;
    struct err err;
    assert_int_equal(cost_of(&middling, m, job, &ulysses, &linked, &whole, &err), 0);
    assert_int_equal(cost_of(&middling, m, job, &sharded, &linked, &beside, &err), 0);
    assert_int_equal(cost_of(&middling, m, job, &sharded, &kernels_cpu, &waited, &err), 0);
    const double shards = beside.sent - whole.sent;
    assert_true(shards > 0 && beside.sent == waited.sent);
    assert_true(waited.exchange >= waited.sent / middling.exchange);
    assert_float_equal(beside.exchange - whole.exchange, middling.beside * shards / middling.exchange, 1e-9);
    job_free(job);
}

// A step costs the same however many there are; and what the formula says.
static void a_step_priced(void **state)
{
    const struct model *m = *state;
    const struct price one = price_of(m, &middling, (struct plan){.ranks = 1}, FIELDS(PROMPT, SIZE("128", "1")));
    const struct price ten = price_of(m, &middling, (struct plan){.ranks = 1}, FIELDS(PROMPT, SIZE("128", "10")));
    const struct price two =
        price_of(m, &middling, (struct plan){.ranks = 1}, FIELDS(PROMPT, "num_images", "2", SIZE("128", "5")));
    assert_float_equal(price_seconds(&one), price_seconds(&ten), 1e-9);
    assert_float_equal(price_seconds(&one), price_seconds(&two), 1e-9);
    const struct price parts = price_of(m, &middling, (struct plan){.ranks = 2, .data = 2},
                                        FIELDS(PROMPT, "num_images", "2", SIZE("128", "5")));
    assert_float_equal(parts.compute, one.compute, 1e-9);
    assert_true(parts.sent == 0);
    assert_true(one.exchange == 0 && one.sent == 0);
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, SIZE("128", "1")));
    struct engine_estimate e;
    struct err err;
    assert_int_equal(engine_predict_rank(m, job, &(struct plan)PLAN(1, 1, 1, 1), 0, &kernels_cpu, &e, &err), 0);
    const struct kernel_cost *k = &e.loop.cost;
    assert_float_equal(one.compute,
                       (k->flops - k->attention) / 1e11 + k->attention / 6e10 + k->row_bytes / 1e10 + k->copied / 2e10 +
                           k->calls * 1e-6,
                       1e-9);
    job_free(job);
}

static void prices_move(void **state)
{
    const struct model *m = *state;
    const char *const *small = FIELDS(PROMPT, SIZE("128", "2")), *const *large = FIELDS(PROMPT, SIZE("256", "2"));
    const char *const *guided = FIELDS(GUIDED, SIZE("128", "2"));
    const struct plan want = {.ranks = 4, .ulysses = 2, .ring = 2};
    const struct price p = price_of(m, &middling, want, small);
    for (int i = 0; i < 7; i++) { // worse in one way: a rate halved, a delay doubled
        struct machine worse = middling;
        double *values[] = {&worse.products, &worse.attention, &worse.rows,      &worse.copies,
                            &worse.exchange, &worse.operation, &worse.collective};
        *values[i] *= i < 5 ? 0.5 : 2;
        const struct price q = price_of(m, &worse, want, small);
        assert_true(price_seconds(&q) > price_seconds(&p));
        assert_true(i == 4 || i == 6 ? q.compute == p.compute : q.exchange == p.exchange);
    }
    assert_true(price_of(m, &middling, want, large).compute > 2 * p.compute);
    double last = INFINITY;
    for (int ranks = 1; ranks <= 8; ranks *= 2) {
        const struct price q = price_of(m, &middling, (struct plan){.ranks = ranks}, large);
        assert_true(q.compute < last);
        last = q.compute;
    }
    const struct price apart = price_of(m, &middling, (struct plan){.ranks = 4, .cfg = 2}, guided);
    const struct price together = price_of(m, &middling, (struct plan){.ranks = 4, .cfg = 1}, guided);
    assert_true(apart.exchange < together.exchange && price_seconds(&apart) < price_seconds(&together));
}

// Stages take the image whole one after the other, patches side by side; more patches than stages leave nobody idle.
static void stages_wait(void **state)
{
    const struct model *m = *state;
    const char *const *job = FIELDS(PROMPT, SIZE("256", "12"));
    const struct price one = price_of(m, &middling, (struct plan){.ranks = 1}, job);
    const struct price whole = price_of(m, &middling, (struct plan){.ranks = 2, .pipe = 2, .warmup = 12}, job);
    const struct price piped = price_of(m, &middling, (struct plan){.ranks = 2, .pipe = 2}, job);
    const struct price idle = price_of(m, &middling, (struct plan){.ranks = 4, .pipe = 4, .patches = 2}, job);
    const struct price busy = price_of(m, &middling, (struct plan){.ranks = 4, .pipe = 4, .patches = 4}, job);
    assert_true(whole.compute > 0.95 * one.compute && whole.compute < 1.3 * one.compute);
    assert_true(piped.compute > 0.5 * one.compute && piped.compute < 0.75 * one.compute);
    assert_true(busy.compute < 0.8 * idle.compute);
}

static void none_is_refused(void **state)
{
    const struct model *m = *state;
    struct price prices[PLAN_MAX_CHOICES];
    struct err err;
    int n;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, SIZE("128", "2")));
    const struct plan open = {.ranks = 6}, wrong = {.ranks = 6, .ring = 2};
    assert_int_equal(cost_all(&middling, m, &kernels_cpu, job, &open, prices, &n, &err), 0);
    assert_int_equal(n, 2);
    assert_int_equal(cost_all(&middling, m, &kernels_cpu, job, &wrong, prices, &n, &err), ERR_UNSUPPORTED);
    assert_int_equal(n, 0);
    assert_non_null(strstr(err.text, "on 6 ranks cfg=1 ulysses=2 ring=3 would do"));
    job_free(job);
}

// ---- a group that chooses

static int64_t limit; // bytes of activations of a rank; 0: what is free

static int chosen_job(const struct group *g, struct comm *comm, struct err *err)
{
    static const struct engine_hooks none = {0};
    const struct engine_options options = {
        .kernels = &kernels_cpu, .device.threads = 1, .control = comm, .memory_limit = limit, .tuned = true};
    struct engine_result result = {0};
    struct engine *e;
    if (comm_rank(comm) > 0)
        setenv("XDG_CACHE_HOME", "/nowhere", 1); // what other ranks would read does not count
    TRY(engine_new(&options, &e, err));
    int rc = 0;
    for (int i = 0; rc == 0 && i < 2; i++) { // priced, and remembered
        engine_result_free(&result);
        rc = engine_run(e, g->model, g->job, &g->want, &none, &result, err);
    }
    if (rc == 0 && comm_rank(comm) == 0)
        g->outcome->plan = result.plan;
    engine_result_free(&result);
    engine_free(e);
    return rc;
}

static struct outcome *choose(const struct model *m, struct plan want, const char *const *fields)
{
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct outcome *o = outcome_new();
    struct group g = {.model = m, .job = job, .want = want, .outcome = o, .work = chosen_job};
    run_group(&g);
    job_free(job);
    return o;
}

static void expect_plan(const struct model *m, struct plan want, const struct plan *expected)
{
    struct outcome *o = choose(m, want, FIELDS(PROMPT, SIZE("64", "1")));
    expect_success(o, want.ranks);
    assert_memory_equal(&o->plan, expected, sizeof *expected);
    outcome_free(o);
}

static void measured(const struct machine *c)
{
    const struct precision fp32 = {.activation = DT_F32};
    struct tuned_key key;
    struct err err;
    tuned_key_of(&kernels_cpu, 4, 1, &fp32, &key);
    if (tuned_save(NULL, &key, c, NULL, 0, &err) != 0)
        fail_msg("%s", err.text);
}

static void leader_chooses(void **state)
{
    const struct model *m = *state;
    const struct plan ulysses = PLAN(4, 1, 4, 1), ring = PLAN(4, 1, 1, 4), mixed = PLAN(4, 1, 2, 2);
    struct machine slow = middling;
    char folder[] = "/tmp/ditfleet-cost-XXXXXX", command[64];
    assert_non_null(mkdtemp(folder));
    setenv("XDG_CACHE_HOME", folder, 1);
    expect_plan(m, (struct plan){.ranks = 4}, &ulysses); // nothing was measured
    slow.copies = 1e7;                                   // Ulysses copies more than a ring
    measured(&slow);
    expect_plan(m, (struct plan){.ranks = 4}, &ring);
    expect_plan(m, (struct plan){.ranks = 4, .ulysses = 2}, &mixed); // what is asked for is not for sale
    slow = middling;
    slow.exchange = 1e7;
    measured(&slow);
    expect_plan(m, (struct plan){.ranks = 4}, &ulysses);
    struct outcome *o = choose(m, (struct plan){.ranks = 4, .ulysses = 3}, FIELDS(PROMPT, SIZE("64", "1")));
    for (int r = 0; r < 4; r++) {
        assert_int_equal(o->rc[r], ERR_UNSUPPORTED);
        assert_non_null(strstr(o->err[r].text, "on 4 ranks cfg=1 ulysses=4 ring=1 would do"));
    }
    outcome_free(o);
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    assert_int_equal(system(command), 0);
}

// Of more text than picture, so that plans differ in what they need: one that is dearer and fits is taken, and where
// none fits the refusal is that of the one that needs least.
static void what_fits(void **state)
{
    const struct model *m = *state;
    const char *const *fields = FIELDS("prompt", "a ring", "negative_prompt", "a star", "true_cfg_scale", "3",
                                       "max_sequence_length", "256", SIZE("128", "2"));
    struct price prices[PLAN_MAX_CHOICES];
    struct engine_estimate most[PLAN_MAX_CHOICES] = {0};
    struct err err;
    int n, least = 0;
    char folder[] = "/tmp/ditfleet-cost-XXXXXX", command[64];
    Ditfleet__V1__Job *job = demo_job(m, fields);
    assert_non_null(mkdtemp(folder));
    setenv("XDG_CACHE_HOME", folder, 1);
    measured(&middling);
    assert_int_equal(cost_all(&middling, m, &kernels_cpu, job, &(struct plan){.ranks = 4}, prices, &n, &err), 0);
    for (int i = 0; i < n; i++) {
        assert_int_equal(cost_memory(m, job, &prices[i].plan, &kernels_cpu, &most[i], &err), 0);
        print_message("%s: %zu bytes, %g ms\n", plan_text(&prices[i].plan), most[i].activation_bytes,
                      price_seconds(&prices[i]) * 1e3);
        if (most[i].activation_bytes < most[least].activation_bytes)
            least = i;
    }
    job_free(job);
    assert_true(least > 0);
    limit = (int64_t)most[least].activation_bytes;
    struct outcome *o = choose(m, (struct plan){.ranks = 4}, fields);
    expect_success(o, 4);
    assert_memory_equal(&o->plan, &prices[least].plan, sizeof o->plan);
    outcome_free(o);
    limit--;
    o = choose(m, (struct plan){.ranks = 4}, fields);
    for (int r = 0; r < 4; r++) {
        assert_int_equal(o->rc[r], ERR_UNSUPPORTED);
        assert_non_null(strstr(o->err[r].text, "of activations on each of 4 ranks"));
    }
    outcome_free(o);
    limit = 0;
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    assert_int_equal(system(command), 0);
}

static int set_up(void **state)
{
    *state = demo_model();
    return 0;
}

static int tear_down(void **state)
{
    model_free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_plan),
        cmocka_unit_test(asked_for),
        cmocka_unit_test(taken),
        cmocka_unit_test(a_step_counted),
        cmocka_unit_test(linked_devices_pack_nothing),
        cmocka_unit_test(shards_come_beside),
        cmocka_unit_test(a_step_priced),
        cmocka_unit_test(prices_move),
        cmocka_unit_test(stages_wait),
        cmocka_unit_test(none_is_refused),
        cmocka_unit_test(leader_chooses),
        cmocka_unit_test(what_fits),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
