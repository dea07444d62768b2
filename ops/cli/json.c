#include "ops/cli/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/job.h"

static json_t *from_enum(const ProtobufCEnumDescriptor *d, int value)
{
    const char *name = "unknown";
    if (d == &ditfleet__v1__state__descriptor)
        name = job_state_name((Ditfleet__V1__State)value);
    else if (d == &ditfleet__v1__rng__descriptor)
        name = job_rng_name((Ditfleet__V1__Rng)value);
    else if (d == &ditfleet__v1__precision__descriptor)
        name = job_precision_name((Ditfleet__V1__Precision)value);
    else if (d == &ditfleet__v1__priority__descriptor)
        name = job_priority_name((Ditfleet__V1__Priority)value);
    return json_string(name);
}

static json_t *from_uint64(uint64_t n)
{
    return n <= INT64_MAX ? json_integer((json_int_t)n) : json_sprintf("%" PRIu64, n);
}

// 3.5999999046325684 was 3.6 when somebody typed it.
static json_t *from_float(float x)
{
    char text[32];
    snprintf(text, sizeof text, "%.7g", (double)x);
    return json_real(strtod(text, NULL));
}

// One value at p; NULL: nothing to show. The types are those that job.proto uses.
static json_t *from_value(const ProtobufCFieldDescriptor *f, const void *p)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
        return *(const char *const *)p && **(const char *const *)p ? json_string(*(const char *const *)p) : NULL;
    case PROTOBUF_C_TYPE_MESSAGE:
        return *(ProtobufCMessage *const *)p ? json_from_message(*(ProtobufCMessage *const *)p) : NULL;
    case PROTOBUF_C_TYPE_ENUM:
        return from_enum(f->descriptor, *(const int *)p);
    case PROTOBUF_C_TYPE_FLOAT:
        return from_float(*(const float *)p);
    case PROTOBUF_C_TYPE_DOUBLE:
        return json_real(*(const double *)p);
    case PROTOBUF_C_TYPE_BOOL:
        return json_boolean(*(const protobuf_c_boolean *)p);
    case PROTOBUF_C_TYPE_UINT32:
        return json_integer(*(const uint32_t *)p);
    case PROTOBUF_C_TYPE_UINT64:
        return from_uint64(*(const uint64_t *)p);
    default:
        return NULL;
    }
}

static json_t *from_list(const ProtobufCFieldDescriptor *f, const ProtobufCMessage *m)
{
    const size_t count = *(const size_t *)((const char *)m + f->quantifier_offset);
    const char *items = *(const char *const *)((const char *)m + f->offset);
    json_t *list = count ? json_array() : NULL;
    for (size_t i = 0; list && i < count; i++)
        json_array_append_new(list, from_value(f, items + i * sizeof(void *))); // lists are of messages and strings
    return list;
}

json_t *json_from_message(const ProtobufCMessage *m)
{
    json_t *object = json_object();
    for (unsigned i = 0; object && i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        const char *base = (const char *)m;
        if ((f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF) && *(const uint32_t *)(base + f->quantifier_offset) != f->id)
            continue;
        json_t *value = f->label == PROTOBUF_C_LABEL_REPEATED ? from_list(f, m) : from_value(f, base + f->offset);
        if (value)
            json_object_set_new(object, f->name, value);
    }
    return object;
}

void json_print(json_t *object)
{
    json_dumpf(object, stdout, JSON_COMPACT | JSON_REAL_PRECISION(15));
    putchar('\n');
    json_decref(object);
}
