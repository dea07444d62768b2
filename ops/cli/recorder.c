#include "ops/cli/recorder.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops/cli/keep.h"

struct recorder {
    json_t *header;
    char *data;
    size_t size;
    bool failed; // out of memory
};

struct recorder *recorder_new(void)
{
    struct recorder *r = calloc(1, sizeof *r);
    if (r)
        r->header = json_object();
    return r;
}

void recorder_free(struct recorder *r)
{
    if (!r)
        return;
    json_decref(r->header);
    free(r->data);
    free(r);
}

void recorder_put(void *recorder, const char *name, struct tensor t)
{
    struct recorder *r = recorder;
    const size_t bytes = tensor_bytes(t);
    if (r->failed || json_object_get(r->header, name))
        return;
    char *grown = realloc(r->data, r->size + bytes + 1);
    if (!grown) {
        r->failed = true;
        return;
    }
    r->data = grown;
    memcpy(r->data + r->size, t.data, bytes);
    json_t *shape = json_array();
    for (int i = 0; i < t.dims; i++)
        json_array_append_new(shape, json_integer(t.n[i]));
    json_object_set_new(r->header, name,
                        json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype_name(t.dtype), "shape", shape, "data_offsets",
                                  (json_int_t)r->size, (json_int_t)r->size + (json_int_t)bytes));
    r->size += bytes;
}

int recorder_write(const struct recorder *r, const char *path, struct err *err)
{
    enum { PREFIX = 8 };
    char *header = r->failed ? NULL : json_dumps(r->header, JSON_COMPACT);
    const size_t length = header ? strlen(header) : 0, padded = (length + 7) / 8 * 8; // tensors start aligned
    const size_t size = PREFIX + padded + r->size;
    char *file = header ? malloc(size + 1) : NULL;
    int rc;
    if (file) {
        for (int i = 0; i < PREFIX; i++)
            file[i] = (char)((uint64_t)padded >> (8 * i));
        snprintf(file + PREFIX, padded + 1, "%-*s", (int)padded, header);
        if (r->size > 0)
            memcpy(file + PREFIX + padded, r->data, r->size);
        rc = keep_file(path, file, size, err);
    } else {
        rc = err_set(err, ERR_NO_MEMORY, "%s: no memory to record the latents", path);
    }
    free(file);
    free(header);
    return rc;
}
