// test_weights.c: safetensors as the reference writes them, and as nobody should: every file made here is either read
// right or refused with a sentence that names it.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/weights.h"

static char folder[] = "/tmp/ditfleet-weights-XXXXXX";

static const char *in_folder(const char *name)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put(const char *name, const void *bytes, size_t size)
{
    FILE *f = fopen(in_folder(name), "wbe");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

static void put_text(const char *name, const char *text)
{
    put(name, text, strlen(text));
}

// The bytes of a file: length, header, data.
static size_t compose(uint8_t *out, const char *header, const void *data, size_t size)
{
    const uint64_t length = strlen(header);
    memcpy(out, &length, sizeof length);
    for (uint64_t i = 0; i < length; i++)
        out[8 + i] = (uint8_t)header[i];
    if (size)
        memcpy(out + 8 + length, data, size);
    return 8 + length + size;
}

static void put_tensors(const char *name, const char *header, const void *data, size_t size)
{
    static uint8_t file[65536];
    put(name, file, compose(file, header, data, size));
}

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st, (void)kind, (void)ftw;
    return remove(path);
}

// An empty folder for every test.
static int set_up(void **state)
{
    (void)state;
    nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
    return mkdir(folder, 0700);
}

static int tear_down(void **state)
{
    (void)state;
    return nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

static struct weights *opened(void)
{
    struct err err = {.code = ERR_NONE};
    struct weights *w = NULL;
    if (weights_open(folder, "model", NULL, &w, &err) != 0)
        fail_msg("%s", err.text);
    return w;
}

static void expect_error(const struct err *err, enum err_code code, const char *a, const char *b, const char *c)
{
    const char *parts[] = {a, b, c};
    if (err->code != code)
        fail_msg("%s: \"%s\", expected %s", err_name(err->code), err->text, err_name(code));
    for (int i = 0; i < 3; i++)
        if (parts[i] && !strstr(err->text, parts[i]))
            fail_msg("\"%s\" does not say \"%s\"", err->text, parts[i]);
}

static void expect_refused(enum err_code code, const char *a, const char *b)
{
    struct err err = {.code = ERR_NONE};
    struct weights *w = (struct weights *)1;
    assert_int_equal(weights_open(folder, "model", NULL, &w, &err), code);
    assert_null(w);
    expect_error(&err, code, a, b, NULL);
}

// ---- good files

#define THREE                                                                                                          \
    "{\"__metadata__\":{\"format\":\"pt\"},"                                                                           \
    "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"                                               \
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},"                                               \
    "\"c\":{\"dtype\":\"F16\",\"shape\":[2,1,1,2],\"data_offsets\":[32,40]}}"
static const uint8_t forty[40] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                  21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40};

static void expect_three(struct weights *w)
{
    struct err err = {.code = ERR_NONE};
    struct tensor t;
    assert_int_equal(weights_get(w, &t, 2, 2, 3, 1, 1, &err, "%s", "a"), 0);
    assert_int_equal(t.dtype, DT_F32);
    assert_int_equal(t.ld, 3);
    assert_int_equal((uintptr_t)t.data % 4, 0);
    assert_memory_equal(t.data, forty, 24);
    assert_int_equal(weights_get(w, &t, 1, 4, 1, 1, 1, &err, "b"), 0);
    assert_int_equal(t.dtype, DT_BF16);
    assert_int_equal((uintptr_t)t.data % 2, 0);
    assert_memory_equal(t.data, forty + 24, 8);
    assert_int_equal(weights_get(w, &t, 4, 2, 1, 1, 2, &err, "c"), 0);
    assert_int_equal(t.dtype, DT_F16);
    assert_memory_equal(t.data, forty + 32, 8);
    assert_int_equal(weights_bytes(w), 40);
    assert_true(weights_has(w, "c"));
    assert_false(weights_has(w, "__metadata__"));
    assert_false(weights_has(w, ""));
}

static void single(void **state)
{
    (void)state;
    put_tensors("model.safetensors", THREE, forty, sizeof forty);
    struct weights *w = opened();
    expect_three(w);
    weights_free(w);
}

// Old writers did not pad the header: tensors may begin at any byte.
static void misaligned(void **state)
{
    (void)state;
    for (int pad = 0; pad < 8; pad++) {
        char header[512];
        snprintf(header, sizeof header, "%s%*s", THREE, pad, "");
        put_tensors("model.safetensors", header, forty, sizeof forty);
        struct weights *w = opened();
        expect_three(w);
        weights_free(w);
    }
}

#define INDEX "model.safetensors.index.json"

static void put_shards(void)
{
    put_tensors("one.safetensors",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]}}",
                forty, 32);
    put_tensors("two.safetensors", "{\"c\":{\"dtype\":\"F16\",\"shape\":[2,1,1,2],\"data_offsets\":[0,8]}}", forty + 32,
                8);
    put_text(INDEX, "{\"metadata\":{\"total_size\":40},\"weight_map\":"
                    "{\"a\":\"one.safetensors\",\"c\":\"two.safetensors\",\"b\":\"one.safetensors\"}}");
}

static void sharded(void **state)
{
    (void)state;
    put_shards();
    struct weights *w = opened();
    expect_three(w);
    struct err err;
    struct tensor t;
    assert_int_equal(weights_get(w, &t, 1, 4, 1, 1, 1, &err, "d"), ERR_CORRUPT);
    expect_error(&err, ERR_CORRUPT, "tensor d [4] is missing", "one.safetensors", NULL);
    weights_free(w);
}

static void empty_tensors(void **state)
{
    (void)state;
    put_tensors("model.safetensors",
                "{\"z\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[4,4]},"
                "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
                "\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
                forty, 8);
    struct weights *w = opened();
    struct err err;
    struct tensor t;
    assert_int_equal(weights_get(w, &t, 2, 0, 7, 1, 1, &err, "z"), 0);
    assert_int_equal(weights_get(w, &t, 1, 1, 1, 1, 1, &err, "s"), 0); // a scalar
    assert_memory_equal(t.data, forty, 4);
    weights_free(w);
    put_tensors("model.safetensors", "{}", NULL, 0);
    w = opened();
    assert_int_equal(weights_bytes(w), 0);
    assert_false(weights_has(w, "a"));
    weights_free(w);
}

// The weights of a convolution are laid out anew, the parts of a linear layer side by side.
static void layers(void **state)
{
    (void)state;
    enum { OUT = 2, IN = 3, TAPS = 9, CONV = OUT * IN * TAPS };
    float data[CONV + OUT + 12 + 6];
    for (int i = 0; i < (int)(sizeof data / sizeof *data); i++)
        data[i] = (float)i;
    put_tensors("model.safetensors",
                "{\"conv.weight\":{\"dtype\":\"F32\",\"shape\":[2,3,3,3],\"data_offsets\":[0,216]},"
                "\"conv.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[216,224]},"
                "\"at.q.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[224,256]},"
                "\"at.k.weight\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[256,272]},"
                "\"at.q.bias\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[272,288]},"
                "\"at.k.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[288,296]}}",
                data, sizeof data);
    struct weights *w = opened();
    struct err err = {.code = ERR_NONE};
    struct conv conv;
    assert_int_equal(weights_conv(w, &conv, OUT, IN, 3, &err, "%s", "conv"), 0);
    for (int o = 0; o < OUT; o++)
        for (int t = 0; t < TAPS; t++)
            for (int i = 0; i < IN; i++)
                assert_true(((float *)conv.w.data)[(o * TAPS + t) * IN + i] == data[(o * IN + i) * TAPS + t]);
    assert_int_equal(conv.w.n[1], 3);
    assert_int_equal(conv.w.n[3], IN);
    assert_memory_equal(conv.b.data, data + CONV, sizeof(float) * OUT);

    static const char *const names[] = {"q", "k"};
    struct linear l;
    assert_int_equal(weights_linear(w, &l, "at", 2, names, (const int64_t[]){4, 2}, 2, true, &err), 0);
    assert_int_equal(l.n, 6);
    assert_int_equal(l.k, 2);
    assert_memory_equal(l.w[1].data, data + CONV + OUT + 8, 4 * sizeof(float));
    assert_int_equal(weights_linear1(w, &l, 4, 2, true, &err, "at.%c", 'q'), 0);
    struct tensor gamma, beta;
    assert_int_equal(weights_norm(w, &gamma, &beta, 4, &err, "at.q"), ERR_CORRUPT);
    expect_error(&err, ERR_CORRUPT, "at.q.weight", "[4, 2]", "[4]");
    assert_int_equal(weights_conv(w, &conv, OUT, IN + 1, 3, &err, "conv"), ERR_CORRUPT);
    expect_error(&err, ERR_CORRUPT, "conv.weight", "[2, 3, 3, 3]", "[2, 4, 3, 3]");
    assert_int_equal(weights_linear(w, &l, "at", 2, names, (const int64_t[]){4, 3}, 2, true, &err), ERR_CORRUPT);
    expect_error(&err, ERR_CORRUPT, "at.k.weight", "[2, 2]", "[3, 2]");
    weights_free(w);
}

static void fingerprints(void **state)
{
    (void)state;
    uint8_t a[32], b[32], c[32], other[40];
    put_tensors("model.safetensors", THREE, forty, sizeof forty);
    struct weights *w = opened();
    weights_fingerprint(w, a);
    weights_free(w);
    w = opened();
    weights_fingerprint(w, b);
    weights_free(w);
    memcpy(other, forty, sizeof other);
    other[39]++;
    put_tensors("model.safetensors", THREE, other, sizeof other);
    w = opened();
    weights_fingerprint(w, c);
    weights_free(w);
    assert_memory_equal(a, b, 32);
    assert_memory_not_equal(a, c, 32);
}

// ---- writing

static uint64_t header_length(const char *name)
{
    uint8_t bytes[8];
    uint64_t length = 0;
    FILE *f = fopen(in_folder(name), "rbe");
    assert_non_null(f);
    assert_int_equal(fread(bytes, 1, sizeof bytes, f), sizeof bytes);
    fclose(f);
    for (int i = 7; i >= 0; i--)
        length = length << 8 | bytes[i];
    return length;
}

// What was saved is what was opened, whatever it was opened from.
static void saved(void **state)
{
    (void)state;
    put_shards();
    put_text(INDEX, "{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"one.safetensors\",\"c\":\"two.safetensors\"}}");
    struct err err = {.code = ERR_NONE};
    struct weights *w = opened(), *copy;
    if (weights_save(w, folder, "copy", &err) != 0)
        fail_msg("%s", err.text);
    assert_int_equal(header_length("copy.safetensors") % 8, 0);
    assert_int_equal(weights_open(folder, "copy", NULL, &copy, &err), 0);
    expect_three(copy);
    weights_free(copy);
    put_text("copy.safetensors", "mine");
    assert_int_equal(weights_save(w, folder, "copy", &err), ERR_INVALID);
    expect_error(&err, ERR_INVALID, "copy.safetensors", "is there already", NULL);
    assert_int_equal(access(in_folder("copy.safetensors"), F_OK), 0);
    weights_free(w);
}

// A file system that ends within the header, within a tensor, or is not there.
static void unwritable(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    struct rlimit before, small;
    put_tensors("model.safetensors", THREE, forty, sizeof forty);
    struct weights *w = opened();
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_IGN);
    for (rlim_t room = 0; room < 240; room += 30) {
        small = (struct rlimit){.rlim_cur = room, .rlim_max = before.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        const int rc = weights_save(w, folder, "copy", &err);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
        assert_int_equal(rc, ERR_IO);
        expect_error(&err, ERR_IO, "copy.safetensors: cannot be written (File too large)", "room for 40 bytes", NULL);
        assert_int_not_equal(access(in_folder("copy.safetensors"), F_OK), 0);
    }
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(weights_save(w, in_folder("nowhere"), "copy", &err), ERR_IO);
    expect_error(&err, ERR_IO, "nowhere/copy.safetensors", "No such file or directory", NULL);
    assert_int_equal(symlink("/dev/full", in_folder("copy.safetensors")), 0);
    assert_int_equal(weights_save(w, folder, "copy", &err), ERR_INVALID); // not through a link
    weights_free(w);
}

// ---- what does not fit the model

static void wrong_tensors(void **state)
{
    (void)state;
    put_tensors("model.safetensors", "{\"ids\":{\"dtype\":\"I64\",\"shape\":[5],\"data_offsets\":[0,40]}}", forty,
                sizeof forty);
    struct weights *w = opened();
    struct err err;
    struct tensor t;
    assert_int_equal(weights_get(w, &t, 1, 5, 1, 1, 1, &err, "ids"), ERR_UNSUPPORTED);
    expect_error(&err, ERR_UNSUPPORTED, "model.safetensors", "tensor ids has dtype I64", "F32, BF16 and F16");
    assert_int_equal(weights_get(w, &t, 2, 5, 1, 1, 1, &err, "ids"), ERR_CORRUPT);
    expect_error(&err, ERR_CORRUPT, "tensor ids has shape [5]", "[5, 1]", "model.safetensors");
    assert_int_equal(weights_get(w, &t, 1, 5, 1, 1, 1, &err, "more"), ERR_CORRUPT);
    expect_error(&err, ERR_CORRUPT, "tensor more [5] is missing", "model.safetensors", NULL);
    weights_free(w);
}

// ---- bad files

static void bad_headers(void **state)
{
    (void)state;
    static const struct {
        const char *tensor; // the value of "a" over 40 bytes of data
        enum err_code code;
        const char *text;
    } rows[] = {
        {"{\"dtype\":\"F32\",\"shape\":[10],\"data_offsets\":[0,44]}", ERR_CORRUPT, "tensor a needs bytes 0 to 40"},
        {"{\"dtype\":\"F32\",\"shape\":[11],\"data_offsets\":[0,44]}", ERR_CORRUPT, "the file holds 40"},
        {"{\"dtype\":\"F32\",\"shape\":[10],\"data_offsets\":[40,0]}", ERR_CORRUPT, "tensor a"},
        {"{\"dtype\":\"F32\",\"shape\":[10],\"data_offsets\":[-4,36]}", ERR_CORRUPT, "tensor a"},
        {"{\"dtype\":\"F32\",\"shape\":[10],\"data_offsets\":[0,9223372036854775807]}", ERR_CORRUPT, "tensor a"},
        {"{\"dtype\":\"F32\",\"shape\":[-10],\"data_offsets\":[0,40]}", ERR_CORRUPT, "impossible shape"},
        {"{\"dtype\":\"F32\",\"shape\":[10.0],\"data_offsets\":[0,40]}", ERR_CORRUPT, "impossible shape"},
        {"{\"dtype\":\"F32\",\"shape\":[\"10\"],\"data_offsets\":[0,40]}", ERR_CORRUPT, "impossible shape"},
        {"{\"dtype\":\"F32\",\"shape\":[10],\"data_offsets\":[\"0\",40]}", ERR_CORRUPT, "tensor a"},
        {"{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}", ERR_CORRUPT,
         "impossible shape"},
        {"{\"dtype\":\"F32\",\"shape\":[0,4611686018427387904,4],\"data_offsets\":[0,0]}", ERR_CORRUPT,
         "impossible shape"},
        {"{\"dtype\":\"F32\",\"shape\":[1,1,1,1,10],\"data_offsets\":[0,40]}", ERR_CORRUPT, "at most 4 dimensions"},
        {"{\"dtype\":\"F32\",\"shape\":10,\"data_offsets\":[0,40]}", ERR_CORRUPT, "at most 4 dimensions"},
        {"{\"dtype\":\"F32\",\"shape\":[10],\"data_offsets\":[0,40,40]}", ERR_CORRUPT, "two offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[10]}", ERR_CORRUPT, "two offsets"},
        {"{\"dtype\":\"F32\",\"data_offsets\":[0,40]}", ERR_CORRUPT, "at most 4 dimensions"},
        {"{\"dtype\":\"F99\",\"shape\":[10],\"data_offsets\":[0,40]}", ERR_UNSUPPORTED, "tensor a has dtype F99"},
        {"{\"shape\":[10],\"data_offsets\":[0,40]}", ERR_UNSUPPORTED, "tensor a has dtype ?"},
        {"[]", ERR_UNSUPPORTED, "tensor a"},
        {"null", ERR_UNSUPPORTED, "tensor a"},
        {"{\"dtype\":\"F32\",\"shape\":[9],\"data_offsets\":[0,36]}", ERR_CORRUPT, "of which the tensors fill 36"},
        {"{\"dtype\":\"F32\",\"shape\":[9],\"data_offsets\":[4,40]}", ERR_CORRUPT, "begins at byte 4"},
        {"{\"dtype\":\"U8\",\"shape\":[40],\"data_offsets\":[0,40]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[10],\"data_offsets\":[30,40]}",
         ERR_CORRUPT, "tensor b begins at byte 30 of the data, where the one before ends at 40"},
        {"{\"dtype\":\"U8\",\"shape\":[40],\"data_offsets\":[0,40]},"
         "\"a\":{\"dtype\":\"U8\",\"shape\":[40],\"data_offsets\":[0,40]}",
         ERR_CORRUPT, "duplicate"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char header[512];
        snprintf(header, sizeof header, "{\"a\":%s}", rows[i].tensor);
        put_tensors("model.safetensors", header, forty, sizeof forty);
        expect_refused(rows[i].code, "model.safetensors", rows[i].text);
    }
    static const char *const not_objects[] = {"", " ", "[]", "{", "nonsense", "{}x", "\xff\xfe", "{\"a\":{}"};
    for (size_t i = 0; i < sizeof not_objects / sizeof *not_objects; i++) {
        put_tensors("model.safetensors", not_objects[i], forty, sizeof forty);
        expect_refused(ERR_CORRUPT, "model.safetensors", "header is not a JSON object");
    }
}

static void lying_lengths(void **state)
{
    (void)state;
    static uint8_t file[1024];
    const size_t size = compose(file, THREE, forty, sizeof forty);
    const uint64_t good = strlen(THREE), lies[] = {0,
                                                   1,
                                                   good - 1,
                                                   good + 1,
                                                   size - 8,
                                                   size - 7,
                                                   100 << 20,
                                                   (100 << 20) + 1,
                                                   (uint64_t)1 << 32,
                                                   INT64_MAX,
                                                   (uint64_t)INT64_MAX + 1,
                                                   UINT64_MAX - 7,
                                                   UINT64_MAX};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        memcpy(file, &lies[i], sizeof *lies);
        put("model.safetensors", file, size);
        expect_refused(ERR_CORRUPT, "model.safetensors", NULL);
    }
}

static void truncated(void **state)
{
    (void)state;
    static uint8_t file[1024];
    const size_t size = compose(file, THREE, forty, sizeof forty);
    for (size_t n = 0; n < size; n++) {
        put("model.safetensors", file, n);
        expect_refused(ERR_CORRUPT, "model.safetensors", NULL);
    }
    put("model.safetensors", file, size + 1); // one byte too many
    expect_refused(ERR_CORRUPT, "model.safetensors", "41 bytes of data, of which the tensors fill 40");
}

static void not_files(void **state)
{
    (void)state;
    expect_refused(ERR_NOT_FOUND, folder, "neither model.safetensors nor model.safetensors.index.json");
    assert_int_equal(mkdir(in_folder("model.safetensors"), 0700), 0);
    expect_refused(ERR_CORRUPT, "model.safetensors", "not a file");
    assert_int_equal(rmdir(in_folder("model.safetensors")), 0);
    assert_int_equal(mkfifo(in_folder("model.safetensors"), 0600), 0);
    expect_refused(ERR_CORRUPT, "model.safetensors", "not a file");
    struct err err;
    struct weights *w;
    char path[2000];
    memset(path, 'p', sizeof path - 1);
    path[sizeof path - 1] = 0;
    assert_int_equal(weights_open(path, "model", NULL, &w, &err), ERR_INVALID);
    expect_error(&err, ERR_INVALID, "path too long", NULL, NULL);
}

static void bad_indexes(void **state)
{
    (void)state;
    static const struct {
        const char *index;
        enum err_code code;
        const char *file, *text;
    } rows[] = {
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"three.safetensors\"}}", ERR_NOT_FOUND, "three.safetensors",
         "cannot be opened"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"d\":\"one.safetensors\"}}", ERR_CORRUPT, INDEX,
         "tensor d is in none of the shards"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":7}}", ERR_CORRUPT, folder, "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"x\":\"same.safetensors\"}}", ERR_CORRUPT, "one.safetensors",
         "tensor a is in"},
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", ERR_CORRUPT, "../one.safetensors", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", ERR_CORRUPT, "/etc/passwd", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"sub/one.safetensors\"}}", ERR_CORRUPT, "sub/one", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", ERR_CORRUPT, "..", "not a file"},
        {"{\"weight_map\":{\"a\":\"\"}}", ERR_CORRUPT, folder, "not a file"},
        {"{\"weight_map\":{\"a\":\"one.safe\\u0000tensors\"}}", ERR_CORRUPT, INDEX, "no weight_map"},
        {"{\"weight_map\":{}}", ERR_CORRUPT, INDEX, "no weight_map that names files"},
        {"{\"weight_map\":[]}", ERR_CORRUPT, INDEX, "no weight_map that names files"},
        {"{}", ERR_CORRUPT, INDEX, "no weight_map that names files"},
        {"[", ERR_CORRUPT, INDEX, "no weight_map that names files"},
        {"", ERR_CORRUPT, INDEX, "no weight_map that names files"},
    };
    put_shards();
    put_tensors("same.safetensors", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", forty, 1);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put_text(INDEX, rows[i].index);
        expect_refused(rows[i].code, rows[i].file, rows[i].text);
    }
}

// Any bytes whatever are read right or refused; what is read lies within the file.
static void mutated(void **state)
{
    (void)state;
    enum { ROUNDS = SANITIZED ? 2000 : 5000 };
    static uint8_t good[1024], bad[1024];
    static const char bytes[] = "0123456789-,.:[]{}\"eaFB \\\xff";
    const size_t size = compose(good, THREE, forty, sizeof forty);
    uint32_t random = 12345;
    int accepted = 0;
    for (int round = 0; round < ROUNDS; round++) {
        memcpy(bad, good, size);
        for (int i = 0; i <= round % 4; i++) {
            random = random * 1664525 + 1013904223;
            const size_t at = (random >> 8) % size;
            random = random * 1664525 + 1013904223;
            bad[at] = random >> 31 ? (uint8_t)bytes[(random >> 8) % (sizeof bytes - 1)] : (uint8_t)(random >> 16);
        }
        put("model.safetensors", bad, size);
        struct err err = {.code = ERR_NONE};
        struct weights *w;
        if (weights_open(folder, "model", NULL, &w, &err) != 0) {
            assert_null(w);
            assert_true(err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED);
            assert_true(err.text[0]);
            continue;
        }
        accepted++;
        uint8_t digest[32];
        struct tensor t;
        unsigned sum = 0;
        weights_fingerprint(w, digest);
        assert_true(weights_bytes(w) <= 40);
        if (weights_get(w, &t, 2, 2, 3, 1, 1, &err, "a") == 0)
            for (size_t i = 0; i < tensor_bytes(t); i++)
                sum += ((uint8_t *)t.data)[i];
        weights_free(w);
        (void)sum;
    }
    assert_in_range(accepted, 1, ROUNDS / 2); // changed data is still data; changed headers hardly ever pass
}

int main(void)
{
    if (!mkdtemp(folder))
        return 1;
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, NULL)
    const struct CMUnitTest tests[] = {
        TEST(single),       TEST(misaligned),    TEST(sharded),     TEST(empty_tensors), TEST(layers),
        TEST(fingerprints), TEST(wrong_tensors), TEST(bad_headers), TEST(lying_lengths), TEST(truncated),
        TEST(not_files),    TEST(bad_indexes),   TEST(mutated),     TEST(saved),         TEST(unwritable),
    };
    return cmocka_run_group_tests(tests, NULL, tear_down);
}
