// test_callback.c: what callbacks say, how they are signed, when they are tried again, and which secrets are taken.
#include "supervisor/callback_message.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        struct err e_ = {0}, *e = &e_;                                                                                 \
        if ((call) != 0)                                                                                               \
            fail_msg("line %d: %s", __LINE__, e->text);                                                                \
    } while (0)

// The specification's own example, and whatever its libraries are tested with.
#define SECRET "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
#define ID     "msg_p5jXN8AQM9LWM0D4loKWxJek"
#define TIME   1614265330
#define BODY   "{\"test\": 2432232314}"
#define SIGNED "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

// ---- signatures

static void test_published_vector(void **state)
{
    (void)state;
    struct callback_secrets secrets;
    char signature[CALLBACK_SIGNATURE_SIZE];
    OK(callback_secrets_parse(SECRET, "secrets", &secrets, e));
    assert_int_equal(secrets.count, 1);
    assert_int_equal(secrets.key[0].length, 24);
    OK(callback_sign(&secrets, ID, TIME, BODY, signature, e));
    assert_string_equal(signature, SIGNED);
    OK(callback_sign(&secrets, ID, TIME + 1, BODY, signature, e));
    assert_string_not_equal(signature, SIGNED);
}

static void append(char *text, size_t size, const char *more)
{
    const size_t at = strlen(text);
    snprintf(text + at, size - at, "%s", more);
}

// Rotation: one signature by each, in the file's order; the most that fit.
static void test_several_secrets(void **state)
{
    (void)state;
    struct callback_secrets secrets;
    char signature[CALLBACK_SIGNATURE_SIZE], text[1024] = "# new\n\n  " SECRET "\t\r\n";
    for (int i = 1; i < CALLBACK_MAX_SECRETS; i++) // of 64 bytes
        append(text, sizeof text,
               "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==\n");
    OK(callback_secrets_parse(text, "secrets", &secrets, e));
    assert_int_equal(secrets.count, CALLBACK_MAX_SECRETS);
    assert_int_equal(secrets.key[1].length, 64);
    OK(callback_sign(&secrets, ID, TIME, BODY, signature, e));
    assert_int_equal(strlen(signature), sizeof signature - 2);
    assert_ptr_equal(strstr(signature, SIGNED " v1,"), signature);
    append(text, sizeof text, SECRET);
    struct err err = {0};
    assert_int_equal(callback_secrets_parse(text, "secrets", &secrets, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "secrets:11: more than 8 secrets"));
}

// ---- secrets that are none

static void test_bad_secrets(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "",
        "\n# " SECRET "\n",
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",                  // no prefix
        "whsec_",                                            // nothing
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS",             // cut
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLa==",            // 22 bytes
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS=",            // 23 bytes
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2La====",            // three pads and more
        "whsec_MfKQ9r8GKYqr-_jUPD8ILPZIo2LaLaSw",            // the alphabet of URLs
        "whsec_MfKQ9r8G KYqrTwjUPD8ILPZIo2LaLaSw",           // a space
        "whsec_MfKQ9r8G=KYqrTwjUPD8ILPZIo2LaLaS",            // padding inside
        SECRET " " SECRET,                                   // two in a line
        SECRET "\nhello",                                    // a line that is none
        "whsk_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",             // another kind
        "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" // 66 bytes
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct callback_secrets secrets;
        struct err err = {0};
        if (callback_secrets_parse(bad[i], "secrets", &secrets, &err) != ERR_INVALID)
            fail_msg("taken: %s", bad[i]);
        assert_ptr_equal(strstr(err.text, "secrets:"), err.text);
        assert_null(strstr(err.text, "MfKQ"));
        assert_null(strstr(err.text, "hello"));
    }
}

static int load(const char *path, struct err *err)
{
    struct callback_secrets secrets;
    *err = (struct err){0};
    int rc = callback_secrets_load(path, &secrets, err);
    if (rc != 0)
        assert_int_equal(secrets.count, 0);
    callback_secrets_wipe(&secrets);
    return rc;
}

static void test_secret_files(void **state)
{
    (void)state;
    char folder[] = "/tmp/ditfleet-callback.XXXXXX", path[64], fifo[64];
    struct err err;
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/secrets", folder);
    snprintf(fifo, sizeof fifo, "%s/fifo", folder);
    assert_int_equal(load(path, &err), ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "[callback] secret_file"));
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(write(fd, SECRET "\n", strlen(SECRET) + 1) > 0);
    for (unsigned mode = 0; mode <= 0777; mode++) {
        assert_int_equal(fchmod(fd, 0400 | mode), 0);
        int want = mode & 027 ? ERR_REFUSED : 0;
        if (load(path, &err) != want)
            fail_msg("mode %03o: %s", 0400 | mode, err.text);
    }
    fchmod(fd, 0600);
    if (geteuid() == 0) {
        assert_int_equal(fchown(fd, 65534, 65534), 0);
        assert_int_equal(load(path, &err), ERR_REFUSED);
        assert_non_null(strstr(err.text, "another user"));
        assert_int_equal(fchown(fd, 0, 0), 0);
    }
    assert_int_equal(write(fd, "", 1), 1); // a zero byte
    assert_int_equal(load(path, &err), ERR_INVALID);
    char line[4097];
    memset(line, '#', sizeof line);
    assert_int_equal(ftruncate(fd, 0), 0);
    assert_int_equal(pwrite(fd, line, sizeof line, 0), sizeof line);
    assert_int_equal(load(path, &err), ERR_INVALID);
    close(fd);
    assert_int_equal(load(folder, &err), ERR_REFUSED);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(load(fifo, &err), ERR_REFUSED); // at once: nobody writes to it
    unlink(path);
    unlink(fifo);
    rmdir(folder);
}

// ---- bodies

static char *body_of(Ditfleet__V1__Result *result, Ditfleet__V1__State state)
{
    struct queue_callback c = {.tenant = "acme", .id = "a.b_c-1", .state = state, .time_ms = 1614265330007};
    char *body = NULL;
    OK(result_pack(result, &c.result, &c.result_length, e));
    OK(callback_body(&c, &body, e));
    queue_callback_free(&c);
    return body;
}

static void test_body_of_success(void **state)
{
    (void)state;
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    Ditfleet__V1__Image one = DITFLEET__V1__IMAGE__INIT, two = DITFLEET__V1__IMAGE__INIT;
    Ditfleet__V1__Image *images[] = {&one, &two};
    Ditfleet__V1__Job used = DITFLEET__V1__JOB__INIT;
    one.location = (char *)"https://store.example/a%20\xc3\xa4.png";
    one.bytes = 5000000000;
    one.sha256 = (char *)"ab12";
    two.location = (char *)"/srv/\"quoted\"\\\n.png";
    two.index = 1;
    used.prompt = (char *)"hush-hush";
    used.negative_prompt = (char *)"hush-hush";
    result.id = (char *)"a.b_c-1";
    result.n_images = 2;
    result.images = images;
    result.used = &used;
    result.attempt = 3;
    result.worker = (char *)"hush-hush";
    char *body = body_of(&result, DITFLEET__V1__STATE__STATE_SUCCEEDED);
    assert_string_equal(body,
                        "{\"type\":\"job.succeeded\",\"timestamp\":\"2021-02-25T15:02:10.007Z\",\"data\":{\"id\":"
                        "\"a.b_c-1\",\"tenant\":\"acme\",\"state\":\"SUCCEEDED\",\"images\":[{\"location\":"
                        "\"https://store.example/a%20\xc3\xa4.png\",\"bytes\":5000000000,\"sha256\":\"ab12\",\"index\":"
                        "0},{\"location\":\"/srv/\\\"quoted\\\"\\\\\\n.png\",\"bytes\":0,\"sha256\":\"\",\"index\":1}],"
                        "\"error\":null,\"attempt\":3}}");
    free(body);
}

static void test_body_of_failures(void **state)
{
    (void)state;
    static const struct {
        Ditfleet__V1__State state;
        const char *type;
    } cases[] = {
        {DITFLEET__V1__STATE__STATE_DEAD, "job.dead"},
        {DITFLEET__V1__STATE__STATE_CANCELLED, "job.cancelled"},
        {DITFLEET__V1__STATE__STATE_EXPIRED, "job.expired"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
        Ditfleet__V1__Error error = DITFLEET__V1__ERROR__INIT;
        error.code = (char *)"io";
        error.message = (char *)"no \"file\"\x01 \xc3\xa4";
        result.error = &error;
        char *body = body_of(&result, cases[i].state);
        json_t *json = json_loads(body, JSON_REJECT_DUPLICATES, NULL), *data = json_object_get(json, "data");
        assert_string_equal(json_string_value(json_object_get(json, "type")), cases[i].type);
        assert_string_equal(json_string_value(json_object_get(data, "state")), job_state_name(cases[i].state));
        assert_int_equal(json_array_size(json_object_get(data, "images")), 0);
        json_t *e = json_object_get(data, "error");
        assert_int_equal(json_object_size(e), 2);
        assert_string_equal(json_string_value(json_object_get(e, "code")), "io");
        assert_string_equal(json_string_value(json_object_get(e, "message")), "no \"file\"\x01 \xc3\xa4");
        assert_null(strchr(body, '\n'));
        json_decref(json);
        free(body);
    }
}

static void test_body_of_rubbish(void **state)
{
    (void)state;
    struct queue_callback c = {.id = "a", .result = (void *)"\xff\xff\xff", .result_length = 3};
    struct err err = {0};
    char *body = NULL;
    assert_int_equal(callback_body(&c, &body, &err), ERR_CORRUPT);
    assert_null(body);
}

// ---- waits

static void test_waits(void **state)
{
    (void)state;
    static const struct {
        uint64_t tries;
        double asked_for, random, want;
    } cases[] = {{1, 0, 0, 2.5},     {1, 0, 0.5, 3.75},    {2, 0, 0, 5},          {3, 0, 0, 10},   {10, 0, 0, 1280},
                 {11, 0, 0, 1800},   {12, 0, 0, 1800},     {1000000, 0, 0, 1800}, {1, 30, 0, 30},  {1, 1, 0, 2.5},
                 {1, 1e9, 0, 3600},  {9, 30, 0, 640},      {1, -5, 0, 2.5},       {0, 0, 0, 1.25}, {4, 0, 0.999, 39.98},
                 {12, 0, 1, 3600.0}, {12, 3600, 0, 3600.0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double got = callback_wait(5, 3600, cases[i].tries, cases[i].asked_for, cases[i].random);
        if (got < cases[i].want - 1e-9 || got > cases[i].want + 1e-9)
            fail_msg("try %llu, asked for %g, random %g: %.17g, not %g", (unsigned long long)cases[i].tries,
                     cases[i].asked_for, cases[i].random, got, cases[i].want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published_vector), cmocka_unit_test(test_several_secrets),
        cmocka_unit_test(test_bad_secrets),      cmocka_unit_test(test_secret_files),
        cmocka_unit_test(test_body_of_success),  cmocka_unit_test(test_body_of_failures),
        cmocka_unit_test(test_body_of_rubbish),  cmocka_unit_test(test_waits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
