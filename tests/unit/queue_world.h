// queue_world.h: what tests of the queue share: a private Redis, small steps, and what must hold at any moment.
//
// Each test starts on an empty server: TEST(f), run by cmocka_run_group_tests(tests, start, stop).
#ifndef DITFLEET_TESTS_QUEUE_WORLD_H
#define DITFLEET_TESTS_QUEUE_WORLD_H

#include "private_redis.h"
#include "proto/queue.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <inttypes.h>
#include <time.h>

#define PREFIX "dit:{test}:"
#define POOL   "shapes@1"

// One server for all tests; each test starts on an empty one.
struct world {
    struct private_redis server;
    struct queue *q;
};

static inline void check(int rc, const struct err *e, int line)
{
    if (rc != 0)
        fail_msg("line %d: %s: %s", line, err_name((enum err_code)rc), e->text);
}
#define OK(call)                                                                                                       \
    do {                                                                                                               \
        struct err e_ = {0}, *e = &e_;                                                                                 \
        int rc_ = (call);                                                                                              \
        check(rc_, e, __LINE__);                                                                                       \
    } while (0)
#define FAILS(code_, call)                                                                                             \
    do {                                                                                                               \
        struct err e_ = {0}, *e = &e_;                                                                                 \
        int rc_ = (call);                                                                                              \
        if (rc_ != (int)(code_) || !*e->text)                                                                          \
            fail_msg("line %d: expected %s, got %s: %s", __LINE__, err_name(code_), err_name((enum err_code)rc_),      \
                     e->text);                                                                                         \
    } while (0)

// ---- small steps

// A fresh connection, which reads the registries anew; an old one does so every second.
static inline void reopen(struct world *w)
{
    queue_close(w->q);
    OK(queue_open(&w->q, w->server.url, "test", QUEUE_NODE, NULL, e));
}

static inline redisReply *command(struct world *w, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    const char *argv[32];
    int argc = 0;
    char *save = NULL;
    for (char *word = strtok_r(text, " ", &save); word && argc < 32; word = strtok_r(NULL, " ", &save))
        argv[argc++] = word;
    redisReply *reply = NULL;
    OK(redis_command_argv(queue_redis(w->q), &reply, e, argc, argv, NULL));
    return reply;
}

static inline long long number(struct world *w, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    redisReply *reply = command(w, "%s", text);
    long long n = reply->type == REDIS_REPLY_INTEGER ? reply->integer : reply->str ? atoll(reply->str) : -1;
    freeReplyObject(reply);
    return n;
}

static inline uint64_t server_ms(struct world *w)
{
    redisReply *t = command(w, "TIME");
    uint64_t ms = strtoull(t->element[0]->str, NULL, 10) * 1000 + strtoull(t->element[1]->str, NULL, 10) / 1000;
    freeReplyObject(t);
    return ms;
}

static inline Ditfleet__V1__Job *new_job(const char *id)
{
    Ditfleet__V1__Job *job = job_new();
    OK(job_set_field(job, "id", id, e));
    OK(job_set_field(job, "model", "shapes", e));
    OK(job_set_field(job, "prompt", "a red circle", e));
    OK(job_set_field(job, "output.url", "http://127.0.0.1:9/{id}.png", e));
    return job;
}

static inline void submit_job(struct world *w, const char *tenant, Ditfleet__V1__Job *job, char entry[QUEUE_ENTRY_SIZE])
{
    void *bytes;
    size_t length;
    char unused[QUEUE_ENTRY_SIZE];
    OK(job_pack(job, &bytes, &length, e));
    OK(queue_submit(w->q, tenant, bytes, length, entry ? entry : unused, e));
    free(bytes);
    job_free(job);
}

static inline void submit(struct world *w, const char *id)
{
    submit_job(w, "default", new_job(id), NULL);
}

static inline struct queue_admitted admit(struct world *w)
{
    struct queue_admission admission = {.consumer = "node1", .callbacks = true};
    struct queue_admitted out, sum = {0};
    do {
        OK(queue_admit(w->q, &admission, 0, &out, e));
        sum.read += out.read;
        sum.admitted += out.admitted;
        sum.duplicate += out.duplicate;
        sum.refused += out.refused;
        sum.no_models |= out.no_models;
    } while (out.read > 0);
    return sum;
}

static inline size_t claim_as(struct world *w, const char *worker, const char *incarnation, unsigned max,
                              uint64_t lease_ms, struct queue_job *jobs)
{
    static const char *const pools[] = {POOL, "other@2"};
    struct queue_claim want = {worker, incarnation, pools, 2, lease_ms, max};
    size_t count;
    char cursor[QUEUE_ENTRY_SIZE];
    OK(queue_claim(w->q, &want, jobs, &count, cursor, e));
    return count;
}

static inline struct queue_fence claim(struct world *w, uint64_t lease_ms)
{
    struct queue_job job;
    if (claim_as(w, "w1", "i1", 1, lease_ms, &job) != 1)
        fail_msg("there was nothing to claim");
    struct queue_fence fence = job.fence;
    queue_job_free(&job);
    return fence;
}

static inline const char *state_of(struct world *w, const char *id)
{
    struct queue_record r;
    OK(queue_get(w->q, "default", id, &r, e));
    const char *name = job_state_name(r.state);
    queue_record_free(&r);
    return name;
}

static inline void finish(struct world *w, const struct queue_fence *fence)
{
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    void *bytes;
    size_t length;
    result.id = (char *)fence->id;
    result.state = DITFLEET__V1__STATE__STATE_SUCCEEDED;
    result.attempt = (uint32_t)fence->epoch;
    OK(result_pack(&result, &bytes, &length, e));
    OK(queue_finish(w->q, fence, bytes, length, e));
    free(bytes);
}

static inline struct queue_reaped reap(struct world *w)
{
    struct queue_reaped out;
    OK(queue_reap(w->q, &out, e));
    return out;
}

static const struct err gpu_fault = {ERR_UNAVAILABLE, true, "the GPU fell off the bus"};
static const struct err app_error = {ERR_INTERNAL, true, "the job's own trouble"};
static const struct err app_final = {ERR_UNSUPPORTED, false, "this size cannot be done"};

// ---- what must hold at any moment: a record is in exactly the index of its state, and the counters tell the truth

// The entry of this name in a list that has room for one more.
static inline struct queue_pool *pool_of(struct queue_pool *pools, size_t *n, const char *name)
{
    for (size_t i = 0; i < *n; i++)
        if (strcmp(pools[i].name, name) == 0)
            return &pools[i];
    snprintf(pools[*n].name, sizeof pools->name, "%s", name);
    return &pools[(*n)++];
}

static inline void tally(struct queue_pool *p, bool queued, bool delayed, bool held, uint64_t gpu_ms)
{
    p->queued += queued;
    p->queued_ms += queued ? gpu_ms : 0;
    p->delayed += delayed;
    p->delayed_ms += delayed ? gpu_ms : 0;
    p->working += held;
    p->working_ms += held ? gpu_ms : 0;
}

// What the queue says of its pools is what the records say.
static inline void check_pools(struct world *w, struct queue_pool *want, size_t n_want)
{
    struct queue_pool *pools;
    size_t n;
    OK(queue_pools(w->q, &pools, &n, e));
    for (size_t i = 0; i < n; i++) {
        const struct queue_pool *p = &pools[i], *t = pool_of(want, &n_want, p->name);
        if (p->queued != t->queued || p->delayed != t->delayed || p->working != t->working ||
            p->queued_ms != t->queued_ms || p->delayed_ms != t->delayed_ms || p->working_ms != t->working_ms)
            fail_msg("pool %s: %" PRIu64 "/%" PRIu64 "/%" PRIu64
                     " jobs queued/delayed/working; the records say %" PRIu64 "/%" PRIu64 "/%" PRIu64,
                     p->name, p->queued, p->delayed, p->working, t->queued, t->delayed, t->working);
        assert_true((p->oldest_ms == 0) || p->queued > 0);
    }
    assert_int_equal(n, n_want); // none is missing
    free(pools);
}

static inline void check_invariants(struct world *w)
{
    struct queue_pool pools[16] = {0};
    size_t n_pools = 0;
    pool_of(pools, &n_pools, POOL); // published, with or without jobs
    redisReply *keys = command(w, "KEYS " PREFIX "job:*");
    long long live = 0, queued = 0, leased = 0, gpu_ms = 0;
    for (size_t i = 0; i < keys->elements; i++) {
        const char *key = keys->element[i]->str, *member = key + sizeof PREFIX "job:" - 1;
        redisReply *r = command(w, "HMGET %s state pool class gpu_ms worker payload result", key);
        const char *state = r->element[0]->str;
        if (!state || strchr(member, '@')) {
            freeReplyObject(r);
            continue;
        }
        Ditfleet__V1__State s = job_state_parse(state);
        bool held = s == DITFLEET__V1__STATE__STATE_LEASED || s == DITFLEET__V1__STATE__STATE_RUNNING ||
                    s == DITFLEET__V1__STATE__STATE_UPLOADING;
        bool delayed = s == DITFLEET__V1__STATE__STATE_DELAYED || s == DITFLEET__V1__STATE__STATE_RETRY_WAIT;
        const char *colon = strchr(member, ':');
        redisReply *ready =
            command(w, "ZSCORE " PREFIX "ready:%s:%s:%.*s %s", r->element[1]->str ? r->element[1]->str : "-",
                    r->element[2]->str ? r->element[2]->str : "-", (int)(colon - member), member, member);
        redisReply *lease = command(w, "ZSCORE " PREFIX "lease %s", member);
        redisReply *later = command(w, "ZSCORE " PREFIX "delayed %s", member);
        redisReply *alive = command(w, "ZSCORE " PREFIX "live %s", member);
        bool holds = held && number(w, "HEXISTS " PREFIX "held:%s %s", r->element[4]->str, member);
        if ((ready->str != NULL) != (s == DITFLEET__V1__STATE__STATE_QUEUED) || (lease->str != NULL) != held ||
            holds != held || (later->str != NULL) != delayed || (alive->str != NULL) == job_state_final(s) ||
            (r->element[6]->str != NULL) != job_state_final(s))
            fail_msg("%s in state %s is in the wrong index", member, state);
        live += !job_state_final(s);
        queued += s == DITFLEET__V1__STATE__STATE_QUEUED;
        leased += held;
        gpu_ms += job_state_final(s) ? 0 : atoll(r->element[3]->str);
        if (r->element[1]->str && !job_state_final(s))
            tally(pool_of(pools, &n_pools, r->element[1]->str), s == DITFLEET__V1__STATE__STATE_QUEUED, delayed, held,
                  (uint64_t)atoll(r->element[3]->str));
        redisReply *all[] = {r, ready, lease, later, alive};
        for (size_t k = 0; k < 5; k++)
            freeReplyObject(all[k]);
    }
    freeReplyObject(keys);
    check_pools(w, pools, n_pools);
    struct queue_stats stats;
    OK(queue_stats(w->q, &stats, e));
    assert_int_equal(number(w, "ZCARD " PREFIX "live"), live);
    assert_int_equal(number(w, "ZCARD " PREFIX "lease"), leased);
    assert_int_equal(stats.queued, queued);
    assert_int_equal(stats.leased + stats.running + stats.uploading, leased);
    assert_int_equal(stats.backlog_ms, gpu_ms);
    struct queue_tenant *tenants;
    size_t n;
    long long ready = 0, owed = 0;
    OK(queue_tenants(w->q, &tenants, &n, e));
    for (size_t i = 0; i < n; i++) {
        ready += (long long)tenants[i].ready;
        owed += (long long)tenants[i].gpu_ms;
    }
    free(tenants);
    assert_int_equal(ready, queued);
    assert_int_equal(owed, gpu_ms);
}

static inline uint64_t flat_price(void *arg, const Ditfleet__V1__Job *job)
{
    (void)job;
    return *(uint64_t *)arg;
}

// Admits one job at this price.
static inline void admit_priced(struct world *w, Ditfleet__V1__Job *job, uint64_t gpu_ms)
{
    struct queue_admission admission = {.consumer = "node1", .price = flat_price, .arg = &gpu_ms};
    struct queue_admitted out;
    submit_job(w, "default", job, NULL);
    OK(queue_admit(w->q, &admission, 0, &out, e));
    assert_int_equal(out.admitted, 1);
}

// ---- the fixture

static inline int start(void **state)
{
    struct world *w = calloc(1, sizeof *w);
    *state = w;
    return private_redis_start(&w->server, NULL);
}

static inline int stop(void **state)
{
    struct world *w = *state;
    private_redis_stop(&w->server);
    free(w);
    return 0;
}

static inline int empty(void **state)
{
    struct world *w = *state;
    struct err e = {0};
    int rc = queue_open(&w->q, w->server.url, "test", QUEUE_NODE, NULL, &e);
    rc = rc ? rc : redis_command(queue_redis(w->q), NULL, &e, "FLUSHALL");
    rc = rc ? rc : queue_model_publish(w->q, "shapes", "1", &e);
    if (rc)
        fprintf(stderr, "%s\n", e.text);
    return rc;
}

static inline int leave(void **state)
{
    struct world *w = *state;
    queue_close(w->q);
    return 0;
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, empty, leave)

#endif
