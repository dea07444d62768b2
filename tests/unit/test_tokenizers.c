// test_tokenizers.c: token ids against the reference's (tests/golden/demo/tokenizers.json, tests/golden/text.json), and
// what bad text and damaged tokenizer files lead to.
#include "worker/text/clip_tokenizer.h"
#include "worker/text/t5_tokenizer.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define CLIP_DIR "ops/demo/model/tokenizer"
#define T5_DIR   "ops/demo/model/tokenizer_2"

enum { ROOM = 2048, MEGABYTE = 1000000 };

struct fixture {
    struct clip_tokenizer *clip;
    struct t5_tokenizer *t5;
};

static int set_up(void **state)
{
    static struct fixture f;
    struct err e = {0};
    if (clip_tokenizer_load(CLIP_DIR, &f.clip, &e) != 0 || t5_tokenizer_load(T5_DIR, &f.t5, &e) != 0) {
        fprintf(stderr, "%s\n", e.text);
        return -1;
    }
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    clip_tokenizer_free(f->clip);
    t5_tokenizer_free(f->t5);
    return 0;
}

// ---- golden ids

typedef int encode_fn(const void *t, const char *text, size_t length, int max_length, int32_t *ids, int64_t *count,
                      struct err *e);

static int clip_encode(const void *t, const char *text, size_t length, int max_length, int32_t *ids, int64_t *count,
                       struct err *e)
{
    return clip_tokenizer_encode(t, text, length, max_length, ids, count, e);
}

static int t5_encode(const void *t, const char *text, size_t length, int max_length, int32_t *ids, int64_t *count,
                     struct err *e)
{
    return t5_tokenizer_encode(t, text, length, max_length, ids, count, e);
}

// want: the ids; compared over max_length if it is given, else over as many as want has.
static void check_ids(encode_fn *encode, const void *t, const json_t *text, const json_t *want, int max_length,
                      const char *what)
{
    int32_t ids[ROOM];
    int64_t count = -1;
    struct err e = {0};
    int rc =
        encode(t, json_string_value(text), json_string_length(text), max_length ? max_length : ROOM, ids, &count, &e);
    assert_int_equal(rc, 0);
    if (max_length == 0 && count != (int64_t)json_array_size(want))
        fail_msg("%s of \"%s\": %lld tokens, the reference has %zu", what, json_string_value(text), (long long)count,
                 json_array_size(want));
    for (size_t i = 0; i < json_array_size(want); i++)
        if (ids[i] != json_integer_value(json_array_get(want, i)))
            fail_msg("%s of \"%s\": token %zu is %d, the reference has %lld", what, json_string_value(text), i, ids[i],
                     (long long)json_integer_value(json_array_get(want, i)));
}

static size_t check_file(const struct fixture *f, const char *path)
{
    json_t *rows = json_load_file(path, JSON_ALLOW_NUL, NULL);
    assert_non_null(rows);
    size_t n = json_array_size(rows);
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i), *text = json_object_get(row, "text");
        check_ids(clip_encode, f->clip, text, json_object_get(row, "clip_ids"), 0, "clip_ids");
        check_ids(t5_encode, f->t5, text, json_object_get(row, "t5_ids"), 0, "t5_ids");
        const json_t *padded = json_object_get(row, "padded");
        for (size_t k = 0; k < json_array_size(padded); k++) {
            const json_t *cut = json_array_get(padded, k);
            int max_length = (int)json_integer_value(json_object_get(cut, "max_length"));
            check_ids(clip_encode, f->clip, text, json_object_get(cut, "clip_ids"), max_length, "padded clip_ids");
            check_ids(t5_encode, f->t5, text, json_object_get(cut, "t5_ids"), max_length, "padded t5_ids");
        }
    }
    json_decref(rows);
    return n;
}

static void test_golden(void **state)
{
    assert_int_equal(check_file(*state, "tests/golden/demo/tokenizers.json"), 35);
    assert_in_range(check_file(*state, "tests/golden/text.json"), 400, 1000);
}

static void test_truncation_and_limits(void **state)
{
    const struct fixture *f = *state;
    int32_t ids[8];
    int64_t count;
    const char *text = "red red red red red red red red red red";
    assert_int_equal(clip_tokenizer_encode(f->clip, text, strlen(text), 8, ids, &count, NULL), 0);
    assert_int_equal(count, 12);
    assert_int_equal(ids[0], 2012);
    assert_int_equal(ids[7], 2013);
    assert_int_equal(t5_tokenizer_encode(f->t5, text, strlen(text), 8, ids, &count, NULL), 0);
    assert_int_equal(count, 11);
    assert_int_equal(ids[7], 1);
    assert_int_equal(t5_tokenizer_encode(f->t5, text, strlen(text), 1, ids, &count, NULL), 0);
    assert_int_equal(ids[0], 1);
    assert_int_equal(clip_tokenizer_max_length(f->clip), 77);
    assert_int_equal(clip_tokenizer_id_limit(f->clip), 2014);
    assert_int_equal(t5_tokenizer_id_limit(f->t5), 2000);
}

// ---- bad text

static void test_bad_text(void **state)
{
    const struct fixture *f = *state;
    static const char *const bad[] = {
        "secret\xff", "secret\xc3", "secret\xed\xa0\x80", "secret\xc0\x80", "secret\xf4\x90\x80\x80", "secret\xe2\x82"};
    int32_t ids[16];
    int64_t count;
    struct err e;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        for (int t5 = 0; t5 < 2; t5++) {
            int rc = t5 ? t5_tokenizer_encode(f->t5, bad[i], strlen(bad[i]), 16, ids, &count, &e)
                        : clip_tokenizer_encode(f->clip, bad[i], strlen(bad[i]), 16, ids, &count, &e);
            assert_int_equal(rc, ERR_INVALID);
            assert_non_null(strstr(e.text, "not valid UTF-8 at byte 6"));
            assert_null(strstr(e.text, "secret"));
        }
    assert_int_equal(clip_tokenizer_encode(f->clip, "a", 1, 1, ids, &count, &e), ERR_INVALID);
    assert_int_equal(t5_tokenizer_encode(f->t5, "a", 1, 0, ids, &count, &e), ERR_INVALID);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// A megabyte of what makes naive code quadratic: one word, one run of unsorted marks, unknown characters.
static void test_long_text_is_fast(void **state)
{
    const struct fixture *f = *state;
    static const char *const units[] = {"a",  "ab ",          "!", " ", "\u0323\u0301", "\u65e5", "\u0958",
                                        "<|", "<|endoftext|>"};
    static char text[MEGABYTE];
    int32_t ids[77];
    int64_t count;
    struct err e = {0};
    for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
        size_t unit = strlen(units[u]), n = 0;
        for (; n + unit <= sizeof text; n += unit)
            memcpy(text + n, units[u], unit);
        double start = seconds();
        assert_int_equal(clip_tokenizer_encode(f->clip, text, n, 77, ids, &count, &e), 0);
        assert_int_equal(t5_tokenizer_encode(f->t5, text, n, 77, ids, &count, &e), ERR_INVALID); // told so at once
        assert_int_equal(t5_tokenizer_encode(f->t5, text, 16000 / unit * unit, 77, ids, &count, &e), 0);
        if (seconds() - start > 10) // some 0.3 s; quadratic code would take minutes
            fail_msg("a megabyte of \"%s\" took %.1f s", units[u], seconds() - start);
    }
}

static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

// Random bytes, and random bytes patched up to lean on UTF-8 and on the special tokens.
static void test_fuzz(void **state)
{
    const struct fixture *f = *state;
    static const char *const bits[] = {
        "<|endoftext|>", "<|",   "'s", "\u0301", "\u65e5", "\u1100\u1161",     "\u0130", " ",
        "\u2581",        "</s>", "a",  "Z",      "7",      "\xf0\x9f\x98\x80", "\xc2",   "\x80"};
    uint32_t seed = 12345;
    int accepted = 0;
    for (int round = 0; round < 4000; round++) {
        char text[256];
        size_t n = 0, length = next_random(&seed) % 200;
        while (n < length)
            if (round % 2 == 0) {
                text[n++] = (char)next_random(&seed);
            } else {
                const char *bit = bits[next_random(&seed) % (sizeof bits / sizeof bits[0] - (round % 3 != 0 ? 2 : 0))];
                while (*bit != '\0')
                    text[n++] = *bit++;
            }
        int max_length = 2 + (int)(next_random(&seed) % 100);
        int32_t ids[102];
        int64_t count = 0;
        struct err e = {0};
        for (int t5 = 0; t5 < 2; t5++) {
            int rc = t5 ? t5_tokenizer_encode(f->t5, text, n, max_length, ids, &count, &e)
                        : clip_tokenizer_encode(f->clip, text, n, max_length, ids, &count, &e);
            assert_true(rc == 0 || rc == ERR_INVALID);
            for (int i = 0; rc == 0 && i < max_length; i++)
                assert_in_range(ids[i], 0, t5 ? 1999 : 2013);
            accepted += rc == 0;
        }
    }
    assert_in_range(accepted, 2000, 8000);
}

// ---- tokenizer files

static void write_file(const char *dir, const char *name, const char *bytes, size_t length)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *out = fopen(path, "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(bytes, 1, length, out), length);
    assert_int_equal(fclose(out), 0);
}

static char *read_file(const char *path, size_t *length)
{
    FILE *in = fopen(path, "rb");
    assert_non_null(in);
    struct stat st;
    assert_int_equal(fstat(fileno(in), &st), 0);
    char *bytes = malloc((size_t)st.st_size + 1);
    *length = fread(bytes, 1, (size_t)st.st_size, in);
    bytes[*length] = '\0';
    fclose(in);
    return bytes;
}

static void make_dir(char dir[64])
{
    snprintf(dir, 64, "/tmp/ditfleet-tokenizer-XXXXXX");
    assert_non_null(mkdtemp(dir));
}

static void remove_dir(const char *dir)
{
    static const char *const names[] = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
                                        "spiece.model"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}

#define VOCAB "{\"a\":0,\"b\":1,\"a</w>\":2,\"b</w>\":3,\"ab</w>\":4,\"<|startoftext|>\":5,\"<|endoftext|>\":6}"

static void test_damaged_clip_files(void **state)
{
    (void)state;
    static const struct {
        const char *vocab, *merges, *config; // NULL: no such file
        int code;
        const char *says;
    } cases[] = {
        {VOCAB, "#version: 0.2\na b</w>\n", NULL, 0, NULL},
        {VOCAB, "a b</w>\r\n\r\n", "{}", 0, NULL},
        {NULL, "", NULL, ERR_NOT_FOUND, "vocab.json"},
        {VOCAB, NULL, NULL, ERR_NOT_FOUND, "merges.txt"},
        {"", "", NULL, ERR_CORRUPT, "vocab.json"},
        {"{\"a\":0", "", NULL, ERR_CORRUPT, "vocab.json: line 1"},
        {"[1]", "", NULL, ERR_CORRUPT, "not a JSON object"},
        {"{\"a\":-1}", "", NULL, ERR_CORRUPT, "vocab.json: token \"a\""},
        {"{\"a\":\"x\"}", "", NULL, ERR_CORRUPT, "vocab.json: token \"a\""},
        {"{\"a\":99999999999}", "", NULL, ERR_CORRUPT, "vocab.json: token \"a\""},
        {"{}", "", NULL, ERR_CORRUPT, "<|startoftext|>"},
        {VOCAB, "ab\n", NULL, ERR_CORRUPT, "merges.txt: line 1"},
        {VOCAB, "a b</w>\na b c\n", NULL, ERR_CORRUPT, "merges.txt: line 2"},
        {VOCAB, " b\n", NULL, ERR_CORRUPT, "merges.txt: line 1"},
        {VOCAB, "a z\n", NULL, ERR_CORRUPT, "merges.txt: line 1"},
        {VOCAB, "", "{\"pad_token\":\"nosuch\"}", ERR_CORRUPT, "nosuch"},
        {VOCAB, "", "{\"pad_token\":7}", ERR_CORRUPT, "special token"},
        {VOCAB, "", "{", ERR_CORRUPT, "tokenizer_config.json"},
        {VOCAB, "", "{\"added_tokens_decoder\":{\"0\":{\"content\":\"a\",\"lstrip\":true}}}", ERR_UNSUPPORTED,
         "lstrip"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char dir[64];
        make_dir(dir);
        if (cases[i].vocab)
            write_file(dir, "vocab.json", cases[i].vocab, strlen(cases[i].vocab));
        if (cases[i].merges)
            write_file(dir, "merges.txt", cases[i].merges, strlen(cases[i].merges));
        if (cases[i].config)
            write_file(dir, "tokenizer_config.json", cases[i].config, strlen(cases[i].config));
        struct clip_tokenizer *t = NULL;
        struct err e = {0};
        int rc = clip_tokenizer_load(dir, &t, &e);
        remove_dir(dir);
        if (rc != cases[i].code || (rc != 0 && strstr(e.text, cases[i].says) == NULL))
            fail_msg("case %zu: code %d, \"%s\"", i, rc, e.text);
        clip_tokenizer_free(t);
    }
}

// How a folder's config files say that special tokens are matched; the ids are what transformers gives for each.
static void test_special_tokens(void **state)
{
    (void)state;
    static const char text[] = "a!<|ENDOFTEXT|>b<|endoftext|>c<|startoftext|>";
#define ANY_CASE                                                                                                       \
    "\"added_tokens_decoder\":{\"2012\":{\"content\":\"<|startoftext|>\",\"normalized\":true},"                        \
    "\"2013\":{\"content\":\"<|endoftext|>\",\"normalized\":true}}"
    static const struct {
        const char *config, *map; // NULL: no such file
        int n;
        int32_t ids[24]; // and the padding
    } cases[] = {
        {"{" ANY_CASE "}", NULL, 9, {2012, 320, 256, 2013, 321, 2013, 322, 2012, 2013, 2013}},
        {NULL, NULL, 17, {2012, 320, 0, 27, 347, 607, 895, 69, 83, 750, 91, 285, 321, 2013, 322, 2012, 2013, 2013}},
        {"{\"pad_token\":\"!\"," ANY_CASE "}", NULL, 9, {2012, 320, 0, 2013, 321, 2013, 322, 2012, 2013, 0}},
        {"{" ANY_CASE "}", "{\"pad_token\":\"!\"}", 9, {2012, 320, 256, 2013, 321, 2013, 322, 2012, 2013, 2013}},
        {"{}",
         "{\"eos_token\":{\"content\":\"<|endoftext|>\",\"normalized\":true},"
         "\"unk_token\":{\"content\":\"<|endoftext|>\",\"normalized\":true},\"pad_token\":\"!\"}",
         9,
         {2012, 320, 0, 2013, 321, 2013, 322, 2012, 2013, 0}},
    };
    size_t vocab_length, merges_length;
    char *vocab = read_file(CLIP_DIR "/vocab.json", &vocab_length);
    char *merges = read_file(CLIP_DIR "/merges.txt", &merges_length);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char dir[64];
        make_dir(dir);
        write_file(dir, "vocab.json", vocab, vocab_length);
        write_file(dir, "merges.txt", merges, merges_length);
        if (cases[i].config)
            write_file(dir, "tokenizer_config.json", cases[i].config, strlen(cases[i].config));
        if (cases[i].map)
            write_file(dir, "special_tokens_map.json", cases[i].map, strlen(cases[i].map));
        struct clip_tokenizer *t = NULL;
        struct err e = {0};
        assert_int_equal(clip_tokenizer_load(dir, &t, &e), 0);
        remove_dir(dir);
        int32_t ids[24];
        int64_t count;
        assert_int_equal(clip_tokenizer_encode(t, text, strlen(text), 24, ids, &count, &e), 0);
        assert_int_equal(count, cases[i].n);
        assert_memory_equal(ids, cases[i].ids, (size_t)(cases[i].n + 1) * sizeof *ids);
        clip_tokenizer_free(t);
    }
    free(vocab);
    free(merges);
}

static void test_damaged_t5_file(void **state)
{
    (void)state;
    struct t5_tokenizer *t = NULL;
    struct err e = {0};
    assert_int_equal(t5_tokenizer_load("/nowhere", &t, &e), ERR_NOT_FOUND);
    assert_non_null(strstr(e.text, "/nowhere/spiece.model"));
    size_t length;
    char *model = read_file(T5_DIR "/spiece.model", &length);
    char dir[64];
    make_dir(dir);
    for (size_t keep = 0; keep < length - 1000; keep += 1 + length / 10) {
        write_file(dir, "spiece.model", model, keep);
        assert_int_equal(t5_tokenizer_load(dir, &t, &e), ERR_CORRUPT);
        assert_non_null(strstr(e.text, "spiece.model"));
    }
    memset(model, 0x5a, length / 2);
    write_file(dir, "spiece.model", model, length);
    assert_int_equal(t5_tokenizer_load(dir, &t, &e), ERR_CORRUPT);
    remove_dir(dir);
    free(model);
    assert_null(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),         cmocka_unit_test(test_truncation_and_limits),
        cmocka_unit_test(test_bad_text),       cmocka_unit_test(test_long_text_is_fast),
        cmocka_unit_test(test_fuzz),           cmocka_unit_test(test_damaged_clip_files),
        cmocka_unit_test(test_special_tokens), cmocka_unit_test(test_damaged_t5_file),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
