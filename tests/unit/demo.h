// demo.h: what tests of the engine share: the demo model, jobs made from text, distances between recordings, and a
// reader of recordings in safetensors that has nothing in common with worker/weights_file.c. Include <cmocka.h> first.
#ifndef DITFLEET_TESTS_DEMO_H
#define DITFLEET_TESTS_DEMO_H

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/engine.h"

#define DEMO_MODEL "ops/demo/model"

static inline struct model *demo_model(void)
{
    struct err err = {.code = ERR_NONE};
    struct model *m = NULL;
    if (model_load(DEMO_MODEL, &m, &err) != 0)
        fail_msg("%s", err.text);
    return m;
}

// A job the model has agreed to, from pairs of field and text, ending in NULL. Freed by job_free.
static inline Ditfleet__V1__Job *demo_job(const struct model *m, const char *const *fields)
{
    struct err err = {.code = ERR_NONE};
    Ditfleet__V1__Job *job = job_new();
    assert_non_null(job);
    for (; *fields; fields += 2)
        if (job_set_field(job, fields[0], fields[1], &err) != 0)
            fail_msg("%s", err.text);
    if (model_resolve_job(m, job, &err) != 0)
        fail_msg("%s", err.text);
    return job;
}

// |a - b| / |b|; numbers that are not finite are infinitely far from anything.
static inline double relative_l2(const float *a, const float *b, int64_t n)
{
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(a[i]) || !isfinite(b[i]))
            return INFINITY;
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

static inline double largest_difference(const float *a, const float *b, int64_t n)
{
    double largest = 0;
    for (int64_t i = 0; i < n; i++)
        if (!(fabs((double)a[i] - (double)b[i]) <= largest)) // a NaN counts
            largest = fabs((double)a[i] - (double)b[i]);
    return largest;
}

// Pixels (three bytes each) of which some channel is more than one level off.
static inline int64_t pixels_off(const uint8_t *a, const uint8_t *b, int64_t pixels)
{
    int64_t off = 0;
    for (int64_t i = 0; i < pixels; i++, a += 3, b += 3)
        off += abs(a[0] - b[0]) > 1 || abs(a[1] - b[1]) > 1 || abs(a[2] - b[2]) > 1;
    return off;
}

// ---- recordings

struct recording {
    json_t *header;
    uint8_t *bytes; // the whole file
    size_t data;    // where tensors begin
};

static inline void recording_open(struct recording *r, const char *path)
{
    FILE *f = fopen(path, "rbe");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    const size_t size = (size_t)ftell(f);
    rewind(f);
    r->bytes = malloc(size);
    assert_non_null(r->bytes);
    assert_int_equal(fread(r->bytes, 1, size, f), size);
    fclose(f);
    uint64_t length;
    memcpy(&length, r->bytes, sizeof length);
    r->data = sizeof length + length;
    r->header = json_loadb((const char *)r->bytes + sizeof length, length, 0, NULL);
    assert_non_null(r->header);
}

static inline void recording_close(struct recording *r)
{
    json_decref(r->header);
    free(r->bytes);
}

// *bytes of the tensor called name; NULL when the recording has none.
static inline const void *recording_get(const struct recording *r, const char *name, size_t *bytes)
{
    json_t *offsets = json_object_get(json_object_get(r->header, name), "data_offsets");
    const size_t start = (size_t)json_integer_value(json_array_get(offsets, 0));
    *bytes = (size_t)json_integer_value(json_array_get(offsets, 1)) - start;
    return offsets ? r->bytes + r->data + start : NULL;
}

#endif
