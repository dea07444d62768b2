// test_golden.c: the demo model's cases against recordings of the reference pipeline (tests/golden/make_goldens.py):
// what goes into the engine, what passes through it, and the picture.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/demo.h"

#define FOLDER "tests/golden/demo"

// What an entry of the recordings must satisfy. The first row whose name is the beginning of the entry's counts.
enum rule { EQUAL, ABSOLUTE, RELATIVE_L2 };
static const struct {
    const char *name;
    enum rule rule;
    double limit;
} rules[] = {
    {"clip_ids", EQUAL, 0},
    {"t5_ids", EQUAL, 0},
    {"negative_clip_ids", EQUAL, 0},
    {"negative_t5_ids", EQUAL, 0},
    {"initial_noise", ABSOLUTE, 1e-5},
    {"sigmas", ABSOLUTE, 2e-7}, // float32 of numbers up to 1
    {"timesteps", ABSOLUTE, 2e-4},
    {"transformer_timestep", ABSOLUTE, 2e-7},
    {"", RELATIVE_L2, 2e-4}, // embeddings, predictions, latents, what the VAE decodes
};

struct comparison {
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
    double found = INFINITY;
    if (bytes != tensor_bytes(t))
        print_error("%s: %zu bytes, the reference has %zu\n", name, tensor_bytes(t), bytes);
    else if (rules[i].rule == EQUAL)
        found = memcmp(t.data, expected, bytes) == 0 ? 0 : INFINITY;
    else if (rules[i].rule == ABSOLUTE)
        found = largest_difference(t.data, expected, tensor_count(t));
    else
        found = relative_l2(t.data, expected, tensor_count(t));
    if (rules[i].rule == RELATIVE_L2 && found > c->worst)
        c->worst = found;
    c->seen++;
    if (!(found <= rules[i].limit)) {
        print_error("%s: %g, allowed %g\n", name, found, rules[i].limit);
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
    struct comm *comm;
    struct engine *engine;
    struct model *model;
};

static int set_up(void **state)
{
    static struct bench b;
    struct err err = {.code = ERR_NONE};
    assert_int_equal(comm_self_new(&b.comm, &err), 0);
    const struct engine_options options = {
        .kernels = &kernels_cpu, .device.threads = 2, .data = b.comm, .control = b.comm};
    assert_int_equal(engine_new(&options, &b.engine, &err), 0);
    b.model = demo_model();
    *state = &b;
    return 0;
}

static int tear_down(void **state)
{
    struct bench *b = *state;
    engine_free(b->engine);
    model_free(b->model);
    comm_free(b->comm);
    return 0;
}

static void check_case(const struct bench *b, const char *name)
{
    struct err err = {.code = ERR_NONE};
    struct comparison c = {.worst = 0};
    struct engine_result result;
    char path[256];
    size_t bytes;
    snprintf(path, sizeof path, FOLDER "/%s.safetensors", name);
    recording_open(&c.golden, path);
    snprintf(path, sizeof path, FOLDER "/%s.json", name);
    Ditfleet__V1__Job *job = job_of(b->model, path);

    const struct engine_hooks hooks = {.trace = compare, .arg = &c};
    if (engine_run(b->engine, b->model, job, &(struct plan){0}, &hooks, &result, &err) != 0)
        fail_msg("%s", err.text);
    const int64_t pixels = (int64_t)job->width * job->height;
    const uint8_t *expected = recording_get(&c.golden, "image_u8", &bytes);
    assert_int_equal(bytes, pixels * 3);
    const int64_t off = pixels_off(result.pixels, expected, pixels);
    print_message("%s: worst relative L2 %.2g, %lld of %lld pixels off\n", name, c.worst, (long long)off,
                  (long long)pixels);
    assert_int_equal(c.failed, 0);
    assert_int_equal(c.seen + 1, json_object_size(c.golden.header) -
                                     1); // nothing was left out: image_u8 is compared below, __metadata__ not
    assert_true(off * 1000 <= pixels);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(relation_256_20), cmocka_unit_test(count_256_4),   cmocka_unit_test(wide_320x192_20),
        cmocka_unit_test(truecfg_256_20),  cmocka_unit_test(long512_384_4), cmocka_unit_test(tall_192x320_12_prompt2),
    };
    const struct CMUnitTest one[] = {cmocka_unit_test(count_256_4)};
    return SANITIZED ? cmocka_run_group_tests(one, set_up, tear_down)
                     : cmocka_run_group_tests(tests, set_up, tear_down);
}
