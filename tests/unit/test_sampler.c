// test_sampler.c: noise schedules against the reference's (tests/golden/make_sampler_goldens.py), bit for bit, and the
// scheduler configurations that are refused.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/sampler.h"

static char folder[] = "/tmp/ditfleet-sampler-XXXXXX";

static int load(const char *config, struct sampler *s, struct err *err)
{
    char path[64];
    snprintf(path, sizeof path, "%s/scheduler_config.json", folder);
    FILE *f = fopen(path, "we");
    assert_non_null(f);
    fputs(config, f);
    fclose(f);
    int rc = sampler_load(folder, s, err);
    unlink(path);
    return rc;
}

static void expect_floats(const json_t *expected, const float *found, int count, size_t i)
{
    assert_int_equal(json_array_size(expected), count);
    for (int j = 0; j < count; j++)
        if ((float)json_real_value(json_array_get(expected, (size_t)j)) != found[j])
            fail_msg("case %zu, number %d: %.9g, the reference has %.9g", i, j, (double)found[j],
                     json_real_value(json_array_get(expected, (size_t)j)));
}

static void schedules(void **state)
{
    (void)state;
    json_t *cases = json_load_file("tests/golden/sampler.json", 0, NULL), *c;
    float sigmas[SAMPLER_MAX_STEPS + 1], timesteps[SAMPLER_MAX_STEPS];
    size_t i;
    assert_true(json_array_size(cases) > 10);
    json_array_foreach(cases, i, c)
    {
        struct sampler s;
        struct err err = {.code = ERR_NONE};
        char *config = json_dumps(json_object_get(c, "config"), 0);
        if (load(config, &s, &err) != 0)
            fail_msg("%s", err.text);
        free(config);
        const int steps = (int)json_integer_value(json_object_get(c, "steps"));
        const json_t *shift = json_object_get(c, "shift");
        const float value = (float)json_real_value(shift);
        sampler_schedule(&s, steps, json_integer_value(json_object_get(c, "image_tokens")),
                         json_is_real(shift) ? &value : NULL, sigmas, timesteps);
        expect_floats(json_object_get(c, "sigmas"), sigmas, steps + 1, i);
        expect_floats(json_object_get(c, "timesteps"), timesteps, steps, i);
    }
    json_decref(cases);
}

#define CLASS "\"_class_name\": \"FlowMatchEulerDiscreteScheduler\""

static void refused(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        enum err_code code;
        const char *key;
    } rows[] = {
        {"{}", ERR_UNSUPPORTED, "_class_name is \"\""},
        {"{\"_class_name\": \"DDIMScheduler\"}", ERR_UNSUPPORTED, "_class_name is \"DDIMScheduler\""},
        {"{" CLASS ", \"shift\": 0}", ERR_INVALID, "shift must be a number from 0.001 to 1000"},
        {"{" CLASS ", \"shift\": \"3\"}", ERR_INVALID, "shift must be"},
        {"{" CLASS ", \"use_dynamic_shifting\": 1}", ERR_INVALID, "use_dynamic_shifting must be true or false"},
        {"{" CLASS ", \"num_train_timesteps\": 500}", ERR_INVALID, "num_train_timesteps"},
        {"{" CLASS ", \"base_image_seq_len\": 0}", ERR_INVALID, "base_image_seq_len"},
        {"{" CLASS ", \"base_image_seq_len\": 512, \"max_image_seq_len\": 512}", ERR_INVALID, "max_image_seq_len"},
        {"{" CLASS ", \"max_shift\": 1e300}", ERR_INVALID, "max_shift"},
        {"{" CLASS ", \"time_shift_type\": \"cubic\"}", ERR_UNSUPPORTED, "time_shift_type is \"cubic\""},
        {"{" CLASS ", \"use_karras_sigmas\": true}", ERR_UNSUPPORTED, "use_karras_sigmas"},
        {"{" CLASS ", \"shift_terminal\": 0.1}", ERR_UNSUPPORTED, "shift_terminal"},
        {"{" CLASS ", \"invert_sigmas\": true}", ERR_UNSUPPORTED, "invert_sigmas"},
        {"[]", ERR_CORRUPT, "not a JSON object"},
        {"{" CLASS, ERR_CORRUPT, "not a JSON object"},
        {"", ERR_CORRUPT, "not a JSON object"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct sampler s;
        struct err err = {.code = ERR_NONE};
        assert_int_equal(load(rows[i].config, &s, &err), rows[i].code);
        if (!strstr(err.text, rows[i].key) || !strstr(err.text, "scheduler_config.json"))
            fail_msg("\"%s\" does not name the file and \"%s\"", err.text, rows[i].key);
    }
    struct sampler s;
    struct err err = {.code = ERR_NONE};
    assert_int_equal(sampler_load(folder, &s, &err), ERR_NOT_FOUND);
}

static int set_up(void **state)
{
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(schedules), cmocka_unit_test(refused)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
