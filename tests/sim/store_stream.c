// store_stream.c: streams and their consumer groups.
#include "store_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- ids

static int compare(struct id a, struct id b)
{
    return a.ms != b.ms ? (a.ms < b.ms ? -1 : 1) : (a.seq > b.seq) - (a.seq < b.seq);
}

void id_print(struct id id, char out[48])
{
    snprintf(out, 48, "%" PRIu64 "-%" PRIu64, id.ms, id.seq);
}

static int out_id(struct run *r, struct id id)
{
    char text[48];
    id_print(id, text);
    return out_string(r, text);
}

static bool read_number(const char *text, size_t length, uint64_t *n)
{
    *n = 0;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9' || __builtin_mul_overflow(*n, 10, n) ||
            __builtin_add_overflow(*n, (uint64_t)(text[i] - '0'), n))
            return false;
    }
    return length > 0 && (length == 1 || text[0] != '0');
}

// "ms-seq", or "ms" alone, whose missing half is seq.
static bool read_id(struct text a, uint64_t seq, struct id *id)
{
    const char *dash = memchr(a.bytes, '-', a.length);
    size_t first = dash ? (size_t)(dash - a.bytes) : a.length;
    id->seq = seq;
    return read_number(a.bytes, first, &id->ms) && (!dash || read_number(dash + 1, a.length - first - 1, &id->seq));
}

static int out_bad_id(struct run *r)
{
    return reply_error(r->out, "ERR Invalid stream ID specified as stream command argument");
}

// ---- entries

static void free_texts(struct entry *e)
{
    for (size_t i = 0; i < e->n; i++)
        text_free(e->texts[i]);
    free(e->texts);
}

void stream_free(struct stream *st)
{
    for (size_t i = 0; i < st->n; i++)
        free_texts(&st->entries[i]);
    for (size_t i = 0; i < st->n_groups; i++) {
        for (size_t k = 0; k < st->groups[i].n; k++)
            text_free(st->groups[i].pending[k].consumer);
        free(st->groups[i].pending);
        text_free(st->groups[i].name);
    }
    free(st->groups);
    free(st->entries);
}

static struct entry entry_of(struct id id, size_t n, const struct text *texts)
{
    struct entry e = {id, n, sim_alloc(n * sizeof *texts)};
    for (size_t i = 0; i < n; i++)
        e.texts[i] = text_copy(texts[i]);
    return e;
}

struct value *stream_clone(const struct stream *from)
{
    struct value *v = sim_alloc(sizeof *v);
    struct stream *to = &v->stream;
    *to = (struct stream){.n = from->n, .capacity = from->n + 4, .last = from->last, .n_groups = from->n_groups};
    to->entries = sim_alloc(to->capacity * sizeof *to->entries);
    for (size_t i = 0; i < from->n; i++)
        to->entries[i] = entry_of(from->entries[i].id, from->entries[i].n, from->entries[i].texts);
    to->groups = sim_alloc((from->n_groups + 1) * sizeof *to->groups);
    for (size_t i = 0; i < from->n_groups; i++) {
        const struct group *g = &from->groups[i];
        struct group *copy = &to->groups[i];
        *copy = (struct group){text_copy(g->name), g->last, sim_alloc((g->n + 1) * sizeof *g->pending), g->n, g->n + 1};
        for (size_t k = 0; k < g->n; k++) {
            copy->pending[k] = g->pending[k];
            copy->pending[k].consumer = text_copy(g->pending[k].consumer);
        }
    }
    return v;
}

// The place of the first entry at or after id.
static size_t place(const struct stream *st, struct id id)
{
    size_t low = 0, high = st->n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (compare(st->entries[middle].id, id) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool has_entry(const struct stream *st, struct id id)
{
    size_t at = place(st, id);
    return at < st->n && compare(st->entries[at].id, id) == 0;
}

static void out_entry(struct run *r, const struct entry *e)
{
    out_array(r, 2);
    out_id(r, e->id);
    out_array(r, e->n);
    for (size_t i = 0; i < e->n; i++)
        out_text(r, e->texts[i]);
}

// ---- XADD and what undoes it

// What an entry's id is to be: "*" is now, or the next after the last; "ms-*" the next of that millisecond.
struct wish {
    bool any, counted;
    struct id id;
};

static bool read_wish(struct run *r, struct text a, struct wish *w)
{
    w->any = text_is(a, "*");
    w->counted = a.length > 2 && memcmp(a.bytes + a.length - 2, "-*", 2) == 0;
    w->id = (struct id){(uint64_t)store_now_ms(r->s), 0};
    if (w->counted ? !read_number(a.bytes, a.length - 2, &w->id.ms) : !w->any && !read_id(a, 0, &w->id)) {
        out_bad_id(r);
        return false;
    }
    return true;
}

static bool next_id(struct run *r, const struct wish *w, struct id last, struct id *id)
{
    *id = w->id;
    if (w->any && id->ms <= last.ms)
        *id = (struct id){last.ms, last.seq + 1};
    if (w->counted)
        id->seq = id->ms == last.ms ? last.seq + 1 : 0;
    if (compare(*id, last) > 0)
        return true;
    reply_error(r->out, "ERR The ID specified in XADD is equal or smaller than the target stream top item");
    return false;
}

enum { NODE = 100 }; // entries that ~ trims at once

static void trim(struct stream *st, int64_t most, bool about)
{
    size_t out = most < (int64_t)st->n ? st->n - (size_t)most : 0;
    if (about)
        out = out / NODE * NODE;
    for (size_t i = 0; i < out; i++)
        free_texts(&st->entries[i]);
    memmove(st->entries, st->entries + out, (st->n - out) * sizeof *st->entries);
    st->n -= out;
}

int xadd(struct run *r)
{
    struct key *k;
    struct wish wish;
    struct id id;
    int64_t most = -1;
    bool about = false, wrong;
    size_t at = 2;
    if (text_is_option(r->argv[at], "MAXLEN")) {
        about = text_is(r->argv[at + 1], "~");
        at += about || text_is(r->argv[at + 1], "=") ? 2 : 1;
        if (at >= r->argc)
            return out_syntax(r);
        if (!arg_integer(r, at++, &most))
            return 0;
        if (most < 0)
            return reply_error(r->out, "ERR The MAXLEN argument must be >= 0.");
    }
    if (at >= r->argc)
        return out_arity(r, "xadd");
    if (!read_wish(r, r->argv[at], &wish))
        return 0;
    if (at + 3 > r->argc || (r->argc - at) % 2 != 1)
        return out_arity(r, "xadd");
    if (!wish.counted && wish.id.ms == 0 && wish.id.seq == 0)
        return reply_error(r->out, "ERR The ID specified in XADD must be greater than 0-0");
    const struct value *there = value_read(r, 1, STORE_STREAM, &wrong);
    if (wrong || !next_id(r, &wish, there ? there->stream.last : (struct id){0}, &id))
        return 0;
    struct stream *st = &value_write(r, 1, STORE_STREAM, true, &k)->stream;
    st->entries = array_open(st->entries, &st->n, &st->capacity, sizeof *st->entries, st->n);
    st->entries[st->n - 1] = entry_of(id, r->argc - at - 1, r->argv + at + 1);
    st->last = id;
    if (most >= 0)
        trim(st, most, about);
    store_touch(r->s, k);
    return out_id(r, id);
}

// The ids from argv[first] on; false: an error is in the reply.
static bool check_ids(struct run *r, size_t first)
{
    struct id id;
    for (size_t i = first; i < r->argc; i++)
        if (!read_id(r->argv[i], 0, &id)) {
            out_bad_id(r);
            return false;
        }
    return true;
}

int xdel(struct run *r)
{
    struct key *k;
    struct id id;
    int64_t n = 0;
    bool wrong;
    const struct value *there = value_read(r, 1, STORE_STREAM, &wrong);
    if (wrong || (there && !check_ids(r, 2)))
        return 0;
    struct value *v = value_write(r, 1, STORE_STREAM, false, &k);
    for (size_t i = 2; v && i < r->argc; i++) {
        read_id(r->argv[i], 0, &id);
        if (!has_entry(&v->stream, id))
            continue;
        size_t at = place(&v->stream, id);
        free_texts(&v->stream.entries[at]);
        array_close(v->stream.entries, &v->stream.n, sizeof *v->stream.entries, at);
        store_touch(r->s, k);
        n++;
    }
    return out_integer(r, n);
}

int xlen(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_STREAM, &wrong);
    if (!wrong)
        out_integer(r, v ? (int64_t)v->stream.n : 0);
    return 0;
}

static bool next_of(struct id *id)
{
    if (++id->seq == 0 && ++id->ms == 0)
        return false;
    return true;
}

static bool read_end(struct text a, uint64_t seq, struct id *id)
{
    if (text_is(a, "-"))
        *id = (struct id){0, 0};
    else if (text_is(a, "+"))
        *id = (struct id){UINT64_MAX, UINT64_MAX};
    else
        return read_id(a, seq, id);
    return true;
}

// Where a range begins; "(" before it: behind that id.
static bool read_start(struct text a, struct id *id)
{
    bool open = a.length > 1 && a.bytes[0] == '(';
    return open ? read_id((struct text){a.bytes + 1, a.length - 1}, 0, id) && next_of(id) : read_end(a, 0, id);
}

static int out_range(struct run *r, struct text low, struct text high, bool backwards)
{
    struct id from, to;
    int64_t count = INT64_MAX;
    bool wrong;
    if (!read_start(low, &from) || !read_end(high, UINT64_MAX, &to))
        return out_bad_id(r);
    if (r->argc == 6 && text_is_option(r->argv[4], "COUNT")) {
        if (!arg_integer(r, 5, &count))
            return 0;
    } else if (r->argc != 4)
        return out_syntax(r);
    const struct value *v = value_read(r, 1, STORE_STREAM, &wrong);
    if (wrong)
        return 0;
    if (!v || count <= 0)
        return v ? out_nil_array(r) : out_array(r, 0);
    size_t first = place(&v->stream, from), end = first;
    while (end < v->stream.n && compare(v->stream.entries[end].id, to) <= 0)
        end++;
    size_t n = (int64_t)(end - first) > count ? (size_t)count : end - first;
    out_array(r, n);
    for (size_t i = 0; i < n; i++)
        out_entry(r, &v->stream.entries[backwards ? end - 1 - i : first + i]);
    return 0;
}

int xrange(struct run *r)
{
    return out_range(r, r->argv[2], r->argv[3], false);
}

int xrevrange(struct run *r)
{
    return out_range(r, r->argv[3], r->argv[2], true);
}

// ---- groups

static struct group *find_group(struct stream *st, struct text name)
{
    for (size_t i = 0; i < st->n_groups; i++)
        if (text_same(st->groups[i].name, name))
            return &st->groups[i];
    return NULL;
}

static size_t pending_place(const struct group *g, struct id id)
{
    size_t at = 0;
    while (at < g->n && compare(g->pending[at].id, id) < 0)
        at++;
    return at;
}

static void forget_pending(struct group *g, size_t at)
{
    text_free(g->pending[at].consumer);
    array_close(g->pending, &g->n, sizeof *g->pending, at);
}

int xack(struct run *r)
{
    struct key *k;
    struct id id;
    int64_t n = 0;
    bool wrong;
    value_read(r, 1, STORE_STREAM, &wrong);
    if (wrong)
        return 0;
    struct value *v = value_write(r, 1, STORE_STREAM, false, &k);
    struct group *g = v ? find_group(&v->stream, r->argv[2]) : NULL;
    if (g && !check_ids(r, 3))
        return 0;
    for (size_t i = 3; g && i < r->argc; i++) {
        read_id(r->argv[i], 0, &id);
        size_t at = pending_place(g, id);
        if (at == g->n || compare(g->pending[at].id, id) != 0)
            continue;
        forget_pending(g, at);
        store_touch(r->s, k);
        n++;
    }
    return out_integer(r, n);
}

static int group_create(struct run *r)
{
    struct key *k;
    struct id last = {0};
    bool make = r->argc == 6 && text_is_option(r->argv[5], "MKSTREAM"), wrong;
    if (r->argc != 5 && !make)
        return out_syntax(r);
    const struct value *there = value_read(r, 2, STORE_STREAM, &wrong);
    if (wrong)
        return 0;
    if (!there && !make)
        return reply_error(r->out, "ERR The XGROUP subcommand requires the key to exist. Note that for CREATE you may "
                                   "want to use the MKSTREAM option to create an empty stream automatically.");
    if (text_is(r->argv[4], "$"))
        last = there ? there->stream.last : last;
    else if (!read_id(r->argv[4], 0, &last))
        return out_bad_id(r);
    struct stream *st = &value_write(r, 2, STORE_STREAM, true, &k)->stream;
    if (!there)
        store_touch(r->s, k);
    if (find_group(st, r->argv[3]))
        return reply_error(r->out, "BUSYGROUP Consumer Group name already exists");
    st->groups = sim_grow(st->groups, (st->n_groups + 1) * sizeof *st->groups);
    st->groups[st->n_groups++] = (struct group){.name = text_copy(r->argv[3]), .last = last};
    store_touch(r->s, k);
    return out_status(r, "OK");
}

static int group_destroy(struct run *r)
{
    struct key *k;
    bool wrong;
    value_read(r, 2, STORE_STREAM, &wrong);
    if (wrong)
        return 0;
    struct value *v = value_write(r, 2, STORE_STREAM, false, &k);
    struct group *g = v ? find_group(&v->stream, r->argv[3]) : NULL;
    if (!v)
        return reply_error(r->out, "ERR The XGROUP subcommand requires the key to exist. Note that for CREATE you may "
                                   "want to use the MKSTREAM option to create an empty stream automatically.");
    if (g) {
        while (g->n > 0)
            forget_pending(g, g->n - 1);
        free(g->pending);
        text_free(g->name);
        *g = v->stream.groups[--v->stream.n_groups];
        store_touch(r->s, k);
    }
    return out_integer(r, g != NULL);
}

int xgroup(struct run *r)
{
    if (text_is_option(r->argv[1], "CREATE") && r->argc >= 5)
        group_create(r);
    else if (text_is_option(r->argv[1], "DESTROY") && r->argc == 4)
        group_destroy(r);
    else
        reply_error(r->out, "ERR unknown subcommand or wrong number of arguments for '%.*s'. Try XGROUP HELP.",
                    (int)r->argv[1].length, r->argv[1].bytes);
    return 0;
}

// ---- reading

struct reading {
    struct text group, consumer; // bytes NULL: XREAD
    int64_t count;
    size_t first, n; // the keys are argv[first] and so on, their ids behind them
};

static bool parse_reading(struct run *r, size_t at, struct reading *w)
{
    int64_t unused;
    for (; at < r->argc; at += 2) {
        if (text_is_option(r->argv[at], "STREAMS")) {
            w->first = at + 1;
            w->n = (r->argc - at - 1) / 2;
            if (w->n > 0 && (r->argc - at - 1) % 2 == 0)
                return true;
            break;
        }
        bool count = text_is_option(r->argv[at], "COUNT");
        if (at + 1 >= r->argc || (!count && !text_is_option(r->argv[at], "BLOCK")))
            break;
        if (!arg_integer(r, at + 1, count ? &w->count : &unused))
            return false;
    }
    out_syntax(r);
    return false;
}

// After which id a stream is read; false: an error is in the reply.
static bool reading_start(struct run *r, const struct reading *w, size_t i, struct id *after)
{
    struct text wish = r->argv[w->first + w->n + i], name = r->argv[w->first + i];
    bool wrong;
    struct value *v = value_read(r, w->first + i, STORE_STREAM, &wrong);
    struct group *g = v && w->group.bytes ? find_group(&v->stream, w->group) : NULL;
    if (wrong)
        return false;
    if (w->group.bytes && !g) {
        reply_error(r->out, "NOGROUP No such key '%.*s' or consumer group '%.*s' in XREADGROUP with GROUP option",
                    (int)name.length, name.bytes, (int)w->group.length, w->group.bytes);
        return false;
    }
    if (g ? text_is(wish, ">") : text_is(wish, "$")) {
        *after = g ? g->last : v ? v->stream.last : (struct id){0};
        return true;
    }
    // A group's history (another id than ">") is not of the model.
    if (g || !read_id(wish, 0, after)) {
        out_bad_id(r);
        return false;
    }
    return true;
}

static void deliver(struct run *r, const struct reading *w, struct group *g, struct id id)
{
    size_t at = pending_place(g, id);
    if (at < g->n && compare(g->pending[at].id, id) == 0)
        forget_pending(g, at); // delivered before the group was made anew from an older id
    g->pending = array_open(g->pending, &g->n, &g->capacity, sizeof *g->pending, at);
    g->pending[at] = (struct pending){id, text_copy(w->consumer), store_now_ms(r->s)};
    g->last = id;
}

// The entries of the i-th stream, to *out; whether there are any.
static bool read_stream(struct run *r, const struct reading *w, size_t i, struct buffer *out)
{
    struct id after;
    struct key *k = store_find(r->s, r->argv[w->first + i]);
    struct run to = {r->s, r->argc, r->argv, out};
    if (!k || !reading_start(r, w, i, &after))
        return false;
    const struct stream *st = &k->value->stream;
    size_t first = place(st, after) + has_entry(st, after), n = st->n - first;
    if (w->count > 0 && n > (size_t)w->count)
        n = (size_t)w->count;
    if (n == 0)
        return false;
    struct value *v = w->group.bytes ? value_write(r, w->first + i, STORE_STREAM, false, &k) : k->value;
    out_array(&to, 2);
    out_text(&to, r->argv[w->first + i]);
    out_array(&to, n);
    for (size_t e = first; e < first + n; e++) {
        out_entry(&to, &v->stream.entries[e]);
        if (w->group.bytes) {
            deliver(r, w, find_group(&v->stream, w->group), v->stream.entries[e].id);
            store_touch(r->s, k);
        }
    }
    return true;
}

static int read_streams(struct run *r, const struct reading *w)
{
    struct buffer found = {0};
    struct id unused;
    size_t n = 0;
    for (size_t i = 0; i < w->n; i++)
        if (!reading_start(r, w, i, &unused))
            return 0;
    for (size_t i = 0; i < w->n; i++)
        n += read_stream(r, w, i, &found);
    if (n == 0)
        out_nil_array(r);
    else
        out_array(r, n);
    buffer_add(r->out, found.bytes, found.length);
    buffer_free(&found);
    return 0;
}

int xread(struct run *r)
{
    struct reading w = {0};
    if (parse_reading(r, 1, &w))
        read_streams(r, &w);
    return 0;
}

int xreadgroup(struct run *r)
{
    struct reading w = {.group = r->argv[2], .consumer = r->argv[3]};
    if (!text_is_option(r->argv[1], "GROUP"))
        return out_syntax(r);
    if (parse_reading(r, 4, &w))
        read_streams(r, &w);
    return 0;
}

// ---- XAUTOCLAIM key group consumer min-idle start [COUNT n]

struct claiming {
    int64_t idle, count;
    struct id next;
    struct buffer claimed, deleted;
    size_t n_claimed, n_deleted;
};

static void autoclaim(struct run *r, struct stream *st, struct group *g, struct claiming *c)
{
    size_t at = pending_place(g, c->next);
    const struct run to_claimed = {r->s, r->argc, r->argv, &c->claimed},
                     to_deleted = {r->s, r->argc, r->argv, &c->deleted};
    for (int64_t attempts = c->count * 10; attempts > 0 && c->count > 0 && at < g->n; attempts--) {
        struct pending *p = &g->pending[at];
        if (!has_entry(st, p->id)) {
            struct run out = to_deleted;
            out_id(&out, p->id);
            c->n_deleted++;
            forget_pending(g, at);
            c->count--;
            continue;
        }
        at++;
        if (store_now_ms(r->s) - p->delivered_ms < c->idle)
            continue;
        text_free(p->consumer);
        p->consumer = text_copy(r->argv[3]);
        p->delivered_ms = store_now_ms(r->s);
        struct run out = to_claimed;
        out_entry(&out, &st->entries[place(st, p->id)]);
        c->n_claimed++;
        c->count--;
    }
    c->next = at < g->n ? g->pending[at].id : (struct id){0, 0};
}

int xautoclaim(struct run *r)
{
    struct key *k;
    struct claiming c = {.count = 100};
    bool wrong;
    if (!arg_integer(r, 4, &c.idle))
        return 0;
    if (!read_end(r->argv[5], 0, &c.next))
        return out_bad_id(r);
    if (r->argc == 8 && text_is_option(r->argv[6], "COUNT")) {
        if (!text_integer(r->argv[7], &c.count) || c.count <= 0 || c.count > INT64_MAX / 16)
            return reply_error(r->out, "ERR COUNT must be > 0");
    } else if (r->argc != 6)
        return out_syntax(r);
    struct value *v = value_read(r, 1, STORE_STREAM, &wrong);
    if (wrong)
        return 0;
    if (!v || !find_group(&v->stream, r->argv[2]))
        return reply_error(r->out, "NOGROUP No such key '%.*s' or consumer group '%.*s'", (int)r->argv[1].length,
                           r->argv[1].bytes, (int)r->argv[2].length, r->argv[2].bytes);
    v = value_write(r, 1, STORE_STREAM, false, &k);
    autoclaim(r, &v->stream, find_group(&v->stream, r->argv[2]), &c);
    if (c.n_claimed + c.n_deleted > 0)
        store_touch(r->s, k);
    out_array(r, 3);
    out_id(r, c.next);
    out_array(r, c.n_claimed);
    buffer_add(r->out, c.claimed.bytes, c.claimed.length);
    out_array(r, c.n_deleted);
    buffer_add(r->out, c.deleted.bytes, c.deleted.length);
    buffer_free(&c.claimed);
    buffer_free(&c.deleted);
    return 0;
}
