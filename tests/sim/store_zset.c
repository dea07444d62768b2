// store_zset.c: sorted sets: an array in order.
#include "store_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void zset_free(struct zset *z)
{
    for (size_t i = 0; i < z->n; i++)
        text_free(z->members[i].name);
    free(z->members);
}

struct value *zset_clone(const struct zset *from)
{
    struct value *v = sim_alloc(sizeof *v);
    v->zset.capacity = from->n + 4;
    v->zset.members = sim_alloc(v->zset.capacity * sizeof *v->zset.members);
    for (size_t i = 0; i < from->n; i++) {
        v->zset.members[i] = from->members[i];
        v->zset.members[i].name = text_copy(from->members[i].name);
    }
    v->zset.n = from->n;
    return v;
}

const struct member *zset_find(const struct zset *z, struct text name)
{
    uint32_t sum = text_sum(name);
    for (size_t i = 0; i < z->n; i++)
        if (z->members[i].sum == sum && text_same(z->members[i].name, name))
            return &z->members[i];
    return NULL;
}

static int compare_names(struct text a, struct text b)
{
    int order = memcmp(a.bytes, b.bytes, a.length < b.length ? a.length : b.length);
    return order ? order : (a.length > b.length) - (a.length < b.length);
}

static bool before(const struct member *a, double score, struct text name)
{
    return a->score < score || (a->score == score && compare_names(a->name, name) < 0);
}

static void put(struct zset *z, double score, struct text name) // takes name
{
    size_t low = 0, high = z->n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (before(&z->members[middle], score, name))
            low = middle + 1;
        else
            high = middle;
    }
    z->members = array_open(z->members, &z->n, &z->capacity, sizeof *z->members, low);
    z->members[low] = (struct member){score, text_sum(name), name};
}

static struct text take(struct zset *z, const struct member *m)
{
    struct text name = m->name;
    array_close(z->members, &z->n, sizeof *m, (size_t)(m - z->members));
    return name;
}

// ---- ZADD

struct zadd_flags {
    bool only_new, only_there, greater, less, changed;
};

static size_t zadd_flags(struct run *r, struct zadd_flags *f)
{
    const struct {
        const char *name;
        bool *flag;
    } all[] = {
        {"NX", &f->only_new}, {"XX", &f->only_there}, {"GT", &f->greater}, {"LT", &f->less}, {"CH", &f->changed}};
    size_t at = 2;
    for (bool found = true; found && at < r->argc; at += found) {
        found = false;
        for (size_t i = 0; i < sizeof all / sizeof *all && !found; i++)
            if ((found = text_is_option(r->argv[at], all[i].name)))
                *all[i].flag = true;
    }
    return at;
}

// 'n' for a new member, 'c' for a changed score, '-' for neither
static char zadd_one(struct run *r, const struct zadd_flags *f, double score, struct text name)
{
    struct key *k;
    struct value *v = value_write(r, 1, STORE_ZSET, !f->only_there, &k);
    const struct member *there = v ? zset_find(&v->zset, name) : NULL;
    if (!v || (there ? f->only_new : f->only_there))
        return '-';
    if (there && (there->score == score || (f->greater && score <= there->score) || (f->less && score >= there->score)))
        return '-';
    put(&v->zset, score, there ? take(&v->zset, there) : text_copy(name));
    store_touch(r->s, k);
    return there ? 'c' : 'n';
}

int zadd(struct run *r)
{
    struct zadd_flags f = {0};
    size_t at = zadd_flags(r, &f);
    int64_t n = 0;
    bool wrong;
    double score = 0;
    if (at >= r->argc || (r->argc - at) % 2 != 0)
        return out_syntax(r);
    if (f.only_new && f.only_there)
        return reply_error(r->out, "ERR XX and NX options at the same time are not compatible");
    if ((f.greater && f.less) || ((f.greater || f.less) && f.only_new))
        return reply_error(r->out, "ERR GT, LT, and/or NX options at the same time are not compatible");
    for (size_t i = at; i < r->argc; i += 2)
        if (!text_double(r->argv[i], &score))
            return reply_error(r->out, "ERR value is not a valid float");
    value_read(r, 1, STORE_ZSET, &wrong);
    if (wrong)
        return 0;
    for (size_t i = at; i < r->argc; i += 2) {
        text_double(r->argv[i], &score);
        char what = zadd_one(r, &f, score, r->argv[i + 1]);
        n += what == 'n' || (what == 'c' && f.changed);
    }
    return out_integer(r, n);
}

// ---- the rest

int zrem(struct run *r)
{
    struct key *k;
    bool wrong;
    int64_t n = 0;
    value_read(r, 1, STORE_ZSET, &wrong);
    if (wrong)
        return 0;
    struct value *v = value_write(r, 1, STORE_ZSET, false, &k);
    for (size_t i = 2; v && i < r->argc; i++) {
        const struct member *m = zset_find(&v->zset, r->argv[i]);
        if (!m)
            continue;
        text_free(take(&v->zset, m));
        store_touch(r->s, k);
        n++;
    }
    if (v && v->zset.n == 0)
        store_drop(r->s, k);
    return out_integer(r, n);
}

int zcard(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_ZSET, &wrong);
    if (!wrong)
        out_integer(r, v ? (int64_t)v->zset.n : 0);
    return 0;
}

int zscore(struct run *r)
{
    bool wrong;
    const struct value *v = value_read(r, 1, STORE_ZSET, &wrong);
    const struct member *m = v ? zset_find(&v->zset, r->argv[2]) : NULL;
    if (m)
        out_double(r, m->score);
    else if (!wrong)
        out_nil(r);
    return 0;
}

static int out_members(struct run *r, const struct zset *z, size_t from, size_t n, bool scores)
{
    out_array(r, scores ? 2 * n : n);
    for (size_t i = from; i < from + n; i++) {
        out_text(r, z->members[i].name);
        if (scores)
            out_double(r, z->members[i].score);
    }
    return 0;
}

// Places, 0 the first, -1 the last.
int zrange(struct run *r)
{
    int64_t start, stop;
    bool wrong, scores = r->argc == 5 && text_is_option(r->argv[4], "WITHSCORES");
    if (r->argc > 4 && !scores)
        return out_syntax(r);
    if (!arg_integer(r, 2, &start) || !arg_integer(r, 3, &stop))
        return 0;
    const struct value *v = value_read(r, 1, STORE_ZSET, &wrong);
    if (wrong)
        return 0;
    int64_t n = v ? (int64_t)v->zset.n : 0;
    start = start < 0 ? start + n : start;
    stop = stop < 0 ? stop + n : stop;
    start = start < 0 ? 0 : start;
    stop = stop >= n ? n - 1 : stop;
    if (start > stop || start >= n)
        return out_array(r, 0);
    return out_members(r, &v->zset, (size_t)start, (size_t)(stop - start + 1), scores);
}

struct bound {
    double score;
    bool open; // the score itself is outside
};

static bool read_bound(struct text a, struct bound *b) // less strict than a score: "" is 0, spaces may stand before it
{
    char digits[256], *end;
    b->open = a.length > 0 && a.bytes[0] == '(';
    snprintf(digits, sizeof digits, "%.*s", (int)a.length - b->open, a.bytes + b->open);
    b->score = strtod(digits, &end);
    return !*end && !isnan(b->score);
}

int zrangebyscore(struct run *r)
{
    struct bound low, high;
    bool wrong, scores = false;
    int64_t offset = 0, limit = -1;
    for (size_t i = 4; i < r->argc; i++) {
        if (text_is_option(r->argv[i], "WITHSCORES"))
            scores = true;
        else if (text_is_option(r->argv[i], "LIMIT") && i + 2 < r->argc) {
            if (!arg_integer(r, i + 1, &offset) || !arg_integer(r, i + 2, &limit))
                return 0;
            i += 2;
        } else
            return out_syntax(r);
    }
    if (!read_bound(r->argv[2], &low) || !read_bound(r->argv[3], &high))
        return reply_error(r->out, "ERR min or max is not a float");
    const struct value *v = value_read(r, 1, STORE_ZSET, &wrong);
    if (wrong)
        return 0;
    size_t n = v ? v->zset.n : 0, from = 0, to;
    while (from < n && (low.open ? v->zset.members[from].score <= low.score : v->zset.members[from].score < low.score))
        from++;
    to = from;
    while (to < n && (high.open ? v->zset.members[to].score < high.score : v->zset.members[to].score <= high.score))
        to++;
    from = offset < 0 || offset > (int64_t)(to - from) ? to : from + (size_t)offset;
    if (limit >= 0 && (size_t)limit < to - from)
        to = from + (size_t)limit;
    if (from == to)
        return out_array(r, 0);
    return out_members(r, &v->zset, from, to - from, scores);
}
