#include "worker/weights.h"
#include "worker/invent.h"
#include "worker/original.h"
#include "worker/ownership.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <openssl/evp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_HEADER = 100 << 20, MAX_NAME = 256, MAX_PATH = 1024 };

struct shard {
    char *path;
    uint8_t *map; // the whole file, read only
    size_t size;
    size_t data; // offset of the first tensor's bytes
};

struct entry {
    char *name;
    struct tensor tensor;
    const struct shard *shard; // NULL: invented
    int64_t start;             // where its bytes begin in the shard's data
    bool fetched;
};

// What is shared out as one: a block, a modulation, or all that every rank has.
struct unit {
    int64_t bytes;
    int64_t at; // of a sharded block: where this rank's piece is among the pieces
};

// A layer or a tensor that is fetched, to be placed.
struct fetched {
    enum weights_kind kind;
    int index;
    bool layer; // linear; else tensor
    struct linear *linear;
    struct tensor *tensor;
    bool fp8;
};

struct weights {
    struct home home;
    struct unit *units[WEIGHTS_KINDS];
    int n_units[WEIGHTS_KINDS];
    enum weights_kind kind; // of what is fetched
    int index;
    struct fetched *later; // what weights_settle is to place
    size_t n_later, room_later;
    void *pieces, *buffers; // on the device, each as one: few pieces of memory can be opened to other ranks
    int64_t piece_bytes, buffer_bytes, second_at; // bytes of them; where the second buffer begins
    bool fp8;                                     // linear layers may be E4M3
    const char *prefix;                           // not NULL: names are the authors', behind this
    struct tensor *placed;
    size_t n_placed, room_placed;
    struct shard *shards;
    int n_shards;
    struct entry *entries; // as files have them; sorted by name, or invented: in the order they were fetched
    size_t n_entries;
    void **owned; // re-laid, re-aligned and invented ones
    size_t n_owned;
};

void weights_free(struct weights *w)
{
    if (!w)
        return;
    for (size_t i = 0; i < w->n_placed; i++)
        w->home.k->displace(w->home.d, w->placed[i]);
    free(w->placed);
    if (w->pieces)
        w->home.k->free(w->home.d, w->pieces);
    if (w->buffers)
        w->home.k->free(w->home.d, w->buffers);
    for (int kind = 0; kind < WEIGHTS_KINDS; kind++)
        free(w->units[kind]);
    free(w->later);
    for (int i = 0; i < w->n_shards; i++) {
        if (w->shards[i].map)
            munmap(w->shards[i].map, w->shards[i].size);
        free(w->shards[i].path);
    }
    for (size_t i = 0; i < w->n_entries; i++)
        free(w->entries[i].name);
    for (size_t i = 0; i < w->n_owned; i++)
        free(w->owned[i]);
    free(w->shards);
    free(w->entries);
    free(w->owned);
    free(w);
}

// Memory that lives as long as w; NULL when there is none.
static void *own(struct weights *w, size_t bytes)
{
    void **list = realloc(w->owned, (w->n_owned + 1) * sizeof *list);
    if (!list)
        return NULL;
    w->owned = list;
    list[w->n_owned] = malloc(bytes ? bytes : 1);
    return list[w->n_owned] ? list[w->n_owned++] : NULL;
}

// The file's bytes, from s->map on; NULL: err says why not.
static uint8_t *map_file(struct shard *s, const char *path, struct err *err)
{
    s->path = strdup(path);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe is refused, not waited for
    struct stat st;
    if (fd < 0) {
        err_set(err, ERR_NOT_FOUND, "%s: cannot be opened (%s)", path, strerror(errno));
        return NULL;
    }
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size < 8) {
        close(fd);
        err_set(err, ERR_CORRUPT, "%s: too short for a safetensors file, or not a file", path);
        return NULL;
    }
    s->size = (size_t)st.st_size;
    void *map = mmap(NULL, s->size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED) {
        err_set(err, ERR_NO_MEMORY, "%s: cannot be mapped (%s)", path, strerror(errno));
        return NULL;
    }
    return s->map = map;
}

static int parse_dtype(const char *name, enum dtype *out)
{
    for (int t = 0; name && t < DT_COUNT; t++)
        if (strcmp(name, dtype_name(t)) == 0) {
            *out = (enum dtype)t;
            return 0;
        }
    return ERR_UNSUPPORTED;
}

// A whole number that is not negative, or -1.
static int64_t whole(const json_t *v)
{
    return json_is_integer(v) && json_integer_value(v) >= 0 ? json_integer_value(v) : -1;
}

// Bytes of a shape; -1 when it is none, or too large for a tensor's arithmetic even if other dimensions are zero.
static int64_t parse_shape(const json_t *shape, enum dtype dtype, int64_t n[TENSOR_MAX_DIMS])
{
    int64_t bytes = (int64_t)dtype_size(dtype), span = bytes;
    for (int i = 0; i < TENSOR_MAX_DIMS; i++) {
        n[i] = i < (int)json_array_size(shape) ? whole(json_array_get(shape, (size_t)i)) : 1;
        if (n[i] < 0 || __builtin_mul_overflow(span, n[i] ? n[i] : 1, &span))
            return -1;
        bytes *= n[i];
    }
    return bytes;
}

// Reads shape and data_offsets of one header entry; every number is checked against the bytes that are there.
static int parse_tensor(struct weights *w, const struct shard *s, const char *name, json_t *info, struct entry *out,
                        struct err *err)
{
    enum dtype dtype;
    json_t *shape = json_object_get(info, "shape"), *offsets = json_object_get(info, "data_offsets");
    const char *type = json_string_value(json_object_get(info, "dtype"));
    if (parse_dtype(type, &dtype) != 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: tensor %.120s has dtype %.20s", s->path, name, type ? type : "?");
    int dims = (int)json_array_size(shape);
    if (!json_is_array(shape) || dims > TENSOR_MAX_DIMS || json_array_size(offsets) != 2)
        return err_set(err, ERR_CORRUPT, "%s: tensor %.120s has no shape of at most 4 dimensions and two offsets",
                       s->path, name);
    int64_t n[TENSOR_MAX_DIMS];
    int64_t start = whole(json_array_get(offsets, 0)), end = whole(json_array_get(offsets, 1));
    int64_t bytes = parse_shape(shape, dtype, n), room = (int64_t)(s->size - s->data);
    if (bytes < 0)
        return err_set(err, ERR_CORRUPT, "%s: tensor %.120s has an impossible shape", s->path, name);
    if (start < 0 || end < start || end > room || end - start != bytes)
        return err_set(err, ERR_CORRUPT,
                       "%s: tensor %.120s needs bytes %lld to %lld of data but the file holds %lld (short or corrupt)",
                       s->path, name, (long long)start, (long long)start + bytes, (long long)room);
    void *data = s->map + s->data + start;
    if ((uintptr_t)data % dtype_size(dtype) != 0) { // old writers did not pad the header
        void *copy = own(w, (size_t)bytes);
        if (!copy)
            return err_set(err, ERR_NO_MEMORY, "%s: out of memory", s->path);
        data = memcpy(copy, data, (size_t)bytes);
    }
    out->tensor = tensor_of(data, dtype, dims ? dims : 1, n[0], n[1], n[2], n[3]);
    out->start = start;
    return 0;
}

static int by_start(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    const int64_t p = x->start - y->start, q = tensor_count(x->tensor) - tensor_count(y->tensor);
    const int64_t order = p ? p : q; // empty tensors lie before what begins where they do
    return (order > 0) - (order < 0);
}

// The format's own rule: the tensors of a file fill its data without overlap and without a hole.
static int check_layout(const struct shard *s, struct entry *entries, size_t count, struct err *err)
{
    int64_t at = 0;
    qsort(entries, count, sizeof *entries, by_start);
    for (size_t i = 0; i < count; i++) {
        if (entries[i].start != at)
            return err_set(err, ERR_CORRUPT,
                           "%s: tensor %.120s begins at byte %lld of the data, where the one before ends at %lld",
                           s->path, entries[i].name, (long long)entries[i].start, (long long)at);
        at += (int64_t)tensor_bytes(entries[i].tensor);
    }
    if ((size_t)at != s->size - s->data)
        return err_set(err, ERR_CORRUPT, "%s: %zu bytes of data, of which the tensors fill %lld", s->path,
                       s->size - s->data, (long long)at);
    return 0;
}

static int parse_header(struct weights *w, struct shard *s, struct err *err)
{
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | s->map[i];
    if (length > MAX_HEADER || length > s->size - 8)
        return err_set(err, ERR_CORRUPT, "%s: header of %llu bytes in a file of %zu: short or not safetensors", s->path,
                       (unsigned long long)length, s->size);
    json_error_t why;
    json_t *root = json_loadb((const char *)s->map + 8, length, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(root)) {
        json_decref(root);
        return err_set(err, ERR_CORRUPT, "%s: header is not a JSON object: %s", s->path, why.text);
    }
    s->data = 8 + (size_t)length;
    const size_t before = w->n_entries;
    int rc = 0;
    const char *name;
    json_t *info;
    struct entry *grown = realloc(w->entries, (w->n_entries + json_object_size(root) + 1) * sizeof *grown);
    if (!grown)
        rc = err_set(err, ERR_NO_MEMORY, "%s: out of memory", s->path);
    else
        w->entries = grown;
    json_object_foreach(root, name, info)
    {
        if (rc != 0 || strcmp(name, "__metadata__") == 0)
            continue;
        struct entry *e = &w->entries[w->n_entries];
        rc = parse_tensor(w, s, name, info, e, err);
        if (rc != 0)
            continue;
        e->shard = s;
        e->fetched = false;
        e->name = strdup(name);
        w->n_entries++;
    }
    json_decref(root);
    return rc != 0 ? rc : check_layout(s, w->entries + before, w->n_entries - before, err);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->name, ((const struct entry *)b)->name);
}

static int open_shard(struct weights *w, const char *path, struct err *err)
{
    struct shard *s = &w->shards[w->n_shards++];
    if (!map_file(s, path, err))
        return err->code;
    return parse_header(w, s, err);
}

static int make_shards(struct weights *w, const char *of, int count, struct err *err)
{
    w->shards = calloc((size_t)count + 1, sizeof *w->shards);
    return w->shards ? 0 : err_set(err, ERR_NO_MEMORY, "%s: out of memory", of);
}

// So that find finds them.
static int sort_entries(struct weights *w, struct err *err)
{
    if (w->n_entries > 0)
        qsort(w->entries, w->n_entries, sizeof *w->entries, by_name);
    for (size_t i = 1; i < w->n_entries; i++)
        if (by_name(&w->entries[i - 1], &w->entries[i]) == 0)
            return err_set(err, ERR_CORRUPT, "%s: tensor %.120s is in %s too", w->entries[i].shard->path,
                           w->entries[i].name, w->entries[i - 1].shard->path);
    return 0;
}

static int open_shards(struct weights *w, const char *dir, const char *const *names, int count, struct err *err)
{
    TRY(make_shards(w, dir, count, err));
    for (int i = 0; i < count; i++) {
        char path[MAX_PATH];
        if (strchr(names[i], '/') || snprintf(path, sizeof path, "%s/%s", dir, names[i]) >= (int)sizeof path)
            return err_set(err, ERR_CORRUPT, "%s: shard name %.80s is not a plain file name", dir, names[i]);
        TRY(open_shard(w, path, err));
    }
    return sort_entries(w, err);
}

// The distinct shard files that an index's weight_map names.
static int open_index(struct weights *w, const char *dir, const char *index_path, struct err *err)
{
    json_error_t why;
    json_t *root = json_load_file(index_path, 0, &why), *map = json_object_get(root, "weight_map"), *file;
    json_t *files = json_object();
    const char *name;
    json_object_foreach(map, name, file) // what is no name becomes one that is refused
        json_object_set_new(files, json_is_string(file) ? json_string_value(file) : "/", json_true());
    int rc, count = 0, total = (int)json_object_size(files);
    const char **names = calloc((size_t)total + 1, sizeof *names);
    if (!names)
        rc = err_set(err, ERR_NO_MEMORY, "%s: out of memory", index_path);
    else if (total == 0)
        rc = err_set(err, ERR_CORRUPT, "%s: no weight_map that names files (%s)", index_path, root ? "" : why.text);
    else {
        json_object_foreach(files, name, file) names[count++] = name;
        rc = open_shards(w, dir, names, count, err);
    }
    json_object_foreach(map, name, file) if (rc == 0 && !weights_has(w, name)) rc =
        err_set(err, ERR_CORRUPT, "%s: tensor %.120s is in none of the shards", index_path, name);
    free(names);
    json_decref(files);
    json_decref(root);
    return rc;
}

int weights_open(const char *dir, const char *stem, const struct home *home, struct weights **out, struct err *err)
{
    char single[MAX_PATH], index[MAX_PATH], name[MAX_PATH];
    *out = NULL;
    snprintf(name, sizeof name, "%s.safetensors", stem);
    if (snprintf(single, sizeof single, "%s/%s", dir, name) >= (int)sizeof single - 16)
        return err_set(err, ERR_INVALID, "%.80s...: path too long", dir);
    snprintf(index, sizeof index, "%.1000s.index.json", single);
    struct weights *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    if (home)
        w->home = *home;
    const char *names[] = {name};
    int rc = 0;
    if (w->home.invention)
        ; // nothing to open
    else if (access(index, F_OK) == 0)
        rc = open_index(w, dir, index, err);
    else if (access(single, F_OK) == 0)
        rc = open_shards(w, dir, names, 1, err);
    else
        rc = err_set(err, ERR_NOT_FOUND, "%s: neither %s nor %s.index.json is there", dir, name, name);
    if (rc != 0) {
        weights_free(w);
        return rc;
    }
    *out = w;
    return 0;
}

static struct entry *find(const struct weights *w, const char *name)
{
    const struct entry key = {.name = (char *)name};
    if (!w->home.invention)
        return w->n_entries ? bsearch(&key, w->entries, w->n_entries, sizeof key, by_name) : NULL;
    for (size_t i = 0; i < w->n_entries; i++)
        if (by_name(&key, &w->entries[i]) == 0)
            return &w->entries[i];
    return NULL;
}

// How the one file there is names its tensors.
static int find_naming(struct weights *w, const char *path, struct err *err)
{
    char probe[MAX_NAME];
    for (int i = 0; original_prefixes[i]; i++) {
        snprintf(probe, sizeof probe, "%s%s", original_prefixes[i], ORIGINAL_PROBE);
        if (find(w, probe)) {
            w->prefix = original_prefixes[i];
            return 0;
        }
    }
    if (find(w, "x_embedder.weight"))
        return 0;
    return err_set(err, ERR_CORRUPT,
                   "%s: no FLUX.1 transformer: it has neither " ORIGINAL_PROBE " (the authors' names, with or without "
                   "\"model.diffusion_model.\" before them) nor x_embedder.weight (diffusers' names)",
                   path);
}

int weights_open_file(const char *path, const struct home *home, struct weights **out, struct err *err)
{
    *out = NULL;
    struct weights *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", path);
    if (home)
        w->home = *home;
    int rc = make_shards(w, path, 1, err);
    rc = rc ? rc : open_shard(w, path, err);
    rc = rc ? rc : sort_entries(w, err);
    rc = rc ? rc : find_naming(w, path, err);
    if (rc != 0)
        weights_free(w);
    else
        *out = w;
    return rc;
}

bool weights_has(const struct weights *w, const char *name)
{
    return find(w, name) != NULL;
}

int64_t weights_bytes(const struct weights *w)
{
    int64_t sum = 0;
    for (size_t i = 0; i < w->n_entries; i++)
        sum += (int64_t)tensor_bytes(w->entries[i].tensor);
    return sum;
}

int64_t weights_placed_bytes(const struct weights *w)
{
    enum { GRAIN = 512 }; // of a device's allocations
    int64_t sum = w->piece_bytes + w->buffer_bytes;
    for (size_t i = 0; i < w->n_placed; i++) {
        const struct tensor t = w->placed[i];
        const size_t scales = t.dtype == DT_E4M3 ? (size_t)t.n[0] * sizeof *t.scale : 0;
        sum += (int64_t)((tensor_bytes(t) + scales + GRAIN - 1) & ~(size_t)(GRAIN - 1));
    }
    return sum;
}

void weights_each(const struct weights *w, weights_on_tensor *on_tensor, void *arg)
{
    for (const struct entry *e = w->entries; e < w->entries + w->n_entries; e++)
        on_tensor(arg, e->shard ? e->shard->path : "", e->name, e->tensor);
}

void weights_fingerprint(const struct weights *w, uint8_t sha256[32])
{
    enum { SAMPLES = 64, PAGE = 4096 };
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    EVP_DigestInit_ex(md, EVP_sha256(), NULL);
    for (int i = 0; i < w->n_shards; i++) {
        const struct shard *s = &w->shards[i];
        uint64_t size = s->size;
        EVP_DigestUpdate(md, &size, sizeof size);
        EVP_DigestUpdate(md, s->map, s->data);
        size_t stride = (s->size - s->data) / SAMPLES + 1;
        for (size_t at = s->data; at < s->size; at += stride) {
            size_t n = s->size - at < PAGE ? s->size - at : PAGE;
            EVP_DigestUpdate(md, s->map + at, n < stride ? n : stride);
        }
    }
    EVP_DigestFinal_ex(md, sha256, NULL);
    EVP_MD_CTX_free(md);
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
    uint16_t *near = own(w, tensor_bytes(*out));
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
    struct entry *e = find(w, name);
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
    char *copy = own(w, 2 * half);
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
    char full[MAX_NAME];
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
    char name[MAX_NAME];                                                                                               \
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
    const struct entry *e = find(w, name);
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

void weights_offer_fp8(struct weights *w, bool offered)
{
    w->fp8 = offered && w->home.fp8;
}

// Makes room to remember one more placed tensor before it is placed.
static int make_room(struct weights *w, size_t more, struct err *err)
{
    if (w->n_placed + more <= w->room_placed)
        return 0;
    const size_t room = 2 * (w->n_placed + more);
    struct tensor *list = realloc(w->placed, room * sizeof *list);
    if (!list)
        return err_set(err, ERR_NO_MEMORY, "no memory for a list of %zu weights", room);
    w->placed = list;
    w->room_placed = room;
    return 0;
}

static void remember(struct weights *w, struct tensor t)
{
    if (!tensor_none(t))
        w->placed[w->n_placed++] = t;
}

static int place_tensor(struct weights *w, struct tensor *t, struct err *err)
{
    TRY(make_room(w, 1, err));
    TRY(w->home.k->place(w->home.d, *t, t, err));
    remember(w, *t);
    return 0;
}

static int place_linear(struct weights *w, struct linear *l, bool fp8, struct err *err)
{
    TRY(make_room(w, 2 * LINEAR_MAX_PARTS, err));
    TRY(w->home.k->place_linear(w->home.d, l, fp8 ? DT_E4M3 : w->home.k->activation, err));
    for (int i = 0; i < l->parts; i++) {
        remember(w, l->w[i]);
        remember(w, l->b[i]);
    }
    return 0;
}

static int place_fetched(struct weights *w, const struct fetched *f, struct err *err)
{
    return f->layer ? place_linear(w, f->linear, f->fp8, err) : place_tensor(w, f->tensor, err);
}

// The i-th tensor of what was fetched; NULL: there are no more. It may be none.
static struct tensor *tensor_at(const struct fetched *f, int i)
{
    if (!f->layer)
        return i == 0 ? f->tensor : NULL;
    if (i < f->linear->parts)
        return &f->linear->w[i];
    return i < 2 * f->linear->parts ? &f->linear->b[i - f->linear->parts] : NULL;
}

static int64_t grains(int64_t bytes)
{
    return (bytes + WEIGHTS_GRAIN - 1) / WEIGHTS_GRAIN * WEIGHTS_GRAIN;
}

// Bytes of a fetched tensor where it is to lie: as in its file, or as a device with memory of its own has it by the
// rules of kernels.h.
static int64_t stored_bytes(const struct weights *w, const struct fetched *f, const struct tensor *t)
{
    enum { E4M3_MULTIPLE = 16 };
    const bool device = w->home.k && (w->home.k->memory || w->home.plan);
    if (f->layer && f->fp8 && t->dims == 2 && f->linear->n % E4M3_MULTIPLE == 0 && f->linear->k % E4M3_MULTIPLE == 0)
        return grains(tensor_count(*t)) + grains(t->n[0] * (int64_t)sizeof *t->scale);
    if (device && (f->layer || t->dims > 1))
        return tensor_count(*t) * (int64_t)dtype_size(w->home.k->activation);
    return (int64_t)tensor_bytes(*t);
}

static void count(struct weights *w, const struct fetched *f)
{
    const struct tensor *t;
    for (int i = 0; w->n_units[f->kind] > f->index && (t = tensor_at(f, i)); i++) {
        const int64_t bytes = tensor_none(*t) ? 0 : stored_bytes(w, f, t);
        w->units[f->kind][f->index].bytes += f->kind == WEIGHTS_BLOCK ? grains(bytes) : bytes;
    }
}

// Now, or by weights_settle.
static int place(struct weights *w, struct fetched f, struct err *err)
{
    f.kind = w->kind;
    f.index = w->index;
    f.fp8 = w->fp8;
    count(w, &f);
    if (!w->home.k)
        return 0;
    if (w->home.held.weights == PLAN_REPLICATED || w->kind == WEIGHTS_COMMON)
        return place_fetched(w, &f, err);
    if (w->n_later == w->room_later) {
        const size_t room = 2 * w->room_later + 64;
        struct fetched *list = realloc(w->later, room * sizeof *list);
        if (!list)
            return err_set(err, ERR_NO_MEMORY, "no memory for a list of %zu weights", room);
        w->later = list;
        w->room_later = room;
    }
    w->later[w->n_later++] = f;
    return 0;
}

int weights_get(struct weights *w, struct tensor *out, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3,
                struct err *err, const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    const int64_t n[] = {n0, n1, n2, n3};
    TRY(get(w, out, dims, n, name, err));
    return place(w, (struct fetched){.tensor = out}, err);
}

static int finish_linear(struct weights *w, struct linear *out, int parts, const struct tensor *weight,
                         const struct tensor *bias, struct err *err)
{
    TRY(linear_init(out, parts, weight, bias, err));
    return place(w, (struct fetched){.layer = true, .linear = out}, err);
}

int weights_linear(struct weights *w, struct linear *out, const char *prefix, int parts, const char *const *names,
                   const int64_t *n, int64_t k, bool bias, struct err *err)
{
    struct tensor weight[LINEAR_MAX_PARTS], b[LINEAR_MAX_PARTS];
    for (int i = 0; i < parts; i++) {
        char name[MAX_NAME];
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
    char full[MAX_NAME + 8];
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
    char full[MAX_NAME + 8];
    snprintf(full, sizeof full, "%s.weight", name);
    TRY(get(w, &t, 4, shape, full, err));
    TRY(weights_get(w, &out->b, 1, c_out, 1, 1, 1, err, "%s.bias", name));
    void *data = own(w, tensor_bytes(t));
    if (!data)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", name);
    if (!w->home.plan) // a plan looks at shapes alone
        channels_last(data, t.data, c_out, c_in, (int64_t)size * size, dtype_size(t.dtype));
    out->w = tensor_of(data, t.dtype, 4, c_out, size, size, c_in);
    return place(w, (struct fetched){.tensor = &out->w}, err);
}

int weights_norm(struct weights *w, struct tensor *gamma, struct tensor *beta, int64_t n, struct err *err,
                 const char *name_format, ...)
{
    FORMAT_NAME(name, name_format);
    TRY(weights_get(w, gamma, 1, n, 1, 1, 1, err, "%s.weight", name));
    return weights_get(w, beta, 1, n, 1, 1, 1, err, "%s.bias", name);
}

// ---- weights that not every rank has

int weights_divide(struct weights *w, int blocks, int once, struct err *err)
{
    const int n[WEIGHTS_KINDS] = {[WEIGHTS_COMMON] = 1, [WEIGHTS_BLOCK] = blocks, [WEIGHTS_ONCE] = once};
    for (int kind = 0; kind < WEIGHTS_KINDS; kind++) {
        w->units[kind] = calloc((size_t)n[kind] + 1, sizeof *w->units[kind]);
        if (!w->units[kind])
            return err_set(err, ERR_NO_MEMORY, "no memory for a list of %d weights", n[kind]);
        w->n_units[kind] = n[kind];
    }
    return 0;
}

void weights_belong(struct weights *w, enum weights_kind kind, int index)
{
    w->kind = kind;
    w->index = index;
}

int weights_count(const struct weights *w, enum weights_kind kind)
{
    return w->n_units[kind];
}

int64_t weights_unit_bytes(const struct weights *w, enum weights_kind kind, int index)
{
    return w->units[kind][index].bytes;
}

struct weights_sharded weights_sharded(const struct weights *w, int block)
{
    if (!w->buffers)
        return (struct weights_sharded){NULL, NULL};
    return (struct weights_sharded){(char *)w->pieces + w->units[WEIGHTS_BLOCK][block].at,
                                    (char *)w->buffers + (block % WEIGHTS_BUFFERS ? w->second_at : 0)};
}

// Shapes and types as the device would have it.
static void forgo(const struct weights *w, const struct fetched *f)
{
    struct linear one = {.parts = 1};
    if (!f->layer) {
        f->tensor->data = NULL;
        return;
    }
    one.n = f->linear->n;
    one.k = f->linear->k;
    one.w[0] = tensor_2d(NULL, f->fp8 ? DT_E4M3 : w->home.k->activation, one.n, one.k);
    if (!tensor_none(f->linear->b[0]))
        one.b[0] = tensor_1d(NULL, w->home.k->activation, one.n);
    *f->linear = one;
}

// A block as it is gathered: its tensors one after the other, the factors of E4M3 behind the numbers.
struct layout {
    char *piece; // not NULL: it gets some of the layout's bytes, mine
    struct span mine;
    char *buffer; // not NULL: its tensors are to point into it
    int64_t at;
};

static void copy_mine(const struct weights *w, const struct layout *l, const void *data, int64_t bytes)
{
    const int64_t end = l->mine.start + l->mine.count;
    const int64_t from = l->at > l->mine.start ? l->at : l->mine.start, to = l->at + bytes < end ? l->at + bytes : end;
    if (data && to > from) // a plan has no factors
        w->home.k->copy(w->home.d, tensor_2d(l->piece + (from - l->mine.start), DT_U8, 1, to - from),
                        tensor_2d((char *)data + (from - l->at), DT_U8, 1, to - from));
}

// Returns where the data will be found.
static void *lay(const struct weights *w, struct layout *l, void *data, int64_t bytes)
{
    if (l->piece)
        copy_mine(w, l, data, bytes);
    if (l->buffer)
        data = l->buffer + l->at;
    l->at += grains(bytes);
    return data;
}

// Returns the layout's bytes.
static int64_t lay_block(const struct weights *w, int block, struct layout l)
{
    struct tensor *t;
    for (size_t f = 0; f < w->n_later; f++)
        for (int i = 0;
             w->later[f].kind == WEIGHTS_BLOCK && w->later[f].index == block && (t = tensor_at(&w->later[f], i)); i++) {
            if (tensor_none(*t))
                continue;
            t->data = lay(w, &l, t->data, (int64_t)tensor_bytes(*t));
            if (t->dtype == DT_E4M3)
                t->scale = lay(w, &l, t->scale, t->n[0] * (int64_t)sizeof *t->scale);
        }
    return l.at;
}

// Places the block whole, keeps this rank's piece of it.
static int shard_block(struct weights *w, int block, struct err *err)
{
    const struct kernels *k = w->home.k;
    const struct unit *u = &w->units[WEIGHTS_BLOCK][block];
    const int64_t piece = ownership_piece(u->bytes, w->home.held.ranks);
    const size_t before = w->n_placed;
    for (size_t f = 0; f < w->n_later; f++)
        if (w->later[f].kind == WEIGHTS_BLOCK && w->later[f].index == block)
            TRY(place_fetched(w, &w->later[f], err));
    if (lay_block(w, block, (struct layout){.piece = NULL}) > u->bytes)
        return err_set(err, ERR_INTERNAL, "block %d is larger on the device than was reckoned", block);
    TRY(k->sync(w->home.d, err));
    lay_block(w, block, (struct layout){.piece = (char *)w->pieces + u->at, .mine = {piece * w->home.rank, piece}});
    TRY(k->sync(w->home.d, err));
    while (w->n_placed > before)
        k->displace(w->home.d, w->placed[--w->n_placed]);
    return 0;
}

static int check_room(const struct weights *w, struct err *err)
{
    const int64_t bytes = ownership_shard_bytes(w, &w->home.held);
    if (!w->home.room || bytes <= w->home.room)
        return 0;
    return err_set(err, ERR_NO_MEMORY,
                   "weights sharded among %d ranks take %.2f GiB of each one's memory, but %.2f GiB are free",
                   w->home.held.ranks, (double)bytes / (1 << 30), (double)w->home.room / (1 << 30));
}

// The buffers come last: until then there is room in their place for a block that is placed whole.
static int shard_blocks(struct weights *w, struct err *err)
{
    const int ranks = w->home.held.ranks, blocks = w->n_units[WEIGHTS_BLOCK];
    int64_t largest[WEIGHTS_BUFFERS] = {0};
    for (int i = 0; i < blocks; i++) {
        struct unit *u = &w->units[WEIGHTS_BLOCK][i];
        const int64_t piece = ownership_piece(u->bytes, ranks);
        int64_t *buffer = &largest[i % WEIGHTS_BUFFERS];
        u->at = w->piece_bytes;
        w->piece_bytes += piece;
        *buffer = piece * ranks > *buffer ? piece * ranks : *buffer;
    }
    w->second_at = largest[0];
    w->buffer_bytes = largest[0] + largest[1];
    TRY(check_room(w, err));
    TRY(w->home.k->alloc(w->home.d, (size_t)w->piece_bytes, &w->pieces, err));
    for (int i = 0; i < blocks; i++)
        TRY(shard_block(w, i, err));
    TRY(w->home.k->alloc(w->home.d, (size_t)w->buffer_bytes, &w->buffers, err));
    for (int i = 0; i < blocks; i++)
        lay_block(w, i, (struct layout){.buffer = weights_sharded(w, i).buffer});
    return 0;
}

int weights_settle(struct weights *w, struct err *err)
{
    struct ownership o;
    if (w->n_later == 0)
        return 0;
    ownership_make(w, &w->home.held, w->home.rank, &o);
    if (o.sharded)
        TRY(shard_blocks(w, err));
    for (size_t i = 0; i < w->n_later; i++) {
        const struct fetched *f = &w->later[i];
        const bool block = f->kind == WEIGHTS_BLOCK;
        if (block && o.sharded)
            continue;
        if (block ? f->index >= o.blocks.start && f->index < o.blocks.start + o.blocks.count
                  : ownership_computes(&o, f->index))
            TRY(place_fetched(w, f, err));
        else
            forgo(w, f);
    }
    w->n_later = 0;
    return 0;
}

// ---- writing

static int describe(json_t *header, const struct entry *e, int64_t start)
{
    const struct tensor t = e->tensor;
    json_t *shape = json_array();
    for (int i = 0; i < t.dims; i++)
        json_array_append_new(shape, json_integer(t.n[i]));
    if (json_object_get(header, e->name)) { // fetched twice: one name cannot stand for both
        json_decref(shape);
        return -1;
    }
    return json_object_set_new(header, e->name,
                               json_pack("{s:s,s:o,s:[I,I]}", "dtype", dtype_name(t.dtype), "shape", shape,
                                         "data_offsets", (json_int_t)start,
                                         (json_int_t)start + (json_int_t)tensor_bytes(t)));
}

// Length and header of a file that holds the tensors one after another, padded as the reference's writer does: data
// begins at a multiple of 8. *size: of both; freed by the caller, NULL when it cannot be made.
static uint8_t *make_header(const struct weights *w, size_t *size)
{
    enum { ALIGN = 8, FLAGS = JSON_COMPACT };
    json_t *root = json_pack("{s:{s:s}}", "__metadata__", "format", "pt"); // which transformers insists on
    int64_t at = 0;
    bool ok = root;
    for (size_t i = 0; ok && i < w->n_entries; i++) {
        ok = describe(root, &w->entries[i], at) == 0;
        at += (int64_t)tensor_bytes(w->entries[i].tensor);
    }
    const size_t text = ok ? json_dumpb(root, NULL, 0, FLAGS) : 0, length = (text + ALIGN - 1) / ALIGN * ALIGN;
    uint8_t *out = text ? malloc(8 + length) : NULL;
    if (out) {
        for (int i = 0; i < 8; i++)
            out[i] = (uint8_t)((uint64_t)length >> 8 * i);
        memset(out + 8, ' ', length);
        json_dumpb(root, (char *)out + 8, text, FLAGS);
    }
    json_decref(root);
    *size = 8 + length;
    return out;
}

static bool write_all(int fd, const void *data, size_t size)
{
    const char *from = data;
    while (size > 0) {
        const ssize_t n = write(fd, from, size);
        if (n < 0 && errno != EINTR)
            return false;
        from += n > 0 ? n : 0;
        size -= n > 0 ? (size_t)n : 0;
    }
    return true;
}

static int refuse_file(const struct weights *w, const char *path, int why, struct err *err)
{
    if (why == EEXIST)
        return err_set(err, ERR_INVALID, "%.300s: is there already, and stays as it is: name another directory", path);
    return err_set(err, why == ENOSPC || why == EDQUOT ? ERR_NO_MEMORY : ERR_IO,
                   "%.300s: cannot be written (%s): name a directory that can, with room for %lld bytes", path,
                   strerror(why), (long long)weights_bytes(w));
}

int weights_save(const struct weights *w, const char *dir, const char *stem, struct err *err)
{
    char path[MAX_PATH];
    size_t size;
    if (snprintf(path, sizeof path, "%s/%s.safetensors", dir, stem) >= (int)sizeof path)
        return err_set(err, ERR_INVALID, "%.80s...: path too long", dir);
    uint8_t *header = make_header(w, &size);
    if (!header)
        return err_set(err, ERR_NO_MEMORY, "%.300s: no memory for its header, or a tensor was fetched twice", path);
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool ok = fd >= 0 && write_all(fd, header, size);
    for (size_t i = 0; ok && i < w->n_entries; i++)
        ok = write_all(fd, w->entries[i].tensor.data, tensor_bytes(w->entries[i].tensor));
    int why = errno;
    free(header);
    if (fd >= 0 && close(fd) != 0 && ok) {
        ok = false;
        why = errno;
    }
    if (ok)
        return 0;
    if (fd >= 0)
        unlink(path);
    return refuse_file(w, path, why, err);
}
