// test_pipefusion.c: PipeFusion. While all steps are warm-up it is the picture of one rank; its later steps are those
// of a slow reference, written from the definition, whatever the number of stages.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/ranks.h"
#include "worker/sampler.h"
#include "worker/stages.h"

#define PIPE(ranks_, cfg_, ulysses_, pipe_, patches_, warmup_)                                                         \
    {                                                                                                                  \
        .ranks = (ranks_), .cfg = (cfg_), .ulysses = (ulysses_), .ring = 1, .pipe = (pipe_), .patches = (patches_),    \
        .warmup = (warmup_), .data = 1                                                                                 \
    }
#define UNEVEN                                                                                                         \
    {                                                                                                                  \
        .ranks = 3, .cfg = 1, .ulysses = 1, .ring = 1, .pipe = 3, .patches = 2, .warmup = 1, .data = 1, .blocks = {    \
            1,                                                                                                         \
            4,                                                                                                         \
            1                                                                                                          \
        }                                                                                                              \
    }
#define PROMPT "prompt", "a red circle above a blue square", "seed", "7", "max_sequence_length", "40"

static struct outcome *run_plan(const struct model *m, const Ditfleet__V1__Job *job, struct plan want)
{
    struct outcome *o = outcome_new();
    struct group g = {.model = m, .job = job, .want = want, .outcome = o, .work = whole_job};
    run_group(&g);
    expect_success(o, want.ranks);
    assert_memory_equal(&o->plan, &want, sizeof want);
    return o;
}

// ---- warm-up

static void check_warm_up(const struct model *m, const char *const *fields, const struct plan *plans)
{
    Ditfleet__V1__Job *job = demo_job(m, fields);
    struct outcome *one = run_plan(m, job, (struct plan)PLAN(1, 1, 1, 1));
    double worst = 0;
    for (; plans->ranks; plans++) {
        struct outcome *o = run_plan(m, job, *plans);
        const double found = compare(o, one);
        worst = found > worst ? found : worst;
        outcome_free(o);
    }
    print_message("worst relative L2 %.2g\n", worst);
    outcome_free(one);
    job_free(job);
}

static void warm_up_is_one_ranks_picture(void **state)
{
    static const struct plan plans[] = {
        PIPE(2, 1, 1, 2, 2, 9), PIPE(3, 1, 1, 3, 3, 9), PIPE(4, 1, 1, 4, 8, 9), PIPE(6, 1, 1, 6, 6, 9),
        PIPE(4, 1, 2, 2, 2, 9), PIPE(8, 1, 4, 2, 3, 9), PIPE(1, 1, 1, 1, 4, 9), {0}};
    check_warm_up(*state, FIELDS(PROMPT, "width", "112", "height", "80", "num_inference_steps", "2"),
                  SANITIZED ? plans + 5 : plans);
    if (!SANITIZED) // one image token: all ranks but one of a stage have no rows of it
        check_warm_up(*state, FIELDS(PROMPT, "width", "16", "height", "16", "num_inference_steps", "2"), plans);
}

static void warm_up_with_guidance(void **state)
{
    static const struct plan plans[] = {
        PIPE(2, 1, 1, 2, 2, 9), PIPE(4, 2, 1, 2, 2, 9), PIPE(8, 2, 2, 2, 4, 9), PIPE(6, 2, 1, 3, 3, 9), {0}};
    check_warm_up(*state,
                  FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3", "width", "112", "height", "80",
                         "num_inference_steps", "2"),
                  plans);
}

// ---- the definition, slowly
//
// Every layer has a key and a value for each row of the text and the image. A pass brings rows; a layer first replaces
// their keys and values by what it makes of them now, then lets the rows look at all that it has. Steps are gone
// through patch by patch, a patch through all layers before the next one begins; the first step takes all rows at once.

struct memory {
    float *k[256], *v[256]; // (text + image rows, dim) of each layer
    int64_t rows, dim;
    int64_t first, count; // rows of the whole that the pass brings: they lie together, the text being in front
};

static void remember_all(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const struct memory *m = self->state;
    for (int64_t i = 0; i < m->count; i++)
        for (int64_t j = 0; j < m->dim; j++) {
            m->k[call->layer][(m->first + i) * m->dim + j] = ((const float *)call->k.data)[i * call->k.ld + j];
            m->v[call->layer][(m->first + i) * m->dim + j] = ((const float *)call->v.data)[i * call->v.ld + j];
        }
    struct tensor k = tensor_of(m->k[call->layer], DT_F32, 3, m->rows, call->k.n[1], call->k.n[2], 1);
    struct tensor v = tensor_of(m->v[call->layer], DT_F32, 3, m->rows, call->k.n[1], call->k.n[2], 1);
    x->k->attention(x->d, call->out, call->q, k, v, &call->opts);
}

struct reference {
    const struct model *m;
    struct exec x;
    struct attention_link link;
    struct memory memory;
    struct dit_info info;
    struct dit_cond cond;
    int64_t text, image, grid_w;
    float *latents; // (image, channels)
    float sigmas[SAMPLER_MAX_STEPS + 1];
};

static const float *recorded(const struct outcome *o, const char *name)
{
    for (int i = 0; i < o->entries; i++)
        if (strcmp(o->entry[i].name, name) == 0)
            return o->values + o->entry[i].at;
    fail_msg("%s was not recorded", name);
    return NULL;
}

// Rows first to first + count of the whole, through all layers; the latents of those that are the image's move along.
static void pass(struct reference *f, int step, int64_t first, int64_t count)
{
    const struct dit_ops *ops = f->m->dit->ops;
    const int64_t text = first < f->text ? f->text - first : 0, from = first + text - f->text, n = count - text;
    const size_t mark = arena_mark(f->x.arena);
    float *ids = calloc((size_t)(count * 3), sizeof *ids);
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = (from + i) / f->grid_w, column = (from + i) % f->grid_w;
        ids[(text + i) * 3 + 1] = (float)row;
        ids[(text + i) * 3 + 2] = (float)column;
    }
    struct tensor rope = arena_tensor(f->x.arena, DT_F32, 3, count, f->info.head_dim / 2, 2, 1);
    ops->rope(f->m->dit, ids, count, rope.data);
    f->memory.first = first;
    f->memory.count = count;
    const struct dit_rows rows = {
        .text = {0, text}, .image = {from, n}, .rope = rope, .of_rank = &count, .projected_text = text};
    struct dit_pass p = {.cond = &f->cond, .rows = &rows, .hidden = exec_tensor(&f->x, 2, count, f->info.hidden, 1, 1)};
    struct tensor x = tensor_2d(f->latents + from * f->info.channels, DT_F32, n, f->info.channels);
    struct tensor v = exec_tensor(&f->x, 2, n, f->info.channels, 1, 1);
    dit_step(&f->x, &f->cond, step);
    ops->embed(f->m->dit, &f->x, &p, x);
    for (int i = 0; i < f->info.blocks; i++)
        ops->block(f->m->dit, &f->x, &p, i);
    ops->head(f->m->dit, &f->x, &p, v);
    for (int64_t i = 0; i < n * f->info.channels; i++)
        ((float *)x.data)[i] += (f->sigmas[step + 1] - f->sigmas[step]) * ((const float *)v.data)[i];
    free(ids);
    arena_release(f->x.arena, mark);
}

// From what one rank was given: embeddings, noise, schedule.
static void reference_begin(struct reference *f, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct outcome *one)
{
    struct err err;
    const int steps = (int)job->num_inference_steps;
    float times[SAMPLER_MAX_STEPS];
    *f = (struct reference){.m = m, .text = job->max_sequence_length, .grid_w = job->width / 16};
    f->image = f->grid_w * (job->height / 16);
    m->dit->ops->info(m->dit, &f->info);
    f->memory.rows = f->text + f->image;
    f->memory.dim = f->info.hidden;
    for (int i = 0; i < f->info.blocks; i++) {
        f->memory.k[i] = calloc((size_t)(f->memory.rows * f->memory.dim), sizeof(float));
        f->memory.v[i] = calloc((size_t)(f->memory.rows * f->memory.dim), sizeof(float));
    }
    f->link = (struct attention_link){.attend = remember_all, .state = &f->memory};
    f->x = (struct exec){.k = &kernels_cpu, .attention = &f->link};
    assert_int_equal(kernels_cpu.open(&(struct device_options){.threads = 1}, &f->x.d, &err), 0);
    assert_int_equal(arena_new(&kernels_cpu, f->x.d, 64 << 20, &f->x.arena, &err), 0);
    const size_t bytes = (size_t)(f->image * f->info.channels) * sizeof(float);
    f->latents = malloc(bytes);
    memcpy(f->latents, recorded(one, "initial_noise"), bytes);
    memcpy(f->sigmas, recorded(one, "sigmas"), (size_t)(steps + 1) * sizeof(float));
    for (int i = 0; i < steps; i++)
        times[i] = recorded(one, "timesteps")[i] / 1000.0F;
    m->dit->ops->prepare(m->dit, &f->x, times, steps, job->guidance_scale,
                         tensor_2d((float *)recorded(one, "prompt_embeds"), DT_F32, f->text, f->info.text_dim),
                         tensor_2d((float *)recorded(one, "pooled_prompt_embeds"), DT_F32, 1, f->info.pooled_dim),
                         &f->cond);
}

static void reference_end(struct reference *f)
{
    for (int i = 0; i < f->info.blocks; i++) {
        free(f->memory.k[i]);
        free(f->memory.v[i]);
    }
    free(f->latents);
    arena_free(f->x.arena);
    kernels_cpu.close(f->x.d);
}

// Every step of every plan against the definition. What is stale makes another picture than one rank's, or the test
// would show nothing.
static void check_stale(const struct model *m, const char *const *fields, int patches, const struct plan *plans)
{
    Ditfleet__V1__Job *job = demo_job(m, fields);
    const int steps = (int)job->num_inference_steps, n_plans = 8;
    struct outcome *one = run_plan(m, job, (struct plan)PLAN(1, 1, 1, 1)), *all[8] = {NULL};
    struct reference f;
    double worst = 0, away = 0;
    for (int i = 0; i < n_plans && plans[i].ranks; i++)
        all[i] = run_plan(m, job, plans[i]);
    reference_begin(&f, m, job, one);
    for (int step = 0; step < steps; step++) {
        const int64_t rows = f.text + f.image, count = step == 0 ? 1 : patches;
        for (int64_t i = 0, from = 0, to; i < count; i++, from = to) { // even, but that the text stays together
            to = rows * (i + 1) / count;
            to = to < f.text ? f.text : to;
            pass(&f, step, from, to - from);
        }
        char name[40];
        snprintf(name, sizeof name, "latents_after_step_%d", step);
        for (int i = 0; all[i]; i++) {
            const double off = relative_l2(recorded(all[i], name), f.latents, f.image * f.info.channels);
            if (!(off <= 1e-5))
                fail_msg("%s: %s is %g off the definition", plan_text(&plans[i]), name, off);
            worst = off > worst ? off : worst;
            if (plans[i].ulysses == 1) // stages alone do not change a bit; thin slices may the last one
                assert_memory_equal(recorded(all[i], name), recorded(all[0], name),
                                    (size_t)(f.image * f.info.channels) * sizeof(float));
        }
        away = relative_l2(f.latents, recorded(one, name), f.image * f.info.channels);
    }
    print_message("%d patches: worst relative L2 to the definition %.2g; to one rank %.2g\n", patches, worst, away);
    assert_true(away > 1e-4 && away < 0.5);
    reference_end(&f);
    for (int i = 0; all[i]; i++)
        outcome_free(all[i]);
    outcome_free(one);
    job_free(job);
}

static void stale_steps_are_the_definitions(void **state)
{
    static const struct plan two[] = {PIPE(1, 1, 1, 1, 2, 1),
                                      PIPE(2, 1, 1, 2, 2, 1),
                                      PIPE(3, 1, 1, 3, 2, 1),
                                      PIPE(6, 1, 1, 6, 2, 1),
                                      UNEVEN,
                                      PIPE(4, 1, 2, 2, 2, 1),
                                      {0}};
    static const struct plan three[] = {PIPE(1, 1, 1, 1, 3, 1), PIPE(2, 1, 1, 2, 3, 1), PIPE(4, 1, 1, 4, 3, 1),
                                        PIPE(6, 1, 2, 3, 3, 1), PIPE(8, 1, 4, 2, 3, 1), {0}};
    const char *const *fields = FIELDS(PROMPT, "width", "112", "height", "80", "num_inference_steps", "5");
    check_stale(*state, fields, 2, SANITIZED ? two + 4 : two);
    if (!SANITIZED)
        check_stale(*state, fields, 3, three);
}

// Patches of one row and of text alone: 15 image tokens and 13 of text in 20 patches.
static void more_patches_than_rows_to_go_round(void **state)
{
    static const struct plan plans[] = {
        PIPE(1, 1, 1, 1, 20, 1), PIPE(2, 1, 1, 2, 20, 1), PIPE(4, 1, 2, 2, 20, 1), PIPE(6, 1, 1, 6, 20, 1), {0}};
    if (!SANITIZED)
        check_stale(
            *state,
            FIELDS("prompt", "a ring", "seed", "11", "max_sequence_length", "1", "width", "48", "height", "80",
                   "num_inference_steps", "4"),
            8,
            (const struct plan[]){
                PIPE(1, 1, 1, 1, 8, 1), PIPE(2, 1, 1, 2, 8, 1), PIPE(4, 1, 2, 2, 8, 1), PIPE(6, 1, 1, 6, 8, 1), {0}});
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS("prompt", "a ring", "seed", "11", "max_sequence_length", "13",
                                                     "width", "48", "height", "80", "num_inference_steps", "3"));
    struct outcome *first = run_plan(*state, job, plans[0]);
    for (const struct plan *p = plans + 1; p->ranks; p++) {
        struct outcome *o = run_plan(*state, job, *p);
        assert_int_equal(pixels_off(o->pixels, first->pixels, (int64_t)first->pixel_bytes / 3), 0);
        outcome_free(o);
    }
    outcome_free(first);
    job_free(job);
}

// Both branches of guidance keep keys of their own, on the same ranks and on halves of them.
static void stale_steps_with_guidance(void **state)
{
    static const struct plan plans[] = {
        PIPE(2, 2, 1, 1, 3, 1), PIPE(2, 1, 1, 2, 3, 1), PIPE(4, 2, 1, 2, 3, 1), PIPE(8, 2, 2, 2, 3, 1), {0}};
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3",
                                                     "width", "80", "height", "48", "num_inference_steps", "4"));
    struct outcome *first = run_plan(*state, job, (struct plan)PIPE(1, 1, 1, 1, 3, 1));
    for (const struct plan *p = plans; p->ranks; p++) {
        struct outcome *o = run_plan(*state, job, *p);
        compare(o, first);
        outcome_free(o);
    }
    outcome_free(first);
    job_free(job);
}

static void ranks_as_threads(void **state)
{
    Ditfleet__V1__Job *job = demo_job(*state, FIELDS(PROMPT, "negative_prompt", "a star", "true_cfg_scale", "3",
                                                     "width", "48", "height", "48", "num_inference_steps", "3"));
    check_on_threads(*state, job, (struct plan)PIPE(1, 1, 1, 1, 2, 1), (struct plan)PIPE(8, 2, 2, 2, 2, 1));
    job_free(job);
}

// ---- plans

static void plans(void **state)
{
    static const struct {
        struct plan want;
        bool cfg;
        enum err_code code;
        const char *text; // the plan that is made, or a part of the error
    } rows[] = {
        {{.ranks = 4, .pipe = 4}, false, 0, "cfg=1 ulysses=1 ring=1 pipe=4 patches=4 warmup=1"},
        {{.ranks = 4, .pipe = 2, .patches = 8, .warmup = 2},
         false,
         0,
         "cfg=1 ulysses=2 ring=1 pipe=2 patches=8 warmup=2"},
        {{.ranks = 8, .pipe = 2}, true, 0, "cfg=2 ulysses=2 ring=1 pipe=2 patches=2 warmup=1"},
        {{.ranks = 2, .patches = 3}, true, 0, "cfg=2 ulysses=1 ring=1 pipe=1 patches=3 warmup=1"},
        {{.ranks = 6, .pipe = 3}, false, 0, "cfg=1 ulysses=2 ring=1 pipe=3 patches=3 warmup=1"},
        {{.ranks = 4, .warmup = 3}, false, 0, "cfg=1 ulysses=4 ring=1"},
        {{.ranks = 4, .pipe = 3}, false, ERR_UNSUPPORTED, "ring_degree 1 x pipefusion_degree 3 is not the 4 ranks"},
        {{.ranks = 6, .pipe = 2}, false, ERR_UNSUPPORTED, "ulysses_degree 3 does not divide"},
        {{.ranks = 4, .ring = 2, .pipe = 2}, false, ERR_UNSUPPORTED, "use ulysses_degree inside the stages"},
        {{.ranks = 3, .patches = 2}, false, ERR_UNSUPPORTED, "use ulysses_degree inside the stages"},
        {{.ranks = 4, .pipe = 2, .blocks = {4, 2}},
         false,
         0,
         "cfg=1 ulysses=2 ring=1 pipe=2 patches=2 warmup=1 blocks=4,2"},
        {{.ranks = 3, .pipe = 3, .blocks = {4, 2}},
         false,
         ERR_UNSUPPORTED,
         "blocks 4,2: 2 stages, but pipefusion_degree is 3"},
        {{.ranks = 1, .pipe = 1, .blocks = {4, 2}},
         false,
         ERR_UNSUPPORTED,
         "blocks 4,2: 2 stages, but pipefusion_degree is 1"},
        {{.ranks = 2, .pipe = 2, .blocks = {4, 3}},
         false,
         ERR_UNSUPPORTED,
         "blocks 4,3: that is 7, the model has 6 blocks"},
        {{.ranks = 7, .pipe = 7}, false, ERR_UNSUPPORTED, "the model has 6 blocks"},
        {{.ranks = 2, .pipe = -2}, false, ERR_INVALID, "pipefusion_degree -2"},
        {{.ranks = 2, .pipe = 2, .patches = 65}, false, ERR_INVALID, "num_pipeline_patch 65; it may be 1 to 64"},
        {{.ranks = 2, .pipe = 2, .warmup = -1}, false, ERR_INVALID, "warmup_steps -1"},
    };
    const struct model *m = *state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct plan plan;
        struct err err = {.code = ERR_NONE};
        const int rc = plan_make(&m->info, &kernels_cpu, &rows[i].want, rows[i].cfg, &plan, &err);
        assert_int_equal(rc, rows[i].code);
        if (!strstr(rc ? err.text : plan_text(&plan), rows[i].text))
            fail_msg("row %zu: \"%s\" does not say \"%s\"", i, rc ? err.text : plan_text(&plan), rows[i].text);
    }
}

static void blocks_of_stages_are_parsed(void **state)
{
    (void)state;
    static const char *const wrong[] = {"2,", ",2",     "2;4",     "0,6", "-1,7", "2,,4",
                                        "x",  "2,1001", "2,40000", "2, ", "2 4"};
    struct plan p = {0};
    struct err err = {.code = ERR_NONE};
    assert_int_equal(plan_parse_blocks("", &p, &err), 0);
    assert_int_equal(p.blocks[0], 0);
    assert_int_equal(plan_parse_blocks("12, 3,400", &p, &err), 0);
    assert_int_equal(p.blocks[0], 12);
    assert_int_equal(p.blocks[1], 3);
    assert_int_equal(p.blocks[2], 400);
    assert_int_equal(p.blocks[3], 0);
    assert_int_equal(p.pipe, 3);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        if (plan_parse_blocks(wrong[i], &p, &err) != ERR_INVALID)
            fail_msg("\"%s\" is taken", wrong[i]);
        assert_non_null(strstr(err.text, wrong[i]));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plans),
        cmocka_unit_test(blocks_of_stages_are_parsed),
        cmocka_unit_test(warm_up_is_one_ranks_picture),
        cmocka_unit_test(warm_up_with_guidance),
        cmocka_unit_test(stale_steps_are_the_definitions),
        cmocka_unit_test(more_patches_than_rows_to_go_round),
        cmocka_unit_test(stale_steps_with_guidance),
        cmocka_unit_test(ranks_as_threads),
    };
    return cmocka_run_group_tests(tests, ranks_set_up, ranks_tear_down);
}
