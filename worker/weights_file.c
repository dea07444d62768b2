// weights_file.c: safetensors files, one or shards with an index: mapped, every offset checked; and written.
#include "worker/original.h"
#include "worker/weights_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_HEADER = 100 << 20 };

void weights_close(struct weights *w)
{
    for (int i = 0; i < w->n_shards; i++) {
        if (w->shards[i].map)
            munmap(w->shards[i].map, w->shards[i].size);
        free(w->shards[i].path);
    }
    free(w->shards);
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
        void *copy = weights_own(w, (size_t)bytes);
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
        char path[WEIGHTS_PATH];
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
    char single[WEIGHTS_PATH], index[WEIGHTS_PATH], name[WEIGHTS_PATH];
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

struct entry *weights_find(const struct weights *w, const char *name)
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
    char probe[WEIGHTS_NAME];
    for (int i = 0; original_prefixes[i]; i++) {
        snprintf(probe, sizeof probe, "%s%s", original_prefixes[i], ORIGINAL_PROBE);
        if (weights_find(w, probe)) {
            w->prefix = original_prefixes[i];
            return 0;
        }
    }
    if (weights_find(w, "x_embedder.weight"))
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
    char path[WEIGHTS_PATH];
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
