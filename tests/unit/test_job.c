// test_job.c: the table of job fields, and a parser that survives any bytes.
#include "proto/job.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static Ditfleet__V1__Job *good_job(void)
{
    static const char *const fields[][2] = {
        {"id", "job-1"},
        {"model", "shapes@1"},
        {"prompt", "a red circle"},
        {"width", "256"},
        {"height", "256"},
        {"num_inference_steps", "20"},
        {"guidance-scale", "3.5"},
        {"seed", "42"},
        {"output.url", "http://127.0.0.1:1/{id}-{attempt}.png"},
        {"labels", "team=a=b"},
        {"output.headers", "X-Key: v"},
        {"negative_prompt", ""},
    };
    Ditfleet__V1__Job *job = job_new();
    assert_non_null(job);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        struct err e = {0};
        if (job_set_field(job, fields[i][0], fields[i][1], &e) != 0)
            fail_msg("%s: %s", fields[i][0], e.text);
    }
    return job;
}

static void good_bytes(void **bytes, size_t *length)
{
    Ditfleet__V1__Job *job = good_job();
    assert_int_equal(job_pack(job, bytes, length, NULL), 0);
    job_free(job);
}

// Packs without validation, as a careless client would, and expects the parser to refuse it in words.
static void expect_refused(Ditfleet__V1__Job *job, enum err_code code, const char *words)
{
    void *bytes;
    size_t length;
    struct err e = {0};
    Ditfleet__V1__Job *parsed;
    assert_int_equal(job_pack(job, &bytes, &length, NULL), 0);
    int rc = job_parse(bytes, length, &parsed, NULL, &e);
    if (rc != (int)code || !strstr(e.text, words))
        fail_msg("expected %s with '%s', got %s: %s", err_name(code), words, err_name((enum err_code)rc), e.text);
    assert_null(parsed);
    free(bytes);
    job_free(job);
}

static void test_round_trip(void **state)
{
    (void)state;
    void *bytes;
    size_t length;
    char id[JOB_NAME_SIZE];
    struct err e = {0};
    Ditfleet__V1__Job *job;
    good_bytes(&bytes, &length);
    if (job_parse(bytes, length, &job, id, &e) != 0)
        fail_msg("%s", e.text);
    assert_string_equal(id, "job-1");
    assert_string_equal(job->prompt, "a red circle");
    assert_int_equal(job->num_inference_steps, 20);
    assert_int_equal(job->seed__case, DITFLEET__V1__JOB__SEED__SEED);
    assert_true(job->seed == 42);
    assert_int_equal(job->negative_prompt__case, DITFLEET__V1__JOB__NEGATIVE_PROMPT__NEGATIVE_PROMPT);
    assert_int_equal(job->true_cfg_scale__case, 0);
    assert_string_equal(job->labels[0]->value, "a=b");
    assert_string_equal(job->output->headers[0]->value, "v");
    Ditfleet__V1__Job *copy = job_copy(job);
    assert_non_null(copy);
    assert_string_equal(copy->output->url, job->output->url);
    job_free(copy);
    job_free(job);
    free(bytes);
}

// A field of job.proto without a row, or a row without a field, is a hole in validation.
static void check_rows(const ProtobufCMessageDescriptor *d, const char *prefix, size_t *seen)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    for (unsigned i = 0; i < d->n_fields; i++) {
        char path[128];
        size_t at = 0;
        snprintf(path, sizeof path, "%s%s%s", prefix, *prefix ? "." : "", d->fields[i].name);
        while (at < count && strcmp(rules[at].name, path) != 0)
            at++;
        if (at == count)
            fail_msg("the table has no row for %s", path);
        bool text = d->fields[i].type == PROTOBUF_C_TYPE_STRING;
        if ((text && !rules[at].max_bytes) ||
            (d->fields[i].label == PROTOBUF_C_LABEL_REPEATED && !rules[at].max_items) || !rules[at].doc)
            fail_msg("the row of %s has no bound or no sentence", path);
        ++*seen;
        if (d->fields[i].type == PROTOBUF_C_TYPE_MESSAGE)
            check_rows(d->fields[i].descriptor, path, seen);
    }
}

static char *read_file(const char *path)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = fopen(path, "r");
    if (!f)
        fail_msg("%s is not there", path);
    if (getdelim(&text, &size, 0, f) < 0)
        fail_msg("%s is empty", path);
    fclose(f);
    return text;
}

static void test_table_is_whole_and_documented(void **state)
{
    (void)state;
    size_t seen = 0, count, size;
    char *table, *document = read_file("proto/PROTOCOL.md");
    job_rules(&count);
    check_rows(&ditfleet__v1__job__descriptor, "", &seen);
    assert_int_equal(seen, count);
    FILE *f = open_memstream(&table, &size);
    job_print_table(f);
    fclose(f);
    if (!strstr(document, table)) {
        printf("%s", table);
        fail_msg("the table of fields in proto/PROTOCOL.md is not the one above; paste it");
    }
    const ProtobufCMessageDescriptor *others[] = {&ditfleet__v1__result__descriptor, &ditfleet__v1__event__descriptor,
                                                  &ditfleet__v1__image__descriptor, &ditfleet__v1__timing__descriptor,
                                                  &ditfleet__v1__error__descriptor};
    for (size_t m = 0; m < 5; m++)
        for (unsigned i = 0; i < others[m]->n_fields; i++) {
            char word[64];
            snprintf(word, sizeof word, "`%s`", others[m]->fields[i].name);
            if (!strstr(document, word))
                fail_msg("PROTOCOL.md does not name %s of %s", word, others[m]->short_name);
        }
    for (int code = ERR_NONE + 1; code < ERR_CODES; code++) {
        char word[64];
        snprintf(word, sizeof word, "| `%s` |", err_name((enum err_code)code));
        if (!strstr(document, word))
            fail_msg("PROTOCOL.md does not list the error %s", word);
    }
    free(table);
    free(document);
}

static void test_names_of_enums(void **state)
{
    (void)state;
    char allowed[256], names[256] = "";
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    for (size_t i = 0; i < count; i++) {
        const char *want = NULL;
        if (strcmp(rules[i].name, "rng") == 0)
            for (int v = 0; v < 6; v++)
                snprintf(names + strlen(names), 32, "%s%s", v ? ", " : "", job_rng_name((Ditfleet__V1__Rng)v)),
                    want = names;
        if (want)
            assert_string_equal(job_rule_allowed(&rules[i], allowed, sizeof allowed), want);
        if (strcmp(rules[i].name, "priority") == 0)
            assert_string_equal(job_rule_allowed(&rules[i], allowed, sizeof allowed), "normal, high, low");
        if (strcmp(rules[i].name, "precision") == 0)
            assert_string_equal(job_rule_allowed(&rules[i], allowed, sizeof allowed),
                                "default, fp32, bf16, fp16, fp8, int8");
    }
    assert_string_equal(job_precision_name(DITFLEET__V1__PRECISION__PRECISION_INT8), "int8");
    assert_string_equal(job_priority_name(DITFLEET__V1__PRIORITY__PRIORITY_LOW), "low");
    assert_string_equal(job_state_name(DITFLEET__V1__STATE__STATE_RETRY_WAIT), "RETRY_WAIT");
    assert_int_equal(job_state_parse("UPLOADING"), DITFLEET__V1__STATE__STATE_UPLOADING);
    assert_int_equal(job_state_parse("x"), DITFLEET__V1__STATE__STATE_UNKNOWN);
}

static void test_bad_fields_from_text(void **state)
{
    (void)state;
    static const char *const bad[][3] = {
        {"width", "8", "16 to 16384"},
        {"width", "12x", "whole number"},
        {"width", "99999999999", "its type"},
        {"num-inference-steps", "0", "1 to 1000"},
        {"guidance_scale", "nan", "0 to 100"},
        {"guidance_scale", "inf", "0 to 100"},
        {"guidance_scale", "abc", "a number"},
        {"rng", "mt19937", "cpu-f32, cpu-bf16"},
        {"priority", "urgent", "normal, high"},
        {"id", "a/b", "A-Z"},
        {"id", "", NULL},
        {"model", "a@", "name@version"},
        {"no_such", "1", "no field"},
        {"output", "x", "no field"},
        {"labels.key", "x", "no field"},
        {"labels", "novalue", "name=value"},
        {"output.headers", "A B: x", "token"},
        {"output.headers", "A: x\r\nB: y", "control"},
        {"output.url", "ftp://h/x", "http://"},
        {"output.url", "http:///x", "no host"},
        {"output.url", "http://h/{nope}", "placeholder"},
        {"output.url", "http://{id}/x", "host"},
        {"output.url", "http://h/a b", "percent-encoded"},
        {"output.file", "a/../b.png", "'..'"},
        {"output.file", "a/", "ends in"},
        {"callback_url", "http://h/{id}", "braces"},
        {"callback_url", "http://me:secret@h/", "user or password"},
        {"traceparent", "00-xyz", "W3C"},
        {"scheduler", "DDIM", "FlowMatch"},
        {"prompt", "\xff\xfe", "UTF-8 at byte 0"},
        {"seed", "18446744073709551616", "its type"},
        {"seed", "-1", "whole number"},
        {"shift", "0", "0.01 to 100"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct err e = {0};
        Ditfleet__V1__Job *job = job_new();
        int rc = job_set_field(job, bad[i][0], bad[i][1], &e);
        if (bad[i][2] && (rc == 0 || !strstr(e.text, bad[i][2])))
            fail_msg("%s=%s gave %d '%s', not '%s'", bad[i][0], bad[i][1], rc, e.text, bad[i][2]);
        job_free(job);
    }
    Ditfleet__V1__Job *job = job_new();
    assert_int_equal(job_set_field(job, "seed", "18446744073709551615", NULL), 0);
    assert_int_equal(job_set_field(job, "rng", "RNG_CUDA", NULL), 0);
    assert_int_equal(job_set_field(job, "prompt", "one", NULL), 0);
    assert_int_equal(job_set_field(job, "prompt", "two", NULL), 0);
    assert_int_equal(job_set_field(job, "negative-prompt", "x", NULL), 0);
    assert_int_equal(job_set_field(job, "negative-prompt", "y", NULL), 0);
    assert_true(job->seed == UINT64_MAX && job->rng == DITFLEET__V1__RNG__RNG_CUDA);
    assert_string_equal(job->prompt, "two");
    struct err e = {0};
    assert_int_equal(job_check_fields(job, &e), 0);
    assert_int_equal(job_validate(job, &e), ERR_INVALID);
    assert_string_equal(e.text, "id is missing");
    job_free(job);
}

static void test_bad_messages(void **state)
{
    (void)state;
    Ditfleet__V1__Job *job = good_job();
    job->guidance_scale = NAN;
    expect_refused(job, ERR_INVALID, "guidance_scale is nan; allowed: 0 to 100");
    job = good_job();
    job->guidance_scale = -INFINITY;
    expect_refused(job, ERR_INVALID, "guidance_scale");
    job = good_job();
    job->rng = (Ditfleet__V1__Rng)77;
    expect_refused(job, ERR_INVALID, "rng is the number 77; allowed: cpu-f32");
    job = good_job();
    memcpy(job->prompt, "\xc3\x28", 2);
    expect_refused(job, ERR_INVALID, "prompt is not UTF-8 at byte 0");
    job = good_job();
    job->height = 1 << 20;
    expect_refused(job, ERR_INVALID, "height");
    job = good_job();
    job->num_images = 2;
    expect_refused(job, ERR_INVALID, "{index}");
    job = good_job();
    job->output->file = strdup("x.png");
    expect_refused(job, ERR_INVALID, "exactly one");
    job = good_job();
    free(job->output->headers[0]->name);
    job->output->headers[0]->name = strdup("");
    expect_refused(job, ERR_INVALID, "output.headers.name is missing");
    job = good_job();
    free(job->model);
    job->model = strdup("");
    expect_refused(job, ERR_INVALID, "model is missing");
    job = good_job();
    ditfleet__v1__output__free_unpacked(job->output, NULL);
    job->output = NULL;
    expect_refused(job, ERR_INVALID, "output is missing");
    job = good_job();
    job->deadline_ms = job->not_before_ms = 5;
    expect_refused(job, ERR_INVALID, "not_before_ms");
}

static void test_long_prompt_is_named(void **state)
{
    (void)state;
    Ditfleet__V1__Job *job = good_job();
    size_t length = 1 << 20;
    free(job->prompt);
    job->prompt = malloc(length + 1);
    memset(job->prompt, 'x', length);
    job->prompt[length] = 0;
    expect_refused(job, ERR_INVALID, "prompt has 1048576 bytes; allowed: at most 32768");
}

// Bytes that protobuf-c would accept or mangle in silence.
static void test_odd_wire_bytes(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t length;
        enum err_code code;
        const char *words;
    } cases[] = {
        {"", 0, ERR_CORRUPT, "no bytes"},
        {"\x1a\x03"
         "a\0b",
         5, ERR_INVALID, "prompt contains a zero byte"},
        {"\xc2\x02\x00", 3, ERR_UNSUPPORTED, "field number 40"},
        {"\x0a\x01"
         "a"
         "\x0a\x01"
         "b",
         6, ERR_INVALID, "id occurs twice"},
        {"\x08\x01", 2, ERR_CORRUPT, "id has wire type 0; allowed: 2"},
        {"\x0b", 1, ERR_CORRUPT, "no valid number and type"},
        {"\x00", 1, ERR_CORRUPT, "no valid number and type"},
        {"\x0a\x05"
         "ab",
         4, ERR_CORRUPT, "end inside id"},
        {"\x38\x80", 2, ERR_CORRUPT, "end inside width"},
        {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, ERR_CORRUPT, "end inside id"},
        {"\xa2\x01\x02\x0a\x09", 5, ERR_CORRUPT, "end inside output.url"},
        {"\x80", 1, ERR_CORRUPT, "a field's tag"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = {0};
        Ditfleet__V1__Job *job;
        int rc = job_parse(cases[i].bytes, cases[i].length, &job, NULL, &e);
        if (rc != (int)cases[i].code || !strstr(e.text, cases[i].words))
            fail_msg("case %zu: %s: %s", i, err_name((enum err_code)rc), e.text);
    }
}

static uint64_t next_random(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

// Any bytes end in a job or in an error with text; the sanitizers see the rest.
static void test_fuzz(void **state)
{
    (void)state;
    void *good;
    size_t length;
    uint64_t seed = 88172645463325252u;
    unsigned parsed = 0;
    good_bytes(&good, &length);
    for (int i = 0; i < 60000; i++) {
        unsigned char buffer[512];
        size_t n = length;
        memcpy(buffer, good, length);
        if (i % 3 == 0) {
            n = next_random(&seed) % (length + 1);
        } else if (i % 3 == 1) {
            for (uint64_t k = next_random(&seed) % 4 + 1; k > 0; k--)
                buffer[next_random(&seed) % length] = (unsigned char)next_random(&seed);
        } else {
            n = next_random(&seed) % sizeof buffer;
            for (size_t k = 0; k < n; k++)
                buffer[k] = (unsigned char)(next_random(&seed) >> 9);
        }
        unsigned char *exact = malloc(n ? n : 1); // so that reading past the end is seen
        memcpy(exact, buffer, n);
        struct err e = {0};
        Ditfleet__V1__Job *job;
        char id[JOB_NAME_SIZE];
        if (job_parse(exact, n, &job, id, &e) == 0) {
            parsed++;
            job_free(job);
        } else if (!*e.text || job) {
            fail_msg("bytes %d were refused without a reason", i);
        }
        Ditfleet__V1__Result *result;
        if (result_unpack(exact, n, &result, &e) == 0)
            result_free(result);
        free(exact);
    }
    assert_in_range(parsed, 100, 30000);
    free(good);
}

static void test_results(void **state)
{
    (void)state;
    struct err why, e = {0};
    void *bytes;
    size_t length;
    Ditfleet__V1__Result *result;
    err_set(&why, ERR_UPLOAD, "the host answered 403");
    assert_int_equal(result_pack_error("a", DITFLEET__V1__STATE__STATE_DEAD, &why, &bytes, &length, &e), 0);
    assert_int_equal(result_unpack(bytes, length, &result, &e), 0);
    assert_string_equal(result->error->code, "upload");
    assert_string_equal(result->error->message, "the host answered 403");
    result_free(result);
    free(bytes);
    assert_int_equal(result_unpack("\x0a\x02\xff\xfe", 4, &result, &e), ERR_INVALID);
    assert_null(result);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),     cmocka_unit_test(test_table_is_whole_and_documented),
        cmocka_unit_test(test_names_of_enums), cmocka_unit_test(test_bad_fields_from_text),
        cmocka_unit_test(test_bad_messages),   cmocka_unit_test(test_long_prompt_is_named),
        cmocka_unit_test(test_odd_wire_bytes), cmocka_unit_test(test_fuzz),
        cmocka_unit_test(test_results),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
