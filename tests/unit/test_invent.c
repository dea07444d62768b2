// Invented weights: numbers like a model's, the same everywhere; architectures of exactly the published sizes.
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "worker/invent.h"
#include "worker/model.h"
#include "worker/weights.h"

static struct invention *make(size_t room, int threads)
{
    struct invention *v;
    struct err err = {.code = ERR_NONE};
    if (invention_new(room, threads, &v, &err) != 0)
        fail_msg("%s", err.text);
    return v;
}

static const uint16_t *window(const struct invention *v, const char *name, int64_t m, int64_t n)
{
    struct tensor t;
    struct err err = {.code = ERR_NONE};
    const int64_t shape[] = {m, n};
    assert_int_equal(invention_tensor(v, name, 2, shape, &t, &err), 0);
    assert_int_equal(t.dtype, DT_BF16);
    assert_int_equal(t.n[0], m);
    assert_int_equal(t.n[1], n);
    assert_int_equal((uintptr_t)t.data % 64, 0);
    return t.data;
}

static void numbers(void **state)
{
    (void)state;
    struct invention *v = make(1 << 20, 2);
    const int64_t n = 1 << 19;
    const uint16_t *w = window(v, "w", n / 512, 512);
    double sum = 0, squares = 0, neighbours = 0;
    for (int64_t i = 0; i < n; i++) {
        const double x = (double)bf16_to_f32(w[i]);
        assert_true(x != 0 && fabs(x) < 0.1);
        sum += x;
        squares += x * x;
        neighbours += i ? x * (double)bf16_to_f32(w[i - 1]) : 0;
    }
    const double n_real = (double)n, deviation = sqrt(squares / n_real);
    assert_true(fabs(sum / n_real) < 5 * 0.02 / sqrt(n_real));
    assert_true(fabs(deviation / 0.02 - 1) < 0.01);
    assert_true(fabs(neighbours / squares) < 5 / sqrt(n_real));
    invention_free(v);
}

static void places(void **state)
{
    (void)state;
    struct invention *one = make(1 << 20, 1), *three = make(1 << 20, 3);
    const uint16_t *a = window(one, "a", 64, 64), *b = window(one, "b", 64, 64);
    assert_ptr_not_equal(a, b);
    assert_ptr_equal(a, window(one, "a", 64, 64));
    assert_memory_equal(a, window(three, "a", 64, 64), 64 * 64 * 2); // however many threads made it
    for (int i = 0; i < 200; i++) {                                  // windows of the largest size end within
        char name[16];
        snprintf(name, sizeof name, "w%d", i);
        assert_memory_equal(window(one, name, 512, 1024), window(three, name, 512, 1024), 1 << 20);
    }
    struct tensor t;
    struct err err = {.code = ERR_NONE};
    const int64_t large[] = {1 << 21};
    assert_int_equal(invention_tensor(one, "w", 1, large, &t, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "tensor w of 2097152 numbers"));
    invention_free(one);
    invention_free(three);
}

static void ids(void **state)
{
    (void)state;
    int32_t a[77], b[77];
    invent_ids("a cat", 49408, a, 77);
    invent_ids("a cat", 49408, b, 77);
    assert_memory_equal(a, b, sizeof a);
    invent_ids("a dog", 49408, b, 77);
    assert_memory_not_equal(a, b, sizeof a);
    assert_int_equal(a[76], 49407);
    for (int i = 0; i < 77; i++)
        assert_in_range(a[i], 0, 49407);
    invent_ids("", 3, a, 0);
}

struct loaded {
    char dir[64];
    struct invention *invention;
    struct device *device;
    struct model *model;
};

static struct loaded load(const char *name)
{
    struct loaded l = {.dir = "/tmp/test-invent-XXXXXX"};
    struct err err = {.code = ERR_NONE};
    const struct device_options options = {.threads = 2};
    size_t largest;
    assert_non_null(mkdtemp(l.dir));
    assert_int_equal(architecture_write(name, l.dir, &largest, &err), 0);
    l.invention = make(largest, 2);
    assert_int_equal(kernels_cpu.open(&options, &l.device, &err), 0);
    const struct home home = {.k = &kernels_cpu, .d = l.device, .invention = l.invention};
    if (model_load_on(l.dir, &home, &l.model, &err) != 0)
        fail_msg("%s: %s", name, err.text);
    return l;
}

static void leave(struct loaded *l)
{
    model_free(l->model);
    kernels_cpu.close(l->device);
    invention_free(l->invention);
    architecture_remove(l->dir);
    assert_int_equal(rmdir(l->dir), 0); // nothing else is in it
}

// Parameters of the published checkpoints, of what is read of them: the VAE's decoder alone.
static void sizes(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int64_t clip, t5, dit, vae;
    } rows[] = {{"flux.1-dev", 123060480, 4762310656, 11901408320, 49545475},
                {"flux.1-schnell", 123060480, 4762310656, 11891178560, 49545475},
                {"demo", 0, 0, 0, 0}};
    for (int i = 0; i < 3; i++) {
        if (SANITIZED && i < 2)
            continue;
        assert_string_equal(architecture_names[i], rows[i].name);
        struct loaded l = load(rows[i].name);
        if (rows[i].dit) {
            assert_int_equal(weights_bytes(clip_weights(l.model->clip)), 2 * rows[i].clip);
            assert_int_equal(weights_bytes(t5_weights(l.model->t5)), 2 * rows[i].t5);
            assert_int_equal(weights_bytes(l.model->dit->weights), 2 * rows[i].dit);
            assert_int_equal(weights_bytes(vae_weights(l.model->vae)), 2 * rows[i].vae);
        }
        assert_int_equal(l.model->info.guidance, i != 1);
        leave(&l);
    }
    assert_null(architecture_names[3]);
}

// Vectors that multiply what a norm made are near 1; biases are near 0.
static void vectors(void **state)
{
    (void)state;
    struct invention *v = make(1 << 16, 1);
    const struct home home = {.invention = v};
    struct weights *w;
    struct tensor gamma, beta;
    struct err err = {.code = ERR_NONE};
    assert_int_equal(weights_open("/nowhere", "model", &home, &w, &err), 0);
    assert_int_equal(weights_norm(w, &gamma, &beta, 100, &err, "norm"), 0);
    for (int i = 0; i < 100; i++) {
        assert_true(fabsf(bf16_to_f32(((uint16_t *)gamma.data)[i]) - 1) < 0.1F);
        assert_true(fabsf(bf16_to_f32(((uint16_t *)beta.data)[i])) < 0.1F);
    }
    assert_int_equal(weights_bytes(w), 400);
    assert_true(weights_has(w, "norm.bias"));
    assert_false(weights_has(w, "norm"));
    weights_free(w);
    invention_free(v);
}

// Each tensor that the file's header names, as the file has it and as it is invented. *bytes: of all.
static void compare(const struct weights *file, struct weights *invented, json_t *header, int64_t *bytes)
{
    const char *name;
    json_t *info;
    *bytes = 0;
    json_object_foreach(header, name, info)
    {
        struct tensor a, b;
        struct err err = {.code = ERR_NONE};
        int64_t n[4] = {1, 1, 1, 1};
        const json_t *shape = json_object_get(info, "shape");
        const int dims = (int)json_array_size(shape);
        for (int i = 0; i < dims; i++)
            n[i] = json_integer_value(json_array_get(shape, (size_t)i));
        if (strcmp(name, "__metadata__") == 0)
            continue;
        assert_int_equal(weights_get((struct weights *)file, &a, dims, n[0], n[1], n[2], n[3], &err, "%s", name), 0);
        assert_int_equal(weights_get(invented, &b, dims, n[0], n[1], n[2], n[3], &err, "%s", name), 0);
        assert_int_equal(a.dtype, DT_BF16);
        assert_int_equal(tensor_bytes(a), tensor_bytes(b));
        assert_memory_equal(a.data, b.data, tensor_bytes(a));
        *bytes += (int64_t)tensor_bytes(a);
    }
}

static json_t *header_of(const char *path)
{
    uint64_t length = 0;
    FILE *f = fopen(path, "rbe");
    assert_non_null(f);
    assert_int_equal(fread(&length, sizeof length, 1, f), 1);
    json_t *header = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL);
    fclose(f);
    assert_non_null(header);
    return header;
}

static void expect_part(const struct loaded *l, enum model_part part, const char *stem, const struct weights *w)
{
    const struct home home = {.invention = l->invention};
    struct weights *file, *invented;
    struct err err = {.code = ERR_NONE};
    char dir[128], path[256];
    int64_t bytes;
    snprintf(dir, sizeof dir, "%s/%s", l->dir, model_part_name(part));
    snprintf(path, sizeof path, "%s/%s.safetensors", dir, stem);
    if (weights_open(dir, stem, NULL, &file, &err) != 0)
        fail_msg("%s", err.text);
    assert_int_equal(weights_open(dir, stem, &home, &invented, &err), 0);
    json_t *header = header_of(path);
    compare(file, invented, header, &bytes);
    assert_true(bytes > 0);
    assert_int_equal(bytes, weights_bytes(file));
    assert_int_equal(bytes, weights_bytes(w));
    json_decref(header);
    weights_free(file);
    weights_free(invented);
    unlink(path);
}

// A model that computes with invented weights saves them as they were invented: convolutions as files have them.
static void written(void **state)
{
    (void)state;
    struct loaded l = load("demo");
    struct err err = {.code = ERR_NONE};
    char path[128];
    snprintf(path, sizeof path, "%s/transformer/diffusion_pytorch_model.safetensors", l.dir);
    const int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    close(fd);
    assert_int_equal(model_save(l.model, l.dir, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, path));
    assert_int_equal(unlink(path), 0); // what was there has stayed, what was written has gone
    if (model_save(l.model, l.dir, &err) != 0)
        fail_msg("%s", err.text);
    expect_part(&l, PART_CLIP, "model", clip_weights(l.model->clip));
    expect_part(&l, PART_T5, "model", t5_weights(l.model->t5));
    expect_part(&l, PART_DIT, "diffusion_pytorch_model", l.model->dit->weights);
    expect_part(&l, PART_VAE, "diffusion_pytorch_model", vae_weights(l.model->vae));
    leave(&l);
}

// A directory that has something of a model keeps it, and gets nothing.
static void occupied(void **state)
{
    (void)state;
    char dir[] = "/tmp/test-invent-XXXXXX", path[64];
    struct err err = {.code = ERR_NONE};
    size_t largest;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(architecture_write("demo", dir, &largest, &err), 0);
    assert_int_equal(architecture_write("demo", dir, &largest, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "scheduler: holds scheduler_config.json already; nothing is overwritten"));
    snprintf(path, sizeof path, "%s/vae/config.json", dir);
    assert_int_equal(access(path, F_OK), 0);
    architecture_remove(dir);
    snprintf(path, sizeof path, "%s/ditfleet.json", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(architecture_write("demo", dir, &largest, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "ditfleet.json: is there already; nothing is overwritten"));
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(rmdir(dir), 0);
}

static void unknown(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    size_t largest;
    assert_int_equal(architecture_write("sdxl", "/tmp", &largest, &err), ERR_INVALID);
    assert_string_equal(err.text, "architecture sdxl: it may be flux.1-dev, flux.1-schnell, demo");
    assert_int_equal(architecture_write("demo", "/nowhere/at/all", &largest, &err), ERR_IO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers), cmocka_unit_test(places),  cmocka_unit_test(ids),      cmocka_unit_test(sizes),
        cmocka_unit_test(vectors), cmocka_unit_test(written), cmocka_unit_test(occupied), cmocka_unit_test(unknown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
