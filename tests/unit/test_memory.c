// test_memory.c: a device with memory of its own and too little of it: parts come and go with the stages of a job and
// change no pixel; prompts that were encoded lately are not encoded again; what cannot fit is refused with the numbers.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/card.h"
#include "tests/unit/demo.h"

// ---- an engine on it

struct bench {
    struct kernels kernels;
    struct comm *comm;
    struct engine *engine;
    struct model *model;
    struct engine_result result;
    struct err err;
};

static void open_codes(struct bench *b, int64_t budget, enum dtype codes, bool exact)
{
    *b = (struct bench){.kernels = card_kernels()};
    card.total = (size_t)8 << 30;
    card.largest = card.placed;
    assert_int_equal(comm_self_new(&b->comm, &b->err), 0);
    const struct engine_options options = {.kernels = &b->kernels,
                                           .device = {.threads = 2, .exact = exact},
                                           .control = b->comm,
                                           .memory_budget = budget,
                                           .codes = codes};
    assert_int_equal(engine_new(&options, &b->engine, &b->err), 0);
    const struct home home = engine_home(b->engine);
    if (model_load_on(DEMO_MODEL, &home, &b->model, &b->err) != 0)
        fail_msg("%s", b->err.text);
}

static void open_bench(struct bench *b, int64_t budget)
{
    open_codes(b, budget, DT_F32, false);
}

static void close_bench(struct bench *b)
{
    engine_result_free(&b->result);
    model_free(b->model);
    engine_free(b->engine);
    comm_free(b->comm);
    assert_int_equal(card.n, 0);
    assert_int_equal(card.placed, 0);
}

#define FIELDS(...)                                                                                                    \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        __VA_ARGS__, NULL                                                                                              \
    }
#define SMALL "seed", "3", "max_sequence_length", "24", "width", "64", "height", "48", "num_inference_steps", "2"

static int run(struct bench *b, const char *const *fields)
{
    static const struct engine_hooks none = {0};
    Ditfleet__V1__Job *job = demo_job(b->model, fields);
    engine_result_free(&b->result);
    int rc = engine_run(b->engine, b->model, job, &(struct plan){0}, &none, &b->result, &b->err);
    job_free(job);
    return rc;
}

static void expect_run(struct bench *b, const char *const *fields)
{
    if (run(b, fields) != 0)
        fail_msg("%s", b->err.text);
}

// The pixels of the job by the CPU and its mapped files.
static uint8_t *reference(const char *const *fields, size_t *size)
{
    static const struct engine_hooks none = {0};
    struct err err = {.code = ERR_NONE};
    struct comm *comm;
    struct engine *e;
    struct engine_result result;
    struct model *m = demo_model();
    Ditfleet__V1__Job *job = demo_job(m, fields);
    assert_int_equal(comm_self_new(&comm, &err), 0);
    const struct engine_options options = {.kernels = &kernels_cpu, .device.threads = 2, .control = comm};
    assert_int_equal(engine_new(&options, &e, &err), 0);
    if (engine_run(e, m, job, &(struct plan){0}, &none, &result, &err) != 0)
        fail_msg("%s", err.text);
    assert_false(result.prompt_cached);
    *size = (size_t)job->num_images * job->width * job->height * 3;
    uint8_t *pixels = result.pixels;
    engine_free(e);
    comm_free(comm);
    job_free(job);
    model_free(m);
    return pixels;
}

static void expect_pixels(const struct bench *b, const uint8_t *pixels, size_t size)
{
    assert_non_null(b->result.pixels);
    assert_memory_equal(b->result.pixels, pixels, size);
}

static int64_t placed(const struct bench *b, unsigned parts)
{
    return model_placed_bytes(b->model, parts);
}

enum { TEXT = 1 << PART_CLIP | 1 << PART_T5, DIT = 1 << PART_DIT, VAE = 1 << PART_VAE };

// ---- tests

// The plan of a part and the part itself agree on its size, and with room enough nothing ever moves.
static void everything_fits(void **state)
{
    (void)state;
    struct bench b;
    size_t size;
    const char *const *job = FIELDS("prompt", "a red circle", SMALL);
    uint8_t *pixels = reference(job, &size);
    open_bench(&b, 0);
    assert_int_equal(b.model->here, PARTS_ALL); // loaded before any job
    assert_int_equal(card.placed, placed(&b, PARTS_ALL));
    for (int i = 0; i < 3; i++) {
        expect_run(&b, job);
        expect_pixels(&b, pixels, size);
        assert_int_equal(b.result.prompt_cached, i > 0);
        assert_int_equal(b.result.moves.evicted, 0);
        assert_int_equal(b.result.moves.loaded, 0);
    }
    assert_int_equal(card.largest, placed(&b, PARTS_ALL));
    free(pixels);
    close_bench(&b);
}

// E4M3 is placed twice where half of the budget is left, and bits need not be those of other devices; then even and odd
// steps take turns.
static void weights_take_turns(void **state)
{
    (void)state;
    struct bench b;
    size_t size;
    const char *const *job = FIELDS("prompt", "a red circle", "seed", "3", "max_sequence_length", "24", "width", "64",
                                    "height", "48", "num_inference_steps", "5");
    uint8_t *pixels = reference(job, &size);
    open_bench(&b, 0);
    const int64_t as_f32 = placed(&b, DIT);
    close_bench(&b);

    open_codes(&b, 0, DT_E4M3, false);
    assert_true(b.model->info.twice);
    const int64_t needed = 2 * (placed(&b, PARTS_ALL) + as_f32); // an upper bound
    memset(card.used, 0, sizeof card.used);
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    assert_true(card.used[1] > 0);
    assert_int_equal(2 * card.used[0], 3 * card.used[1]); // steps 0, 2, 4; 1, 3
    close_bench(&b);

    open_codes(&b, needed, DT_E4M3, false);
    assert_true(b.model->info.twice);
    const int64_t twice = placed(&b, PARTS_ALL);
    close_bench(&b);
    open_codes(&b, twice, DT_E4M3, false);
    assert_false(b.model->info.twice);
    close_bench(&b);
    open_codes(&b, 0, DT_E4M3, true);
    assert_false(b.model->info.twice);
    memset(card.used, 0, sizeof card.used);
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    assert_int_equal(card.used[0] + card.used[1], 0);
    close_bench(&b);
    free(pixels);
}

// Room for the transformer and the VAE beside the activations, but not for the encoders as well.
static void encoders_make_way(void **state)
{
    (void)state;
    struct bench b;
    size_t size, other_size;
    const char *const *job = FIELDS("prompt", "a red circle", SMALL), *const *other = FIELDS("prompt", "a star", SMALL);
    uint8_t *pixels = reference(job, &size), *other_pixels = reference(other, &other_size);
    open_bench(&b, 0);
    const int64_t denoising = placed(&b, DIT | VAE), all = placed(&b, PARTS_ALL);
    close_bench(&b);

    // 4 MB of activations and prompts; a job of this size takes less.
    const int64_t budget = ENGINE_LIBRARY_BYTES + denoising + (4 << 20);
    open_bench(&b, budget);
    assert_true(all - denoising > 4 << 20);
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    assert_true(b.result.moves.evicted & 1 << PART_T5);
    assert_true(b.model->here & DIT);
    assert_false(b.model->here & 1 << PART_T5);
    // The same prompt: neither encoder comes back.
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    assert_true(b.result.prompt_cached);
    assert_int_equal(b.result.moves.loaded & TEXT, 0);
    // Another one: they do, and the transformer makes way where it must.
    expect_run(&b, other);
    expect_pixels(&b, other_pixels, other_size);
    assert_false(b.result.prompt_cached);
    assert_true(b.result.moves.loaded & 1 << PART_T5);
    assert_true(b.result.moves.loaded_bytes > 0);
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    assert_true(b.result.prompt_cached);
    assert_true(card.largest <= budget - ENGINE_LIBRARY_BYTES);
    free(pixels);
    free(other_pixels);
    close_bench(&b);
}

// As little as can be: one stage at a time.
static void one_stage_at_a_time(void **state)
{
    (void)state;
    struct bench b;
    size_t size;
    const char *const *job =
        FIELDS("prompt", "a red circle", "negative_prompt", "a star", "true_cfg_scale", "2", "num_images", "2", SMALL);
    uint8_t *pixels = reference(job, &size);
    open_bench(&b, 0);
    const int64_t dit = placed(&b, DIT);
    assert_true(dit > placed(&b, TEXT)); // of the demo model
    close_bench(&b);
    open_bench(&b, ENGINE_LIBRARY_BYTES + dit + (4 << 20));
    for (int i = 0; i < 2; i++) {
        expect_run(&b, job);
        expect_pixels(&b, pixels, size);
        assert_true(b.result.moves.evicted != 0);
        assert_int_equal(b.result.prompt_cached, i > 0);
    }
    free(pixels);
    close_bench(&b);
}

// Neither stage's activations fit beside the other's weights: the arena is replaced between them.
static void stages_take_turns(void **state)
{
    (void)state;
    struct bench b;
    size_t size;
    const char *const *job = FIELDS("prompt", "a red circle", "seed", "3", "max_sequence_length", "24", "width", "256",
                                    "height", "256", "num_inference_steps", "2", "num_images", "2");
    uint8_t *pixels = reference(job, &size);
    open_bench(&b, 0);
    struct engine_estimate estimate;
    Ditfleet__V1__Job *resolved = demo_job(b.model, job);
    assert_int_equal(
        engine_predict(
            b.engine, b.model, resolved,
            &(struct plan){.ranks = 1, .cfg = 1, .ulysses = 1, .ring = 1, .pipe = 1, .patches = 1, .data = 1},
            &estimate, &b.err),
        0);
    job_free(resolved);
    const unsigned parts[ENGINE_STAGES] = {TEXT, DIT, VAE};
    int64_t most = 0;
    for (int i = 0; i < ENGINE_STAGES; i++) {
        const int64_t bytes = placed(&b, parts[i]) + (int64_t)estimate.stage_bytes[i];
        most = bytes > most ? bytes : most;
    }
    most += 1 << 20; // prompts, tokens
    assert_true(most < placed(&b, DIT) + (int64_t)estimate.activation_bytes);
    close_bench(&b);
    open_bench(&b, ENGINE_LIBRARY_BYTES + most);
    for (int i = 0; i < 2; i++) {
        expect_run(&b, job);
        expect_pixels(&b, pixels, size);
        assert_true(b.result.moves.evicted & DIT);
    }
    expect_run(&b, FIELDS("prompt", "a red circle", SMALL)); // an arena for all stages again
    assert_true(b.result.prompt_cached);
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    free(pixels);
    close_bench(&b);
}

// Two models, each within the budget, not both.
static void models_take_turns(void **state)
{
    (void)state;
    struct bench b;
    size_t size;
    const char *const *job = FIELDS("prompt", "a red circle", SMALL);
    uint8_t *pixels = reference(job, &size);
    open_bench(&b, 0);
    const int64_t all = placed(&b, PARTS_ALL);
    close_bench(&b);
    open_bench(&b, ENGINE_LIBRARY_BYTES + all + (6 << 20));
    struct model *first = b.model, *second;
    const struct home home = engine_home(b.engine);
    assert_int_equal(model_load_on(DEMO_MODEL, &home, &second, &b.err), 0);
    for (int i = 0; i < 4; i++) {
        b.model = i % 2 ? second : first;
        expect_run(&b, job);
        expect_pixels(&b, pixels, size);
    }
    assert_true(card.largest <= all + (6 << 20));
    model_free(second);
    b.model = first;
    expect_run(&b, job);
    expect_pixels(&b, pixels, size);
    free(pixels);
    close_bench(&b);
}

// Each of the last 8 prompts is found, one from before is not; a longer max_sequence_length starts anew.
static void last_prompts(void **state)
{
    (void)state;
    struct bench b;
    open_bench(&b, 0);
#define PROMPT(i)                                                                                                      \
    FIELDS("prompt", (char[]){'a', (char)('a' + (i)), 0}, "seed", "1", "max_sequence_length", "16", "width", "16",     \
           "height", "16", "num_inference_steps", "1")
    for (int i = 0; i < 9; i++) {
        expect_run(&b, PROMPT(i));
        assert_false(b.result.prompt_cached);
    }
    for (int i = 8; i > 0; i--) {
        expect_run(&b, PROMPT(i));
        assert_true(b.result.prompt_cached);
    }
    expect_run(&b, PROMPT(0)); // in place of the 8th, now the one used longest ago
    assert_false(b.result.prompt_cached);
    expect_run(&b, PROMPT(8));
    assert_false(b.result.prompt_cached);
    expect_run(&b, PROMPT(1));
    assert_true(b.result.prompt_cached);
    expect_run(&b, FIELDS("prompt", "ab", "max_sequence_length", "17", "width", "16", "height", "16",
                          "num_inference_steps", "1"));
    assert_false(b.result.prompt_cached);
    expect_run(&b, PROMPT(1));
    assert_false(b.result.prompt_cached);
    close_bench(&b);
}

struct recorded {
    int n;
    size_t bytes;
    uint8_t data[1 << 16];
};

static void record_text(void *arg, const char *name, struct tensor t)
{
    struct recorded *r = arg;
    if (!strstr(name, "_ids") && !strstr(name, "prompt_embeds"))
        return;
    assert_true(r->bytes + tensor_bytes(t) <= sizeof r->data);
    memcpy(r->data + r->bytes, t.data, tensor_bytes(t));
    r->bytes += tensor_bytes(t);
    r->n++;
}

// Who watches sees the same ids and embeddings, encoded or found.
static void traces_are_whole(void **state)
{
    (void)state;
    struct bench b;
    static struct recorded seen[2];
    open_bench(&b, 0);
    Ditfleet__V1__Job *job = demo_job(b.model, FIELDS("prompt", "a red circle", SMALL));
    for (int i = 0; i < 2; i++) {
        const struct engine_hooks hooks = {.trace = record_text, .arg = &seen[i]};
        if (engine_run(b.engine, b.model, job, &(struct plan){0}, &hooks, &b.result, &b.err) != 0)
            fail_msg("%s", b.err.text);
        assert_int_equal(b.result.prompt_cached, i);
        engine_result_free(&b.result);
    }
    assert_int_equal(seen[0].n, 4);
    assert_memory_equal(&seen[0], &seen[1], sizeof *seen);
    job_free(job);
    close_bench(&b);
}

static int stop_at_text(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    (void)step, (void)steps;
    return (int)stage == *(int *)arg ? err_set(err, ERR_CANCELLED, "stopped") : 0;
}

// A job that ends before its prompt was encoded leaves none; one that ends later does.
static void stopped_jobs(void **state)
{
    (void)state;
    struct bench b;
    open_bench(&b, 0);
    Ditfleet__V1__Job *job = demo_job(b.model, FIELDS("prompt", "a red circle", SMALL));
    for (int stage = ENGINE_TEXT; stage <= ENGINE_DENOISE; stage++) {
        const struct engine_hooks stopping = {.progress = stop_at_text, .arg = &stage};
        assert_int_equal(engine_run(b.engine, b.model, job, &(struct plan){0}, &stopping, &b.result, &b.err),
                         ERR_CANCELLED);
        assert_null(b.result.pixels);
    }
    expect_run(&b, FIELDS("prompt", "a red circle", SMALL));
    assert_true(b.result.prompt_cached);
    job_free(job);
    close_bench(&b);
}

// More than the budget: refused before any work, in numbers, with a size that then is taken.
static void too_large(void **state)
{
    (void)state;
    struct bench b;
    char side[16] = "";
    open_bench(&b, 0);
    const int64_t dit = placed(&b, DIT);
    close_bench(&b);
    open_bench(&b, ENGINE_LIBRARY_BYTES + dit + (8 << 20));
    const int moved = card.n;
    assert_int_equal(run(&b, FIELDS("prompt", "x", "width", "1024", "height", "1024", "num_inference_steps", "1")),
                     ERR_UNSUPPORTED);
    assert_int_equal(card.n, moved);
    const char *said = strstr(b.err.text, "the largest square that fits is ");
    if (!said || !strstr(b.err.text, "width 1024 x height 1024 needs ") || !strstr(b.err.text, "memory budget"))
        fail_msg("%s", b.err.text);
    assert_int_equal(sscanf(said, "the largest square that fits is %7s", side), 1);
    expect_run(&b, FIELDS("prompt", "x", "width", side, "height", side, "num_inference_steps", "1"));
    snprintf(side, sizeof side, "%d", atoi(side) + 16);
    assert_int_equal(run(&b, FIELDS("prompt", "x", "width", side, "height", side, "num_inference_steps", "1")),
                     ERR_UNSUPPORTED);
    close_bench(&b);

    open_bench(&b, ENGINE_LIBRARY_BYTES + dit / 2);
    assert_int_equal(run(&b, FIELDS("prompt", "x", SMALL)), ERR_UNSUPPORTED);
    assert_non_null(strstr(b.err.text, "no size fits"));
    close_bench(&b);
}

// A budget that the device does not have; and one that turns out not to be free.
static void no_such_memory(void **state)
{
    (void)state;
    struct bench b = {.kernels = card_kernels()};
    struct err err = {.code = ERR_NONE};
    struct engine *e;
    card.total = (size_t)8 << 30;
    assert_int_equal(comm_self_new(&b.comm, &err), 0);
    const struct engine_options options = {
        .kernels = &b.kernels, .device.threads = 1, .control = b.comm, .memory_budget = (int64_t)9 << 30};
    assert_int_equal(engine_new(&options, &e, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "memory budget 9.00 GiB: the device has 8.00 GiB"));
    comm_free(b.comm);

    card.full = true;
    struct engine_options enough = options;
    struct model *m = NULL;
    assert_int_equal(comm_self_new(&b.comm, &err), 0);
    enough.memory_budget = 0;
    enough.control = b.comm;
    assert_int_equal(engine_new(&enough, &e, &err), 0);
    const struct home home = engine_home(e);
    assert_int_equal(model_load_on(DEMO_MODEL, &home, &m, &err), ERR_NO_MEMORY);
    assert_null(m);
    engine_free(e);
    comm_free(b.comm);
    card.full = false;
    assert_int_equal(card.n, 0);
}

// What a plan says 8 bits save: a byte a weight of the blocks' linear layers, less their scales.
static void eight_bits_are_planned(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    struct residency *r;
    int64_t bytes[3];
    struct kernels k = card_kernels();
    k.activation = DT_BF16;
    assert_int_equal(residency_new(&k, NULL, 0, &r, &err), 0); // nothing fits: nothing is placed
    for (int i = 0; i < 3; i++) {
        const enum dtype codes[] = {DT_BF16, DT_E4M3, DT_I8};
        struct model *m;
        const struct home home = {.k = &k, .codes = codes[i], .residency = r};
        assert_int_equal(model_load_on(DEMO_MODEL, &home, &m, &err), 0);
        assert_int_equal(m->here, 0);
        bytes[i] = model_placed_bytes(m, DIT);
        model_free(m);
    }
    residency_free(r);
    // Weights of a double block: 2 streams x (4 + 2 * 4) dim^2; of a single one 3 + 4 + 5.
    struct model *m = demo_model();
    const int64_t dim = m->info.hidden, blocks = m->info.blocks;
    model_free(m);
    int64_t doubles = 2, singles = blocks - doubles; // of the demo model
    const int64_t weights = (doubles * 24 + singles * 12) * dim * dim, saved = bytes[0] - bytes[1];
    assert_true(saved <= weights && saved >= weights * 95 / 100);
    assert_int_equal(bytes[1], bytes[2]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(everything_fits),   cmocka_unit_test(weights_take_turns),
        cmocka_unit_test(encoders_make_way), cmocka_unit_test(one_stage_at_a_time),
        cmocka_unit_test(stages_take_turns), cmocka_unit_test(models_take_turns),
        cmocka_unit_test(last_prompts),      cmocka_unit_test(stopped_jobs),
        cmocka_unit_test(traces_are_whole),  cmocka_unit_test(too_large),
        cmocka_unit_test(no_such_memory),    cmocka_unit_test(eight_bits_are_planned),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
