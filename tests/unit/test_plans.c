// test_plans.c: every plan of ranks makes the picture that one rank makes. Ranks are processes over shared memory, as
// in the fleet (and once threads, where a race detector sees them); what rank 0 was shown comes back through a mapping.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/ranks.h"
#include "worker/stages.h"

// Every plan that 2, 3, 4, 6 and 8 ranks have for the model's 8 heads. Ranks, cfg, ulysses, ring; a list's last is the
// one that stands for all where SANITIZED.
#define RING_PLANS                                                                                                     \
    PLAN(2, 1, 1, 2), PLAN(3, 1, 1, 3), PLAN(4, 1, 1, 4), PLAN(4, 1, 2, 2), PLAN(6, 1, 1, 6), PLAN(6, 1, 2, 3),        \
        PLAN(8, 1, 1, 8), PLAN(8, 1, 4, 2), PLAN(8, 1, 2, 4)
#define ULYSSES_PLANS PLAN(2, 1, 2, 1), PLAN(4, 1, 4, 1), PLAN(8, 1, 8, 1)
static const struct plan whole[] = {ULYSSES_PLANS, RING_PLANS, {0}};
static const struct plan guided[] = {
    ULYSSES_PLANS,    RING_PLANS,       PLAN(2, 2, 1, 1), PLAN(4, 2, 2, 1), PLAN(4, 2, 1, 2),
    PLAN(6, 2, 1, 3), PLAN(8, 2, 4, 1), PLAN(8, 2, 1, 4), PLAN(8, 2, 2, 2), {0}};
static const struct plan few[] = {PLAN(2, 1, 2, 1), PLAN(3, 1, 1, 3), PLAN(6, 1, 2, 3),
                                  PLAN(8, 1, 8, 1), PLAN(8, 1, 2, 4), {0}};
static const bool uncut[4];

// The job under one rank and under every plan of the list (where SANITIZED, the last, which spreads it thinnest); cut:
// what the result must say of the prompts.
static void check(void **state, const char *const *fields, const struct plan *plans, const bool cut[4])
{
    const struct model *m = *state;
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct outcome *one = outcome_new();
    struct group g = {.model = m, .job = job, .want = PLAN(1, 1, 1, 1), .outcome = one, .work = whole_job};
    run_group(&g);
    expect_success(one, 1);
    assert_memory_equal(one->cut, cut, sizeof one->cut);
    double worst = 0;
    while (SANITIZED && plans[1].ranks)
        plans++;
    for (; plans->ranks; plans++) {
        struct outcome *o = outcome_new();
        g.want = *plans, g.outcome = o;
        run_group(&g);
        expect_success(o, plans->ranks);
        assert_memory_equal(&o->plan, plans, sizeof *plans);
        assert_memory_equal(o->cut, cut, sizeof o->cut);
        double found = compare(o, one);
        worst = found > worst ? found : worst;
        outcome_free(o);
    }
    print_message("worst relative L2 %.2g\n", worst);
    outcome_free(one);
    job_free(job);
}

#define PROMPT "prompt", "a red circle above a blue square", "seed", "7", "max_sequence_length", "40"
static void square(void **state)
{
    if (SANITIZED)
        return;
    check(state, FIELDS(PROMPT, "width", "256", "height", "256", "num_inference_steps", "2"), few, uncut);
}

static void odd_size(void **state)
{
    if (SANITIZED)
        return;
    check(state, FIELDS(PROMPT, "width", "208", "height", "176", "num_inference_steps", "3"), few, uncut);
}

static void one_step(void **state)
{
    check(state, FIELDS(PROMPT, "width", "112", "height", "80", "num_inference_steps", "1"), whole, uncut);
}

static void true_cfg(void **state)
{
    check(state,
          FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3", "guidance_scale", "1", "width", "112",
                 "height", "80", "num_inference_steps", "2"),
          guided, uncut);
}

static void empty_prompt(void **state)
{
    check(state,
          FIELDS("prompt", "", "seed", "8", "max_sequence_length", "40", "width", "112", "height", "80",
                 "num_inference_steps", "2"),
          whole, uncut);
}

// Longer than both encoders take: the picture is that of what fits, and the result says so, of the text it was.
static void long_prompt(void **state)
{
    char text[4000];
    for (size_t at = 0; at + 20 < sizeof text;)
        at += (size_t)snprintf(text + at, sizeof text - at, "a red circle and ");
    check(state,
          FIELDS("prompt", text, "seed", "9", "max_sequence_length", "96", "width", "112", "height", "80",
                 "num_inference_steps", "2"),
          whole, (const bool[4]){true});
    check(state,
          FIELDS(PROMPT, "prompt_2", text, "negative_prompt", text, "negative_prompt_2", "a star", "true_cfg_scale",
                 "2", "width", "64", "height", "48", "num_inference_steps", "1"),
          (const struct plan[]){PLAN(2, 2, 1, 1), {0}}, (const bool[4]){false, true, true, false});
}

// Fewer text rows than ranks: some ranks have none.
static void little_text(void **state)
{
    check(state,
          FIELDS("prompt", "a ring", "seed", "10", "max_sequence_length", "13", "width", "112", "height", "80",
                 "num_inference_steps", "2"),
          whole, uncut);
    check(state,
          FIELDS("prompt", "", "seed", "10", "max_sequence_length", "1", "width", "112", "height", "80",
                 "num_inference_steps", "2"),
          whole, uncut);
}

// Latent rows: 4, 6 and 2. Some of 8 ranks decode nothing; one token, some denoise nothing.
static void tiny(void **state)
{
    check(state, FIELDS(PROMPT, "width", "48", "height", "32", "num_inference_steps", "2"), whole, uncut);
    check(state, FIELDS(PROMPT, "width", "32", "height", "48", "num_inference_steps", "2"), whole, uncut);
    check(state, FIELDS(PROMPT, "width", "16", "height", "16", "num_inference_steps", "2"), whole, uncut);
}

static void two_images(void **state)
{
    check(state, FIELDS(PROMPT, "num_images", "2", "width", "48", "height", "80", "num_inference_steps", "2"), whole,
          uncut);
}

// Several images on parts of the group: each is one rank's picture, wherever it was made.
static void images_side_by_side(void **state)
{
    static const struct {
        struct plan want;
        const char *images, *made;
    } rows[] = {
        {{.ranks = 2}, "4", "cfg=1 ulysses=1 ring=1 data=2"},
        {{.ranks = 4}, "4", "cfg=1 ulysses=1 ring=1 data=4"},
        {{.ranks = 8}, "2", "cfg=1 ulysses=4 ring=1 data=2"},
        {{.ranks = 6}, "2", "cfg=1 ulysses=1 ring=3 data=2"},
        {{.ranks = 6}, "3", "cfg=1 ulysses=2 ring=1 data=3"},
        {{.ranks = 4}, "3", "cfg=1 ulysses=4 ring=1"},
        {{.ranks = 4, .ulysses = 2}, "4", "cfg=1 ulysses=2 ring=1 data=2"},
        {{.ranks = 4, .data = 1}, "4", "cfg=1 ulysses=4 ring=1"},
        {{.ranks = 4, .pipe = 2, .warmup = 9}, "2", "cfg=1 ulysses=1 ring=1 pipe=2 patches=2 warmup=9 data=2"},
    };
    const struct model *m = *state;
    for (size_t i = SANITIZED ? 8 : 0; i < sizeof rows / sizeof *rows; i++) {
        Ditfleet__V1__Job *job = demo_job(
            m, FIELDS(PROMPT, "num_images", rows[i].images, "width", "48", "height", "80", "num_inference_steps", "2"));
        struct outcome *one = outcome_new(), *o = outcome_new();
        struct group g = {.model = m, .job = job, .want = PLAN(1, 1, 1, 1), .outcome = one, .work = whole_job};
        run_group(&g);
        expect_success(one, 1);
        g.want = rows[i].want, g.outcome = o;
        run_group(&g);
        expect_success(o, rows[i].want.ranks);
        assert_string_equal(plan_text(&o->plan), rows[i].made);
        assert_int_equal(o->pixel_bytes, one->pixel_bytes);
        assert_int_equal(pixels_off(o->pixels, one->pixels, (int64_t)one->pixel_bytes / 3), 0);
        outcome_free(one);
        outcome_free(o);
        job_free(job);
    }
}

static void images_that_cannot_be_dealt(void **state)
{
    static const struct {
        struct plan want;
        int images;
        enum err_code code;
        const char *text;
    } rows[] = {
        {{.ranks = 4, .data = 4}, 6, ERR_UNSUPPORTED, "data_degree 4: 6 images cannot be dealt"},
        {{.ranks = 4, .data = 3}, 6, ERR_UNSUPPORTED, "data_degree 3 does not divide the 4 ranks"},
        {{.ranks = 4, .data = -2}, 4, ERR_INVALID, "data_degree -2"},
        {{.ranks = 4, .data = 65}, 65, ERR_INVALID, "data_degree 65; it may be 1 to 64"},
        {{.ranks = 4, .data = 2, .ulysses = 4}, 2, ERR_UNSUPPORTED, "x data_degree 2 is not the 4 ranks"},
    };
    const struct model *m = *state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct plan want = rows[i].want, plan;
        struct err err = {.code = ERR_NONE};
        int rc = plan_deal_images(&want, rows[i].images, &err);
        rc = rc ? rc : plan_make(&m->info, &kernels_cpu, &want, false, &plan, &err);
        assert_int_equal(rc, rows[i].code);
        if (!strstr(err.text, rows[i].text))
            fail_msg("\"%s\" does not say \"%s\"", err.text, rows[i].text);
    }
}

// As other systems crash on. 15 image tokens and 13 of text: of every number of ranks but one, some have fewer rows.
static void sizes_the_group_does_not_divide(void **state)
{
    check(state,
          FIELDS("prompt", "a ring", "seed", "11", "max_sequence_length", "13", "width", "48", "height", "80",
                 "num_inference_steps", "2"),
          whole, uncut);
}

// As other systems err on: where every rank had all text rows, their keys would weigh as many times as there are ranks.
// Far more text than image here, so that it would show.
static void text_keys_count_once(void **state)
{
    check(state,
          FIELDS("prompt", "a red circle above a blue square", "seed", "12", "max_sequence_length", "250", "width",
                 "32", "height", "32", "num_inference_steps", "1"),
          whole, uncut);
}

// ---- each step by itself

// Takes the tokens of each step from a recording, whatever came of the steps before.
static void replay_run(const struct runner *self, const struct dit *m, struct exec *x, const struct dit_cond *cond,
                       const struct dit_rows *rows, int step, struct tensor tokens, struct tensor out)
{
    const struct outcome *o = self->state;
    char name[40] = "initial_noise";
    if (step > 0)
        snprintf(name, sizeof name, "latents_after_step_%d", step - 1);
    for (int i = 0; i < o->entries; i++)
        if (strcmp(o->entry[i].name, name) == 0)
            tokens.data = (float *)o->values + o->entry[i].at + rows->image.start * tokens.ld;
    runner_whole.run(&runner_whole, m, x, cond, rows, step, tokens, out);
}

static int replay_prepared(const struct group *g, struct run *r, struct comm *comm, struct err *err)
{
    const struct runner replay = {.run = replay_run, .state = (void *)g->replayed};
    struct prompt prompts[BRANCHES];
    bool cut[4] = {false};
    TRY(run_join(r, comm, err));
    r->runner = &replay;
    TRY(encode_prompts(r, prompts, cut, err));
    struct tensor tokens = exec_tensor(&r->world, 2, r->image_tokens, r->model->info.channels, 1, 1);
    float *noise = calloc((size_t)tensor_count(tokens), sizeof *noise);
    int rc = noise ? denoise(r, prompts, noise, tokens, err) : ERR_NO_MEMORY;
    free(noise);
    return rc;
}

static int replay(const struct group *g, struct comm *comm, struct err *err)
{
    const struct engine_hooks hooks = {.trace = record, .arg = g->outcome};
    struct device *d;
    struct arena *arena;
    struct run r;
    TRY(kernels_cpu.open(&(struct device_options){.threads = 1}, &d, err));
    int rc = arena_new(&kernels_cpu, d, 64 << 20, &arena, err);
    if (rc == 0) {
        run_init(&r, g->model, g->job, &g->want);
        r.hooks = &hooks;
        r.control = comm;
        run_use(&r, &kernels_cpu, d, arena);
        rc = replay_prepared(g, &r, comm, err);
        run_leave(&r);
        arena_free(arena);
    }
    kernels_cpu.close(d);
    return rc;
}

static double compare_predictions(const struct outcome *o, const struct outcome *one, int expected)
{
    double worst = 0;
    int found = 0;
    for (int i = 0; i < one->entries && i < o->entries; i++) {
        if (!strstr(one->entry[i].name, "noise_pred_step_"))
            continue;
        assert_string_equal(o->entry[i].name, one->entry[i].name);
        double off = relative_l2(o->values + o->entry[i].at, one->values + one->entry[i].at, one->entry[i].count);
        if (!(off <= 1e-5))
            fail_msg("%s is %g off", one->entry[i].name, off);
        worst = off > worst ? off : worst;
        found++;
    }
    assert_int_equal(found, expected);
    return worst;
}

static void same_input_each_step(void **state)
{
    enum { STEPS = 4 };
    if (SANITIZED)
        return;
    const struct model *m = *state;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3", "width",
                                                "112", "height", "80", "num_inference_steps", "4"));
    struct outcome *one = outcome_new();
    struct group g = {.model = m, .job = job, .want = PLAN(1, 1, 1, 1), .outcome = one, .work = whole_job};
    run_group(&g);
    expect_success(one, 1);
    g.work = replay, g.replayed = one;
    for (const struct plan *p = guided; p->ranks; p++) {
        struct outcome *o = outcome_new();
        g.want = *p, g.outcome = o;
        run_group(&g);
        expect_success(o, p->ranks);
        double worst = compare_predictions(o, one, 2 * STEPS);
        print_message("%d ranks, %s: worst relative L2 of a step %.2g\n", p->ranks, plan_text(p), worst);
        outcome_free(o);
    }
    outcome_free(one);
    job_free(job);
}

// A ring adds slice by slice, in an order of its own: but in the same one each time.
static void same_bits_each_time(void **state)
{
    const struct model *m = *state;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, "width", "112", "height", "80", "num_inference_steps", "2"));
    struct outcome *once = outcome_new(), *again = outcome_new();
    struct group g = {.model = m, .job = job, .want = PLAN(6, 1, 2, 3), .outcome = once, .work = whole_job};
    run_group(&g);
    g.outcome = again;
    run_group(&g);
    expect_success(once, 6);
    expect_success(again, 6);
    assert_int_equal(once->used, again->used);
    assert_memory_equal(once->values, again->values, (size_t)once->used * sizeof(float));
    outcome_free(once);
    outcome_free(again);
    job_free(job);
}

// ---- ranks as threads

static void threads(void **state)
{
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3",
                                                     "width", "80", "height", "48", "num_inference_steps", "2"));
    check_on_threads(*state, job, (struct plan)PLAN(1, 1, 1, 1), (struct plan)PLAN(8, 2, 2, 2));
    job_free(job);
}

// ---- plans that cannot be

static void refused(void **state)
{
    static const struct {
        struct plan want;
        bool cfg;
        enum err_code code;
        const char *text; // part of the error
    } rows[] = {
        {PLAN(3, 0, 3, 0), false, ERR_UNSUPPORTED, "ulysses_degree 3 does not divide the model's 8 attention heads"},
        {PLAN(3, 0, 3, 0), false, ERR_UNSUPPORTED, "on 3 ranks cfg=1 ulysses=1 ring=3 would do"},
        {PLAN(6, 0, 0, 2), false, ERR_UNSUPPORTED, "it may be 1, 2, 4, 8; on 6 ranks cfg=1 ulysses=2 ring=3 would do"},
        {PLAN(6, 0, 3, 0), true, ERR_UNSUPPORTED, "on 6 ranks cfg=2 ulysses=1 ring=3 would do"},
        {PLAN(2, 2, 0, 0), false, ERR_UNSUPPORTED, "cfg_degree 2 needs a job with two guidance branches"},
        {PLAN(2, 3, 0, 0), true, ERR_INVALID, "cfg_degree 3"},
        {PLAN(2, -1, 0, 0), true, ERR_INVALID, "cfg_degree -1"},
        {PLAN(4, 1, 2, 1), false, ERR_UNSUPPORTED,
         "cfg_degree 1 x ulysses_degree 2 x ring_degree 1 is not the 4 ranks"},
        {PLAN(4, 2, 4, 0), true, ERR_UNSUPPORTED, "cfg_degree 2 x ulysses_degree 4 x ring_degree 1 is not the 4 ranks"},
        {PLAN(4, 0, 0, 3), false, ERR_UNSUPPORTED, "ring_degree 3 is not the 4 ranks of the group; on 4 ranks cfg=1"},
        {PLAN(3, 2, 0, 0), true, ERR_UNSUPPORTED, "cfg_degree 2 x ulysses_degree 1 x ring_degree 1 is not the 3 ranks"},
        {PLAN(1, 0, 8, 0), false, ERR_UNSUPPORTED, "is not the 1 ranks"},
        {PLAN(1, 0, 0, 2), false, ERR_UNSUPPORTED, "is not the 1 ranks"},
        {PLAN(4, 0, -4, 0), false, ERR_INVALID, "ulysses_degree -4"},
        {PLAN(4, 0, 0, 65), false, ERR_INVALID, "ring_degree 65; it may be 1 to 64"},
        {PLAN(0, 0, 0, 0), false, ERR_INVALID, "0 ranks"},
        {PLAN(COMM_MAX_RANKS + 1, 0, 0, 0), false, ERR_INVALID, "a group has 1 to 64"},
    };
    const struct model *m = *state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct plan plan;
        struct err err = {.code = ERR_NONE};
        assert_int_equal(plan_make(&m->info, &kernels_cpu, &rows[i].want, rows[i].cfg, &plan, &err), rows[i].code);
        if (!strstr(err.text, rows[i].text))
            fail_msg("\"%s\" does not say \"%s\"", err.text, rows[i].text);
    }
}

// What a backend without ring attention is asked for: never a ring, and no message proposes one.
static void refused_without_parts(void **state)
{
    const struct model *m = *state;
    struct kernels k = kernels_cpu;
    struct plan plan;
    struct err err = {.code = ERR_NONE};
    k.name = "plain";
    k.attention_part = NULL;
    assert_int_equal(plan_make(&m->info, &k, &(struct plan){.ranks = 8}, false, &plan, &err), 0);
    assert_int_equal(plan.ring, 1);
    assert_int_equal(plan_make(&m->info, &k, &(struct plan){.ranks = 3}, false, &plan, &err), ERR_UNSUPPORTED);
    assert_string_equal(err.text,
                        "ring_degree 3: plain has no ring attention; without it the ranks of a branch are the "
                        "ulysses_degree, 1, 2, 4, 8 for the model's 8 attention heads");
    assert_int_equal(plan_make(&m->info, &k, &(struct plan)PLAN(3, 1, 3, 1), false, &plan, &err), ERR_UNSUPPORTED);
    assert_null(strstr(err.text, "ring="));
}

static void chosen(void **state)
{
    static const struct {
        struct plan want, made;
        bool cfg;
    } rows[] = {
        {PLAN(1, 0, 0, 0), PLAN(1, 1, 1, 1), true},    {PLAN(2, 0, 0, 0), PLAN(2, 2, 1, 1), true},
        {PLAN(2, 0, 2, 0), PLAN(2, 1, 2, 1), true},    {PLAN(2, 0, 0, 0), PLAN(2, 1, 2, 1), false},
        {PLAN(8, 0, 0, 0), PLAN(8, 2, 4, 1), true},    {PLAN(8, 1, 0, 0), PLAN(8, 1, 8, 1), true},
        {PLAN(8, 0, 4, 0), PLAN(8, 2, 4, 1), true},    {PLAN(8, 0, 0, 0), PLAN(8, 1, 8, 1), false},
        {PLAN(3, 0, 0, 0), PLAN(3, 1, 1, 3), true},    {PLAN(6, 0, 0, 0), PLAN(6, 1, 2, 3), false},
        {PLAN(6, 0, 0, 0), PLAN(6, 2, 1, 3), true},    {PLAN(6, 1, 0, 0), PLAN(6, 1, 2, 3), true},
        {PLAN(4, 0, 2, 0), PLAN(4, 1, 2, 2), false},   {PLAN(4, 0, 0, 4), PLAN(4, 1, 1, 4), true},
        {PLAN(8, 0, 0, 2), PLAN(8, 2, 2, 2), true},    {PLAN(5, 0, 0, 0), PLAN(5, 1, 1, 5), false},
        {PLAN(48, 0, 0, 0), PLAN(48, 1, 8, 6), false},
    };
    const struct model *m = *state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct plan plan;
        struct err err = {.code = ERR_NONE};
        assert_int_equal(plan_make(&m->info, &kernels_cpu, &rows[i].want, rows[i].cfg, &plan, &err), 0);
        assert_memory_equal(&plan, &rows[i].made, sizeof plan);
    }
}

// ---- jobs that end early: on every rank, in the same words, and the group goes on to the next

static int stop_at_first_step(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    (void)arg, (void)steps;
    return stage == ENGINE_DENOISE && step == 1 ? err_set(err, ERR_CANCELLED, "somebody asked to stop") : 0;
}

static int ended_then_served(const struct group *g, struct comm *comm, struct err *err)
{
    const bool leads = comm_rank(comm) == 0; // who alone is asked
    const struct engine_options options = {
        .kernels = &kernels_cpu, .device.threads = 1, .control = comm, .memory_limit = 8 << 20};
    const struct engine_hooks none = {0}, stopping = {.progress = leads ? stop_at_first_step : NULL};
    struct engine *e;
    struct engine_result result;
    TRY(engine_new(&options, &e, err));
    int rc = engine_run(e, g->model, g->job, &g->want, &stopping, &result, err);
    Ditfleet__V1__Job small = *g->job;
    struct err later;
    small.width = small.height = 32;
    if (engine_run(e, g->model, &small, &(struct plan){0}, &none, &result, &later) != 0)
        rc = err_set(err, ERR_INTERNAL, "the next job: %s", later.text);
    engine_result_free(&result);
    engine_free(e);
    return rc;
}

static void endings(void **state)
{
    static const struct {
        struct plan want;
        enum err_code code;
        const char *side, *text;
    } rows[] = {
        {PLAN(4, 2, 2, 1), ERR_UNSUPPORTED, "32", "two guidance branches"},
        {PLAN(2, 0, 0, 0), ERR_CANCELLED, "32", "somebody asked to stop"},
        {PLAN(1, 0, 0, 0), ERR_CANCELLED, "32", "somebody asked to stop"},
        {{.ranks = 4, .pipe = 2, .patches = 3}, ERR_CANCELLED, "32", "somebody asked to stop"},
        {PLAN(2, 0, 0, 0), ERR_UNSUPPORTED, "512",
         "width 512 x height 512 needs 0.07 GiB of activations on each of 2 ranks"},
        {PLAN(1, 0, 0, 0), ERR_UNSUPPORTED, "512", "but 0.01 GiB are free"},
        {PLAN(1, 0, 0, 0), ERR_UNSUPPORTED, "512", "the largest square that fits is 112 x 112"},
    };
    const struct model *m = *state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const int ranks = rows[i].want.ranks;
        Ditfleet__V1__Job *job =
            demo_job(m, FIELDS(PROMPT, "width", rows[i].side, "height", rows[i].side, "num_inference_steps", "2"));
        struct outcome *o = outcome_new();
        struct group g = {.model = m, .job = job, .want = rows[i].want, .outcome = o, .work = ended_then_served};
        run_group(&g);
        for (int r = 0; r < ranks; r++) {
            if (o->rc[r] != (int)rows[i].code || !strstr(o->err[r].text, rows[i].text))
                fail_msg("row %zu, rank %d: %d %s", i, r, o->rc[r], o->err[r].text);
            assert_string_equal(o->err[r].text, o->err[0].text);
        }
        outcome_free(o);
        job_free(job);
    }
}

// A part that is gone before its picture is there is no success.
static void die_in_a_convolution(struct device *d, struct tensor y, struct tensor x, const struct conv *conv)
{
    (void)d, (void)y, (void)x, (void)conv;
    _exit(1);
}

static int second_part_dies(const struct group *g, struct comm *comm, struct err *err)
{
    struct kernels mortal = kernels_cpu;
    const struct engine_hooks none = {0};
    const struct engine_options options = {
        .kernels = comm_rank(comm) == 0 ? &kernels_cpu : &mortal, .device.threads = 1, .control = comm};
    struct engine *e;
    struct engine_result result;
    mortal.conv2d = die_in_a_convolution; // as the VAE has them, once steps are over
    comm_set_timeout(comm, 2000);
    TRY(engine_new(&options, &e, err));
    const int rc = engine_run(e, g->model, g->job, &g->want, &none, &result, err);
    engine_result_free(&result);
    engine_free(e);
    return rc;
}

static void part_that_dies_decoding(void **state)
{
    Ditfleet__V1__Job *job =
        demo_job(*state, FIELDS(PROMPT, "num_images", "2", "width", "32", "height", "32", "num_inference_steps", "1"));
    struct outcome *o = outcome_new();
    struct group g = {
        .model = *state, .job = job, .want = {.ranks = 2, .data = 2}, .outcome = o, .work = second_part_dies};
    run_group(&g);
    assert_int_equal(o->rc[1], -1); // it did not come back
    assert_int_equal(o->rc[0], ERR_TIMEOUT);
    outcome_free(o);
    job_free(job);
}

// What is said of a rank that hangs: which, in what, and in which step.
static int hang_after_a_step(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    (void)steps, (void)err;
    if (stage == ENGINE_DENOISE && step == 1 && comm_rank(arg) == 1)
        sleep(1);
    return 0;
}

static int second_rank_hangs(const struct group *g, struct comm *comm, struct err *err)
{
    const struct engine_hooks hooks = {.progress = hang_after_a_step, .arg = comm};
    const struct engine_options options = {.kernels = &kernels_cpu, .device.threads = 1, .control = comm};
    struct engine *e;
    struct engine_result result;
    TRY(engine_new(&options, &e, err));
    comm_set_timeout(comm, comm_rank(comm) == 0 ? 300 : 0);
    const int rc = engine_run(e, g->model, g->job, &g->want, &hooks, &result, err);
    engine_result_free(&result);
    engine_free(e);
    return rc;
}

static void a_hung_rank_is_named_with_the_step(void **state)
{
    Ditfleet__V1__Job *job =
        demo_job(*state, FIELDS(PROMPT, "width", "32", "height", "32", "num_inference_steps", "3"));
    struct outcome *o = outcome_new();
    struct group g = {.model = *state, .job = job, .want = {.ranks = 2}, .outcome = o, .work = second_rank_hangs};
    run_group(&g);
    assert_int_equal(o->rc[0], ERR_TIMEOUT);
    if (!strstr(o->err[0].text, "denoising, step 1 of 3: broadcast ") || !strstr(o->err[0].text, "missing ranks 1 "))
        fail_msg("%s", o->err[0].text);
    outcome_free(o);
    job_free(job);
}

// Images side by side take more memory than one after the other by all ranks.
static int in_little_memory(const struct group *g, struct comm *comm, struct err *err)
{
    const struct engine_hooks none = {0};
    const struct engine_options options = {
        .kernels = &kernels_cpu, .device.threads = 1, .control = comm, .memory_limit = 24 << 20};
    struct engine *e;
    struct engine_result result;
    TRY(engine_new(&options, &e, err));
    const int rc = engine_run(e, g->model, g->job, &g->want, &none, &result, err);
    if (rc == 0 && comm_rank(comm) == 0)
        g->outcome->plan = result.plan;
    engine_result_free(&result);
    engine_free(e);
    return rc;
}

static void images_that_do_not_fit_side_by_side(void **state)
{
    Ditfleet__V1__Job *job = demo_job(
        *state, FIELDS(PROMPT, "num_images", "2", "width", "256", "height", "256", "num_inference_steps", "1"));
    struct outcome *o = outcome_new();
    struct group g = {.model = *state, .job = job, .want = {.ranks = 2}, .outcome = o, .work = in_little_memory};
    run_group(&g);
    expect_success(o, 2);
    assert_string_equal(plan_text(&o->plan), "cfg=1 ulysses=2 ring=1");
    g.want.data = 2;
    run_group(&g);
    assert_int_equal(o->rc[0], ERR_UNSUPPORTED);
    outcome_free(o);
    job_free(job);
}

// ---- prompts that were encoded before: every rank finds them, or none

static int served_from_cache(const struct group *g, struct comm *comm, struct err *err)
{
    static const struct engine_hooks none = {0};
    static const bool cached[] = {false, true, false, true, true}; // of the jobs below
    const struct engine_options options = {.kernels = &kernels_cpu, .device.threads = 1, .control = comm};
    const size_t bytes = (size_t)g->job->width * g->job->height * 3;
    Ditfleet__V1__Job other = *g->job, swapped = *g->job;
    struct engine_result first, next;
    struct engine *e;
    other.negative_prompt = (char *)"a ring"; // one branch of two is new
    swapped.prompt = g->job->negative_prompt, swapped.negative_prompt = g->job->prompt;
    const Ditfleet__V1__Job *jobs[] = {g->job, g->job, &other, &swapped, g->job};
    TRY(engine_new(&options, &e, err));
    int rc = engine_run(e, g->model, jobs[0], &g->want, &none, &first, err);
    for (int i = 1; rc == 0 && i < 5; i++) {
        rc = engine_run(e, g->model, jobs[i], &g->want, &none, &next, err);
        if (rc == 0 && next.prompt_cached != cached[i])
            rc = err_set(err, ERR_INTERNAL, "job %d: cached %d", i, next.prompt_cached);
        if (rc == 0 && jobs[i] == g->job && first.pixels && memcmp(first.pixels, next.pixels, bytes) != 0)
            rc = err_set(err, ERR_INTERNAL, "job %d: other pixels", i);
        engine_result_free(&next);
    }
    engine_result_free(&first);
    engine_free(e);
    return rc;
}

static void cached_prompts(void **state)
{
    const struct model *m = *state;
    Ditfleet__V1__Job *job = demo_job(m, FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3", "width",
                                                "48", "height", "32", "num_inference_steps", "1"));
    for (const struct plan *p = guided; p->ranks; p++) {
        struct outcome *o = outcome_new();
        struct group g = {.model = m, .job = job, .want = *p, .outcome = o, .work = served_from_cache};
        run_group(&g);
        expect_success(o, p->ranks);
        outcome_free(o);
    }
    job_free(job);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(square),
        cmocka_unit_test(odd_size),
        cmocka_unit_test(one_step),
        cmocka_unit_test(true_cfg),
        cmocka_unit_test(empty_prompt),
        cmocka_unit_test(long_prompt),
        cmocka_unit_test(little_text),
        cmocka_unit_test(tiny),
        cmocka_unit_test(two_images),
        cmocka_unit_test(images_side_by_side),
        cmocka_unit_test(images_that_cannot_be_dealt),
        cmocka_unit_test(sizes_the_group_does_not_divide),
        cmocka_unit_test(text_keys_count_once),
        cmocka_unit_test(refused),
        cmocka_unit_test(refused_without_parts),
        cmocka_unit_test(chosen),
        cmocka_unit_test(same_input_each_step),
        cmocka_unit_test(same_bits_each_time),
        cmocka_unit_test(threads),
        cmocka_unit_test(endings),
        cmocka_unit_test(part_that_dies_decoding),
        cmocka_unit_test(a_hung_rank_is_named_with_the_step),
        cmocka_unit_test(images_that_do_not_fit_side_by_side),
        cmocka_unit_test(cached_prompts),
    };
    return cmocka_run_group_tests(tests, ranks_set_up, ranks_tear_down);
}
