// store.c: keys, their expiry and copies; strings and hashes; the table of commands.
#include "store_internal.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { BUCKETS = 4096 };

struct store {
    struct key *buckets[BUCKETS];
    int64_t now_us;
    struct key **dirty;
    size_t n_dirty, dirty_capacity;
};

struct copied {
    struct text name;
    struct value *value;
    int64_t expires_ms;
};
struct store_copy {
    size_t n, capacity;
    struct copied *keys;
};

// ---- memory, texts, replies

void *sim_grow(void *memory, size_t size)
{
    void *grown = realloc(memory, size);
    if (!grown) {
        fprintf(stderr, "out of memory\n");
        abort();
    }
    return grown;
}

void *sim_alloc(size_t size)
{
    return memset(sim_grow(NULL, size), 0, size);
}

void *array_open(void *array, size_t *n, size_t *capacity, size_t size, size_t at)
{
    if (*n == *capacity)
        array = sim_grow(array, (*capacity = *capacity ? *capacity * 2 : 8) * size);
    char *place = (char *)array + at * size;
    memmove(place + size, place, (*n - at) * size);
    ++*n;
    memset(place, 0, size);
    return array;
}

void array_close(void *array, size_t *n, size_t size, size_t at)
{
    char *place = (char *)array + at * size;
    --*n;
    memmove(place, place + size, (*n - at) * size);
}

struct text text_of(const char *string)
{
    return (struct text){string, strlen(string)};
}

bool text_same(struct text a, struct text b)
{
    return a.length == b.length && memcmp(a.bytes, b.bytes, a.length) == 0;
}

bool text_is(struct text a, const char *string)
{
    return a.bytes && text_same(a, text_of(string));
}

bool text_is_option(struct text a, const char *name)
{
    return a.length == strlen(name) && strncasecmp(a.bytes, name, a.length) == 0;
}

struct text text_copy(struct text a)
{
    char *copy = sim_grow(NULL, a.length + 1);
    memcpy(copy, a.bytes, a.length);
    copy[a.length] = 0;
    return (struct text){copy, a.length};
}

void text_free(struct text a)
{
    free((char *)a.bytes);
}

uint32_t text_sum(struct text a)
{
    uint32_t sum = 2166136261u;
    for (size_t i = 0; i < a.length; i++)
        sum = (sum ^ (unsigned char)a.bytes[i]) * 16777619u;
    return sum;
}

// As strict as Redis: no spaces, no plus, no leading zeros.
bool text_integer(struct text a, int64_t *n)
{
    char digits[24], again[24], *end;
    if (a.length == 0 || a.length >= sizeof digits)
        return false;
    memcpy(digits, a.bytes, a.length);
    digits[a.length] = 0;
    errno = 0;
    *n = strtoll(digits, &end, 10);
    snprintf(again, sizeof again, "%" PRId64, *n);
    return errno == 0 && !*end && strcmp(digits, again) == 0;
}

bool text_double(struct text a, double *x)
{
    char digits[256], *end;
    if (a.length == 0 || a.length >= sizeof digits || isspace((unsigned char)a.bytes[0]))
        return false;
    memcpy(digits, a.bytes, a.length);
    digits[a.length] = 0;
    *x = strtod(digits, &end);
    return end == digits + a.length && !isnan(*x);
}

void buffer_add(struct buffer *b, const void *bytes, size_t length)
{
    if (b->length + length > b->capacity)
        b->bytes = sim_grow(b->bytes, b->capacity = (b->length + length) * 2);
    if (length > 0)
        memcpy(b->bytes + b->length, bytes, length);
    b->length += length;
}

void buffer_free(struct buffer *b)
{
    free(b->bytes);
    *b = (struct buffer){0};
}

static void add_line(struct buffer *b, char kind, const char *text)
{
    buffer_add(b, &kind, 1);
    buffer_add(b, text, strlen(text));
    buffer_add(b, "\r\n", 2);
}

static void add_number(struct buffer *b, char kind, int64_t n)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRId64, n);
    add_line(b, kind, text);
}

int reply_error(struct buffer *b, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    add_line(b, '-', text);
    return 0;
}

void reply_bulk(struct buffer *b, struct text bytes)
{
    add_number(b, '$', (int64_t)bytes.length);
    buffer_add(b, bytes.bytes, bytes.length);
    buffer_add(b, "\r\n", 2);
}

int out_status(struct run *r, const char *text)
{
    add_line(r->out, '+', text);
    return 0;
}

int out_integer(struct run *r, int64_t n)
{
    add_number(r->out, ':', n);
    return 0;
}

int out_text(struct run *r, struct text bytes)
{
    reply_bulk(r->out, bytes);
    return 0;
}

int out_string(struct run *r, const char *text)
{
    return out_text(r, text_of(text));
}

int out_double(struct run *r, double x)
{
    char text[40];
    snprintf(text, sizeof text, "%.17g", x);
    return out_string(r, text);
}

int out_nil(struct run *r)
{
    add_number(r->out, '$', -1);
    return 0;
}

int out_nil_array(struct run *r)
{
    add_number(r->out, '*', -1);
    return 0;
}

int out_array(struct run *r, size_t n)
{
    add_number(r->out, '*', (int64_t)n);
    return 0;
}

int out_syntax(struct run *r)
{
    return reply_error(r->out, "ERR syntax error");
}

int out_arity(struct run *r, const char *name)
{
    return reply_error(r->out, "ERR wrong number of arguments for '%s' command", name);
}

bool arg_integer(struct run *r, size_t i, int64_t *n)
{
    bool good = text_integer(r->argv[i], n);
    if (!good)
        reply_error(r->out, "ERR value is not an integer or out of range");
    return good;
}

// ---- values

static void hash_free(struct hash *h)
{
    for (size_t i = 0; i < h->n; i++) {
        text_free(h->fields[i].name);
        text_free(h->fields[i].value);
    }
    free(h->fields);
}

void value_release(struct value *v)
{
    if (!v || --v->refs > 0)
        return;
    if (v->type == STORE_STRING)
        text_free(v->string);
    else if (v->type == STORE_HASH)
        hash_free(&v->hash);
    else if (v->type == STORE_ZSET)
        zset_free(&v->zset);
    else
        stream_free(&v->stream);
    free(v);
}

static struct value *hash_clone(const struct hash *from)
{
    struct value *v = sim_alloc(sizeof *v);
    v->hash.capacity = from->n + 4;
    v->hash.fields = sim_alloc(v->hash.capacity * sizeof *v->hash.fields);
    for (size_t i = 0; i < from->n; i++)
        v->hash.fields[i] =
            (struct field){from->fields[i].sum, text_copy(from->fields[i].name), text_copy(from->fields[i].value)};
    v->hash.n = from->n;
    return v;
}

// A value of its own for whoever writes.
static struct value *unshare(struct value *v)
{
    if (v->refs == 1)
        return v;
    struct value *own = v->type == STORE_HASH   ? hash_clone(&v->hash)
                        : v->type == STORE_ZSET ? zset_clone(&v->zset)
                                                : stream_clone(&v->stream); // a string is never written to
    own->type = v->type;
    own->refs = 1;
    value_release(v);
    return own;
}

// ---- keys

struct store *store_new(void)
{
    return sim_alloc(sizeof(struct store));
}

static void free_keys(struct store *s)
{
    for (size_t i = 0; i < BUCKETS; i++) {
        for (struct key *k = s->buckets[i], *next; k; k = next) {
            next = k->next;
            value_release(k->value);
            text_free(k->name);
            free(k);
        }
        s->buckets[i] = NULL;
    }
    s->n_dirty = 0;
}

void store_free(struct store *s)
{
    free_keys(s);
    free(s->dirty);
    free(s);
}

void store_set_clock(struct store *s, int64_t microseconds)
{
    s->now_us = microseconds;
}

int64_t store_now_us(const struct store *s)
{
    return s->now_us;
}

int64_t store_now_ms(const struct store *s)
{
    return s->now_us / 1000;
}

void store_touch(struct store *s, struct key *k)
{
    if (k->dirty)
        return;
    k->dirty = true;
    s->dirty = array_open(s->dirty, &s->n_dirty, &s->dirty_capacity, sizeof(struct key *), s->n_dirty);
    s->dirty[s->n_dirty - 1] = k;
}

void store_drop(struct store *s, struct key *k)
{
    value_release(k->value);
    k->value = NULL;
    k->expires_ms = 0;
    store_touch(s, k);
}

static struct key *find_any(struct store *s, struct text name, bool create)
{
    uint32_t sum = text_sum(name);
    struct key **bucket = &s->buckets[sum % BUCKETS], *k = *bucket;
    while (k && (k->sum != sum || !text_same(k->name, name)))
        k = k->next;
    if (!k && create) {
        k = sim_alloc(sizeof *k);
        *k = (struct key){.next = *bucket, .sum = sum, .name = text_copy(name)};
        *bucket = k;
    }
    return k;
}

struct key *store_find(struct store *s, struct text name)
{
    struct key *k = find_any(s, name, false);
    if (k && k->value && k->expires_ms && k->expires_ms <= store_now_ms(s))
        store_drop(s, k);
    return k && k->value ? k : NULL;
}

struct value *value_read(struct run *r, size_t i, enum store_type type, bool *wrong)
{
    struct key *k = store_find(r->s, r->argv[i]);
    *wrong = k && k->value->type != type;
    if (*wrong)
        reply_error(r->out, "WRONGTYPE Operation against a key holding the wrong kind of value");
    return k && !*wrong ? k->value : NULL;
}

struct value *value_write(struct run *r, size_t i, enum store_type type, bool create, struct key **found)
{
    bool wrong;
    struct value *v = value_read(r, i, type, &wrong);
    *found = NULL;
    if (wrong || (!v && !create))
        return NULL;
    struct key *k = find_any(r->s, r->argv[i], true);
    if (!v) {
        k->value = sim_alloc(sizeof *v);
        k->value->refs = 1;
        k->value->type = type;
        k->expires_ms = 0;
    }
    k->value = unshare(k->value);
    *found = k;
    return k->value;
}

size_t store_dirty(const struct store *s)
{
    return s->n_dirty;
}

struct text store_dirty_key(const struct store *s, size_t i)
{
    return s->dirty[i]->name;
}

void store_clean(struct store *s)
{
    for (size_t i = 0; i < s->n_dirty; i++) {
        struct key *k = s->dirty[i], **at = &s->buckets[k->sum % BUCKETS];
        k->dirty = false;
        if (k->value)
            continue;
        while (*at != k)
            at = &(*at)->next;
        *at = k->next;
        text_free(k->name);
        free(k);
    }
    s->n_dirty = 0;
}

struct store_copy *store_copy(struct store *s)
{
    struct store_copy *c = sim_alloc(sizeof *c);
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct key *k = s->buckets[i]; k; k = k->next) {
            if (!k->value)
                continue;
            c->keys = array_open(c->keys, &c->n, &c->capacity, sizeof *c->keys, c->n);
            c->keys[c->n - 1] = (struct copied){text_copy(k->name), k->value, k->expires_ms};
            k->value->refs++;
        }
    return c;
}

void store_restore(struct store *s, const struct store_copy *c)
{
    free_keys(s);
    for (size_t i = 0; c && i < c->n; i++) {
        struct key *k = find_any(s, c->keys[i].name, true);
        k->value = c->keys[i].value;
        k->value->refs++;
        k->expires_ms = c->keys[i].expires_ms;
    }
}

void store_copy_free(struct store_copy *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n; i++) {
        text_free(c->keys[i].name);
        value_release(c->keys[i].value);
    }
    free(c->keys);
    free(c);
}

// ---- commands on keys and strings

static int get(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_STRING, &wrong);
    if (v)
        out_text(r, v->string);
    else if (!wrong)
        out_nil(r);
    return 0;
}

static int set(struct run *r)
{
    if (r->argc != 3)
        return out_syntax(r); // no options
    struct key *k = find_any(r->s, r->argv[1], true);
    value_release(k->value);
    k->value = sim_alloc(sizeof *k->value);
    *k->value = (struct value){.refs = 1, .type = STORE_STRING, .string = text_copy(r->argv[2])};
    k->expires_ms = 0;
    store_touch(r->s, k);
    return out_status(r, "OK");
}

static int exists(struct run *r)
{
    int64_t n = 0;
    for (size_t i = 1; i < r->argc; i++)
        n += store_find(r->s, r->argv[i]) != NULL;
    return out_integer(r, n);
}

static int del(struct run *r)
{
    int64_t n = 0;
    for (size_t i = 1; i < r->argc; i++) {
        struct key *k = store_find(r->s, r->argv[i]);
        if (k)
            store_drop(r->s, k);
        n += k != NULL;
    }
    return out_integer(r, n);
}

static int pexpire(struct run *r)
{
    int64_t ms;
    bool greater = r->argc > 3 && text_is_option(r->argv[3], "GT"),
         less = r->argc > 3 && text_is_option(r->argv[3], "LT");
    if (r->argc > 4 || (r->argc == 4 && !greater && !less))
        return reply_error(r->out, "ERR Unsupported option %.*s", (int)r->argv[3].length, r->argv[3].bytes);
    if (!arg_integer(r, 2, &ms))
        return 0;
    if (ms > INT64_MAX - store_now_ms(r->s))
        return reply_error(r->out, "ERR invalid expire time in 'pexpire' command");
    int64_t at = ms + store_now_ms(r->s);
    struct key *k = store_find(r->s, r->argv[1]);
    // What never expires is later than any time.
    if (!k || (greater && (!k->expires_ms || at <= k->expires_ms)) || (less && k->expires_ms && at >= k->expires_ms))
        return out_integer(r, 0);
    if (ms <= 0)
        store_drop(r->s, k);
    else
        k->expires_ms = at;
    store_touch(r->s, k);
    return out_integer(r, 1);
}

static int pttl(struct run *r)
{
    const struct key *k = store_find(r->s, r->argv[1]);
    return out_integer(r, !k ? -2 : !k->expires_ms ? -1 : k->expires_ms - store_now_ms(r->s));
}

static int persist(struct run *r)
{
    struct key *k = store_find(r->s, r->argv[1]);
    bool expires = k && k->expires_ms;
    if (expires) {
        k->expires_ms = 0;
        store_touch(r->s, k);
    }
    return out_integer(r, expires);
}

static int time_(struct run *r)
{
    char text[24];
    out_array(r, 2);
    snprintf(text, sizeof text, "%" PRId64, store_now_us(r->s) / 1000000);
    out_string(r, text);
    snprintf(text, sizeof text, "%" PRId64, store_now_us(r->s) % 1000000);
    return out_string(r, text);
}

// ---- hashes

static struct field *hash_find(const struct hash *h, struct text name)
{
    uint32_t sum = text_sum(name);
    for (size_t i = 0; i < h->n; i++)
        if (h->fields[i].sum == sum && text_same(h->fields[i].name, name))
            return &h->fields[i];
    return NULL;
}

// Whether the field is new.
static bool hash_put(struct hash *h, struct text name, struct text value)
{
    struct field *f = hash_find(h, name);
    if (f) {
        struct text old = f->value;
        f->value = text_copy(value);
        text_free(old);
        return false;
    }
    h->fields = array_open(h->fields, &h->n, &h->capacity, sizeof *h->fields, h->n);
    h->fields[h->n - 1] = (struct field){text_sum(name), text_copy(name), text_copy(value)};
    return true;
}

static int out_field(struct run *r, const struct value *v, struct text name)
{
    const struct field *f = v ? hash_find(&v->hash, name) : NULL;
    if (f)
        out_text(r, f->value);
    else
        out_nil(r);
    return 0;
}

static int hget(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_HASH, &wrong);
    if (!wrong)
        out_field(r, v, r->argv[2]);
    return 0;
}

static int hstrlen(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_HASH, &wrong);
    const struct field *f = v ? hash_find(&v->hash, r->argv[2]) : NULL;
    return wrong ? 0 : out_integer(r, f ? (int64_t)f->value.length : 0);
}

static int hmget(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_HASH, &wrong);
    if (wrong)
        return 0;
    out_array(r, r->argc - 2);
    for (size_t i = 2; i < r->argc; i++)
        out_field(r, v, r->argv[i]);
    return 0;
}

static int out_hash(struct run *r, bool values)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_HASH, &wrong);
    if (wrong)
        return 0;
    size_t n = v ? v->hash.n : 0;
    out_array(r, values ? 2 * n : n);
    for (size_t i = 0; i < n; i++) {
        out_text(r, v->hash.fields[i].name);
        if (values)
            out_text(r, v->hash.fields[i].value);
    }
    return 0;
}

static int hgetall(struct run *r)
{
    return out_hash(r, true);
}

static int hkeys(struct run *r)
{
    return out_hash(r, false);
}

static int hset(struct run *r)
{
    struct key *k;
    int64_t n = 0;
    if (r->argc % 2 != 0)
        return out_arity(r, "hset");
    struct value *v = value_write(r, 1, STORE_HASH, true, &k);
    if (!v)
        return 0;
    for (size_t i = 2; i < r->argc; i += 2)
        n += hash_put(&v->hash, r->argv[i], r->argv[i + 1]);
    store_touch(r->s, k);
    return out_integer(r, n);
}

static int hsetnx(struct run *r)
{
    struct key *k;
    struct value *v = value_write(r, 1, STORE_HASH, true, &k);
    if (!v)
        return 0;
    bool there = hash_find(&v->hash, r->argv[2]);
    if (!there) {
        hash_put(&v->hash, r->argv[2], r->argv[3]);
        store_touch(r->s, k);
    }
    return out_integer(r, !there);
}

static int hdel(struct run *r)
{
    struct key *k;
    int64_t n = 0;
    struct value *v = value_write(r, 1, STORE_HASH, false, &k);
    for (size_t i = 2; v && i < r->argc; i++) {
        struct field *f = hash_find(&v->hash, r->argv[i]);
        if (!f)
            continue;
        text_free(f->name);
        text_free(f->value);
        array_close(v->hash.fields, &v->hash.n, sizeof *f, (size_t)(f - v->hash.fields));
        store_touch(r->s, k);
        n++;
    }
    if (v && v->hash.n == 0)
        store_drop(r->s, k);
    if (v || !store_find(r->s, r->argv[1]))
        out_integer(r, n);
    return 0;
}

static int hincrby(struct run *r)
{
    struct key *k;
    int64_t by, n = 0;
    char text[24];
    if (!arg_integer(r, 3, &by))
        return 0;
    bool wrong;
    const struct value *there = value_read(r, 1, STORE_HASH, &wrong);
    const struct field *f = there ? hash_find(&there->hash, r->argv[2]) : NULL;
    if (wrong)
        return 0;
    if (f && !text_integer(f->value, &n))
        return reply_error(r->out, "ERR hash value is not an integer");
    if (__builtin_add_overflow(n, by, &n))
        return reply_error(r->out, "ERR increment or decrement would overflow");
    struct value *v = value_write(r, 1, STORE_HASH, true, &k);
    if (!v)
        return 0;
    snprintf(text, sizeof text, "%" PRId64, n);
    hash_put(&v->hash, r->argv[2], text_of(text));
    store_touch(r->s, k);
    return out_integer(r, n);
}

// ---- the table

static const struct {
    const char *name;
    int arity; // with the name; negative: at least
    command_function *run;
} commands[] = {
    {"GET", 2, get},
    {"SET", -3, set},
    {"EXISTS", -2, exists},
    {"DEL", -2, del},
    {"PEXPIRE", -3, pexpire},
    {"PTTL", 2, pttl},
    {"PERSIST", 2, persist},
    {"TIME", 1, time_},
    {"HGET", 3, hget},
    {"HSTRLEN", 3, hstrlen},
    {"HMGET", -3, hmget},
    {"HGETALL", 2, hgetall},
    {"HKEYS", 2, hkeys},
    {"HSET", -4, hset},
    {"HSETNX", 4, hsetnx},
    {"HDEL", -3, hdel},
    {"HINCRBY", 4, hincrby},
    {"ZADD", -4, zadd},
    {"ZREM", -3, zrem},
    {"ZCARD", 2, zcard},
    {"ZSCORE", 3, zscore},
    {"ZRANGE", -4, zrange},
    {"ZRANGEBYSCORE", -4, zrangebyscore},
    {"XADD", -5, xadd},
    {"XDEL", -3, xdel},
    {"XLEN", 2, xlen},
    {"XRANGE", -4, xrange},
    {"XREVRANGE", -4, xrevrange},
    {"XACK", -4, xack},
    {"XGROUP", -4, xgroup},
    {"XREADGROUP", -7, xreadgroup},
    {"XAUTOCLAIM", -6, xautoclaim},
    {"XREAD", -4, xread},
};

int store_run(struct store *s, size_t argc, const struct text *argv, struct buffer *out)
{
    struct run r = {s, argc, argv, out};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (!text_is_option(argv[0], commands[i].name))
            continue;
        int arity = commands[i].arity;
        char name[24] = "";
        for (size_t k = 0; commands[i].name[k]; k++)
            name[k] = (char)tolower((unsigned char)commands[i].name[k]);
        if (arity > 0 ? (int)argc != arity : (int)argc < -arity)
            return out_arity(&r, name);
        return commands[i].run(&r);
    }
    return reply_error(out, "ERR unknown command '%.*s'", (int)(argv[0].length > 64 ? 64 : argv[0].length),
                       argv[0].bytes);
}

// ---- looking inside

enum store_type store_type(struct store *s, struct text key)
{
    const struct key *k = store_find(s, key);
    return k ? k->value->type : STORE_NONE;
}

int64_t store_expires(struct store *s, struct text key)
{
    const struct key *k = store_find(s, key);
    return k ? k->expires_ms : 0;
}

struct text store_value(struct store *s, struct text key)
{
    const struct key *k = store_find(s, key);
    return k && k->value->type == STORE_STRING ? k->value->string : (struct text){0};
}

struct text store_field(struct store *s, struct text key, const char *field)
{
    const struct key *k = store_find(s, key);
    const struct field *f = k && k->value->type == STORE_HASH ? hash_find(&k->value->hash, text_of(field)) : NULL;
    return f ? f->value : (struct text){0};
}

bool store_score(struct store *s, struct text key, struct text member, double *score)
{
    const struct key *k = store_find(s, key);
    const struct member *m = k && k->value->type == STORE_ZSET ? zset_find(&k->value->zset, member) : NULL;
    if (m)
        *score = m->score;
    return m != NULL;
}

size_t store_size(struct store *s, struct text key)
{
    const struct key *k = store_find(s, key);
    if (!k)
        return 0;
    const struct value *v = k->value;
    return v->type == STORE_HASH     ? v->hash.n
           : v->type == STORE_ZSET   ? v->zset.n
           : v->type == STORE_STREAM ? v->stream.n
                                     : 1;
}

void store_entry_id(struct store *s, struct text key, size_t i, char id[48])
{
    id_print(store_find(s, key)->value->stream.entries[i].id, id);
}

struct text store_entry_field(struct store *s, struct text key, size_t i, const char *field)
{
    const struct entry *e = &store_find(s, key)->value->stream.entries[i];
    for (size_t k = 0; k + 1 < e->n; k += 2)
        if (text_is(e->texts[k], field))
            return e->texts[k + 1];
    return (struct text){0};
}

void store_each(struct store *s, store_on_key *f, void *arg)
{
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct key *k = s->buckets[i]; k; k = k->next)
            if (k->value && (!k->expires_ms || k->expires_ms > store_now_ms(s)) && !f(arg, k->name))
                return;
}
