// test_golden.c: the demo model's cases against recordings of the reference pipeline (tests/golden/make_goldens.py):
// what goes into the engine, what passes through it, and the picture. And that a job makes the same bytes again.
//
//   test_golden [cpu fp32 | cuda fp32|fp16|bf16]     cuda: exit status 77 where there is no GPU
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/backend.h"
#include "tests/unit/demo.h"

#define FOLDER "tests/golden/demo"
enum { SKIPPED = 77 };

// The recordings are float32's. What another type may add, with what was seen on an H200.
static const struct allowance {
    const char *precision;
    double step; // relative L2 of every entry: embeddings, the prediction and the latents of each step, decoded picture
    double noise; // absolute: half a unit in the last place of numbers below 8
    double psnr;  // dB of the picture; 0: one pixel in a thousand may be more than a level off
} allowances[] = {
    {"fp32", 2e-4, 1e-5, 0},        // 3.9e-6 after the last step
    {"fp16", 9e-3, 2e-3, 40},       // 3.5e-3
    {"bf16", 3.3e-2, 1.6e-2, 30.5}, // 1.3e-2; the reference's own bf16 pictures have 31.6 dB and more
};

// What an entry of the recordings must satisfy. The first row whose name is the beginning of the entry's counts.
enum rule { EQUAL, ABSOLUTE, NOISE, STEP };
static const struct {
    const char *name;
    enum rule rule;
    double limit;
} rules[] = {
    {"clip_ids", EQUAL, 0},
    {"t5_ids", EQUAL, 0},
    {"negative_clip_ids", EQUAL, 0},
    {"negative_t5_ids", EQUAL, 0},
    {"initial_noise", NOISE, 0},
    {"sigmas", ABSOLUTE, 2e-7}, // float32 of numbers up to 1
    {"timesteps", ABSOLUTE, 2e-4},
    {"transformer_timestep", ABSOLUTE, 2e-7},
    {"", STEP, 0}, // embeddings, predictions, latents, what the VAE decodes
};

struct comparison {
    const struct allowance *allowed;
    struct recording golden;
    int seen, failed;
    double worst; // relative L2
};

static void compare(void *arg, const char *name, struct tensor t)
{
    struct comparison *c = arg;
    size_t bytes;
    const void *expected = recording_get(&c->golden, name, &bytes);
    if (!expected)
        return;
    size_t i = 0;
    while (strncmp(name, rules[i].name, strlen(rules[i].name)) != 0)
        i++;
    const enum rule rule = rules[i].rule;
    const double limit = rule == STEP ? c->allowed->step : rule == NOISE ? c->allowed->noise : rules[i].limit;
    double found = INFINITY;
    if (bytes != tensor_bytes(t))
        print_error("%s: %zu bytes, the reference has %zu\n", name, tensor_bytes(t), bytes);
    else if (rule == EQUAL)
        found = memcmp(t.data, expected, bytes) == 0 ? 0 : INFINITY;
    else if (rule == STEP)
        found = relative_l2(t.data, expected, tensor_count(t));
    else
        found = largest_difference(t.data, expected, tensor_count(t));
    if (rule == STEP && found > c->worst)
        c->worst = found;
    if (rule == STEP && c->allowed->psnr > 0)
        print_message("  %-24s %.2g\n", name, found);
    c->seen++;
    if (!(found <= limit)) {
        print_error("%s: %g, allowed %g\n", name, found, limit);
        c->failed++;
    }
}

static Ditfleet__V1__Job *job_of(const struct model *m, const char *path)
{
    struct err err = {.code = ERR_NONE};
    const char *key;
    json_t *root = json_load_file(path, 0, NULL), *value;
    assert_non_null(root);
    Ditfleet__V1__Job *job = job_new();
    json_object_foreach(root, key, value)
    {
        if (strcmp(key, "name") == 0 || strcmp(key, "bf16_psnr_db") == 0 || strcmp(key, "steps_saved") == 0)
            continue; // about the recording
        char *number = json_dumps(value, JSON_ENCODE_ANY);
        const char *text = json_is_string(value) ? json_string_value(value) : number;
        if (job_set_field(job, key, text, &err) != 0)
            fail_msg("%s: %s", path, err.text);
        free(number);
    }
    json_decref(root);
    if (model_resolve_job(m, job, &err) != 0)
        fail_msg("%s: %s", path, err.text);
    return job;
}

struct bench {
    const struct kernels *kernels;
    const struct allowance *allowed;
    struct comm *comm;
    struct engine *engine;
    struct model *model;
};

static const struct allowance *allowance_of(const char *precision)
{
    for (size_t i = 0; i < sizeof allowances / sizeof *allowances; i++)
        if (strcmp(allowances[i].precision, precision) == 0)
            return &allowances[i];
    return NULL;
}

static int bench_open(struct bench *b, struct err *err)
{
    const char *p = b->allowed->precision;
    const enum dtype type = strcmp(p, "fp32") == 0 ? DT_F32 : strcmp(p, "fp16") == 0 ? DT_F16 : DT_BF16;
    TRY(comm_self_new(&b->comm, err));
    const struct engine_options options = {
        .kernels = b->kernels, .device = {.threads = 2, .activation = type}, .control = b->comm};
    return engine_new(&options, &b->engine, err);
}

static int load_model(struct bench *b, struct err *err)
{
    const struct home home = engine_home(b->engine);
    return model_load_on(DEMO_MODEL, b->kernels == &kernels_cpu ? NULL : &home, &b->model, err);
}

static void bench_close(struct bench *b)
{
    model_free(b->model);
    engine_free(b->engine);
    comm_free(b->comm);
}

static void run(const struct bench *b, const Ditfleet__V1__Job *job, const struct engine_hooks *hooks,
                struct engine_result *result)
{
    struct err err = {.code = ERR_NONE};
    if (engine_run(b->engine, b->model, job, &(struct plan){0}, hooks, result, &err) != 0)
        fail_msg("%s", err.text);
}

// Against full scale; of equal pictures 99.
static double psnr(const uint8_t *a, const uint8_t *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)(a[i] - b[i]) * (a[i] - b[i]);
    return sum > 0 ? 10 * log10(255.0 * 255 * (double)n / sum) : 99;
}

static void check_case(const struct bench *b, const char *name)
{
    struct comparison c = {.allowed = b->allowed};
    struct engine_result result;
    char path[256];
    size_t bytes;
    snprintf(path, sizeof path, FOLDER "/%s.safetensors", name);
    recording_open(&c.golden, path);
    snprintf(path, sizeof path, FOLDER "/%s.json", name);
    Ditfleet__V1__Job *job = job_of(b->model, path);

    const struct engine_hooks hooks = {.trace = compare, .arg = &c};
    run(b, job, &hooks, &result);
    const int64_t pixels = (int64_t)job->width * job->height;
    const uint8_t *expected = recording_get(&c.golden, "image_u8", &bytes);
    assert_int_equal(bytes, pixels * 3);
    const int64_t off = pixels_off(result.pixels, expected, pixels);
    const double like = psnr(result.pixels, expected, pixels * 3);
    print_message("%s: worst relative L2 %.2g, %lld of %lld pixels off, %.1f dB\n", name, c.worst, (long long)off,
                  (long long)pixels, like);
    assert_int_equal(c.failed, 0);
    assert_int_equal(c.seen + 1, json_object_size(c.golden.header) -
                                     1); // nothing was left out: image_u8 is compared below, __metadata__ not
    assert_true(b->allowed->psnr > 0 ? like >= b->allowed->psnr : off * 1000 <= pixels);
    for (int i = 0; i < 4; i++)
        assert_false(result.prompt_cut[i]);
    engine_result_free(&result);
    recording_close(&c.golden);
    job_free(job);
}

#define CASE(name)                                                                                                     \
    static void name(void **state)                                                                                     \
    {                                                                                                                  \
        check_case(*state, #name);                                                                                     \
    }
CASE(relation_256_20)
CASE(count_256_4)
CASE(wide_320x192_20)
CASE(truecfg_256_20)
CASE(long512_384_4)
CASE(tall_192x320_12_prompt2)

// With another job between, whose shapes are others.
static void the_same_seed_gives_the_same_bytes(void **state)
{
    const struct bench *b = *state;
    const struct engine_hooks hooks = {0};
    struct engine_result first, again, other;
    Ditfleet__V1__Job *job = job_of(b->model, FOLDER "/count_256_4.json"),
                      *between = job_of(b->model, FOLDER "/count_256_4.json");
    between->width = 128;
    between->num_inference_steps = 2;
    run(b, job, &hooks, &first);
    run(b, between, &hooks, &other);
    run(b, job, &hooks, &again);
    assert_memory_equal(first.pixels, again.pixels, (size_t)job->width * job->height * 3);
    engine_result_free(&first);
    engine_result_free(&other);
    engine_result_free(&again);
    job_free(job);
    job_free(between);
}

static int run_all(struct bench *b)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(relation_256_20, b),
        cmocka_unit_test_prestate(count_256_4, b),
        cmocka_unit_test_prestate(wide_320x192_20, b),
        cmocka_unit_test_prestate(truecfg_256_20, b),
        cmocka_unit_test_prestate(long512_384_4, b),
        cmocka_unit_test_prestate(tall_192x320_12_prompt2, b),
        cmocka_unit_test_prestate(the_same_seed_gives_the_same_bytes, b),
    };
    if (!SANITIZED)
        return cmocka_run_group_tests(tests, NULL, NULL);
    const struct CMUnitTest one[] = {cmocka_unit_test_prestate(count_256_4, b)};
    return cmocka_run_group_tests(one, NULL, NULL);
}

int main(int argc, char **argv)
{
    struct bench b = {.allowed = allowance_of(argc == 3 ? argv[2] : "fp32")};
    struct err err = {.code = ERR_NONE};
    if ((argc != 1 && argc != 3) || !b.allowed) {
        fprintf(stderr, "usage: test_golden [cpu fp32 | cuda fp32|fp16|bf16]\n");
        return 2;
    }
    int rc = backend_find(argc == 3 ? argv[1] : "cpu", &b.kernels, &err);
    if (rc == 0 && (rc = bench_open(&b, &err)) != 0 && b.kernels != &kernels_cpu &&
        (rc == ERR_UNSUPPORTED || rc == ERR_UNAVAILABLE)) {
        printf("skipped: no GPU here: %s\n", err.text);
        bench_close(&b);
        return SKIPPED;
    }
    if (rc == 0)
        rc = load_model(&b, &err);
    if (rc == 0)
        rc = run_all(&b);
    else
        fprintf(stderr, "%s\n", err.text);
    bench_close(&b);
    return rc;
}
