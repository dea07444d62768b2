// test_queue.c: the queue against a private Redis: each promise of PROTOCOL.md, and each way it was broken elsewhere.
#include "queue_world.h"
#include "scripted_redis.h"

#include <ctype.h>

static int on_event(void *arg, const Ditfleet__V1__Event *event)
{
    char *trail = arg;
    snprintf(trail + strlen(trail), 400 - strlen(trail), "%s/%s/%u/%u ", job_state_name(event->state), event->stage,
             event->step, event->attempt);
    return 0;
}

static void test_whole_path(void **state)
{
    struct world *w = *state;
    char entry[QUEUE_ENTRY_SIZE], trail[400] = "";
    submit_job(w, "default", new_job("a"), entry);
    assert_int_equal(admit(w).admitted, 1);
    assert_int_equal(number(w, "XLEN " PREFIX "in:default"), 0);
    assert_string_equal(state_of(w, "a"), "QUEUED");
    struct queue_job job;
    assert_int_equal(claim_as(w, "w1", "i1", 1, 10000, &job), 1);
    assert_string_equal(job.pool, POOL);
    assert_int_equal(job.fence.epoch, 1);
    assert_int_equal(strlen(job.fence.nonce), 32);
    Ditfleet__V1__Job *parsed;
    OK(job_parse(job.payload, job.payload_length, &parsed, NULL, e));
    assert_string_equal(parsed->prompt, "a red circle");
    job_free(parsed);
    struct queue_progress p = {DITFLEET__V1__STATE__STATE_RUNNING, "denoise", 1, 20, 2.5};
    OK(queue_progress(w->q, &job.fence, &p, e));
    p.step = 2;
    OK(queue_progress(w->q, &job.fence, &p, e));
    OK(queue_beat(w->q, &job.fence, 20000, e));
    struct queue_record r;
    OK(queue_get(w->q, "default", "a", &r, e));
    assert_int_equal(r.state, DITFLEET__V1__STATE__STATE_RUNNING);
    assert_string_equal(r.stage, "denoise");
    assert_int_equal(r.step, 2);
    assert_string_equal(r.entry, entry);
    assert_in_range(r.lease_ms - r.now_ms, 19000, 20000);
    queue_record_free(&r);
    check_invariants(w);
    p.state = DITFLEET__V1__STATE__STATE_UPLOADING, p.stage = "upload";
    OK(queue_progress(w->q, &job.fence, &p, e));
    finish(w, &job.fence);
    finish(w, &job.fence); // the repeated message after a lost reply
    Ditfleet__V1__Result *result;
    OK(queue_await(w->q, "default", "a", entry, 1000, on_event, trail, &result, e));
    assert_int_equal(result->state, DITFLEET__V1__STATE__STATE_SUCCEEDED);
    result_free(result);
    assert_string_equal(trail, "LEASED//0/1 RUNNING/denoise/1/1 RUNNING/denoise/2/1 "
                               "UPLOADING/upload/2/1 SUCCEEDED/upload/2/1 ");
    assert_int_equal(number(w, "HSTRLEN " PREFIX "job:default:a payload"), 0); // it may hold secrets
    assert_in_range(number(w, "PTTL " PREFIX "job:default:a"), 1, 86400000);
    assert_in_range(number(w, "PTTL " PREFIX "ev:default:a"), 1, 86400000);
    queue_job_free(&job);
    check_invariants(w);
}

static void test_same_id(void **state)
{
    struct world *w = *state;
    char first[QUEUE_ENTRY_SIZE], second[QUEUE_ENTRY_SIZE], third[QUEUE_ENTRY_SIZE];
    submit_job(w, "default", new_job("a"), first);
    submit_job(w, "default", new_job("a"), second);
    Ditfleet__V1__Job *other = new_job("a");
    OK(job_set_field(other, "prompt", "a blue square", e));
    submit_job(w, "default", other, third);
    struct queue_admitted out = admit(w);
    assert_int_equal(out.admitted, 1);
    assert_int_equal(out.duplicate, 1);
    assert_int_equal(out.refused, 1);
    struct queue_fence fence = claim(w, 10000);
    struct queue_job none;
    assert_int_equal(claim_as(w, "w2", "i", 1, 1000, &none), 0);
    finish(w, &fence);
    // Each submission finds its own outcome: two the picture, the third its refusal.
    Ditfleet__V1__Result *result;
    const char *entries[] = {first, second, NULL};
    for (int i = 0; i < 3; i++) {
        OK(queue_await(w->q, "default", "a", entries[i], 1000, NULL, NULL, &result, e));
        assert_int_equal(result->state, DITFLEET__V1__STATE__STATE_SUCCEEDED);
        result_free(result);
    }
    OK(queue_await(w->q, "default", "a", third, 1000, NULL, NULL, &result, e));
    assert_int_equal(result->state, DITFLEET__V1__STATE__STATE_DEAD);
    assert_string_equal(result->error->code, "conflict");
    result_free(result);
    // Another tenant's "a" is another job.
    OK(queue_tenant_add(w->q, "acme", 1, e));
    submit_job(w, "acme", new_job("a"), NULL);
    OK(queue_tenant_add(w->q, "acme", 1, e));
    usleep(1100000); // admission learns of new tenants within a second
    assert_int_equal(admit(w).admitted, 1);
    check_invariants(w);
}

static void test_refusals(void **state)
{
    struct world *w = *state;
    char entry[QUEUE_ENTRY_SIZE];
    Ditfleet__V1__Result *result;
    OK(queue_submit(w->q, "default", "\xff\xff garbage", 10, entry, e));
    submit(w, "good");
    assert_int_equal(admit(w).refused, 1);
    assert_string_equal(state_of(w, "good"), "QUEUED"); // the queue goes on
    OK(queue_await(w->q, "default", "whatever", entry, 1000, NULL, NULL, &result, e));
    assert_string_equal(result->error->code, "corrupt");
    result_free(result);
    // Out of bounds, with an id that can be read: the result is under the id as well, and the id stays free.
    Ditfleet__V1__Job *job = new_job("wide");
    job->width = 1;
    submit_job(w, "default", job, entry);
    assert_int_equal(admit(w).refused, 1);
    OK(queue_await(w->q, "default", "wide", NULL, 1000, NULL, NULL, &result, e));
    assert_non_null(strstr(result->error->message, "width is 1; allowed: 16 to 16384"));
    result_free(result);
    submit_job(w, "default", new_job("wide"), entry);
    assert_int_equal(admit(w).admitted, 1);
    assert_string_equal(state_of(w, "wide"), "QUEUED");
    // An unknown model, an unknown version, no field named job, a prompt of 1 MB.
    job = new_job("m1");
    OK(job_set_field(job, "model", "nosuch", e));
    submit_job(w, "default", job, NULL);
    job = new_job("m2");
    OK(job_set_field(job, "model", "shapes@9", e));
    submit_job(w, "default", job, entry);
    freeReplyObject(command(w, "XADD " PREFIX "in:default * wrong x"));
    job = new_job("long");
    free(job->prompt);
    job->prompt = calloc(1, (1 << 20) + 1);
    memset(job->prompt, 'x', 1 << 20);
    submit_job(w, "default", job, NULL);
    assert_int_equal(admit(w).refused, 4);
    OK(queue_await(w->q, "default", "m2", entry, 1000, NULL, NULL, &result, e));
    assert_string_equal(result->error->message, "model shapes@9 is not served by this fleet; known: shapes@1");
    result_free(result);
    OK(queue_await(w->q, "default", "long", NULL, 1000, NULL, NULL, &result, e));
    assert_non_null(strstr(result->error->message, "prompt has 1048576 bytes"));
    result_free(result);
    redisReply *dead = command(w, "XRANGE " PREFIX "dlq - +");
    assert_int_equal(dead->elements, 6);
    freeReplyObject(dead);
    check_invariants(w);
}

// Anything may stand on the stream; admission answers each entry and the next job runs.
static void test_fuzzed_entries(void **state)
{
    struct world *w = *state;
    void *good;
    size_t length;
    uint64_t seed = 7;
    Ditfleet__V1__Job *job = new_job("f");
    OK(job_pack(job, &good, &length, e));
    job_free(job);
    for (int i = 0; i < 600; i++) {
        unsigned char *copy = malloc(length);
        memcpy(copy, good, length);
        size_t n = length;
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        if (i % 2)
            n = (seed >> 33) % length;
        else
            copy[(seed >> 33) % length] = (unsigned char)(seed >> 24);
        char entry[QUEUE_ENTRY_SIZE];
        OK(queue_submit(w->q, "default", copy, n, entry, e));
        free(copy);
    }
    free(good);
    struct queue_admitted out = admit(w);
    assert_int_equal(out.read, 600);
    assert_int_equal(out.admitted + out.duplicate + out.refused, 600);
    submit(w, "after");
    assert_int_equal(admit(w).admitted, 1);
    check_invariants(w);
}

static void test_registry_of_models(void **state)
{
    struct world *w = *state;
    OK(queue_model_withdraw(w->q, "shapes", "1", e));
    reopen(w);
    submit(w, "a");
    struct queue_admitted out = admit(w);
    assert_true(out.no_models && out.read == 0); // nobody has said yet what exists
    OK(queue_model_publish(w->q, "shapes", "1", e));
    reopen(w);
    assert_int_equal(admit(w).admitted, 1);
    OK(queue_model_publish(w->q, "shapes", "2", e));
    struct queue_model *models;
    size_t n;
    OK(queue_models(w->q, &models, &n, e));
    assert_int_equal(n, 2);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(models[i].is_default, strcmp(models[i].version, "2") == 0);
    free(models);
    OK(queue_model_withdraw(w->q, "shapes", "2", e));
    OK(queue_models(w->q, &models, &n, e));
    assert_int_equal(n, 1);
    assert_true(models[0].is_default);
    free(models);
}

static redisReply *snapshot(struct world *w, const char *id)
{
    return command(w, "HGETALL " PREFIX "job:default:%s", id);
}

static void expect_same(redisReply *a, redisReply *b)
{
    assert_int_equal(a->elements, b->elements);
    for (size_t i = 0; i < a->elements; i++) {
        assert_int_equal(a->element[i]->len, b->element[i]->len);
        assert_memory_equal(a->element[i]->str, b->element[i]->str, (size_t)a->element[i]->len);
    }
    freeReplyObject(a);
    freeReplyObject(b);
}

static void expect_stale(struct world *w, const struct queue_fence *f, enum err_code code)
{
    struct queue_progress p = {DITFLEET__V1__STATE__STATE_RUNNING, "denoise", 19, 20, 0};
    long long events = number(w, "XLEN " PREFIX "ev:default:%s", f->id);
    redisReply *before = snapshot(w, f->id);
    FAILS(code, queue_beat(w->q, f, 99999, e));
    FAILS(code, queue_progress(w->q, f, &p, e));
    FAILS(code, queue_finish(w->q, f, "x", 1, e));
    FAILS(code, queue_fail(w->q, f, QUEUE_CAUSE_APP, &app_final, NULL, e));
    FAILS(code, queue_release(w->q, f, e));
    expect_same(before, snapshot(w, f->id));
    assert_int_equal(number(w, "XLEN " PREFIX "ev:default:%s", f->id), events);
}

static void test_stale_fence_writes_nothing(void **state)
{
    struct world *w = *state;
    submit(w, "a");
    admit(w);
    struct queue_fence old = claim(w, 1);
    usleep(5000);
    assert_int_equal(reap(w).lost, 1);
    expect_stale(w, &old, ERR_STALE); // taken away, not yet claimed again
    struct queue_fence now = claim(w, 10000);
    assert_int_equal(now.epoch, 2);
    expect_stale(w, &old, ERR_STALE);
    // The server went back in time: the epoch is right, the nonce is not.
    struct queue_fence ghost = now;
    memset(ghost.nonce, 'f', 32);
    expect_stale(w, &ghost, ERR_STALE);
    finish(w, &now);
    struct queue_fence late = now;
    late.epoch = 3;
    expect_stale(w, &late, ERR_STALE);
    assert_string_equal(state_of(w, "a"), "SUCCEEDED");
    check_invariants(w);
}

static void test_cancel(void **state)
{
    struct world *w = *state;
    Ditfleet__V1__State s;
    FAILS(ERR_NOT_FOUND, queue_cancel(w->q, "default", "a", NULL, e));
    submit(w, "a");
    submit(w, "b");
    submit(w, "c");
    admit(w);
    OK(queue_cancel(w->q, "default", "a", &s, e));
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_CANCELLED);
    struct queue_fence b = claim(w, 10000);
    assert_string_equal(b.id, "b"); // not a
    OK(queue_cancel(w->q, "default", "b", &s, e));
    expect_stale(w, &b, ERR_CANCELLED); // cancel came first
    Ditfleet__V1__Result *result;
    OK(queue_await(w->q, "default", "b", NULL, 1000, NULL, NULL, &result, e));
    assert_string_equal(result->error->code, "cancelled");
    result_free(result);
    struct queue_fence c = claim(w, 10000);
    finish(w, &c); // finish came first
    OK(queue_cancel(w->q, "default", "c", &s, e));
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_SUCCEEDED);
    check_invariants(w);
}

static void test_own_errors_run_out(void **state)
{
    struct world *w = *state;
    Ditfleet__V1__State s;
    OK(queue_set(w->q, "backoff_ms", 20, e));
    OK(queue_set(w->q, "max_attempts", 3, e));
    FAILS(ERR_INVALID, queue_set(w->q, "no_such", 1, e));
    submit(w, "a");
    admit(w);
    for (unsigned attempt = 1; attempt <= 3; attempt++) {
        struct queue_fence f = claim(w, 10000);
        OK(queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_error, &s, e));
        OK(queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_error, &s, e)); // repeated: counted once
        struct queue_record r;
        OK(queue_get(w->q, "default", "a", &r, e));
        assert_int_equal(r.attempts_app, attempt);
        assert_string_equal(r.error, app_error.text);
        queue_record_free(&r);
        if (attempt == 3)
            break;
        assert_true(s == DITFLEET__V1__STATE__STATE_RETRY_WAIT || s == DITFLEET__V1__STATE__STATE_QUEUED);
        check_invariants(w);
        usleep(100000); // more than the longest backoff of two attempts
        reap(w);
        assert_string_equal(state_of(w, "a"), "QUEUED");
    }
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_DEAD);
    assert_int_equal(number(w, "XLEN " PREFIX "dlq"), 1);
    assert_int_equal(number(w, "HEXISTS " PREFIX "job:default:a payload"), 1); // a dead job can be looked into
    // An error that no retry mends ends it at once; the job's own max_attempts goes before the queue's.
    submit(w, "b");
    Ditfleet__V1__Job *c = new_job("c");
    c->max_attempts = 1;
    submit_job(w, "default", c, NULL);
    admit(w);
    struct queue_fence f = claim(w, 10000);
    OK(queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_final, &s, e));
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_DEAD);
    f = claim(w, 10000);
    OK(queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_error, &s, e));
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_DEAD);
    check_invariants(w);
}

static void test_fleet_faults_do_not_count(void **state)
{
    struct world *w = *state;
    Ditfleet__V1__State s;
    OK(queue_set(w->q, "backoff_ms", 1, e));
    OK(queue_set(w->q, "max_attempts_infra", 4, e));
    submit(w, "a");
    admit(w);
    for (int i = 1; i <= 4; i++) {
        struct queue_fence f = claim(w, 10000);
        OK(queue_fail(w->q, &f, QUEUE_CAUSE_INFRA, &gpu_fault, &s, e));
        if (i == 1)
            assert_int_equal(s, DITFLEET__V1__STATE__STATE_QUEUED); // the first costs no waiting
        usleep(20000);
        reap(w);
    }
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_DEAD); // bounded all the same
    struct queue_record r;
    OK(queue_get(w->q, "default", "a", &r, e));
    assert_int_equal(r.attempts_app, 0);
    assert_int_equal(r.attempts_infra, 4);
    queue_record_free(&r);
    check_invariants(w);
}

static void test_release(void **state)
{
    struct world *w = *state;
    submit(w, "a");
    admit(w);
    struct queue_fence f = claim(w, 10000);
    OK(queue_release(w->q, &f, e));
    OK(queue_release(w->q, &f, e)); // repeated
    struct queue_record r;
    OK(queue_get(w->q, "default", "a", &r, e));
    assert_int_equal(r.state, DITFLEET__V1__STATE__STATE_QUEUED);
    assert_int_equal(r.attempts_app + r.attempts_infra, 0);
    queue_record_free(&r);
    check_invariants(w);
}

static void test_dead_worker(void **state)
{
    struct world *w = *state;
    struct queue_job jobs[4];
    unsigned n;
    for (int i = 0; i < 4; i++) {
        char id[8];
        snprintf(id, sizeof id, "j%d", i);
        submit(w, id);
    }
    admit(w);
    assert_int_equal(claim_as(w, "w1", "old", 2, 60000, jobs), 2);
    assert_int_equal(claim_as(w, "w1", "new", 1, 60000, jobs + 2), 1);
    assert_int_equal(claim_as(w, "w2", "old", 1, 60000, jobs + 3), 1);
    OK(queue_release_all(w->q, "w1", "old", &gpu_fault, &n, e));
    assert_int_equal(n, 2);
    assert_string_equal(state_of(w, "j0"), "QUEUED"); // at once, not when the lease runs out
    assert_string_equal(state_of(w, "j1"), "QUEUED");
    assert_string_equal(state_of(w, "j2"), "LEASED");
    assert_string_equal(state_of(w, "j3"), "LEASED");
    check_invariants(w);
    OK(queue_release_all(w->q, "w1", NULL, &gpu_fault, &n, e));
    assert_int_equal(n, 1);
    OK(queue_release_all(w->q, "w1", NULL, &gpu_fault, &n, e));
    assert_int_equal(n, 0);
    for (int i = 0; i < 4; i++)
        queue_job_free(&jobs[i]);
    check_invariants(w);
}

// One worker after the other claims the job and dies. The state it is left in.
static const char *die_over(struct world *w, const char *worker, const struct err *why)
{
    struct queue_job job;
    freeReplyObject(command(w, "ZADD " PREFIX "delayed XX 0 default:bad")); // its backoff is over
    struct queue_reaped reaped;
    OK(queue_reap(w->q, &reaped, e));
    assert_int_equal(claim_as(w, worker, "i", 1, 60000, &job), 1);
    queue_job_free(&job);
    OK(queue_release_all(w->q, worker, "i", why, NULL, e));
    check_invariants(w);
    return state_of(w, "bad");
}

static void test_poison(void **state)
{
    struct world *w = *state;
    struct err crash;
    err_set(&crash, ERR_CRASHED, "killed by signal 11");
    submit(w, "bad");
    admit(w);
    OK(queue_serve(w->q, "shapes", "1", "w1", e));
    OK(queue_serve(w->q, "shapes", "1", "w2", e));
    assert_string_equal(die_over(w, "w1", &gpu_fault), "QUEUED"); // no evidence
    assert_string_equal(die_over(w, "w1", &crash), "RETRY_WAIT");
    assert_string_equal(die_over(w, "w1", &crash), "RETRY_WAIT"); // w2 may have better luck
    assert_string_equal(die_over(w, "w2", &gpu_fault), "RETRY_WAIT");
    assert_string_equal(die_over(w, "w2", &crash), "DEAD");
    struct queue_record r = {0};
    OK(queue_get(w->q, "default", "bad", &r, e));
    assert_string_equal(r.error_code, "crashed");
    assert_string_equal(r.error,
                        "poison: workers crashed over this job twice, on w1 and on w2; the last: killed by signal 11");
    assert_int_equal(r.attempts_infra, 5);
    queue_record_free(&r);
}

// Where no other worker serves the pool, or has not for a minute, the second crash at the same one is enough.
static void test_poison_alone(void **state)
{
    struct world *w = *state;
    struct err crash;
    err_set(&crash, ERR_CRASHED, "killed by signal 11");
    submit(w, "bad");
    admit(w);
    OK(queue_serve(w->q, "shapes", "1", "w1", e));
    freeReplyObject(command(w, "ZADD " PREFIX "serves:shapes@1 1000 w2"));
    assert_string_equal(die_over(w, "w1", &crash), "QUEUED");
    assert_string_equal(die_over(w, "w1", &crash), "DEAD");
}

// What a worker only uploaded when it crashed over the next job is not to blame.
static void test_crash_spares_the_upload(void **state)
{
    struct world *w = *state;
    struct queue_job jobs[2];
    struct err crash;
    err_set(&crash, ERR_CRASHED, "killed by signal 11");
    submit(w, "bad");
    submit(w, "uploaded");
    admit(w);
    for (int round = 0; round < 2; round++) {
        freeReplyObject(command(w, "ZADD " PREFIX "delayed XX 0 default:bad 0 default:uploaded"));
        struct queue_reaped reaped;
        OK(queue_reap(w->q, &reaped, e));
        assert_int_equal(claim_as(w, "w1", "i", 2, 60000, jobs), 2);
        for (int i = 0; i < 2; i++) {
            const bool upload = strcmp(jobs[i].fence.id, "uploaded") == 0;
            const struct queue_progress p = {upload ? DITFLEET__V1__STATE__STATE_UPLOADING
                                                    : DITFLEET__V1__STATE__STATE_RUNNING,
                                             upload ? "upload" : "denoise", 1, 2, 0};
            OK(queue_progress(w->q, &jobs[i].fence, &p, e));
            queue_job_free(&jobs[i]);
        }
        OK(queue_release_all(w->q, "w1", "i", &crash, NULL, e));
    }
    assert_string_equal(state_of(w, "bad"), "DEAD");
    assert_string_equal(state_of(w, "uploaded"), "RETRY_WAIT");
    check_invariants(w);
}

static void test_orphans_are_found(void **state)
{
    struct world *w = *state;
    OK(queue_set(w->q, "check_ms", 1, e));
    submit(w, "q");
    submit(w, "l");
    submit(w, "gone");
    admit(w);
    struct queue_fence f = claim(w, 60000);
    assert_string_equal(f.id, "q");
    claim(w, 60000);
    freeReplyObject(command(w, "ZREM " PREFIX "lease default:l"));
    freeReplyObject(
        command(w, "DEL " PREFIX "lease " PREFIX "ready:" POOL ":normal:default " PREFIX "ring:" POOL ":normal"));
    freeReplyObject(command(w, "DEL " PREFIX "job:default:gone"));
    usleep(5000);
    struct queue_reaped out = reap(w);
    assert_int_equal(out.orphans, 2); // both leased ones had lost their lease
    assert_string_equal(state_of(w, "q"), "QUEUED");
    assert_string_equal(state_of(w, "l"), "QUEUED");
    assert_int_equal(number(w, "ZCARD " PREFIX "live"), 2);
    struct queue_job jobs[2];
    freeReplyObject(command(w, "DEL " PREFIX "ring:" POOL ":normal"));
    assert_int_equal(claim_as(w, "w1", "i1", 2, 60000, jobs), 0);
    usleep(5000);
    assert_true(reap(w).orphans >= 1);
    assert_int_equal(claim_as(w, "w1", "i1", 2, 60000, jobs), 2);
    queue_job_free(&jobs[0]);
    queue_job_free(&jobs[1]);
}

static void test_times(void **state)
{
    struct world *w = *state;
    const uint64_t now = server_ms(w);
    OK(queue_set(w->q, "max_speed", 0, e)); // the jobs' price would not let them end so soon
    Ditfleet__V1__Job *job = new_job("later");
    job->not_before_ms = now + 150;
    submit_job(w, "default", job, NULL);
    job = new_job("past");
    job->deadline_ms = now - 1000;
    submit_job(w, "default", job, NULL);
    job = new_job("soon");
    job->deadline_ms = now + 150;
    submit_job(w, "default", job, NULL);
    job = new_job("running");
    job->deadline_ms = now + 150;
    job->priority = DITFLEET__V1__PRIORITY__PRIORITY_HIGH;
    submit_job(w, "default", job, NULL);
    admit(w);
    assert_string_equal(state_of(w, "later"), "DELAYED");
    assert_string_equal(state_of(w, "past"), "EXPIRED");
    struct queue_fence f = claim(w, 60000);
    assert_string_equal(f.id, "running");
    check_invariants(w);
    assert_in_range(reap(w).next_ms, 1, 200);
    usleep(200000);
    struct queue_reaped out = reap(w);
    assert_int_equal(out.due, 1);
    assert_int_equal(out.expired, 2);
    assert_string_equal(state_of(w, "later"), "QUEUED");
    assert_string_equal(state_of(w, "soon"), "EXPIRED");
    expect_stale(w, &f, ERR_EXPIRED);
    check_invariants(w);
}

static void test_classes_and_fairness(void **state)
{
    struct world *w = *state;
    struct queue_job job;
    OK(queue_tenant_add(w->q, "big", 3, e));
    OK(queue_tenant_add(w->q, "small", 1, e));
    reopen(w);
    for (int i = 0; i < 40; i++) {
        char id[16];
        snprintf(id, sizeof id, "j%d", i);
        submit_job(w, "big", new_job(id), NULL);
        submit_job(w, "small", new_job(id), NULL);
    }
    Ditfleet__V1__Job *urgent = new_job("urgent");
    urgent->priority = DITFLEET__V1__PRIORITY__PRIORITY_HIGH;
    submit_job(w, "small", urgent, NULL);
    admit(w);
    assert_int_equal(claim_as(w, "w", "i", 1, 60000, &job), 1);
    assert_string_equal(job.fence.id, "urgent");
    queue_job_free(&job);
    int big = 0;
    for (int i = 0; i < 40; i++) {
        assert_int_equal(claim_as(w, "w", "i", 1, 60000, &job), 1);
        big += strcmp(job.fence.tenant, "big") == 0;
        queue_job_free(&job);
    }
    assert_in_range(big, 28, 32); // three quarters
    // One who comes late gets its share from now on, not for the time it was away.
    for (int i = 0; i < 10; i++) {
        char id[16];
        snprintf(id, sizeof id, "late%d", i);
        submit(w, id);
    }
    admit(w);
    int late = 0;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(claim_as(w, "w", "i", 1, 60000, &job), 1);
        late += strcmp(job.fence.tenant, "default") == 0;
        queue_job_free(&job);
    }
    assert_in_range(late, 1, 5);
    check_invariants(w);
}

static void test_batch_claim(void **state)
{
    struct world *w = *state;
    struct queue_job jobs[8];
    for (int i = 0; i < 6; i++) {
        char id[8];
        snprintf(id, sizeof id, "b%d", i);
        Ditfleet__V1__Job *job = new_job(id);
        job->width = job->height = i % 2 ? 256 : 512;
        submit_job(w, "default", job, NULL);
    }
    admit(w);
    assert_int_equal(claim_as(w, "w", "i", 8, 60000, jobs), 3); // those of 512 x 512, as the oldest is
    for (int i = 0; i < 3; i++) {
        char id[8];
        snprintf(id, sizeof id, "b%d", 2 * i);
        assert_string_equal(jobs[i].fence.id, id);
        queue_job_free(&jobs[i]);
    }
    check_invariants(w);
}

// The script itself, with arguments that may be empty.
static redisReply *script(struct world *w, const char *const *args, int n)
{
    FILE *file = fopen("proto/queue.lua", "r");
    char *text = NULL;
    size_t size = 0;
    assert_non_null(file);
    assert_true(getdelim(&text, &size, 0, file) > 0);
    fclose(file);
    const char *argv[32] = {"EVAL", text, "1", PREFIX};
    assert_true(n <= 28);
    memcpy(argv + 4, args, (size_t)n * sizeof *args);
    redisReply *reply;
    OK(redis_command_argv(queue_redis(w->q), &reply, e, 4 + n, argv, NULL));
    free(text);
    return reply;
}

// The reply of a claim was lost: the same claim again gets the same job, not a second one.
static void test_repeated_claim(void **state)
{
    struct world *w = *state;
    submit(w, "a");
    submit(w, "b");
    admit(w);
    struct queue_fence f = claim(w, 60000);
    redisReply *reply = script(w, (const char *[]){"claim", "w1", "i1", "60000", "1", f.nonce, POOL}, 7);
    assert_int_equal(reply->elements, 2);
    assert_string_equal(reply->element[1]->element[1]->str, "a");
    freeReplyObject(reply);
    assert_string_equal(state_of(w, "b"), "QUEUED");
}

static void test_no_wake_is_missed(void **state)
{
    struct world *w = *state;
    static const char *const pools[] = {POOL};
    struct queue_claim want = {"w1", "i1", pools, 1, 1000, 1};
    struct queue_job job;
    size_t n;
    bool woken;
    char cursor[QUEUE_ENTRY_SIZE];
    OK(queue_claim(w->q, &want, &job, &n, cursor, e));
    assert_int_equal(n, 0);
    OK(queue_wait(w->q, cursor, 20, &woken, e));
    assert_false(woken);
    submit(w, "a");
    admit(w); // between the failed claim and the wait
    OK(queue_wait(w->q, cursor, 5000, &woken, e));
    assert_true(woken);
    submit(w, "b");
    admit(w); // a is ready already, of which the waiter was told
    assert_int_equal(number(w, "XLEN " PREFIX "wake"), 1);
    for (int i = 0; i < 2; i++) {
        OK(queue_claim(w->q, &want, &job, &n, cursor, e));
        assert_int_equal(n, 1);
        queue_job_free(&job);
    }
    OK(queue_claim(w->q, &want, &job, &n, cursor, e));
    assert_int_equal(n, 0);
    submit(w, "c");
    admit(w);
    OK(queue_wait(w->q, cursor, 5000, &woken, e));
    assert_true(woken);
}

static void test_server_lost_its_data(void **state)
{
    struct world *w = *state;
    submit(w, "a");
    admit(w);
    struct queue_fence f = claim(w, 60000);
    freeReplyObject(command(w, "FLUSHALL"));
    freeReplyObject(command(w, "SCRIPT FLUSH"));
    freeReplyObject(command(w, "FUNCTION FLUSH"));
    FAILS(ERR_STALE, queue_beat(w->q, &f, 1000, e));
    FAILS(ERR_STALE, queue_finish(w->q, &f, "x", 1, e));
    assert_int_equal(number(w, "DBSIZE"), 0);
    OK(queue_model_publish(w->q, "shapes", "1", e)); // as nodes do every few seconds
    submit(w, "b");
    assert_int_equal(admit(w).read + admit(w).read, 1); // the first round may only find that the group is gone
    f = claim(w, 60000);
    assert_string_equal(f.id, "b");
    finish(w, &f);
    check_invariants(w);
}

static unsigned calls_of(struct world *w, const char *name)
{
    redisReply *all = command(w, "INFO commandstats");
    char line[64];
    snprintf(line, sizeof line, "cmdstat_%s:calls=", name);
    const char *at = strstr(all->str, line);
    const unsigned calls = at ? (unsigned)strtoul(at + strlen(line), NULL, 10) : 0;
    freeReplyObject(all);
    return calls;
}

// One function on the server, whoever calls; scripts where a user may not call it, with the same effect.
static void test_functions_where_they_may_be(void **state)
{
    struct world *w = *state;
    struct queue *q;
    freeReplyObject(command(w, "FUNCTION FLUSH"));
    freeReplyObject(command(w, "CONFIG RESETSTAT"));
    submit(w, "a");
    admit(w);
    struct queue_fence f = claim(w, 60000);
    assert_int_equal(calls_of(w, "function|load"), 1);
    assert_true(calls_of(w, "fcall") >= 3);
    assert_int_equal(calls_of(w, "evalsha"), 0);
    freeReplyObject(command(w, "ACL SETUSER plain reset on >p ~* +@all -fcall"));
    freeReplyObject(command(w, "ACL SETUSER half reset on >p ~* +@all -function|load"));
    for (int half = 0; half < 2; half++) {
        freeReplyObject(command(w, "FUNCTION FLUSH"));
        freeReplyObject(command(w, "CONFIG RESETSTAT"));
        OK(queue_open(&q, w->server.url, "test", QUEUE_NODE, NULL, e));
        OK(redis_command(queue_redis(q), NULL, e, "AUTH %s p", half ? "half" : "plain"));
        OK(queue_beat(q, &f, 60000, e));
        OK(queue_beat(q, &f, 60000, e));
        assert_true(calls_of(w, "evalsha") >= 2);
        assert_int_equal(calls_of(w, "function|load"), 0);
        assert_true(calls_of(w, "fcall") <= 1); // it is not asked again
        queue_close(q);
    }
    finish(w, &f);
    freeReplyObject(command(w, "ACL DELUSER plain half"));
}

static void test_broken_connections(void **state)
{
    struct world *w = *state;
    struct queue *other;
    OK(queue_open(&other, w->server.url, "test", QUEUE_NODE, NULL, e));
    submit(w, "a");
    for (int i = 0; i < 4; i++) {
        OK(redis_command(queue_redis(other), NULL, e, "CLIENT KILL TYPE normal SKIPME yes"));
        if (i == 0)
            assert_int_equal(admit(w).admitted, 1);
        else if (i == 1)
            assert_string_equal(state_of(w, "a"), "QUEUED");
        else if (i == 2)
            submit(w, "b");
        else
            claim(w, 1000);
    }
    queue_close(other);
    check_invariants(w);
}

// An admitter took entries and died.
static void test_dead_admitter(void **state)
{
    struct world *w = *state;
    submit(w, "a");
    admit(w);
    char entry[QUEUE_ENTRY_SIZE];
    submit_job(w, "default", new_job("b"), entry);
    freeReplyObject(command(w, "XREADGROUP GROUP admit dead STREAMS " PREFIX "in:default >"));
    assert_int_equal(admit(w).read, 0); // it may be alive
    freeReplyObject(command(w, "XCLAIM " PREFIX "in:default admit dead 0 %s IDLE 6000", entry));
    reopen(w);
    assert_int_equal(admit(w).admitted, 1);
    assert_string_equal(state_of(w, "b"), "QUEUED");
}

// An entry was delivered, and a failover lost the delivery but not the entry: it is there, undelivered. What the
// admitter that has it in hand does then must not take it out of the door.
static void test_delivery_lost_by_failover(void **state)
{
    struct world *w = *state;
    char entry[QUEUE_ENTRY_SIZE];
    admit(w); // opens the door
    submit_job(w, "default", new_job("a"), entry);
    freeReplyObject(command(w, "XREADGROUP GROUP admit slow STREAMS " PREFIX "in:default >"));
    freeReplyObject(command(w, "XGROUP DESTROY " PREFIX "in:default admit"));
    freeReplyObject(command(w, "XGROUP CREATE " PREFIX "in:default admit 0"));
    redisReply *reply = script(w,
                               (const char *[]){"admit", "default", entry, "a", "payload", "7", POOL, "normal", "1",
                                                "0", "0", "0", "", "", "", ""},
                               16);
    assert_string_equal(reply->element[0]->str, "gone");
    freeReplyObject(reply);
    assert_int_equal(admit(w).admitted, 1);
    assert_string_equal(state_of(w, "a"), "QUEUED");
    assert_int_equal(number(w, "XLEN " PREFIX "in:default"), 0);
    check_invariants(w);
}

static void test_outbox(void **state)
{
    struct world *w = *state;
    Ditfleet__V1__Job *job = new_job("a");
    OK(job_set_field(job, "callback_url", "https://example.org/done", e));
    submit_job(w, "default", job, NULL);
    submit(w, "b");
    admit(w);
    struct queue_fence f = claim(w, 60000);
    finish(w, &f);
    f = claim(w, 60000);
    finish(w, &f);
    redisReply *r = command(w, "XRANGE " PREFIX "outbox - +");
    assert_int_equal(r->elements, 1);
    assert_string_equal(r->element[0]->element[1]->element[9]->str, "https://example.org/done");
    freeReplyObject(r);
}

// A job of this tenant that is over, cancelled, and wants to be called back.
static void over(struct world *w, const char *tenant, const char *id)
{
    Ditfleet__V1__Job *job = new_job(id);
    OK(job_set_field(job, "callback_url", "https://example.org/done?key=hush#x", e));
    submit_job(w, tenant, job, NULL);
    admit(w);
    OK(queue_cancel(w->q, tenant, id, NULL, e));
}

// Takes up to max callbacks under a lease of lease_ms; the caller frees them.
static size_t take_callbacks(struct world *w, unsigned max, uint64_t lease_ms, struct queue_callback list[QUEUE_BATCH])
{
    const struct queue_callbacks_want want = {.max = max, .lease_ms = lease_ms, .max_of_tenant = 100};
    size_t count;
    uint64_t next_ms;
    OK(queue_callbacks(w->q, &want, list, &count, &next_ms, e));
    assert_true(next_ms <= 1000);
    return count;
}

static struct queue_callback take_callback(struct world *w, uint64_t lease_ms)
{
    struct queue_callback list[QUEUE_BATCH];
    assert_int_equal(take_callbacks(w, 1, lease_ms, list), 1);
    return list[0];
}

static void callback_is_due(struct world *w, const char *entry)
{
    freeReplyObject(command(w, "ZADD " PREFIX "outbox_due:default 1 %s", entry));
    freeReplyObject(command(w, "ZADD " PREFIX "outbox_ring 1 default"));
}

static void no_callbacks(struct world *w)
{
    struct queue_callback list[QUEUE_BATCH];
    assert_int_equal(take_callbacks(w, QUEUE_BATCH, 1000, list), 0);
}

static void outbox_is_empty(struct world *w)
{
    assert_int_equal(number(w, "XLEN " PREFIX "outbox"), 0);
    assert_int_equal(number(w, "EXISTS " PREFIX "outbox_ring " PREFIX "outbox_due:default " PREFIX
                               "outbox_tries " PREFIX "outbox_hold"),
                     0);
}

static void test_callback_is_made_once(void **state)
{
    struct world *w = *state;
    over(w, "default", "a");
    struct queue_callback c = take_callback(w, 60000);
    assert_string_equal(c.tenant, "default");
    assert_string_equal(c.id, "a");
    assert_string_equal(c.url, "https://example.org/done?key=hush#x");
    assert_int_equal(c.state, DITFLEET__V1__STATE__STATE_CANCELLED);
    assert_int_equal(c.tries, 1);
    assert_true(c.time_ms > 1700000000000);
    assert_int_equal(strlen(c.message), 44);
    Ditfleet__V1__Result *result;
    OK(result_unpack(c.result, c.result_length, &result, e));
    assert_string_equal(result->error->code, "cancelled");
    result_free(result);
    no_callbacks(w); // it is in hand
    OK(queue_callback_done(w->q, &c, e));
    FAILS(ERR_STALE, queue_callback_done(w->q, &c, e));
    FAILS(ERR_STALE, queue_callback_retry(w->q, &c, 0, true, e));
    no_callbacks(w);
    outbox_is_empty(w);
    queue_callback_free(&c);
}

// A holder that was not heard from has nothing more to say; the message keeps its id.
static void test_callback_is_taken_over(void **state)
{
    struct world *w = *state;
    over(w, "default", "a");
    struct queue_callback dead = take_callback(w, 1);
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    struct queue_callback c = take_callback(w, 60000);
    assert_int_equal(c.tries, 2);
    assert_string_equal(c.message, dead.message);
    const struct err why = {.code = ERR_UPLOAD, .text = "answered 410"};
    FAILS(ERR_STALE, queue_callback_done(w->q, &dead, e));
    FAILS(ERR_STALE, queue_callback_retry(w->q, &dead, 0, true, e));
    FAILS(ERR_STALE, queue_callback_dead(w->q, &dead, &why, "", e));
    assert_int_equal(number(w, "XLEN " PREFIX "outbox"), 1);
    OK(queue_callback_done(w->q, &c, e));
    outbox_is_empty(w);
    queue_callback_free(&dead);
    queue_callback_free(&c);
}

static void test_callback_is_tried_again(void **state)
{
    struct world *w = *state;
    over(w, "default", "a");
    OK(queue_set(w->q, "retention_ms", 1000, e));
    struct queue_callback c = take_callback(w, 60000);
    OK(queue_callback_retry(w->q, &c, 3600000 * 48ull, true, e));
    no_callbacks(w);
    assert_true(number(w, "PTTL " PREFIX "job:default:a") > 3600000 * 47LL); // the record outlives the wait
    callback_is_due(w, c.entry);
    queue_callback_free(&c);
    c = take_callback(w, 60000);
    assert_int_equal(c.tries, 2);
    const struct err why = {.code = ERR_UPLOAD, .text = "answered 410"};
    OK(queue_callback_dead(w->q, &c, &why, "https://example.org/done", e));
    outbox_is_empty(w);
    redisReply *r = command(w, "XREVRANGE " PREFIX "dlq + - COUNT 1");
    const char *const want[] = {"tenant", "default", "id",           "a",        "code",
                                "upload", "error",   "answered 410", "callback", "https://example.org/done"};
    assert_int_equal(r->element[0]->element[1]->elements, 10);
    for (size_t i = 0; i < 10; i++)
        assert_string_equal(r->element[0]->element[1]->element[i]->str, want[i]);
    freeReplyObject(r);
    assert_string_equal(state_of(w, "a"), "CANCELLED");
    assert_true(number(w, "PTTL " PREFIX "job:default:a") <= 1000); // nothing waits for it any more
    queue_callback_free(&c);
}

// What is given back was not tried. Said twice it counts once, and does not disturb whoever has it then.
static void test_callback_is_given_back(void **state)
{
    struct world *w = *state;
    OK(queue_set(w->q, "retention_ms", 1000, e));
    over(w, "default", "a");
    assert_true(number(w, "PTTL " PREFIX "job:default:a") > 80000000); // it may have to wait for its turn
    struct queue_callback first = take_callback(w, 60000);
    OK(queue_callback_retry(w->q, &first, 0, false, e));
    FAILS(ERR_STALE, queue_callback_retry(w->q, &first, 0, false, e));
    struct queue_callback c = take_callback(w, 60000);
    assert_int_equal(c.tries, 1);
    assert_true(c.hold > first.hold);
    FAILS(ERR_STALE, queue_callback_retry(w->q, &first, 0, false, e));
    FAILS(ERR_STALE, queue_callback_done(w->q, &first, e));
    no_callbacks(w);
    OK(queue_callback_done(w->q, &c, e));
    assert_true(number(w, "PTTL " PREFIX "job:default:a") <= 1000);
    outbox_is_empty(w);
    queue_callback_free(&first);
    queue_callback_free(&c);
}

static void add_tenants(struct world *w, const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        OK(queue_tenant_add(w->q, names[i], 1, e));
    reopen(w);
}

static void many_over(struct world *w, const char *tenant, int n)
{
    char id[16];
    for (int i = 0; i < n; i++) {
        snprintf(id, sizeof id, "j%d", i);
        over(w, tenant, id);
    }
}

// Takes callbacks as a node does; whose they are, in order. Returns how soon to ask again.
static uint64_t turns(struct world *w, const struct queue_callbacks_want *want, const char *const *tenants, size_t n)
{
    struct queue_callback list[QUEUE_BATCH];
    size_t count;
    uint64_t next_ms;
    OK(queue_callbacks(w->q, want, list, &count, &next_ms, e));
    assert_int_equal(count, n);
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(list[i].tenant, tenants[i]);
        queue_callback_free(&list[i]);
    }
    return next_ms;
}

// A tenant whose receivers hang does not keep others waiting, and has no more than its share.
static void test_callbacks_are_shared_among_tenants(void **state)
{
    struct world *w = *state;
    add_tenants(w, (const char *[]){"acme"}, 1);
    many_over(w, "default", QUEUE_BATCH);
    over(w, "acme", "b");
    const char *const tenants[] = {"default"};
    const unsigned hand[] = {3};
    struct queue_callbacks_want want = {
        .max = 8, .lease_ms = 60000, .max_of_tenant = 5, .in_hand = tenants, .n_of_tenant = hand, .n_in_hand = 1};
    turns(w, &want, (const char *[]){"acme", "default", "default"}, 3);
    want.max_of_tenant = 3;
    assert_true(turns(w, &want, NULL, 0) >= 250); // what may not be taken is not asked for all the time
    assert_int_equal(number(w, "XLEN " PREFIX "outbox"), QUEUE_BATCH + 1);
}

// Several tenants whose receivers hang do not take each place that becomes free from those that have none.
static void test_callbacks_of_who_has_the_fewest(void **state)
{
    struct world *w = *state;
    const char *const tenants[] = {"a", "b", "c"};
    add_tenants(w, tenants, 3);
    many_over(w, "a", 40);
    many_over(w, "b", 40);
    over(w, "c", "late");
    const unsigned full[] = {8, 8}, freed[] = {7, 8}, fewer[] = {7, 5};
    struct queue_callbacks_want want = {
        .max = 1, .lease_ms = 60000, .max_of_tenant = 8, .in_hand = tenants, .n_of_tenant = full, .n_in_hand = 2};
    struct queue_callbacks_want also = want;
    also.n_of_tenant = freed;
    turns(w, &also, (const char *[]){"c"}, 1);
    over(w, "c", "later");
    turns(w, &want, (const char *[]){"c"}, 1);
    turns(w, &also, (const char *[]){"a"}, 1);
    also.n_of_tenant = fewer;
    also.max = 3;
    turns(w, &also, (const char *[]){"b", "b", "b"}, 3);
    also.n_in_hand = 0;
    also.max = 4;
    over(w, "c", "last");
    turns(w, &also, (const char *[]){"a", "b", "c", "a"}, 4);
}

// More tenants than one call looks at: each has its turn before any has its second.
static void test_callbacks_of_many_tenants(void **state)
{
    enum { TENANTS = QUEUE_BATCH + 8 };
    struct world *w = *state;
    char names[TENANTS][8];
    const char *list[TENANTS];
    for (int i = 0; i < TENANTS; i++) {
        snprintf(names[i], sizeof names[i], "t%02d", i);
        list[i] = names[i];
    }
    add_tenants(w, list, TENANTS);
    for (int i = 0; i < TENANTS; i++)
        many_over(w, list[i], 2);
    const struct queue_callbacks_want want = {.max = 8, .lease_ms = 60000, .max_of_tenant = 8};
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < TENANTS; i += 8) {
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL); // turns are told apart by milliseconds
            turns(w, &want, list + i, 8);
        }
    no_callbacks(w);
}

// What one tenant's dead receiver leaves waiting is no other tenant's loss.
static void test_outbox_of_each_tenant(void **state)
{
    struct world *w = *state;
    add_tenants(w, (const char *[]){"acme"}, 1);
    OK(queue_set(w->q, "outbox_max", 2, e));
    many_over(w, "default", 3);
    many_over(w, "acme", 2);
    assert_int_equal(number(w, "ZCARD " PREFIX "outbox_due:default"), 2);
    assert_int_equal(number(w, "ZCARD " PREFIX "outbox_due:acme"), 2);
    struct queue_callback c = take_callback(w, 60000);
    OK(queue_callback_done(w->q, &c, e));
    over(w, c.tenant, "more"); // there is room again
    assert_int_equal(number(w, "XLEN " PREFIX "outbox"), 4);
    queue_callback_free(&c);
}

// Nothing is dropped without a word: neither where the outbox is full nor where the record did not wait.
static void test_callbacks_that_cannot_be_made(void **state)
{
    struct world *w = *state;
    OK(queue_set(w->q, "outbox_max", 1, e));
    over(w, "default", "a");
    over(w, "default", "b");
    assert_int_equal(number(w, "XLEN " PREFIX "outbox"), 1);
    redisReply *r = command(w, "XRANGE " PREFIX "dlq - +");
    const redisReply *fields = r->element[r->elements - 1]->element[1];
    assert_string_equal(fields->element[3]->str, "b");
    assert_non_null(strstr(fields->element[7]->str, "outbox_max"));
    assert_string_equal(fields->element[9]->str, "https://example.org/done");
    freeReplyObject(r);
    freeReplyObject(command(w, "DEL " PREFIX "job:default:a"));
    submit(w, "a"); // another job of the same name
    admit(w);
    no_callbacks(w);
    outbox_is_empty(w);
    r = command(w, "XREVRANGE " PREFIX "dlq + - COUNT 1");
    assert_string_equal(r->element[0]->element[1]->element[3]->str, "a");
    assert_string_equal(r->element[0]->element[1]->element[5]->str, "not_found");
    freeReplyObject(r);
    assert_string_equal(state_of(w, "a"), "QUEUED");
}

static void refused_callback(void *arg, const char *tenant, const char *id, const char *entry, const struct err *why)
{
    (void)tenant, (void)entry;
    assert_string_equal(id, "a");
    assert_int_equal(why->code, ERR_REFUSED);
    assert_non_null(strstr(why->text, "[callback] secret_file"));
    ++*(int *)arg;
}

static void test_callbacks_are_off(void **state)
{
    struct world *w = *state;
    int refusals = 0;
    const struct queue_admission admission = {.consumer = "node1", .on_refusal = refused_callback, .arg = &refusals};
    struct queue_admitted out;
    Ditfleet__V1__Job *job = new_job("a");
    OK(job_set_field(job, "callback_url", "https://example.org/done", e));
    submit_job(w, "default", job, NULL);
    submit(w, "b");
    OK(queue_admit(w->q, &admission, 0, &out, e));
    assert_int_equal(out.admitted, 1);
    assert_int_equal(out.refused, 1);
    assert_int_equal(refusals, 1);
    assert_string_equal(state_of(w, "a"), "DEAD");
    outbox_is_empty(w);
}

static void test_access_of_a_tenant(void **state)
{
    struct world *w = *state;
    char line[QUEUE_ACL_SIZE], url[200], *at;
    OK(queue_tenant_add(w->q, "acme", 1, e));
    OK(queue_acl(w->q, QUEUE_USER_PRODUCER, "acme", "acme", line, e));
    // What a shell would do with the line: strip the quotes.
    for (at = line; *at; at++)
        if (*at == '\'')
            memmove(at, at + 1, strlen(at)), at--;
    freeReplyObject(command(w, "%s", line));
    snprintf(url, sizeof url, "unix://%s", w->server.socket);
    struct queue *acme;
    OK(queue_open(&acme, url, "test", QUEUE_PRODUCER, NULL, e));
    OK(redis_command(queue_redis(acme), NULL, e, "AUTH acme PASSWORD"));
    char entry[QUEUE_ENTRY_SIZE];
    void *bytes;
    size_t length;
    Ditfleet__V1__Job *job = new_job("mine");
    OK(job_pack(job, &bytes, &length, e));
    job_free(job);
    OK(queue_submit(acme, "acme", bytes, length, entry, e));
    FAILS(ERR_REFUSED, queue_submit(acme, "default", bytes, length, entry, e));
    FAILS(ERR_REFUSED, queue_cancel(acme, "acme", "mine", NULL, e));
    free(bytes);
    reopen(w);
    assert_int_equal(admit(w).admitted, 1);
    Ditfleet__V1__Result *result;
    OK(queue_cancel(w->q, "acme", "mine", NULL, e));
    OK(queue_await(acme, "acme", "mine", entry, 1000, NULL, NULL, &result, e));
    assert_int_equal(result->state, DITFLEET__V1__STATE__STATE_CANCELLED);
    result_free(result);
    struct queue_record r;
    OK(queue_get(acme, "acme", "mine", &r, e));
    queue_record_free(&r);
    FAILS(ERR_REFUSED, queue_get(acme, "default", "mine", &r, e));
    queue_close(acme);
    freeReplyObject(command(w, "ACL DELUSER acme"));
}

// What the script calls, those who run it may call.
static void test_access_of_the_script(void **state)
{
    struct world *w = *state;
    char worker[QUEUE_ACL_SIZE], operator[QUEUE_ACL_SIZE], *text = NULL;
    size_t size = 0, calls = 0;
    FILE *file = fopen("proto/queue.lua", "r");
    assert_non_null(file);
    assert_true(getdelim(&text, &size, 0, file) > 0);
    fclose(file);
    OK(queue_acl(w->q, QUEUE_USER_WORKER, "worker", NULL, worker, e));
    OK(queue_acl(w->q, QUEUE_USER_OPERATOR, "operator", NULL, operator, e));
    for (const char *at = text; (at = strstr(at, "call('")) != NULL; calls++) {
        at += 6;
        char right[40];
        int n = snprintf(right, sizeof right, "+%.*s", (int)strcspn(at, "'"), at);
        for (int i = 0; i < n; i++)
            right[i] = (char)tolower((unsigned char)right[i]);
        if (!strstr(worker, right) || !strstr(operator, right))
            fail_msg("queue.lua calls %s, which no line of access control grants", right + 1);
    }
    assert_true(calls > 100);
    free(text);
}

static void test_server_checks(void **state)
{
    struct world *w = *state;
    struct queue *q;
    freeReplyObject(command(w, "CONFIG SET maxmemory-policy allkeys-lru"));
    FAILS(ERR_REFUSED, queue_open(&q, w->server.url, "test", QUEUE_NODE, NULL, e));
    assert_null(q);
    freeReplyObject(command(w, "CONFIG SET maxmemory-policy noeviction"));
    FAILS(ERR_INVALID, queue_open(&q, w->server.url, "a b", QUEUE_NODE, NULL, e));
    FAILS(ERR_UNAVAILABLE, queue_open(&q, "unix:///tmp/ditfleet-no-such-socket", "test", QUEUE_NODE, NULL, e));
    // Out of memory: refused in words, nothing half-written, fine again afterwards.
    freeReplyObject(command(w, "CONFIG SET maxmemory 1"));
    char entry[QUEUE_ENTRY_SIZE];
    FAILS(ERR_NO_MEMORY, queue_submit(w->q, "default", "x", 1, entry, e));
    freeReplyObject(command(w, "CONFIG SET maxmemory 0"));
    check_invariants(w);
}

static void wait_for_failed_save(struct world *w)
{
    bool failed = false;
    for (int i = 0; i < 1000 && !failed; i++) {
        redisReply *info = command(w, "INFO persistence");
        failed = strstr(info->str, "rdb_last_bgsave_status:err") != NULL;
        freeReplyObject(info);
        usleep(failed ? 0 : 10000);
    }
    assert_true(failed);
}

// Each way in which a server refuses to write, in the middle of work: the reason is told, nothing is half-written, a
// job in hand is not lost, and all goes on when it is over.
static void refuses_to_write(struct world *w, enum err_code code, const char *trouble)
{
    struct queue_admission admission = {.consumer = "node1"};
    struct queue_admitted out;
    struct queue_reaped reaped;
    struct queue_job job;
    struct err why;
    char entry[QUEUE_ENTRY_SIZE];
    size_t n;
    static const char *const pools[] = {POOL};
    const struct queue_claim want = {"w1", "i1", pools, 1, 60000, 1};
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    void *bytes;
    size_t length;
    OK(result_pack(&result, &bytes, &length, e));
    struct queue_fence f = claim(w, 60000);
    freeReplyObject(command(w, "%s", trouble));
    if (code == ERR_IO)
        wait_for_failed_save(w);
    FAILS(code, queue_submit(w->q, "default", "x", 1, entry, e));
    if (code == ERR_NO_MEMORY) { // what is in the queue goes on
        OK(queue_finish(w->q, &f, bytes, length, e));
        OK(queue_reap(w->q, &reaped, e));
    } else {
        FAILS(code, queue_reap(w->q, &reaped, e));
        FAILS(code, queue_finish(w->q, &f, bytes, length, e));
        FAILS(code, queue_beat(w->q, &f, 60000, e));
        FAILS(code, queue_claim(w->q, &want, &job, &n, entry, e));
        FAILS(code, queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_error, NULL, e));
        int rc = queue_admit(w->q, &admission, 0, &out, &why);
        assert_true(rc == (int)code || (rc == 0 && out.admitted == 0));
    }
    free(bytes);
}

static void goes_on(struct world *w)
{
    check_invariants(w);
    reopen(w);
    admit(w);
    for (struct queue_job job; claim_as(w, "w1", "i2", 1, 60000, &job) == 1; queue_job_free(&job))
        finish(w, &job.fence);
    OK(queue_release_all(w->q, "w1", "i1", &gpu_fault, NULL, e));
    for (struct queue_job job; claim_as(w, "w1", "i2", 1, 60000, &job) == 1; queue_job_free(&job))
        finish(w, &job.fence);
    assert_string_equal(state_of(w, "a"), "SUCCEEDED");
    assert_string_equal(state_of(w, "b"), "SUCCEEDED");
    check_invariants(w);
}

static void two_jobs(struct world *w)
{
    submit(w, "a");
    submit(w, "b");
    admit(w);
}

static void test_replica_in_between(void **state)
{
    struct world *w = *state;
    struct queue_stats stats;
    two_jobs(w);
    freeReplyObject(command(w, "REPLICAOF 127.0.0.1 1"));
    OK(queue_stats(w->q, &stats, e)); // figures can be read all the same
    assert_int_equal(stats.queued, 2);
    freeReplyObject(command(w, "REPLICAOF NO ONE"));
    refuses_to_write(w, ERR_UNAVAILABLE, "REPLICAOF 127.0.0.1 1");
    freeReplyObject(command(w, "REPLICAOF NO ONE"));
    goes_on(w);
}

static void test_no_memory_in_between(void **state)
{
    struct world *w = *state;
    two_jobs(w);
    refuses_to_write(w, ERR_NO_MEMORY, "CONFIG SET maxmemory 1");
    freeReplyObject(command(w, "CONFIG SET maxmemory 0"));
    goes_on(w);
}

// Redis could not save, and takes no writes until it can.
static void test_no_disk_in_between(void **state)
{
    struct world *w = *state;
    char in_the_way[120];
    two_jobs(w);
    snprintf(in_the_way, sizeof in_the_way, "%s/dump.rdb", w->server.folder);
    assert_int_equal(mkdir(in_the_way, 0700), 0);
    OK(redis_command(queue_redis(w->q), NULL, e, "CONFIG SET save %s", "3600 1000000"));
    refuses_to_write(w, ERR_IO, "BGSAVE");
    assert_int_equal(rmdir(in_the_way), 0);
    OK(redis_command(queue_redis(w->q), NULL, e, "CONFIG SET save %s", ""));
    goes_on(w);
}

// One submission to a server that says these lines, and its receipt.
static int receipt_of(const char *const *lines, size_t n, unsigned replicas, struct queue_receipt *r, bool *confirmed)
{
    char url[64], entry[QUEUE_ENTRY_SIZE];
    const char *all[8] = {"-NOPERM this user has no permissions\r\n", "$15\r\n1700000000000-0\r\n"};
    struct queue *q;
    struct err why;
    memcpy(all + 2, lines, n * sizeof *lines);
    pid_t peer = serve_lines(all, n + 2, url);
    OK(queue_open(&q, url, "test", QUEUE_PRODUCER, NULL, e));
    OK(queue_submit(q, "default", "x", 1, entry, e));
    int rc = queue_receipt(q, replicas, 100, r, confirmed, &why);
    queue_close(q);
    kill(peer, SIGKILL);
    waitpid(peer, NULL, 0);
    return rc;
}
#define RECEIPT(replicas, r, confirmed, ...)                                                                           \
    receipt_of((const char *const[]){__VA_ARGS__}, sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *),        \
               replicas, r, confirmed)

static void test_receipts(void **state)
{
    struct world *w = *state;
    static const char unknown[] = "-ERR unknown command 'WAITAOF', with args beginning with: '1'\r\n",
                      no_file[] = "-ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled.\r\n",
                      both[] = "*2\r\n:1\r\n:2\r\n", none[] = "*2\r\n:0\r\n:0\r\n";
    struct queue_receipt r;
    bool confirmed;
    assert_int_equal(RECEIPT(2, &r, &confirmed, both), 0);
    assert_true(confirmed && r.on_disk && r.local == 1 && r.replicas == 2);
    assert_int_equal(RECEIPT(3, &r, &confirmed, both), 0);
    assert_true(!confirmed && r.replicas == 2);
    assert_int_equal(RECEIPT(0, &r, &confirmed, none), 0);
    assert_true(!confirmed && r.on_disk && r.local == 0);
    assert_int_equal(RECEIPT(1, &r, &confirmed, no_file, "*2\r\n:0\r\n:1\r\n"), 0);
    assert_true(!confirmed && r.on_disk && r.local == 0 && r.replicas == 1);
    assert_int_equal(RECEIPT(1, &r, &confirmed, unknown, ":1\r\n"), 0);
    assert_true(confirmed && !r.on_disk && r.local == 0 && r.replicas == 1);
    assert_int_equal(RECEIPT(0, &r, &confirmed, unknown, ":0\r\n"), 0);
    assert_false(confirmed); // in one server's memory
    assert_int_equal(RECEIPT(1, &r, &confirmed, "-NOPERM no\r\n", ":0\r\n"), 0);
    assert_false(confirmed || r.on_disk);
    assert_int_equal(RECEIPT(1, &r, &confirmed, "-READONLY no\r\n", both), ERR_UNAVAILABLE);
    // Another connection knows nothing of the submission, whatever it answers.
    assert_int_equal(RECEIPT(1, &r, &confirmed, "", both), ERR_UNAVAILABLE);
    assert_int_equal(RECEIPT(1, &r, &confirmed, unknown, "", ":5\r\n"), ERR_UNAVAILABLE);
    assert_false(confirmed);
    // This server has no replicas.
    submit(w, "a");
    OK(queue_receipt(w->q, 1, 50, &r, &confirmed, e));
    assert_false(confirmed || r.replicas);
    redis_disconnect(queue_redis(w->q));
    FAILS(ERR_UNAVAILABLE, queue_receipt(w->q, 0, 50, &r, &confirmed, e));
}

static void test_await_waits(void **state)
{
    struct world *w = *state;
    Ditfleet__V1__Result *result;
    char entry[QUEUE_ENTRY_SIZE];
    submit_job(w, "default", new_job("a"), entry);
    FAILS(ERR_TIMEOUT, queue_await(w->q, "default", "a", entry, 30, NULL, NULL, &result, e));
    pid_t child = fork();
    if (child == 0) { // the fleet, a moment later
        struct world mine = *w;
        struct err err;
        usleep(50000);
        if (queue_open(&mine.q, w->server.url, "test", QUEUE_NODE, NULL, &err) != 0)
            _exit(1);
        admit(&mine);
        struct queue_fence f = claim(&mine, 10000);
        finish(&mine, &f);
        _exit(0);
    }
    char trail[400] = "";
    OK(queue_await(w->q, "default", "a", entry, 5000, on_event, trail, &result, e));
    assert_int_equal(result->state, DITFLEET__V1__STATE__STATE_SUCCEEDED);
    assert_string_equal(trail, "LEASED//0/1 SUCCEEDED//0/1 ");
    result_free(result);
    waitpid(child, NULL, 0);
}

// The pool's numbers now.
static struct queue_pool look(struct world *w, const char *name)
{
    struct queue_pool *pools, found = {0};
    size_t n;
    OK(queue_pools(w->q, &pools, &n, e));
    for (size_t i = 0; i < n; i++)
        if (strcmp(pools[i].name, name) == 0)
            found = pools[i];
    free(pools);
    return found;
}

#define POOL_IS(p, queued_, delayed_, working_, queued_ms_, delayed_ms_, working_ms_)                                  \
    do {                                                                                                               \
        const struct queue_pool p_ = (p);                                                                              \
        assert_int_equal(p_.queued, queued_);                                                                          \
        assert_int_equal(p_.delayed, delayed_);                                                                        \
        assert_int_equal(p_.working, working_);                                                                        \
        assert_int_equal(p_.queued_ms, queued_ms_);                                                                    \
        assert_int_equal(p_.delayed_ms, delayed_ms_);                                                                  \
        assert_int_equal(p_.working_ms, working_ms_);                                                                  \
    } while (0)

// A job through every move there is: its pool's numbers follow, and end at nothing.
static void test_pools_follow_every_move(void **state)
{
    struct world *w = *state;
    OK(queue_model_publish(w->q, "other", "2", e));
    reopen(w);
    OK(queue_set(w->q, "backoff_ms", 1000000, e));
    OK(queue_set(w->q, "backoff_cap_ms", 1000000, e));
    POOL_IS(look(w, POOL), 0, 0, 0, 0, 0, 0);
    admit_priced(w, new_job("a"), 700);
    Ditfleet__V1__Job *job = new_job("b");
    OK(job_set_field(job, "model", "other@2", e));
    admit_priced(w, job, 50);
    admit_priced(w, new_job("free"), 0);
    POOL_IS(look(w, POOL), 2, 0, 0, 700, 0, 0);
    POOL_IS(look(w, "other@2"), 1, 0, 0, 50, 0, 0);
    struct queue_fence a = claim(w, 60000);
    assert_string_equal(a.id, "a");
    POOL_IS(look(w, POOL), 1, 0, 1, 0, 0, 700);
    struct queue_progress p = {DITFLEET__V1__STATE__STATE_RUNNING, "denoise", 1, 2, 0};
    OK(queue_progress(w->q, &a, &p, e)); // from one state of work to another: nothing moves
    POOL_IS(look(w, POOL), 1, 0, 1, 0, 0, 700);
    OK(queue_release(w->q, &a, e));
    OK(queue_release(w->q, &a, e)); // repeated: counted once
    POOL_IS(look(w, POOL), 2, 0, 0, 700, 0, 0);
    a = claim(w, 60000);
    OK(queue_fail(w->q, &a, QUEUE_CAUSE_APP, &app_error, NULL, e));
    POOL_IS(look(w, POOL), 1, 1, 0, 0, 700, 0);
    OK(queue_cancel(w->q, "default", "a", NULL, e));
    OK(queue_cancel(w->q, "default", "free", NULL, e));
    OK(queue_cancel(w->q, "default", "free", NULL, e));
    POOL_IS(look(w, POOL), 0, 0, 0, 0, 0, 0);
    struct queue_fence b = claim(w, 1);
    POOL_IS(look(w, "other@2"), 0, 0, 1, 0, 0, 50);
    usleep(5000);
    assert_int_equal(reap(w).lost, 1);
    POOL_IS(look(w, "other@2"), 1, 0, 0, 50, 0, 0);
    OK(queue_model_withdraw(w->q, "other", "2", e)); // its jobs are seen none the less
    POOL_IS(look(w, "other@2"), 1, 0, 0, 50, 0, 0);
    b = claim(w, 60000);
    finish(w, &b);
    struct queue_pool *pools;
    size_t n;
    OK(queue_pools(w->q, &pools, &n, e));
    assert_int_equal(n, 1); // a pool with neither jobs nor models is gone
    assert_string_equal(pools->name, POOL);
    free(pools);
    check_invariants(w);
}

// Jobs that were let in before pools were counted leave no debt.
static void test_pools_of_uncounted_jobs(void **state)
{
    struct world *w = *state;
    admit_priced(w, new_job("old"), 100);
    admit_priced(w, new_job("older"), 100);
    freeReplyObject(command(w, "DEL " PREFIX "stats"));
    struct queue_fence a = claim(w, 60000), b = claim(w, 60000);
    POOL_IS(look(w, POOL), 0, 0, 2, 0, 0, 200);
    admit_priced(w, new_job("new"), 70);
    POOL_IS(look(w, POOL), 1, 0, 2, 70, 0, 200);
    finish(w, &a);
    finish(w, &b);
    POOL_IS(look(w, POOL), 1, 0, 0, 70, 0, 0);
}

// The age counts from admission, through a retry too; from not_before_ms where there was one.
static void test_age_of_the_oldest(void **state)
{
    struct world *w = *state;
    struct queue_pool pool;
    OK(queue_set(w->q, "backoff_ms", 0, e));
    submit(w, "a");
    admit(w);
    usleep(120000);
    submit(w, "young");
    OK(queue_tenant_add(w->q, "other", 1, e));
    submit_job(w, "other", new_job("young"), NULL);
    reopen(w);
    admit(w);
    pool = look(w, POOL);
    assert_int_equal(pool.queued, 3);
    assert_in_range(pool.oldest_ms, 120, 5000);
    struct queue_fence a = claim(w, 60000);
    assert_string_equal(a.id, "a");
    assert_in_range(look(w, POOL).oldest_ms, 0, 110);
    OK(queue_fail(w->q, &a, QUEUE_CAUSE_INFRA, &gpu_fault, NULL, e));
    assert_in_range(look(w, POOL).oldest_ms, 120, 5000);
    OK(queue_cancel(w->q, "default", "a", NULL, e));
    OK(queue_cancel(w->q, "default", "young", NULL, e));
    OK(queue_cancel(w->q, "other", "young", NULL, e));
    assert_int_equal(look(w, POOL).oldest_ms, 0);
    redisReply *t = command(w, "TIME");
    Ditfleet__V1__Job *job = new_job("later");
    job->not_before_ms =
        strtoull(t->element[0]->str, NULL, 10) * 1000 + strtoull(t->element[1]->str, NULL, 10) / 1000 + 300;
    freeReplyObject(t);
    submit_job(w, "default", job, NULL);
    admit(w);
    pool = look(w, POOL);
    assert_int_equal(pool.delayed, 1);
    assert_int_equal(pool.oldest_ms, 0);
    usleep(310000);
    assert_int_equal(reap(w).due, 1);
    pool = look(w, POOL);
    assert_int_equal(pool.queued, 1);
    assert_in_range(pool.oldest_ms, 0, 290); // the 300 it was told to wait are not counted
}

// A thousand jobs of two tenants and all classes; every number at every tenth, and nothing left at the end.
static void test_pools_of_a_thousand_jobs(void **state)
{
    struct world *w = *state;
    struct queue_job jobs[QUEUE_BATCH];
    uint64_t price = 3, done = 0;
    struct queue_admission admission = {.consumer = "node1", .price = flat_price, .arg = &price};
    struct queue_admitted out;
    OK(queue_tenant_add(w->q, "second", 2, e));
    reopen(w);
    for (int i = 0; i < 1000; i++) {
        char id[16];
        snprintf(id, sizeof id, "n%d", i);
        Ditfleet__V1__Job *job = new_job(id);
        job->priority = (Ditfleet__V1__Priority)(i % 3);
        submit_job(w, i % 2 ? "second" : "default", job, NULL);
    }
    do
        OK(queue_admit(w->q, &admission, 0, &out, e));
    while (out.read > 0);
    POOL_IS(look(w, POOL), 1000, 0, 0, 3000, 0, 0);
    for (size_t n; (n = claim_as(w, "w1", "i1", 25, 60000, jobs)) > 0; done += n) {
        const uint64_t left = 1000 - done;
        POOL_IS(look(w, POOL), left - n, 0, n, 3 * (left - n), 0, 3 * n);
        for (size_t i = 0; i < n; i++) {
            finish(w, &jobs[i].fence);
            queue_job_free(&jobs[i]);
        }
        POOL_IS(look(w, POOL), left - n, 0, 0, 3 * (left - n), 0, 0);
    }
    assert_int_equal(done, 1000);
    struct queue_stats stats;
    OK(queue_stats(w->q, &stats, e));
    assert_int_equal(stats.succeeded, 1000);
    assert_int_equal(stats.backlog_ms, 0);
    check_invariants(w);
}

// Random moves by several workers, with a fixed seed; the invariants hold after every few, and everything ends.
static void test_random_moves(void **state)
{
    struct world *w = *state;
    struct queue_fence held[64];
    size_t n_held = 0;
    int submitted = 0;
    uint64_t seed = 42;
    OK(queue_set(w->q, "backoff_ms", 1, e));
    for (int i = 0; i < 2500; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        unsigned what = (unsigned)(seed >> 33) % 16, pick = (unsigned)(seed >> 40);
        struct queue_fence *f = n_held ? &held[pick % n_held] : NULL;
        struct queue_job job;
        struct err ignored;
        char id[16];
        snprintf(id, sizeof id, "r%d", what < 3 ? submitted++ : (int)(pick % (unsigned)(submitted + 1)));
        if (what < 3) {
            Ditfleet__V1__Job *j = new_job(id);
            j->priority = (Ditfleet__V1__Priority)(pick % 3);
            submit_job(w, "default", j, NULL);
        } else if (what < 5) {
            admit(w);
        } else if (what < 9 && n_held < 64 && claim_as(w, pick % 2 ? "w1" : "w2", "i", 1, pick % 3 ? 60000 : 1, &job)) {
            held[n_held++] = job.fence;
            queue_job_free(&job);
        } else if (what == 9) {
            reap(w);
        } else if (what == 10) {
            (void)queue_cancel(w->q, "default", id, NULL, &ignored);
        } else if (what == 11 && pick % 8 == 0) {
            OK(queue_release_all(w->q, pick % 2 ? "w1" : "w2", NULL, &gpu_fault, NULL, e));
        } else if (f && what > 11) {
            struct queue_progress p = {DITFLEET__V1__STATE__STATE_UPLOADING, "upload", 1, 2, 0};
            int rc = what == 12   ? queue_progress(w->q, f, &p, &ignored)
                     : what == 13 ? queue_release(w->q, f, &ignored)
                     : what == 14 ? queue_fail(w->q, f, pick % 2 ? QUEUE_CAUSE_APP : QUEUE_CAUSE_INFRA, &app_error,
                                               NULL, &ignored)
                                  : queue_finish(w->q, f, "x", 1, &ignored);
            assert_true(rc == 0 || rc == ERR_STALE || rc == ERR_CANCELLED);
            if (what > 12)
                *f = held[--n_held];
        }
        if (i % 100 == 99)
            check_invariants(w);
    }
    for (int round = 0; number(w, "ZCARD " PREFIX "live") > 0 && round < 5000; round++) {
        struct queue_job job;
        admit(w);
        reap(w);
        OK(queue_release_all(w->q, round % 2 ? "w1" : "w2", "i", &gpu_fault, NULL, e));
        if (claim_as(w, "w3", "i", 1, 60000, &job)) {
            finish(w, &job.fence);
            queue_job_free(&job);
        } else {
            usleep(1000);
        }
    }
    assert_int_equal(number(w, "ZCARD " PREFIX "live"), 0);
    assert_int_equal(
        number(w, "EXISTS " PREFIX "lease " PREFIX "delayed " PREFIX "held:w1 " PREFIX "held:w2 " PREFIX "held:w3"), 0);
    check_invariants(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_whole_path),
        TEST(test_same_id),
        TEST(test_refusals),
        TEST(test_fuzzed_entries),
        TEST(test_registry_of_models),
        TEST(test_stale_fence_writes_nothing),
        TEST(test_cancel),
        TEST(test_own_errors_run_out),
        TEST(test_fleet_faults_do_not_count),
        TEST(test_release),
        TEST(test_dead_worker),
        TEST(test_poison),
        TEST(test_poison_alone),
        TEST(test_crash_spares_the_upload),
        TEST(test_orphans_are_found),
        TEST(test_times),
        TEST(test_classes_and_fairness),
        TEST(test_batch_claim),
        TEST(test_repeated_claim),
        TEST(test_no_wake_is_missed),
        TEST(test_functions_where_they_may_be),
        TEST(test_server_lost_its_data),
        TEST(test_broken_connections),
        TEST(test_dead_admitter),
        TEST(test_delivery_lost_by_failover),
        TEST(test_outbox),
        TEST(test_callback_is_made_once),
        TEST(test_callback_is_taken_over),
        TEST(test_callback_is_tried_again),
        TEST(test_callback_is_given_back),
        TEST(test_callbacks_are_shared_among_tenants),
        TEST(test_callbacks_of_who_has_the_fewest),
        TEST(test_callbacks_of_many_tenants),
        TEST(test_outbox_of_each_tenant),
        TEST(test_callbacks_that_cannot_be_made),
        TEST(test_callbacks_are_off),
        TEST(test_access_of_a_tenant),
        TEST(test_access_of_the_script),
        TEST(test_server_checks),
        TEST(test_replica_in_between),
        TEST(test_no_memory_in_between),
        TEST(test_no_disk_in_between),
        TEST(test_receipts),
        TEST(test_await_waits),
        TEST(test_pools_follow_every_move),
        TEST(test_pools_of_uncounted_jobs),
        TEST(test_age_of_the_oldest),
        TEST(test_pools_of_a_thousand_jobs),
        TEST(test_random_moves),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
