// store_internal.h: what the files of the model share; nobody else includes it.
#ifndef DITFLEET_SIM_STORE_INTERNAL_H
#define DITFLEET_SIM_STORE_INTERNAL_H

#include "store.h"

struct field {
    uint32_t sum;
    struct text name, value;
};
struct hash { // in order of insertion
    struct field *fields;
    size_t n, capacity;
};

struct member {
    double score;
    uint32_t sum;
    struct text name;
};
struct zset { // in order of score, then name
    struct member *members;
    size_t n, capacity;
};

struct id {
    uint64_t ms, seq;
};
struct entry {
    struct id id;
    size_t n; // names and values
    struct text *texts;
};
struct pending { // delivered, not yet acknowledged
    struct id id;
    struct text consumer;
    int64_t delivered_ms;
};
struct group {
    struct text name;
    struct id last;
    struct pending *pending; // in order of id
    size_t n, capacity;
};
struct stream {
    struct entry *entries;
    size_t n, capacity;
    struct id last;
    struct group *groups;
    size_t n_groups;
};

// Shared by the keyspace and its copies; who writes to one that is shared, copies it first.
struct value {
    unsigned refs;
    enum store_type type;
    union {
        struct text string;
        struct hash hash;
        struct zset zset;
        struct stream stream;
    };
};

struct key { // stays in the table after its value is gone, until store_clean
    struct key *next;
    uint32_t sum;
    struct text name;
    struct value *value;
    int64_t expires_ms; // 0: never
    bool dirty;
};

// A command under way.
struct run {
    struct store *s;
    size_t argc;
    const struct text *argv;
    struct buffer *out;
};

typedef int
command_function(struct run *r); // 0, as all below that write to the reply, so that a command can end with one

// keys
int64_t store_now_ms(const struct store *s);
int64_t store_now_us(const struct store *s);
void store_touch(struct store *s, struct key *k);
void store_drop(struct store *s, struct key *k);
struct key *store_find(struct store *s, struct text name); // NULL: no such key
// The value at argv[i] to read, or NULL: there is none, or (*wrong, the error is in the reply) it has another type.
struct value *value_read(struct run *r, size_t i, enum store_type type, bool *wrong);
// The same to write to; create: it is made if it is not there.
struct value *value_write(struct run *r, size_t i, enum store_type type, bool create, struct key **k);
void value_release(struct value *v);
struct value *stream_clone(const struct stream *from);
void stream_free(struct stream *st);
struct value *zset_clone(const struct zset *from);
void zset_free(struct zset *z);
const struct member *zset_find(const struct zset *z, struct text name);
void id_print(struct id id, char out[48]);

// numbers and replies
uint32_t text_sum(struct text a);
bool text_is_option(struct text a, const char *name); // whatever its case
bool text_integer(struct text a, int64_t *n);
bool text_double(struct text a, double *x);
bool arg_integer(struct run *r, size_t i, int64_t *n); // an error reply when it is none
int out_status(struct run *r, const char *text);
int out_integer(struct run *r, int64_t n);
int out_text(struct run *r, struct text bytes);
int out_string(struct run *r, const char *text);
int out_double(struct run *r, double x);
int out_nil(struct run *r);
int out_nil_array(struct run *r);
int out_array(struct run *r, size_t n);
int out_syntax(struct run *r);
int out_arity(struct run *r, const char *name);

// Room for one more at place `at` of an array of n elements.
void *array_open(void *array, size_t *n, size_t *capacity, size_t size, size_t at);
void array_close(void *array, size_t *n, size_t size, size_t at);

command_function zadd, zrem, zcard, zscore, zrange, zrangebyscore;
command_function xadd, xdel, xlen, xrange, xrevrange, xack, xgroup, xreadgroup, xautoclaim, xread;

#endif
