// weights.c: the tensors that a model asks for by name, of the shapes its configuration implies.
#include "worker/invent.h"
#include "worker/original.h"
#include "worker/weights_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void weights_free(struct weights *w)
{
    if (!w)
        return;
    weights_displace(w);
    weights_close(w);
    for (size_t i = 0; i < w->n_entries; i++)
        free(w->entries[i].name);
    for (size_t i = 0; i < w->n_owned; i++)
        free(w->owned[i]);
    free(w->entries);
    free(w->owned);
    free(w);
}

void *weights_own(struct weights *w, size_t bytes)
{
    void **list = realloc(w->owned, (w->n_owned + 1) * sizeof *list);
    if (!list)
        return NULL;
    w->owned = list;
    list[w->n_owned] = malloc(bytes ? bytes : 1);
    return list[w->n_owned] ? list[w->n_owned++] : NULL;
}

bool weights_has(const struct weights *w, const char *name)
{
    return weights_find(w, name) != NULL;
}

int64_t weights_bytes(const struct weights *w)
{
    int64_t sum = 0;
    for (size_t i = 0; i < w->n_entries; i++)
        sum += (int64_t)tensor_bytes(w->entries[i].tensor);
    return sum;
}

void weights_each(const struct weights *w, weights_on_tensor *on_tensor, void *arg)
{
    for (const struct entry *e = w->entries; e < w->entries + w->n_entries; e++)
        on_tensor(arg, e->shard ? e->shard->path : "", e->name, e->tensor);
}

static void print_shape(char *text, size_t size, int dims, const int64_t *n)
{
    int at = snprintf(text, size, "[");
    for (int i = 0; i < dims; i++)
        at += snprintf(text + at, size - (size_t)at, "%s%lld", i ? ", " : "", (long long)n[i]);
    snprintf(text + at, size - (size_t)at, "]");
}

static int add_entry(struct weights *w, const char *name, struct tensor t, struct err *err)
{
    struct entry *grown = realloc(w->entries, (w->n_entries + 1) * sizeof *grown);
    char *copy = strdup(name);
    if (grown)
        w->entries = grown;
    if (!grown || !copy) {
        free(copy);
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", name);
    }
    w->entries[w->n_entries++] = (struct entry){.name = copy, .tensor = t};
    return 0;
}

// A vector called weight multiplies what a norm made: it is near 1, in memory of its own.
static int invent(struct weights *w, struct tensor *out, int dims, const int64_t *n, const char *name, struct err *err)
{
    const size_t length = strlen(name), suffix = strlen(".weight");
    TRY(invention_tensor(w->home.invention, name, dims, n, out, err));
    if (dims > 1 || length < suffix || strcmp(name + length - suffix, ".weight") != 0)
        return add_entry(w, name, *out, err);
    const uint16_t *noise = out->data;
    uint16_t *near = weights_own(w, tensor_bytes(*out));
    if (!near)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", name);
    for (int64_t i = 0; i < n[0]; i++)
        near[i] = f32_to_bf16(1 + bf16_to_f32(noise[i]));
    out->data = near;
    return add_entry(w, name, *out, err);
}

// The file's own tensor of this name, whole.
static int get_whole(struct weights *w, struct tensor *out, int dims, const int64_t *n, const char *name,
                     struct err *err)
{
    struct entry *e = weights_find(w, name);
    char found[96], expected[96];
    print_shape(expected, sizeof expected, dims, n);
    if (!e)
        return err_set(err, ERR_CORRUPT, "%s%s: tensor %s %s is missing", w->shards[0].path,
                       w->n_shards > 1 ? " and its other shards" : "", name, expected);
    if (e->tensor.dims != dims || memcmp(e->tensor.n, n, (size_t)dims * sizeof *n) != 0) {
        print_shape(found, sizeof found, e->tensor.dims, e->tensor.n);
        return err_set(err, ERR_CORRUPT, "%s: tensor %s has shape %s but the configuration implies %s", e->shard->path,
                       name, found, expected);
    }
    if (e->tensor.dtype != DT_F32 && e->tensor.dtype != DT_BF16 && e->tensor.dtype != DT_F16)
        return err_set(err, ERR_UNSUPPORTED, "%s: tensor %s has dtype %s; F32, BF16 and F16 can be used",
                       e->shard->path, name, dtype_name(e->tensor.dtype));
    e->fetched = true;
    *out = e->tensor;
    return 0;
}

// Exchanges the halves of a tensor's rows, in memory of its own.
static int swap_halves(struct weights *w, struct tensor *t, const char *name, struct err *err)
{
    const size_t half = tensor_bytes(*t) / 2;
    char *copy = weights_own(w, 2 * half);
    const char *from = t->data;
    if (!copy || !from)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", name);
    if (!w->home.plan) { // a plan looks at shapes alone
        memcpy(copy, from + half, half);
        memcpy(copy + half, from, half);
    }
    t->data = copy;
    return 0;
}

// By the name that the authors' file has for it: rows of a tensor that holds several.
static int get_original(struct weights *w, struct tensor *out, int dims, const int64_t *n, const char *name,
                        struct err *err)
{
    struct original o;
    struct tensor t = {0};
    int64_t whole[TENSOR_MAX_DIMS];
    char full[WEIGHTS_NAME];
    if (!original_of(name, &o))
        return err_set(err, ERR_UNSUPPORTED, "%s: with its authors' names a transformer has no %s", w->shards[0].path,
                       name);
    snprintf(full, sizeof full, "%s%s", w->prefix, o.name);
    memcpy(whole, n, (size_t)dims * sizeof *n);
    whole[0] = n[0] / o.rows * o.whole;
    TRY(get_whole(w, &t, dims, whole, full, err));
    *out = t;
    out->data = (char *)t.data + tensor_bytes(t) / (size_t)o.whole * (size_t)o.first;
    out->n[0] = n[0];
    return o.swapped ? swap_halves(w, out, full, err) : 0;
}

static int get(struct weights *w, struct tensor *out, int dims, const int64_t *n, const char *name, struct err *err)
{
    if (w->home.invention)
        return invent(w, out, dims, n, name, err);
    return (w->prefix ? get_original : get_whole)(w, out, dims, n, name, err);
}

#define FORMAT_NAME(name, format)                                                                                      \
    char name[WEIGHTS_NAME];                                                                                           \
    va_list name##_args;                                                                                               \
    va_start(name##_args, format);                                                                                     \
    vsnprintf(name, sizeof(name), format, name##_args);                                                                \
    va_end(name##_args)

int weights_refuse(const struct weights *w, const char *key, struct err *err, const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    struct original o;
    if (w->prefix && original_of(name, &o))
        snprintf(name, sizeof name, "%s%s", w->prefix, o.name);
    const struct entry *e = weights_find(w, name);
    return e ? err_set(err, ERR_CORRUPT, "%s: tensor %s is there, but by the configuration's %s it should not be",
                       e->shard ? e->shard->path : "invented weights", name, key)
             : 0;
}

int weights_refuse_rest(const struct weights *w, struct err *err)
{
    const struct entry *first = NULL;
    size_t rest = 0;
    char shape[96];
    for (size_t i = w->n_entries; i-- > 0;)
        if (w->entries[i].shard && !w->entries[i].fetched) {
            first = &w->entries[i];
            rest++;
        }
    if (!first)
        return 0;
    print_shape(shape, sizeof shape, first->tensor.dims, first->tensor.n);
    return err_set(err, ERR_CORRUPT, "%s: tensor %.120s %s is no part of this model%s", first->shard->path, first->name,
                   shape, rest > 1 ? ", and is not the only one" : "");
}

int weights_get(struct weights *w, struct tensor *out, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3,
                struct err *err, const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    const int64_t n[] = {n0, n1, n2, n3};
    TRY(get(w, out, dims, n, name, err));
    return weights_place(w, (struct fetched){.tensor = out}, err);
}

static int finish_linear(struct weights *w, struct linear *out, int parts, const struct tensor *weight,
                         const struct tensor *bias, struct err *err)
{
    TRY(linear_init(out, parts, weight, bias, err));
    return weights_place(w, (struct fetched){.layer = true, .linear = out}, err);
}

int weights_linear(struct weights *w, struct linear *out, const char *prefix, int parts, const char *const *names,
                   const int64_t *n, int64_t k, bool bias, struct err *err)
{
    struct tensor weight[LINEAR_MAX_PARTS], b[LINEAR_MAX_PARTS];
    for (int i = 0; i < parts; i++) {
        char name[WEIGHTS_NAME];
        const int64_t shape[] = {n[i], k};
        snprintf(name, sizeof name, "%s.%s.weight", prefix, names[i]);
        TRY(get(w, &weight[i], 2, shape, name, err));
        snprintf(name, sizeof name, "%s.%s.bias", prefix, names[i]);
        if (bias)
            TRY(get(w, &b[i], 1, shape, name, err));
    }
    return finish_linear(w, out, parts, weight, bias ? b : NULL, err);
}

int weights_linear1(struct weights *w, struct linear *out, int64_t n, int64_t k, bool bias, struct err *err,
                    const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    const int64_t shape[] = {n, k};
    struct tensor weight, b;
    char full[WEIGHTS_NAME + 8];
    snprintf(full, sizeof full, "%s.weight", name);
    TRY(get(w, &weight, 2, shape, full, err));
    snprintf(full, sizeof full, "%s.bias", name);
    if (bias)
        TRY(get(w, &b, 1, shape, full, err));
    return finish_linear(w, out, 1, &weight, bias ? &b : NULL, err);
}

// (c_out, c_in, taps) -> (c_out, taps, c_in), elements of size bytes.
static void channels_last(char *to, const char *from, int64_t c_out, int64_t c_in, int64_t taps, size_t size)
{
    for (int64_t o = 0; o < c_out; o++)
        for (int64_t i = 0; i < c_in; i++)
            for (int64_t t = 0; t < taps; t++)
                memcpy(to + (size_t)((o * taps + t) * c_in + i) * size,
                       from + (size_t)((o * c_in + i) * taps + t) * size, size);
}

int weights_conv(struct weights *w, struct conv *out, int64_t c_out, int64_t c_in, int size, struct err *err,
                 const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    const int64_t shape[] = {c_out, c_in, size, size};
    struct tensor t = {0};
    char full[WEIGHTS_NAME + 8];
    snprintf(full, sizeof full, "%s.weight", name);
    TRY(get(w, &t, 4, shape, full, err));
    TRY(weights_get(w, &out->b, 1, c_out, 1, 1, 1, err, "%s.bias", name));
    void *data = weights_own(w, tensor_bytes(t));
    if (!data)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", name);
    if (!w->home.plan) // a plan looks at shapes alone
        channels_last(data, t.data, c_out, c_in, (int64_t)size * size, dtype_size(t.dtype));
    out->w = tensor_of(data, t.dtype, 4, c_out, size, size, c_in);
    return weights_place(w, (struct fetched){.tensor = &out->w}, err);
}

int weights_norm(struct weights *w, struct tensor *gamma, struct tensor *beta, int64_t n, struct err *err,
                 const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    TRY(weights_get(w, gamma, 1, n, 1, 1, 1, err, "%s.weight", name));
    return weights_get(w, beta, 1, n, 1, 1, 1, err, "%s.bias", name);
}
