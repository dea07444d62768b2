// test_seams.c: another way to spread one picture is a link and a runner, and no line of any model. The toy of this
// file keeps every layer's keys and values of the whole picture and passes the rows through the blocks patch by patch,
// the text with the first one: what a displaced-patch pipeline does, but over values that are not stale, so that the
// result must be runner_whole's.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/demo.h"
#include "worker/stages.h"

enum { PATCHES = 3, MAX_LAYERS = 16 };

// State that the toy link and the toy runner share.
struct toy {
    struct tensor k[MAX_LAYERS], v[MAX_LAYERS]; // (all rows, heads, dim) of each attention of the model
    int64_t at;                                 // where in the whole the rows begin that the pass carries
    int64_t calls;
    bool seen[MAX_LAYERS];
};

// Puts the keys and values of the rows in hand in their place and attends over all of them.
static void toy_attend(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    struct toy *toy = self->state;
    assert_in_range(call->layer, 0, MAX_LAYERS - 1);
    struct attention_call whole = *call;
    whole.k = toy->k[call->layer];
    whole.v = toy->v[call->layer];
    x->k->copy(x->d, tensor_rows(whole.k, toy->at, call->k.n[0]), call->k);
    x->k->copy(x->d, tensor_rows(whole.v, toy->at, call->v.n[0]), call->v);
    toy->calls++;
    toy->seen[call->layer] = true;
    self->next->attend(self->next, x, &whole);
}

// One pass of some rows through all blocks.
static void pass(const struct dit *m, struct exec *x, const struct dit_cond *cond, const struct dit_rows *rows,
                 int step, struct tensor tokens, struct tensor out)
{
    (void)step;
    struct dit_info info;
    m->ops->info(m, &info);
    struct dit_pass p = {.cond = cond, .rows = rows};
    p.hidden = exec_tensor(x, 2, rows->text.count + rows->image.count, info.hidden, 1, 1);
    m->ops->embed(m, x, &p, tokens);
    for (int i = 0; i < info.blocks; i++)
        dit_block(m, x, &p, i);
    m->ops->head(m, x, &p, out);
}

static void toy_run(const struct runner *self, const struct dit *m, struct exec *x, const struct dit_cond *cond,
                    const struct dit_rows *rows, int step, struct tensor tokens, struct tensor out)
{
    struct toy *toy = self->state;
    const int64_t text = rows->text.count;
    const size_t mark = arena_mark(x->arena);
    struct dit_info info;
    m->ops->info(m, &info);
    assert_in_range(info.blocks, 1, MAX_LAYERS);
    for (int i = 0; i < info.blocks; i++) { // before any block, whose own activations are released at its end
        toy->k[i] = exec_tensor(x, 3, text + rows->image.count, info.heads, info.head_dim, 1);
        toy->v[i] = exec_tensor(x, 3, text + rows->image.count, info.heads, info.head_dim, 1);
    }
    toy->at = 0;
    pass(m, x, cond, rows, step, tokens, out); // fills the buffers
    x->k->zero(x->d, out);
    const struct spread patches = spread_even(rows->image.count, 0, PATCHES);
    for (int i = 0; i < PATCHES; i++) {
        const struct span image = spread_of(&patches, i);
        const int64_t text_here = i == 0 ? text : 0, count = text_here + image.count;
        toy->at = i == 0 ? 0 : text + image.start;
        const struct dit_rows patch = {.text = {rows->text.start, text_here},
                                       .image = {rows->image.start + image.start, image.count},
                                       .rope = tensor_rows(rows->rope, toy->at, count),
                                       .of_rank = &count,
                                       .projected_text = text_here};
        pass(m, x, cond, &patch, step, tensor_rows(tokens, image.start, image.count),
             tensor_rows(out, image.start, image.count));
    }
    arena_release(x->arena, mark);
}

// ---- a run that the test sets up as the engine does, but for the ways it chooses

struct bench {
    struct model *model;
    struct comm *comm;
    struct device *device;
    struct arena *arena;
};

// tokens (image_tokens, channels) after all steps; link and runner NULL: what the plan chooses.
static float *denoised(const struct bench *b, const Ditfleet__V1__Job *job, const struct attention_link *link,
                       const struct runner *runner)
{
    static const struct engine_hooks none = {0};
    const size_t mark = arena_mark(b->arena);
    struct err err = {.code = ERR_NONE};
    struct prompt prompts[BRANCHES];
    bool cut[4] = {false};
    struct run r;
    run_init(&r, b->model, job,
             &(struct plan){.ranks = 1, .cfg = 1, .ulysses = 1, .ring = 1, .pipe = 1, .patches = 1, .data = 1});
    r.hooks = &none;
    r.control = b->comm;
    run_use(&r, &kernels_cpu, b->device, b->arena);
    assert_int_equal(run_join(&r, b->comm, &err), 0);
    if (runner)
        r.branch.attention = link, r.runner = runner;
    struct tensor tokens = exec_tensor(&r.world, 2, r.image_tokens, b->model->info.channels, 1, 1);
    float *values = malloc(tensor_bytes(tokens));
    assert_non_null(values);
    assert_int_equal(noise_tokens(&r, values, &err), 0);
    if (encode_prompts(&r, prompts, cut, &err) != 0 || denoise(&r, prompts, values, tokens, &err) != 0)
        fail_msg("%s", err.text);
    kernels_cpu.download(b->device, values, tokens);
    run_leave(&r);
    arena_release(b->arena, mark);
    return values;
}

static void check(const struct bench *b, const char *const *fields, int branches, int steps)
{
    struct toy toy = {.calls = 0};
    const struct attention_link link = {.attend = toy_attend, .next = &attention_local, .state = &toy};
    const struct runner runner = {.run = toy_run, .state = &toy};
    Ditfleet__V1__Job *job = demo_job(b->model, fields);
    float *whole = denoised(b, job, NULL, NULL), *patched = denoised(b, job, &link, &runner);
    double off = relative_l2(patched, whole, (int64_t)(job->width / 16) * (job->height / 16) * b->model->info.channels);
    print_message("%d steps, relative L2 %.2g\n", steps, off);
    assert_true(off <= 1e-5);
    for (int i = 0; i < MAX_LAYERS; i++) // FLUX.1 attends once a block, each under its own number
        assert_int_equal(toy.seen[i], i < b->model->info.blocks);
    assert_int_equal(toy.calls, (int64_t)b->model->info.blocks * (1 + PATCHES) * branches * steps);
    free(whole);
    free(patched);
    job_free(job);
}

static void one_step(void **state)
{
    check(*state,
          (const char *const[]){"prompt", "a ring", "seed", "3", "max_sequence_length", "24", "width", "112", "height",
                                "80", "num_inference_steps", "1", NULL},
          1, 1);
}

static void two_branches(void **state)
{
    check(*state,
          (const char *const[]){"prompt", "a ring", "seed", "3", "negative_prompt", "a star", "true_cfg_scale", "2",
                                "max_sequence_length", "13", "width", "80", "height", "48", "num_inference_steps", "3",
                                NULL},
          2, 3);
}

// Fewer rows than patches: some carry nothing.
static void empty_patches(void **state)
{
    check(*state,
          (const char *const[]){"prompt", "", "seed", "3", "max_sequence_length", "5", "width", "32", "height", "16",
                                "num_inference_steps", "2", NULL},
          1, 2);
}

static int set_up(void **state)
{
    static struct bench b;
    struct err err = {.code = ERR_NONE};
    assert_int_equal(comm_self_new(&b.comm, &err), 0);
    assert_int_equal(kernels_cpu.open(&(struct device_options){.threads = 2}, &b.device, &err), 0);
    assert_int_equal(arena_new(&kernels_cpu, b.device, 64 << 20, &b.arena, &err), 0);
    b.model = demo_model();
    *state = &b;
    return 0;
}

static int tear_down(void **state)
{
    struct bench *b = *state;
    model_free(b->model);
    arena_free(b->arena);
    kernels_cpu.close(b->device);
    comm_free(b->comm);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_step),
        cmocka_unit_test(two_branches),
        cmocka_unit_test(empty_patches),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
