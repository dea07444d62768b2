// check.c: an account of each job, kept beside the store.
#include "check.h"

#include <ctype.h>
#include <hiredis/hiredis.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BIT(state) (1u << DITFLEET__V1__STATE__STATE_##state)
enum {
    NONE = 1u,
    HELD = BIT(LEASED) | BIT(RUNNING) | BIT(UPLOADING),
    WAITING = BIT(DELAYED) | BIT(RETRY_WAIT),
    LIVE = BIT(QUEUED) | WAITING | HELD,
    FINAL = BIT(SUCCEEDED) | BIT(DEAD) | BIT(CANCELLED) | BIT(EXPIRED),
    AGAIN = BIT(QUEUED) | BIT(RETRY_WAIT) | BIT(DEAD), // where a failed attempt leads
    STATES = 11,
    POOLS = 2,
    DOOR_MAX = 512,
    SETTLED_AT_ONCE = 64 // most jobs that one operation ends
};
static const char *const tenants[CHECK_TENANTS] = {"default", "acme", "bulk"};
static const char *const pools[POOLS] = {"m@1", "n@1"};

// ---- who may move a job from where to where

static const struct rule {
    const char *op;
    unsigned from, to;
} rules[] = {
    {"admit", NONE, BIT(QUEUED) | BIT(DELAYED) | BIT(EXPIRED)},
    {"claim", BIT(QUEUED), BIT(LEASED) | BIT(EXPIRED)},
    {"beat", HELD, BIT(RUNNING) | BIT(UPLOADING)},
    {"finish", HELD, BIT(SUCCEEDED)},
    {"fail", HELD, AGAIN},
    {"release", HELD, BIT(QUEUED)},
    {"release_all", HELD, AGAIN},
    {"cancel", LIVE, BIT(CANCELLED)},
    {"dead_retry", BIT(DEAD), BIT(QUEUED)}, // another life
    {"reap", HELD, AGAIN | BIT(EXPIRED)},
    {"reap", WAITING, BIT(QUEUED) | BIT(EXPIRED)},
    {"reap", BIT(QUEUED), BIT(EXPIRED)},
};

// ---- the account

struct job {
    unsigned state; // a bit of the above
    unsigned pool, commits;
    bool misplaced;
    uint64_t epoch, gpu_ms, app, infra;
    int64_t due_ms, deadline_ms, expires_ms;
    double lease_ms;
    uint32_t result; // a sum of its bytes
    char nonce[40], worker[16], incarnation[16];
};

struct door_entry {
    char id[48];
    int k; // -1: no readable job
};

struct history { // what a failover puts back
    struct job jobs[CHECK_JOBS];
    struct door_entry doors[CHECK_TENANTS][DOOR_MAX];
    size_t n_door[CHECK_TENANTS];
    uint64_t totals[STATES], refused, retries;
    double vtime[CHECK_TENANTS], vclock;
    int64_t drift[CHECK_TENANTS]; // ready counts too high by what was misplaced and left before it was mended
    unsigned n_jobs;              // names used so far
};

struct check_copy {
    struct history history;
};

struct check {
    struct store *store;
    struct history h;
    unsigned commits_ever[CHECK_JOBS], failovers;
    char hold[24]; // of the callback that a command is about, before it
    char broken[512];
    // the command
    char op[24];
    size_t argc; // its arguments, without EVALSHA, sha, 1, prefix and name
    const struct text *argv;
    int64_t now_ms;
};

struct check *check_new(struct store *store)
{
    struct check *c = sim_alloc(sizeof *c);
    c->store = store;
    return c;
}

void check_free(struct check *c)
{
    free(c);
}

const char *check_tenant(unsigned k)
{
    return tenants[k % CHECK_TENANTS];
}

const char *check_broken(const struct check *c)
{
    return c->broken;
}

bool check_fail(struct check *c, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (!*c->broken)
        vsnprintf(c->broken, sizeof c->broken, format, args);
    va_end(args);
    return false;
}

struct check_copy *check_copy(const struct check *c)
{
    struct check_copy *copy = sim_alloc(sizeof *copy);
    copy->history = c->h;
    return copy;
}

void check_restore(struct check *c, const struct check_copy *copy)
{
    if (copy)
        c->h = copy->history;
    else
        memset(&c->h, 0, sizeof c->h);
    c->failovers++;
}

Ditfleet__V1__State check_state(const struct check *c, unsigned k)
{
    unsigned state = c->h.jobs[k].state;
    return state > NONE ? (Ditfleet__V1__State)__builtin_ctz(state) : 0;
}

static const char *state_name(unsigned state)
{
    return state > NONE ? job_state_name((Ditfleet__V1__State)__builtin_ctz(state)) : "nowhere";
}

void check_misplaced(struct check *c, unsigned k)
{
    c->h.jobs[k].misplaced = true;
}

unsigned long check_total(const struct check *c, Ditfleet__V1__State final)
{
    return c->h.totals[final];
}

unsigned check_live(const struct check *c)
{
    unsigned n = 0;
    for (unsigned k = 0; k < c->h.n_jobs; k++)
        n += (c->h.jobs[k].state & LIVE) != 0;
    return n;
}

// ---- keys

struct name {
    char text[160];
};

static struct name key(const char *format, ...) __attribute__((format(printf, 1, 2)));
static struct name key(const char *format, ...)
{
    struct name n = {CHECK_PREFIX};
    va_list args;
    va_start(args, format);
    vsnprintf(n.text + sizeof CHECK_PREFIX - 1, sizeof n.text - sizeof CHECK_PREFIX + 1, format, args);
    va_end(args);
    return n;
}

static struct name record_key(unsigned k)
{
    return key("job:%s:j%u", check_tenant(k), k);
}

static struct name member(unsigned k)
{
    struct name n;
    snprintf(n.text, sizeof n.text, "%s:j%u", check_tenant(k), k);
    return n;
}

static struct text field(struct check *c, const struct name *k, const char *name)
{
    return store_field(c->store, text_of(k->text), name);
}

static uint64_t number(struct check *c, const struct name *k, const char *name)
{
    struct text t = field(c, k, name);
    return t.bytes ? strtoull(t.bytes, NULL, 10) : 0;
}

static bool score(struct check *c, const char *index, unsigned k, double *at)
{
    struct name n = key("%s", index), m = member(k);
    return store_score(c->store, text_of(n.text), text_of(m.text), at);
}

static size_t size_of(struct check *c, const char *name)
{
    struct name n = key("%s", name);
    return store_size(c->store, text_of(n.text));
}

static void copy_text(char *out, size_t size, struct text t)
{
    snprintf(out, size, "%.*s", t.bytes ? (int)t.length : 0, t.bytes ? t.bytes : "");
}

// "job:<tenant>:j<k>" behind the prefix; -1: it names no job.
static int job_of_key(struct text name)
{
    const size_t skip = sizeof CHECK_PREFIX "job:" - 1;
    if (name.length <= skip || memcmp(name.bytes, CHECK_PREFIX "job:", skip) != 0)
        return -1;
    const char *colon = memchr(name.bytes + skip, ':', name.length - skip);
    if (!colon || colon[1] != 'j')
        return -1;
    unsigned long k = strtoul(colon + 2, NULL, 10);
    return k < CHECK_JOBS && text_same(text_of(record_key((unsigned)k).text), name) ? (int)k : -1;
}

// ---- a record as it is now

struct seen {
    struct job job;
    bool there, callback;
};

static unsigned state_bit(struct text state)
{
    char name[16];
    copy_text(name, sizeof name, state);
    return 1u << job_state_parse(name);
}

static struct seen look(struct check *c, unsigned k)
{
    struct name r = record_key(k);
    struct seen s = {.job = c->h.jobs[k]};
    struct text state = field(c, &r, "state"), result = field(c, &r, "result"), callback = field(c, &r, "callback");
    s.there = state.bytes && !text_is(field(c, &r, "refused"), "1"); // a refused submission leaves its name free
    s.job.state = s.there ? state_bit(state) : NONE;
    if (!s.there)
        return s;
    s.callback = callback.length > 0;
    s.job.pool = text_is(field(c, &r, "pool"), pools[1]);
    s.job.epoch = number(c, &r, "epoch");
    s.job.gpu_ms = number(c, &r, "gpu_ms");
    s.job.app = number(c, &r, "attempts_app");
    s.job.infra = number(c, &r, "attempts_infra");
    s.job.due_ms = (int64_t)number(c, &r, "due_ms");
    s.job.deadline_ms = (int64_t)number(c, &r, "deadline_ms");
    s.job.result = 0;
    for (size_t i = 0; i < result.length; i++)
        s.job.result = s.job.result * 31 + (unsigned char)result.bytes[i];
    copy_text(s.job.nonce, sizeof s.job.nonce, field(c, &r, "nonce"));
    copy_text(s.job.worker, sizeof s.job.worker, field(c, &r, "worker"));
    return s;
}

// ---- place

static bool in_held(struct check *c, unsigned k, const struct job *j, char incarnation[16])
{
    struct name held = key("held:%s", j->worker), m = member(k);
    char text[80], expected[80];
    copy_text(text, sizeof text, field(c, &held, m.text));
    size_t length = strcspn(text, " ");
    snprintf(incarnation, 16, "%.*s", (int)length, text);
    snprintf(expected, sizeof expected, "%s %" PRIu64 " %s", incarnation, j->epoch, j->nonce);
    return *text && strcmp(text, expected) == 0;
}

static bool check_place(struct check *c, unsigned k, struct job *j)
{
    struct name r = record_key(k);
    char ready[64];
    double at = 0, lease = 0;
    struct text class = field(c, &r, "class");
    snprintf(ready, sizeof ready, "ready:%s:%.*s:%s", pools[j->pool], (int)class.length, class.bytes, check_tenant(k));
    bool is_ready = score(c, ready, k, &at), is_delayed = score(c, "delayed", k, &at);
    bool is_leased = score(c, "lease", k, &lease), is_live = score(c, "live", k, &at);
    bool is_held = in_held(c, k, j, j->incarnation);
    int64_t expires = j->expires_ms = store_expires(c->store, text_of(r.text));
    bool right = is_ready == (j->state == BIT(QUEUED)) && is_delayed == ((j->state & WAITING) != 0) &&
                 is_leased == ((j->state & HELD) != 0);
    if (is_leased)
        j->lease_ms = lease;
    j->misplaced = j->misplaced && !right;
    if ((!right && !j->misplaced) || is_held != ((j->state & HELD) != 0) || is_live != ((j->state & LIVE) != 0))
        return check_fail(c, "place: job j%u in state %s is in ready %d, delayed %d, lease %d, held %d, live %d", k,
                          state_name(j->state), is_ready, is_delayed, is_leased, is_held, is_live);
    if ((expires > 0) != ((j->state & FINAL) != 0))
        return check_fail(c, "place: job j%u in state %s expires at %" PRId64, k, state_name(j->state), expires);
    return true;
}

// ---- moves

static bool is_op(const struct check *c, const char *op)
{
    return strcmp(c->op, op) == 0;
}

static bool has_fence(const struct check *c)
{
    return is_op(c, "beat") || is_op(c, "finish") || is_op(c, "fail") || is_op(c, "release");
}

static bool names_job(const struct check *c, unsigned k)
{
    char id[16];
    snprintf(id, sizeof id, "j%u", k);
    return c->argc > 1 && text_is(c->argv[0], check_tenant(k)) && text_is(c->argv[1], id);
}

static bool check_fence(struct check *c, unsigned k, const struct job *was)
{
    char epoch[24];
    snprintf(epoch, sizeof epoch, "%" PRIu64, was->epoch);
    if (!names_job(c, k) || !(was->state & HELD) || !text_is(c->argv[2], epoch) || !text_is(c->argv[3], was->nonce))
        return check_fail(c, "fence: %s wrote to job j%u, which its fence does not hold", c->op, k);
    return true;
}

static bool allowed(const struct check *c, unsigned from, unsigned to)
{
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (is_op(c, rules[i].op) && (rules[i].from & from) && (rules[i].to & to))
            return true;
    return false;
}

// Why a job may be moved by somebody else than its holder.
static bool check_reason(struct check *c, unsigned k, const struct job *was, const struct job *now)
{
    const char *wrong = NULL;
    if (now->state == BIT(EXPIRED) && !(now->deadline_ms > 0 && now->deadline_ms <= c->now_ms))
        wrong = "its deadline has not passed";
    else if (is_op(c, "cancel") && !names_job(c, k))
        wrong = "another was named";
    else if (is_op(c, "release_all") && (!text_is(c->argv[0], was->worker) || !text_is(c->argv[1], was->incarnation)))
        wrong = "another incarnation holds it";
    else if (is_op(c, "reap") && (was->state & HELD) && now->state != BIT(EXPIRED) && !was->misplaced &&
             was->lease_ms > (double)c->now_ms)
        wrong = "its lease has not run out";
    else if (is_op(c, "reap") && (was->state & WAITING) && now->state == BIT(QUEUED) && was->due_ms > c->now_ms)
        wrong = "it is not due";
    else if (is_op(c, "claim") && now->state == BIT(LEASED) &&
             (now->epoch != was->epoch + 1 ||
              (strcmp(now->nonce, was->nonce) == 0 && strcmp(now->worker, was->worker) != 0)))
        wrong = "its epoch did not grow, or its nonce was another's";
    return wrong ? check_fail(c, "move: %s moved job j%u: %s", c->op, k, wrong) : true;
}

static bool check_charge(struct check *c, unsigned k, const struct job *was, const struct job *now)
{
    const bool failed = was->state != now->state && (was->state & HELD) && (now->state & AGAIN);
    const bool own = is_op(c, "fail") && c->argc > 4 && text_is(c->argv[4], "app");
    const uint64_t app = failed && own,
                   infra = failed && !own && (is_op(c, "fail") || is_op(c, "release_all") || is_op(c, "reap"));
    if (is_op(c, "dead_retry") && was->state == BIT(DEAD) && now->app + now->infra == 0)
        return true; // all its attempts again
    if (now->app != was->app + app || now->infra != was->infra + infra)
        return check_fail(
            c, "charge: %s of job j%u: attempts app %" PRIu64 " to %" PRIu64 ", infra %" PRIu64 " to %" PRIu64, c->op,
            k, was->app, now->app, was->infra, now->infra);
    c->h.retries += failed && now->state != BIT(DEAD) && app + infra > 0;
    return true;
}

// Among the newest of the outbox, since this command put it there.
static bool in_outbox(struct check *c, unsigned k)
{
    struct name outbox = key("outbox");
    char id[16];
    snprintf(id, sizeof id, "j%u", k);
    size_t n = size_of(c, "outbox");
    for (size_t i = n; i > 0 && i + SETTLED_AT_ONCE > n; i--)
        if (text_is(store_entry_field(c->store, text_of(outbox.text), i - 1, "id"), id))
            return true;
    return false;
}

static bool check_end(struct check *c, unsigned k, const struct seen *s)
{
    struct job *j = &c->h.jobs[k];
    c->h.totals[__builtin_ctz(s->job.state)]++;
    if (j->expires_ms < c->now_ms + CHECK_RETENTION_MS)
        return check_fail(c, "lost: job j%u is final, and its record goes in %" PRId64 " ms", k,
                          j->expires_ms - c->now_ms);
    if (s->callback && !in_outbox(c, k))
        return check_fail(c, "callback: job j%u is final, and its callback is nowhere", k);
    if (s->job.state != BIT(SUCCEEDED))
        return true;
    if (++j->commits > 1 || ++c->commits_ever[k] > 1 + c->failovers)
        return check_fail(c, "commit: job j%u was committed %u times, %u in all histories of %u failovers", k,
                          j->commits, c->commits_ever[k], c->failovers);
    return true;
}

// A record that is gone, or whose name is free again.
static bool check_gone(struct check *c, unsigned k)
{
    struct job *j = &c->h.jobs[k];
    if (j->state & LIVE)
        return check_fail(c, "lost: job j%u is not final, and its record is gone", k);
    if ((j->state & FINAL) && j->expires_ms > c->now_ms)
        return check_fail(c, "lost: job j%u was final, and its record is gone before its time (%s)", k, c->op);
    c->commits_ever[k] = 0; // the name begins a new life
    *j = (struct job){.state = NONE};
    return true;
}

static bool check_record(struct check *c, unsigned k)
{
    struct job *j = &c->h.jobs[k], was;
    if (!j->state)
        j->state = NONE;
    if (k >= c->h.n_jobs)
        c->h.n_jobs = k + 1;
    if ((j->state & FINAL) && j->expires_ms <= c->now_ms && !check_gone(c, k))
        return false;
    struct seen s = look(c, k);
    if (!s.there)
        return check_gone(c, k);
    was = *j;
    if ((was.state & FINAL) && !(is_op(c, "dead_retry") && was.state == BIT(DEAD)) &&
        (s.job.state != was.state || s.job.result != was.result || s.job.epoch != was.epoch))
        return check_fail(c, "final: %s changed job j%u, which was %s", c->op, k, state_name(was.state));
    if (has_fence(c) && !check_fence(c, k, &was))
        return false;
    if (s.job.state != was.state && !allowed(c, was.state, s.job.state))
        return check_fail(c, "move: %s moved job j%u from %s to %s", c->op, k, state_name(was.state),
                          state_name(s.job.state));
    if (s.job.state != was.state && !check_reason(c, k, &was, &s.job))
        return false;
    if (s.job.state == was.state && (s.job.epoch != was.epoch || strcmp(s.job.nonce, was.nonce) != 0))
        return check_fail(c, "move: %s changed the fence of job j%u and not its state", c->op, k);
    if (!check_charge(c, k, &was, &s.job))
        return false;
    if (was.misplaced && s.job.state != was.state && was.state == BIT(QUEUED))
        c->h.drift[k % CHECK_TENANTS]++;
    if (s.job.state != was.state && !((s.job.state & HELD) && (was.state & HELD)))
        s.job.misplaced = false;
    *j = s.job;
    if (!check_place(c, k, j))
        return false;
    return s.job.state == was.state || !(s.job.state & FINAL) || check_end(c, k, &s);
}

// ---- doors

static int job_of_payload(struct text payload, unsigned tenant)
{
    Ditfleet__V1__Job *job = NULL;
    char id[JOB_NAME_SIZE] = "";
    struct err unused;
    if (!payload.bytes || job_parse(payload.bytes, payload.length, &job, id, &unused) != 0)
        return -1;
    job_free(job);
    unsigned long k = *id == 'j' ? strtoul(id + 1, NULL, 10) : CHECK_JOBS;
    return k < CHECK_JOBS && k % CHECK_TENANTS == tenant ? (int)k : -1;
}

// An entry that left its door became a job, or left a receipt.
static bool check_left(struct check *c, unsigned tenant, const struct door_entry *e)
{
    struct name receipt = key("job:%s:@%s", tenants[tenant], e->id);
    struct name r = e->k >= 0 ? record_key((unsigned)e->k) : receipt;
    bool same = e->k >= 0 && field(c, &receipt, "same_as").bytes && store_type(c->store, text_of(r.text)) == STORE_HASH;
    if (same || field(c, &receipt, "result").bytes || text_is(field(c, &r, "entry"), e->id))
        return true;
    return check_fail(c, "lost: entry %s of %s left its door, and there is neither a job nor a receipt (%s)", e->id,
                      tenants[tenant], c->op);
}

static bool check_door(struct check *c, unsigned tenant)
{
    struct name door = key("in:%s", tenants[tenant]);
    struct door_entry *known = c->h.doors[tenant];
    size_t n = store_size(c->store, text_of(door.text)), n_known = c->h.n_door[tenant], kept = 0, at = 0;
    char id[48];
    for (size_t i = 0; i < n_known; i++) { // both are in order
        if (at < n)
            store_entry_id(c->store, text_of(door.text), at, id);
        bool there = at < n && strcmp(id, known[i].id) == 0;
        if (!there && !check_left(c, tenant, &known[i]))
            return false;
        at += there;
        if (there)
            known[kept++] = known[i];
    }
    for (; at < n && kept < DOOR_MAX; at++) {
        store_entry_id(c->store, text_of(door.text), at, known[kept].id);
        known[kept++].k = job_of_payload(store_entry_field(c->store, text_of(door.text), at, "job"), tenant);
    }
    c->h.n_door[tenant] = kept;
    return at == n || check_fail(c, "lost: the check's account of a door is too small");
}

// ---- after each command

static void read_command(struct check *c, size_t argc, const struct text *argv)
{
    bool script =
        argc > 4 && argv[0].length >= 4 && (memcmp(argv[0].bytes, "EVAL", 4) == 0 || text_is(argv[0], "FCALL"));
    size_t name = script ? 4 : 0;
    copy_text(c->op, sizeof c->op, argv[name]);
    c->argc = argc - name - 1;
    c->argv = argv + name + 1;
}

void check_before(struct check *c, size_t argc, const struct text *argv)
{
    struct name holds = key("outbox_hold");
    char entry[48];
    read_command(c, argc, argv);
    *c->hold = 0;
    if (strncmp(c->op, "callback_", 9) != 0)
        return;
    copy_text(entry, sizeof entry, c->argv[0]);
    copy_text(c->hold, sizeof c->hold, field(c, &holds, entry));
}

static bool check_reply(struct check *c, struct text reply)
{
    bool script = islower((unsigned char)*c->op);
    static const char *const harmless[] = {"-NOSCRIPT", "-ERR Function not found", "-ERR unknown command 'FCALL'"};
    bool unknown = false;
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
        unknown = unknown || strncmp(reply.bytes, harmless[i], strlen(harmless[i])) == 0;
    if (script && *reply.bytes == '-' && !unknown)
        return check_fail(c, "script: %s ended in %.*s", c->op, (int)reply.length - 2, reply.bytes);
    if (strncmp(c->op, "callback_", 9) == 0 && reply.length > 3 && memmem(reply.bytes, reply.length, "\r\nok\r\n", 6) &&
        !text_is(c->argv[1], c->hold))
        return check_fail(c, "callback: %s of one that somebody else has in hand", c->op);
    for (const char *at = reply.bytes, *end = at + reply.length; is_op(c, "admit"); at++) {
        at = memmem(at, (size_t)(end - at), "\r\nrefused\r\n", 11);
        if (!at)
            break;
        c->h.refused++;
    }
    return true;
}

bool check_after(struct check *c, size_t argc, const struct text *argv, struct text reply, int64_t now_ms)
{
    c->now_ms = now_ms;
    read_command(c, argc, argv);
    bool good = check_reply(c, reply);
    for (size_t i = 0; i < store_dirty(c->store) && good; i++) {
        struct text name = store_dirty_key(c->store, i);
        int k = job_of_key(name);
        if (k >= 0)
            good = check_record(c, (unsigned)k);
        for (unsigned t = 0; t < CHECK_TENANTS && good; t++)
            if (text_is(name, key("in:%s", tenants[t]).text))
                good = check_door(c, t);
    }
    for (unsigned k = 0; k < c->h.n_jobs && good && is_op(c, "reap"); k++) // it mends without writing to the record
        good = !c->h.jobs[k].misplaced || check_place(c, k, &c->h.jobs[k]);
    return good;
}

// ---- everything

struct recount {
    struct check *c;
    uint64_t by_state[STATES], backlog_ms;
    uint64_t jobs[POOLS][3], ms[POOLS][3]; // queued, delayed, working
    uint64_t queued_of[CHECK_TENANTS], ms_of[CHECK_TENANTS];
    size_t ready, held, due, was_due;
    unsigned misplaced;
};

static bool recount_jobs(struct check *c, struct recount *r)
{
    for (unsigned k = 0; k < c->h.n_jobs; k++) {
        struct job *j = &c->h.jobs[k];
        if (j->state <= NONE)
            continue;
        struct seen s = look(c, k);
        if (!s.there && !check_gone(c, k))
            return false;
        if (!s.there)
            continue;
        if (s.job.state != j->state)
            return check_fail(c, "move: job j%u is %s, and no operation wrote so", k, state_name(s.job.state));
        if (!check_place(c, k, j))
            return false;
        r->misplaced += j->misplaced;
        r->by_state[__builtin_ctz(j->state)]++;
        if (!(j->state & LIVE))
            continue;
        unsigned what = j->state & HELD ? 2 : j->state & WAITING ? 1 : 0;
        r->jobs[j->pool][what]++;
        r->ms[j->pool][what] += j->gpu_ms;
        r->backlog_ms += j->gpu_ms;
        r->queued_of[k % CHECK_TENANTS] += what == 0;
        r->ms_of[k % CHECK_TENANTS] += j->gpu_ms;
        r->was_due += what == 0 && j->due_ms > 0;
    }
    return true;
}

static bool begins(struct text key, const char *what, const char **rest)
{
    const size_t skip = sizeof CHECK_PREFIX - 1, length = strlen(what);
    bool good = key.length > skip + length && memcmp(key.bytes + skip, what, length) == 0;
    *rest = good ? key.bytes + skip + length : NULL;
    return good;
}

// Each key that holds jobs.
static bool recount_key(void *arg, struct text name)
{
    struct recount *r = arg;
    struct check *c = r->c;
    const char *rest;
    size_t n = store_size(c->store, name);
    if (begins(name, "held:", &rest))
        r->held += n;
    if (begins(name, "outbox_due:", &rest)) {
        struct name ring = key("outbox_ring");
        double at;
        r->due += n;
        if (!store_score(c->store, text_of(ring.text), text_of(rest), &at))
            return check_fail(c, "callback: %s has some due and is not in outbox_ring", rest);
    }
    if (begins(name, "ready:", &rest)) {
        const char *tenant = strrchr(rest, ':') + 1;
        struct name ring = key("ring:%.*s", (int)(tenant - 1 - rest), rest), t = key("tenant:%s", tenant);
        struct text vtime = field(c, &t, "vtime");
        double at;
        r->ready += n;
        struct name limited = key("limited"); // above its rate, it is there instead
        if (store_score(c->store, text_of(limited.text), text_of(rest), &at))
            return true;
        if (!store_score(c->store, text_of(ring.text), text_of(tenant), &at))
            return r->misplaced > 0 || check_fail(c, "fair: %s has ready jobs and is not in %s", tenant, ring.text);
        if (vtime.bytes && at > strtod(vtime.bytes, NULL))
            return check_fail(c, "fair: %s stands at %.17g in %s, its virtual time is %s", tenant, at, ring.text,
                              vtime.bytes);
    }
    return true;
}

static bool check_sizes(struct check *c, const struct recount *r)
{
    const uint64_t *n = r->by_state;
    const size_t queued = n[DITFLEET__V1__STATE__STATE_QUEUED],
                 waiting = n[DITFLEET__V1__STATE__STATE_DELAYED] + n[DITFLEET__V1__STATE__STATE_RETRY_WAIT],
                 held = n[DITFLEET__V1__STATE__STATE_LEASED] + n[DITFLEET__V1__STATE__STATE_RUNNING] +
                        n[DITFLEET__V1__STATE__STATE_UPLOADING];
    const size_t outbox = size_of(c, "outbox");
    if (r->held != held || size_of(c, "live") != queued + waiting + held)
        return check_fail(c, "place: %zu jobs are held, %zu are in held; %zu are not final, %zu in live", held, r->held,
                          queued + waiting + held, size_of(c, "live"));
    if (r->misplaced == 0 && (r->ready != queued || size_of(c, "delayed") != waiting || size_of(c, "lease") != held))
        return check_fail(c, "place: %zu jobs queued, %zu waiting, %zu held; in ready %zu, delayed %zu, lease %zu",
                          queued, waiting, held, r->ready, size_of(c, "delayed"), size_of(c, "lease"));
    if (size_of(c, "due") != r->was_due)
        return check_fail(c, "place: %zu queued jobs had to wait, %zu are in due", r->was_due, size_of(c, "due"));
    if (r->due != outbox || size_of(c, "outbox_hold") > outbox || size_of(c, "outbox_tries") > outbox)
        return check_fail(c, "callback: %zu in outbox, %zu due, %zu tries, %zu holds", outbox, r->due,
                          size_of(c, "outbox_tries"), size_of(c, "outbox_hold"));
    return true;
}

static bool check_tenants(struct check *c, const struct recount *r)
{
    struct name clock_key = key("vclock");
    for (unsigned t = 0; t < CHECK_TENANTS; t++) {
        struct name k = key("tenant:%s", tenants[t]);
        struct text ready = field(c, &k, "ready"), vtime = field(c, &k, "vtime");
        const long long counted = ready.bytes ? strtoll(ready.bytes, NULL, 10) : 0;
        const double at = vtime.bytes ? strtod(vtime.bytes, NULL) : 0;
        if (r->misplaced == 0 && counted != (long long)r->queued_of[t] + c->h.drift[t])
            return check_fail(c, "fair: %s has %" PRIu64 " jobs queued, its ready count is %lld", tenants[t],
                              r->queued_of[t] + (uint64_t)c->h.drift[t], counted);
        if (number(c, &k, "gpu_ms") != r->ms_of[t])
            return check_fail(c, "stats: gpu_ms of %s is %" PRIu64 ", counted %" PRIu64, tenants[t],
                              number(c, &k, "gpu_ms"), r->ms_of[t]);
        if (!isfinite(at) || at < c->h.vtime[t])
            return check_fail(c, "fair: the virtual time of %s went from %.17g to %.17g", tenants[t], c->h.vtime[t],
                              at);
        c->h.vtime[t] = at;
    }
    struct text vclock = store_value(c->store, text_of(clock_key.text));
    const double at = vclock.bytes ? strtod(vclock.bytes, NULL) : 0;
    if (!isfinite(at) || at < c->h.vclock)
        return check_fail(c, "fair: the clock of virtual time went from %.17g to %.17g", c->h.vclock, at);
    c->h.vclock = at;
    return true;
}

static redisReply *parse(struct text reply)
{
    void *parsed = NULL;
    redisReader *reader = redisReaderCreate();
    redisReaderFeed(reader, reply.bytes, reply.length);
    redisReaderGetReply(reader, &parsed);
    redisReaderFree(reader);
    return parsed;
}

// What the reply of stats says of name; 0 when it does not name it.
static uint64_t stat_of(const redisReply *stats, const char *name)
{
    for (size_t i = 0; i + 1 < stats->elements; i += 2)
        if (strcmp(stats->element[i]->str, name) == 0)
            return strtoull(stats->element[i + 1]->str, NULL, 10);
    return 0;
}

static bool check_stats(struct check *c, const struct recount *r, const redisReply *stats)
{
    struct name registered = key("tenants");
    uint64_t waiting = 0;
    for (unsigned t = 0; t < CHECK_TENANTS; t++)
        waiting += field(c, &registered, tenants[t]).bytes ? c->h.n_door[t] : 0;
    for (int s = DITFLEET__V1__STATE__STATE_QUEUED; s < STATES; s++) {
        bool final = (1u << s) & FINAL;
        const char *name = job_state_name((Ditfleet__V1__State)s);
        uint64_t expected = final ? c->h.totals[s] : r->by_state[s];
        for (unsigned t = 0; t < CHECK_TENANTS && s == DITFLEET__V1__STATE__STATE_QUEUED; t++)
            expected += (uint64_t)c->h.drift[t];
        if (stat_of(stats, name) != expected)
            return check_fail(c, "stats: %s is %" PRIu64 ", counted %" PRIu64, name, stat_of(stats, name), expected);
    }
    const struct {
        const char *name;
        uint64_t expected;
    } rows[] = {{"gpu_ms", r->backlog_ms}, {"refused", c->h.refused}, {"retries", c->h.retries}, {"waiting", waiting}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (stat_of(stats, rows[i].name) != rows[i].expected)
            return check_fail(c, "stats: %s is %" PRIu64 ", counted %" PRIu64, rows[i].name,
                              stat_of(stats, rows[i].name), rows[i].expected);
    return true;
}

static bool check_pools(struct check *c, const struct recount *r, const redisReply *reply)
{
    for (size_t p = 0; p < POOLS; p++)
        for (size_t i = 0; i + 7 < reply->elements; i += 8) {
            if (strcmp(reply->element[i]->str, pools[p]) != 0)
                continue;
            for (size_t what = 0; what < 6; what++) {
                uint64_t said = strtoull(reply->element[i + 1 + what]->str, NULL, 10),
                         counted = what < 3 ? r->jobs[p][what] : r->ms[p][what - 3];
                if (said != counted)
                    return check_fail(c, "stats: number %zu of pool %s is %" PRIu64 ", counted %" PRIu64, what,
                                      pools[p], said, counted);
            }
        }
    return true;
}

bool check_all(struct check *c, struct text stats, struct text pools_, int64_t now_ms)
{
    struct recount r = {.c = c};
    c->now_ms = now_ms;
    *c->op = 0;
    if (*c->broken || !recount_jobs(c, &r))
        return false;
    store_each(c->store, recount_key, &r);
    if (*c->broken || !check_sizes(c, &r) || !check_tenants(c, &r))
        return false;
    redisReply *s = parse(stats), *p = parse(pools_);
    bool good = s && s->type == REDIS_REPLY_ARRAY && p && p->type == REDIS_REPLY_ARRAY;
    if (!good)
        check_fail(c, "script: stats or pools ended in an error");
    good = good && (r.misplaced > 0 || check_stats(c, &r, s)) && check_pools(c, &r, p);
    freeReplyObject(s);
    freeReplyObject(p);
    return good;
}

bool check_quiet(const struct check *c)
{
    bool quiet = check_live(c) == 0 && size_of((struct check *)c, "outbox") == 0;
    for (unsigned t = 0; t < CHECK_TENANTS; t++)
        quiet = quiet && c->h.n_door[t] == 0;
    return quiet;
}
