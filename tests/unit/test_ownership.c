// test_ownership.c: weights that a group's ranks have between them, by stage or sharded. Every picture has the bits of
// the same plan with all weights on every rank; what a rank's memory holds is counted, and is what was predicted.
//
// Ranks compute on a card each (card.h): what they do not have in its memory is NaN, or no memory.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/card.h"
#include "tests/unit/ranks.h"
#include "worker/invent.h"
#include "worker/ownership.h"

#define PROMPT "prompt", "a red circle above a blue square", "seed", "7", "max_sequence_length", "24"
#define SMALL  PROMPT, "width", "64", "height", "48", "num_inference_steps", "3"
#define GUIDED "negative_prompt", "a star", "true_cfg_scale", "3"

#define STAGES(ranks_, cfg_, ulysses_, pipe_, patches_)                                                                \
    {                                                                                                                  \
        .ranks = (ranks_), .cfg = (cfg_), .ulysses = (ulysses_), .ring = 1, .pipe = (pipe_), .patches = (patches_),    \
        .warmup = 1, .data = 1                                                                                         \
    }

enum { TRANSFORMER = 1 << PART_DIT };

// What ranks have to say besides their pictures, in memory that they share.
static struct seen {
    int64_t transformer[MAX_RANKS]; // bytes on the card after loading
    int64_t planned[MAX_RANKS];     // as the model says
    int64_t sent[MAX_RANKS];        // by the job
    struct engine_estimate estimate[MAX_RANKS];
    unsigned evicted[MAX_RANKS];
} * seen;

// ---- a rank

struct desk {
    struct kernels kernels;
    struct engine *engine;
    struct model *model;
};

static int sit(const struct group *g, struct comm *comm, int64_t budget, struct desk *d, struct err *err)
{
    const int me = comm_rank(comm);
    struct plan held;
    card.total = (size_t)8 << 30;
    *d = (struct desk){.kernels = card_kernels()};
    TRY(plan_hold(&g->want, g->want.ranks, &held, err));
    const struct engine_options options = {
        .kernels = &d->kernels, .device.threads = 1, .control = comm, .memory_budget = budget, .held = held};
    TRY(engine_new(&options, &d->engine, err));
    const struct home home = engine_home(d->engine);
    const int64_t before = card.placed + card.taken;
    TRY(model_load_on(DEMO_MODEL, &home, &d->model, err));
    seen->planned[me] = model_placed_bytes(d->model, TRANSFORMER);
    seen->transformer[me] =
        card.placed + card.taken - before - model_placed_bytes(d->model, d->model->here & ~(unsigned)TRANSFORMER);
    return 0;
}

static int stand_up(struct desk *d, int rc, struct err *err)
{
    model_free(d->model);
    engine_free(d->engine);
    if (rc == 0 && (card.n != 0 || card.placed != 0 || card.taken != 0))
        return err_set(err, ERR_INTERNAL, "%d weights, %lld bytes of memory stay", card.n, (long long)card.taken);
    return rc;
}

static int on_card(const struct group *g, struct comm *comm, struct err *err)
{
    const int me = comm_rank(comm);
    struct desk d;
    TRY(sit(g, comm, 0, &d, err));
    const uint64_t before = comm_bytes_sent(comm);
    int rc = run_engine(g, d.engine, d.model, err);
    seen->sent[me] = (int64_t)(comm_bytes_sent(comm) - before);
    struct plan plan;
    if (rc == 0)
        rc = plan_make(&d.model->info, &d.kernels, &g->want, job_true_cfg(g->job), &plan, err);
    if (rc == 0)
        rc = engine_predict(d.engine, d.model, g->job, &plan, &seen->estimate[me], err);
    return stand_up(&d, rc, err);
}

// The picture that is the others' measure.
static int all_by_every_rank(const struct group *g, struct comm *comm, struct err *err)
{
    struct group all = *g;
    all.apart = false;
    return whole_job(&all, comm, err);
}

// ---- groups

static struct outcome *run_by(const struct model *m, const Ditfleet__V1__Job *job, struct plan want,
                              int (*work)(const struct group *g, struct comm *comm, struct err *err))
{
    struct outcome *o = outcome_new();
    struct group g = {.model = m, .job = job, .want = want, .apart = true, .outcome = o, .work = work};
    run_group(&g);
    expect_success(o, want.ranks);
    return o;
}

static void expect_same_bits(const struct outcome *o, const struct outcome *one)
{
    assert_int_equal(o->entries, one->entries);
    assert_int_equal(o->used, one->used);
    for (int i = 0; i < one->entries; i++) {
        assert_string_equal(o->entry[i].name, one->entry[i].name);
        if (memcmp(o->values + o->entry[i].at, one->values + one->entry[i].at,
                   (size_t)one->entry[i].count * sizeof *one->values) != 0)
            fail_msg("%s: %s has other bits", plan_text(&o->plan), one->entry[i].name);
    }
    assert_int_equal(o->pixel_bytes, one->pixel_bytes);
    assert_memory_equal(o->pixels, one->pixels, one->pixel_bytes);
}

struct row {
    struct plan plan; // replicated
    const char *const *fields;
};

static void check_rows(const struct model *m, const struct row *rows, size_t n, int weights,
                       int (*work)(const struct group *g, struct comm *comm, struct err *err))
{
    for (size_t i = 0; i < n; i++) {
        struct plan want = rows[i].plan;
        Ditfleet__V1__Job *job = demo_job(m, rows[i].fields);
        struct outcome *all = run_by(m, job, want, all_by_every_rank);
        want.weights = weights == PLAN_SHARDED ? PLAN_SHARDED : PLAN_REPLICATED; // as it is asked for
        struct outcome *o = run_by(m, job, want, work);
        assert_int_equal(all->plan.weights, PLAN_REPLICATED);
        assert_int_equal(o->plan.weights, weights);
        expect_same_bits(o, all);
        for (int r = 0; work == on_card && r < want.ranks; r++)
            assert_int_equal(seen->transformer[r], seen->planned[r]);
        outcome_free(all);
        outcome_free(o);
        job_free(job);
    }
}

static void sharded_has_the_same_bits(void **state)
{
    const struct row rows[] = {
        {PLAN(2, 1, 2, 1), FIELDS(SMALL)},
        {PLAN(3, 1, 1, 3), FIELDS(SMALL)},
        {PLAN(4, 1, 2, 2), FIELDS(SMALL)},
        {PLAN(2, 2, 1, 1), FIELDS(SMALL, GUIDED)},
        {PLAN(2, 1, 2, 1), FIELDS(SMALL, GUIDED)},
        {PLAN(4, 2, 2, 1), FIELDS(SMALL, GUIDED)},
        {{.ranks = 4, .cfg = 1, .ulysses = 2, .ring = 1, .pipe = 1, .patches = 1, .data = 2},
         FIELDS(SMALL, "num_images", "2")},
        {PLAN(8, 1, 8, 1), FIELDS(SMALL)},
    };
    const size_t n = sizeof rows / sizeof *rows;
    check_rows(*state, rows, SANITIZED ? 1 : n, PLAN_SHARDED, on_card);
    check_rows(*state, rows + n - 4, SANITIZED ? 1 : 4, PLAN_SHARDED, whole_job);
}

// Stages of ranks, of branches, of parts of the group, and of uneven numbers of blocks.
static void stages_have_the_same_bits(void **state)
{
    const struct row rows[] = {
        {STAGES(2, 1, 1, 2, 2), FIELDS(SMALL)},
        {STAGES(4, 1, 2, 2, 3), FIELDS(SMALL)},
        {STAGES(4, 2, 1, 2, 2), FIELDS(SMALL, GUIDED)},
        {STAGES(6, 1, 1, 6, 6), FIELDS(SMALL)},
        {{.ranks = 4, .cfg = 1, .ulysses = 1, .ring = 1, .pipe = 2, .patches = 2, .warmup = 1, .data = 2},
         FIELDS(SMALL, "num_images", "2")},
        {{.ranks = 3,
          .cfg = 1,
          .ulysses = 1,
          .ring = 1,
          .pipe = 3,
          .patches = 2,
          .warmup = 1,
          .data = 1,
          .blocks = {1, 4, 1}},
         FIELDS(SMALL, GUIDED)},
    };
    const size_t n = sizeof rows / sizeof *rows;
    check_rows(*state, rows, SANITIZED ? 1 : n, PLAN_BY_STAGE, on_card);
    check_rows(*state, rows + n - 1, 1, PLAN_BY_STAGE, whole_job);
}

// ---- memory

// Bytes of the fullest card.
static int64_t fullest(const struct model *m, const Ditfleet__V1__Job *job, struct plan want)
{
    int64_t most = 0;
    outcome_free(run_by(m, job, want, on_card));
    for (int r = 0; r < want.ranks; r++)
        most = seen->transformer[r] > most ? seen->transformer[r] : most;
    return most;
}

static void a_rank_has_its_share(void **state)
{
    Ditfleet__V1__Job *job =
        demo_job(*state, FIELDS(PROMPT, "width", "16", "height", "16", "num_inference_steps", "1"));
    struct plan two = PLAN(2, 1, 2, 1), four = PLAN(4, 1, 4, 1);
    const int64_t whole = fullest(*state, job, (struct plan)PLAN(1, 1, 1, 1));
    const int64_t stage = fullest(*state, job, (struct plan)STAGES(2, 1, 1, 2, 2));
    const int64_t half_stage = fullest(*state, job, (struct plan)STAGES(4, 1, 2, 2, 2));
    two.weights = four.weights = PLAN_SHARDED;
    const int64_t half = fullest(*state, job, two), fourth = fullest(*state, job, four);
    print_message("of %lld bytes: a stage of two %.3f, with two ranks each %.3f, half %.3f, a fourth %.3f\n",
                  (long long)whole, (double)stage / (double)whole, (double)half_stage / (double)whole,
                  (double)half / (double)whole, (double)fourth / (double)whole);
    assert_true((double)stage <= 0.55 * (double)whole);
    assert_true((double)half_stage <= 0.55 * (double)whole);
    // Parts of blocks and modulations shrink with the ranks; what is common, and the two buffers of 24 dim^2, do not.
    const int64_t dim = ((const struct model *)*state)->info.hidden, square = dim * dim * (int64_t)sizeof(float);
    const int64_t common = whole - (96 + 38) * square;
    assert_true(common > 0 && common < 8 * square); // what is small is in it
    const int64_t expected[] = {common + (48 + 96 / 2 + 38 / 2) * square, common + (48 + 96 / 4 + 38 / 4) * square};
    assert_true(llabs(half - expected[0]) < 4 * square); // modulations are of up to 6 dim^2
    assert_true(llabs(fourth - expected[1]) < 4 * square);
    job_free(job);
}

// FLUX.1-dev, of which nothing but shapes is needed.
static void flux_dev_fits_on_two(void **state)
{
    (void)state;
    char dir[] = "/tmp/test-ownership-XXXXXX";
    struct err err = {.code = ERR_NONE};
    struct invention *invention;
    struct model *m;
    size_t largest;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(architecture_write("flux.1-dev", dir, &largest, &err), 0);
    assert_int_equal(invention_new(largest, 2, &invention, &err), 0);
    const struct home home = {.invention = invention, .plan = true};
    if (model_load_on(dir, &home, &m, &err) != 0)
        fail_msg("%s", err.text);
    struct plan sharded = PLAN(2, 1, 2, 1), staged = STAGES(2, 1, 1, 2, 2), one = PLAN(1, 1, 1, 1);
    sharded.weights = PLAN_SHARDED;
    staged.weights = PLAN_BY_STAGE;
    const double whole = (double)ownership_bytes(m->dit->weights, &one, 0);
    assert_true(whole == (double)weights_bytes(m->dit->weights));
    for (int r = 0; r < 2; r++) {
        const double half = (double)ownership_bytes(m->dit->weights, &sharded, r);
        const double stage = (double)ownership_bytes(m->dit->weights, &staged, r);
        print_message("rank %d: sharded %.2f GB, by stage %.2f, of %.2f GB\n", r, half / 1e9, stage / 1e9, whole / 1e9);
        assert_true(half <= 0.55 * whole);
        assert_true(stage <= 0.52 * whole);
    }
    model_free(m);
    invention_free(invention);
    architecture_remove(dir);
    rmdir(dir);
}

// What a dry run counts is what is sent: every block's part at every step, the modulations once.
static void bytes_are_predicted(void **state)
{
    enum { STEPS = 3, RANKS = 4 };
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(SMALL));
    struct plan want = PLAN(RANKS, 1, RANKS, 1);
    int64_t sent[RANKS];
    double loop[RANKS];
    outcome_free(run_by(*state, job, want, on_card));
    for (int r = 0; r < RANKS; r++) {
        sent[r] = seen->sent[r];
        loop[r] = seen->estimate[r].loop.sent;
    }
    want.weights = PLAN_SHARDED;
    outcome_free(run_by(*state, job, want, on_card));
    const struct dit_info *info = &((const struct model *)*state)->info;
    for (int r = 0; r < RANKS; r++) {
        const double more = seen->estimate[r].loop.sent - loop[r], once = (double)(seen->sent[r] - sent[r]) - more;
        // Weights of 2 double and 4 single blocks, 96 dim^2 of 4 bytes, less what is small.
        const double blocks = 96.0 * 4 * (double)(info->hidden * info->hidden) / RANKS * (RANKS - 1) * STEPS;
        assert_true(more > blocks && more < 1.01 * blocks);
        // Modulations of 38 dim columns, dealt to the ranks in whole layers of up to 6.
        const double columns = 4.0 * STEPS * (double)info->hidden * (RANKS - 1);
        assert_true(once > 3 * columns && once < 16 * columns);
    }
    job_free(job);
}

// ---- parts that come and go, jobs that end early

static int stop_at_first_step(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    (void)arg, (void)steps;
    return stage == ENGINE_DENOISE && step == 1 ? err_set(err, ERR_CANCELLED, "somebody asked to stop") : 0;
}

// With little room a rank's encoder makes way for its part of the transformer, and comes back for another prompt.
static int in_little_room(const struct group *g, struct comm *comm, struct err *err)
{
    const struct engine_hooks stopping = {.progress = stop_at_first_step}, none = {0};
    struct engine_result result;
    struct err ended;
    struct desk d;
    TRY(sit(g, comm, ENGINE_LIBRARY_BYTES + seen->planned[comm_rank(comm)] + (6 << 20), &d, err));
    Ditfleet__V1__Job other = *g->job;
    other.prompt = (char *)"a star";
    int rc = 0;
    if (engine_run(d.engine, d.model, &other, &g->want, &stopping, &result, &ended) != ERR_CANCELLED)
        rc = err_set(err, ERR_INTERNAL, "not cancelled: %s", ended.text);
    if (rc == 0)
        rc = engine_run(d.engine, d.model, &other, &g->want, &none, &result, err);
    engine_result_free(&result);
    seen->evicted[comm_rank(comm)] = result.moves.evicted;
    if (rc == 0)
        rc = run_engine(g, d.engine, d.model, err);
    return stand_up(&d, rc, err);
}

static void parts_come_and_go(void **state)
{
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(SMALL));
    struct plan want = PLAN(2, 1, 2, 1);
    struct outcome *all = run_by(*state, job, want, all_by_every_rank);
    want.weights = PLAN_SHARDED;
    outcome_free(run_by(*state, job, want, on_card)); // which says how much room a transformer takes
    struct outcome *o = run_by(*state, job, want, in_little_room);
    assert_true(seen->evicted[0] != 0);
    expect_same_bits(o, all);
    outcome_free(all);
    outcome_free(o);
    job_free(job);
}

// ---- what cannot be

// A job that would have other stages, or none, is refused on all ranks; the next one is made.
static int another_plan(const struct group *g, struct comm *comm, struct err *err)
{
    static const struct plan others[] = {{.pipe = 0}, {.pipe = 2, .blocks = {4, 2}}};
    const struct engine_hooks none = {0};
    struct engine_result result;
    struct desk d;
    int rc = 0;
    TRY(sit(g, comm, 0, &d, err));
    for (size_t i = 0; rc == 0 && i < sizeof others / sizeof *others; i++) {
        struct err why = {.code = ERR_NONE};
        if (engine_run(d.engine, d.model, g->job, &others[i], &none, &result, &why) != ERR_UNSUPPORTED ||
            !strstr(why.text, "have the weights of 2 stages"))
            rc = err_set(err, ERR_INTERNAL, "%zu was not refused: %s", i, why.text);
    }
    if (rc == 0)
        rc = run_engine(g, d.engine, d.model, err);
    return stand_up(&d, rc, err);
}

static void other_stages_are_refused(void **state)
{
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(SMALL));
    outcome_free(run_by(*state, job, (struct plan)STAGES(2, 1, 1, 2, 2), another_plan));
    job_free(job);
}

static void refused(void **state)
{
    static const struct {
        struct plan want;
        const char *text;
    } rows[] = {
        {{.ranks = 1, .weights = PLAN_SHARDED}, "one rank has nobody to share them with"},
        {{.ranks = 4, .pipe = 2, .weights = PLAN_SHARDED}, "weights sharded with pipefusion_degree 2"},
        {{.ranks = 2, .patches = 2, .weights = PLAN_SHARDED}, "weights sharded with pipefusion_degree"},
    };
    const struct model *m = *state;
    struct plan plan;
    struct err err = {.code = ERR_NONE};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int hold = 0; hold < 2; hold++) {
            const struct plan *want = &rows[i].want;
            const int rc = hold ? plan_hold(want, want->ranks, &plan, &err)
                                : plan_make(&m->info, &kernels_cpu, want, false, &plan, &err);
            assert_int_equal(rc, ERR_UNSUPPORTED);
            if (!strstr(err.text, rows[i].text))
                fail_msg("\"%s\" does not say \"%s\"", err.text, rows[i].text);
        }
    assert_int_equal(plan_parse_weights("half", &plan, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "replicated or sharded"));
}

// Less memory of the host than the parts of blocks take: refused when the model is loaded, before they are copied.
static void no_room_on_the_host(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    struct comm *comm;
    struct engine *e;
    struct model *m;
    assert_int_equal(comm_dry_new(0, 2, false, &comm, &err), 0);
    const struct engine_options options = {.kernels = &kernels_cpu,
                                           .device.threads = 1,
                                           .control = comm,
                                           .memory_limit = 10 << 20,
                                           .held = {.ranks = 2, .weights = PLAN_SHARDED}};
    assert_int_equal(engine_new(&options, &e, &err), 0);
    const struct home home = engine_home(e);
    assert_int_equal(model_load_on(DEMO_MODEL, &home, &m, &err), ERR_NO_MEMORY);
    if (!strstr(err.text, "weights sharded among 2 ranks take 0.0") || !strstr(err.text, "but 0.01 GiB are free"))
        fail_msg("%s", err.text);
    engine_free(e);
    comm_free(comm);
}

// Too little of a card for all of the transformer: the refusal says what sharding would take.
static int refused_whole(const struct group *g, struct comm *comm, struct err *err)
{
    const struct engine_hooks none = {0};
    struct engine_result result;
    struct desk d;
    TRY(sit(g, comm, ENGINE_LIBRARY_BYTES + (16 << 20), &d, err));
    const int rc = engine_run(d.engine, d.model, g->job, &g->want, &none, &result, err);
    return stand_up(&d, rc, err);
}

static void a_refusal_proposes_sharding(void **state)
{
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(SMALL));
    struct outcome *o = outcome_new();
    struct group g = {.model = *state, .job = job, .want = PLAN(2, 1, 2, 1), .outcome = o, .work = refused_whole};
    run_group(&g);
    for (int r = 0; r < 2; r++)
        if (o->rc[r] != ERR_UNSUPPORTED ||
            !strstr(o->err[r].text, "no size fits; with weights sharded the transformer takes 0.0"))
            fail_msg("rank %d: %d %s", r, o->rc[r], o->err[r].text);
    outcome_free(o);
    job_free(job);
}

// The factors of 8 bits are in the parts of blocks, too.
static void eight_bits_are_planned(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    struct residency *r;
    struct kernels k = card_kernels();
    int64_t bytes[2][2]; // of 8 bits, sharded
    k.activation = DT_BF16;
    assert_int_equal(residency_new(&k, NULL, 0, &r, &err), 0); // nothing fits: nothing is placed
    for (int i = 0; i < 4; i++) {
        struct model *m;
        const struct home home = {.k = &k,
                                  .codes = i / 2 == 1 ? DT_I8 : DT_BF16,
                                  .residency = r,
                                  .held = {.ranks = 2, .weights = i % 2 ? PLAN_SHARDED : PLAN_REPLICATED}};
        assert_int_equal(model_load_on(DEMO_MODEL, &home, &m, &err), 0);
        bytes[i / 2][i % 2] = model_placed_bytes(m, TRANSFORMER);
        const struct plan plan = home.held;
        const int64_t said = ownership_bytes(m->dit->weights, &plan, 0);
        assert_true(llabs(said - bytes[i / 2][i % 2]) < bytes[i / 2][i % 2] / 50);
        model_free(m);
    }
    residency_free(r);
    // Of 96 dim^2 weights of blocks a byte each is saved; sharded, of half of them and of two buffers of 24.
    const int64_t saved = bytes[0][0] - bytes[1][0], sharded = bytes[0][1] - bytes[1][1];
    assert_true(sharded > saved * 95 / 100 && sharded < saved * 105 / 100);
    assert_true(bytes[1][1] < bytes[0][1]);
}

static int set_up(void **state)
{
    seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(seen != MAP_FAILED);
    return ranks_set_up(state);
}

static int tear_down(void **state)
{
    munmap(seen, sizeof *seen);
    return ranks_tear_down(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sharded_has_the_same_bits), cmocka_unit_test(stages_have_the_same_bits),
        cmocka_unit_test(a_rank_has_its_share),      cmocka_unit_test(flux_dev_fits_on_two),
        cmocka_unit_test(bytes_are_predicted),       cmocka_unit_test(parts_come_and_go),
        cmocka_unit_test(other_stages_are_refused),  cmocka_unit_test(refused),
        cmocka_unit_test(no_room_on_the_host),       cmocka_unit_test(a_refusal_proposes_sharding),
        cmocka_unit_test(eight_bits_are_planned),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
