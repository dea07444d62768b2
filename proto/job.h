// job.h: the job as every program sees it: parsed from bytes nobody trusts, checked by one table, packed again.
//
// The validated job is the protobuf-c struct itself. One table in job.c holds each field's bounds, default and
// sentence; job_parse, job_validate, the command line's flags, --help and the table of PROTOCOL.md all read it through
// protobuf-c's descriptors, so a field cannot be checked one way and documented another.
#ifndef DITFLEET_JOB_H
#define DITFLEET_JOB_H

#include "proto/err.h"
#include "proto/job.pb-c.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum {
    JOB_MAX_BYTES = 256 * 1024,   // of a serialised Job
    JOB_MAX_PROMPT = 32 * 1024,   // bytes of one prompt
    JOB_MAX_NAME = 128,           // bytes of an id, and of a model's name or version
    JOB_MAX_TENANT = 64,          // bytes of a tenant's name
    JOB_NAME_SIZE = 132,          // an id, or "@" and a stream id, with its zero
    JOB_MODEL_SIZE = 2 * 128 + 2, // "name@version" with its zero
};

// One row of the table. name is the field's name in job.proto; nested fields are "output.url", "labels.key", ...
struct job_rule {
    const char *name;
    const char *fallback; // what an absent field means, in words
    const char *doc;      // one sentence
    double min, max;      // numbers; max 0 and min 0: any value of the type
    size_t max_bytes;     // strings
    size_t max_items;     // repeated fields
    char separator;       // repeated fields: how job_set_field splits an item's text, '=' or ':'
    bool required;        // by job_validate
    int (*check)(const char *name, const char *text, struct err *e); // strings that are more than UTF-8; may be NULL
    const char *form; // what check allows, in words, for documents and errors
};

// The whole table, in the order of job.proto. The array is constant.
const struct job_rule *job_rules(size_t *count);

// "uint32", "string", "float", "Rng", "repeated Label", ...: the type of a rule's field as job.proto spells it.
const char *job_rule_type(const struct job_rule *rule, char *buffer, size_t size);

// What values the rule allows, in words: "16 to 16384", "at most 32768 bytes of UTF-8", "cpu-f32, cpu-bf16, ...".
const char *job_rule_allowed(const struct job_rule *rule, char *buffer, size_t size);

// Prints the table of fields as PROTOCOL.md holds it (Markdown).
void job_print_table(FILE *out);

// Parses and validates. The caller frees *job by job_free. Any bytes are legal input; on failure *job is NULL and e
// names the field and what is allowed. ERR_CORRUPT: not a Job; ERR_UNSUPPORTED: a field this version does not know;
// ERR_INVALID: out of bounds. *id (may be NULL, JOB_NAME_SIZE bytes) receives the job's id if one could be read, else
// "".
int job_parse(const void *bytes, size_t length, Ditfleet__V1__Job **job, char *id, struct err *e);

// Checks every field against the table, and the fields against each other. The first failure is reported.
int job_validate(const Ditfleet__V1__Job *job, struct err *e);

// The same for a job that never travels (`ditfleet generate`): required fields (id, model, output) may be missing.
int job_check_fields(const Ditfleet__V1__Job *job, struct err *e);

// An empty job on the heap, to be filled by job_set_field or by hand with malloc'd strings. NULL: no memory.
Ditfleet__V1__Job *job_new(void);
void job_free(Ditfleet__V1__Job *job); // NULL is fine

// A deep copy; NULL: no memory.
Ditfleet__V1__Job *job_copy(const Ditfleet__V1__Job *job);

// Sets a field from text: "num_inference_steps" "20", "rng" "cpu-bf16", "labels" "k=v" (appends), "output.url"
// "http://...", "output.headers" "Name: value" (appends). Dashes in name count as underscores, so a flag's name serves.
// The value is checked against the field's rule.
int job_set_field(Ditfleet__V1__Job *job, const char *name, const char *text, struct err *e);

// Enum value <-> the short name that flags and PROTOCOL.md use: "cpu-bf16", "bf16", "high".
const char *job_rng_name(Ditfleet__V1__Rng rng);
const char *job_precision_name(Ditfleet__V1__Precision precision);
const char *job_priority_name(Ditfleet__V1__Priority priority);

// "QUEUED" <-> DITFLEET__V1__STATE__STATE_QUEUED; an unknown name gives STATE_UNKNOWN.
const char *job_state_name(Ditfleet__V1__State state);
Ditfleet__V1__State job_state_parse(const char *name);
bool job_state_final(Ditfleet__V1__State state);

// Packs into a malloc'd buffer the caller frees.
int job_pack(const Ditfleet__V1__Job *job, void **bytes, size_t *length, struct err *e);
int result_pack(const Ditfleet__V1__Result *result, void **bytes, size_t *length, struct err *e);
int event_pack(const Ditfleet__V1__Event *event, void **bytes, size_t *length, struct err *e);

// Unpack checks the wire format and UTF-8 only: results and events come from the fleet itself.
int result_unpack(const void *bytes, size_t length, Ditfleet__V1__Result **result, struct err *e);
int event_unpack(const void *bytes, size_t length, Ditfleet__V1__Event **event, struct err *e);
void result_free(Ditfleet__V1__Result *result); // NULL is fine
void event_free(Ditfleet__V1__Event *event);    // NULL is fine

// The Result of a job that did not succeed: id, state and the error, packed. What admission and workers write.
int result_pack_error(const char *id, Ditfleet__V1__State state, const struct err *why, void **bytes, size_t *length,
                      struct err *e);

// A name that travels in keys and members: [A-Za-z0-9._-], 1 to max_bytes. what is the word used in the error:
// "tenant".
int job_check_name(const char *what, const char *name, size_t max_bytes, struct err *e);

#endif
