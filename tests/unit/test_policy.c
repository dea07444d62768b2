// test_policy.c: who may have how much of the fleet: rates, limits of work in the queue, deadlines, classes.
#include "queue_world.h"

#include <math.h>

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct offer {
    uint64_t gpu_ms; // the price
    struct err why;  // it was refused
};

static uint64_t offered_price(void *arg, const Ditfleet__V1__Job *job)
{
    (void)job;
    return ((struct offer *)arg)->gpu_ms;
}

static void on_refusal(void *arg, const char *tenant, const char *id, const char *entry, const struct err *why)
{
    (void)tenant, (void)id, (void)entry;
    ((struct offer *)arg)->why = *why;
}

// Submits and admits one job; the answer says why not.
static struct err offer(struct world *w, const char *tenant, Ditfleet__V1__Job *job, uint64_t gpu_ms)
{
    struct offer o = {.gpu_ms = gpu_ms};
    const struct queue_admission admission = {
        .consumer = "node1", .price = offered_price, .on_refusal = on_refusal, .arg = &o};
    struct queue_admitted out;
    submit_job(w, tenant, job, NULL);
    OK(queue_admit(w->q, &admission, 0, &out, e));
    assert_int_equal(out.admitted + out.refused, 1);
    return o.why;
}

static void offer_many(struct world *w, const char *tenant, const char *name, Ditfleet__V1__Priority priority, int n,
                       uint64_t gpu_ms)
{
    for (int i = 0; i < n; i++) {
        char id[32];
        snprintf(id, sizeof id, "%s%d", name, i);
        Ditfleet__V1__Job *job = new_job(id);
        job->priority = priority;
        assert_int_equal(offer(w, tenant, job, gpu_ms).code, ERR_NONE);
    }
}

static void limit(struct world *w, const char *tenant, double rate, double burst_s, double max_queued_s)
{
    OK(queue_tenant_limit(w->q, tenant, &(struct queue_limits){1, rate, burst_s, max_queued_s}, e));
    reopen(w);
}

// The first letter of the id of the job that is claimed next, and '-' when there is none.
static char next_job(struct world *w)
{
    struct queue_job job;
    if (claim_as(w, "w", "i", 1, 60000, &job) == 0)
        return '-';
    char first = job.fence.id[0];
    finish(w, &job.fence);
    queue_job_free(&job);
    return first;
}

static void test_rate_delays(void **state)
{
    struct world *w = *state;
    const Ditfleet__V1__Priority normal = DITFLEET__V1__PRIORITY__PRIORITY_NORMAL;
    limit(w, "acme", 20, 5, 0);
    OK(queue_set(w->q, "check_ms", 1, e));
    offer_many(w, "acme", "a", normal, 60, 1000);
    offer_many(w, "default", "d", normal, 20, 1000);
    int acme = 0, others = 0;
    const double began = seconds();
    for (char c; (c = next_job(w)) != '-';) // five at once, and nobody else waits for the rest
        c == 'a' ? acme++ : others++;
    assert_int_equal(others, 20);
    assert_in_range(acme, 5, 7 + (int)(20 * (seconds() - began)));
    check_invariants(w);
    // What waits for its rate is no orphan, and the reaper comes when it is over.
    struct queue_reaped reaped = reap(w);
    assert_int_equal(reaped.orphans, 0);
    if (number(w, "ZCARD " PREFIX "limited") > 0) // it is not over already
        assert_in_range(reaped.next_ms, 0, 60);
    while (acme < 20) {
        assert_true(seconds() - began < 20); // which at this rate takes 0.7 s
        reap(w);
        acme += next_job(w) == 'a';
        assert_in_range(acme, 5, 7 + (int)(20 * (seconds() - began)));
        usleep(2000);
    }
    // Without the rate the rest comes at once.
    limit(w, "acme", 0, -1, -1);
    for (acme = 20; next_job(w) == 'a';)
        acme++;
    assert_int_equal(acme, 60);
    check_invariants(w);
}

// Who was kept from claiming has not saved it up.
static void test_rate_is_no_credit(void **state)
{
    struct world *w = *state;
    const Ditfleet__V1__Priority normal = DITFLEET__V1__PRIORITY__PRIORITY_NORMAL;
    limit(w, "acme", 0.001, 0, 0);
    offer_many(w, "acme", "a", normal, 20, 1000);
    offer_many(w, "default", "d", normal, 60, 1000);
    int acme = 0;
    for (int i = 0; i < 40; i++)
        acme += next_job(w) == 'a';
    assert_int_equal(acme, 1); // a bucket that holds nothing lends one job
    limit(w, "acme", 0, -1, -1);
    acme = 0;
    for (int i = 0; i < 20; i++)
        acme += next_job(w) == 'a';
    assert_in_range(acme, 9, 11);
    check_invariants(w);
}

static void test_quota_refuses(void **state)
{
    struct world *w = *state;
    limit(w, "acme", -1, -1, 2.5);
    assert_int_equal(offer(w, "acme", new_job("a"), 1000).code, ERR_NONE);
    assert_int_equal(offer(w, "acme", new_job("b"), 1500).code, ERR_NONE);
    struct err why = offer(w, "acme", new_job("c"), 1);
    assert_int_equal(why.code, ERR_OVERLOADED);
    assert_string_equal(why.text,
                        "tenant acme has 2.500 GPU-seconds of work waiting and running, its limit is 2.500, and this "
                        "job would add 0.001; submit it again when some of that is done");
    assert_int_equal(offer(w, "default", new_job("c"), 100000).code, ERR_NONE); // the limit is acme's alone
    why = offer(w, "acme", new_job("d"), 3000);
    assert_non_null(strstr(why.text, "it is above the limit by itself"));
    check_invariants(w);
    // Its sender is told, by the id too, which stays free; it is no dead letter, and not kept for long.
    Ditfleet__V1__Result *result;
    OK(queue_await(w->q, "acme", "c", NULL, 0, NULL, NULL, &result, e));
    assert_string_equal(result->error->code, "overloaded");
    assert_true(result->error->retryable);
    result_free(result);
    assert_int_equal(number(w, "XLEN " PREFIX "dlq"), 0);
    assert_in_range(number(w, "PTTL " PREFIX "job:acme:c"), 1, 600000);
    assert_in_range(number(w, "PTTL " PREFIX "ev:acme:c"), 1, 600000);
    assert_int_equal(next_job(w), 'a');
    assert_int_equal(offer(w, "acme", new_job("c"), 1000).code, ERR_NONE);
    // The same job once more is no new work; one that is over at once is none either.
    struct queue_admitted again = (submit_job(w, "acme", new_job("c"), NULL), admit(w));
    assert_int_equal(again.duplicate, 1);
    OK(queue_cancel(w->q, "acme", "c", NULL, e));
    for (int i = 0; i < 3; i++) {
        Ditfleet__V1__Job *late = new_job("late0");
        late->id[4] = (char)('0' + i);
        late->deadline_ms = 1;
        assert_int_equal(offer(w, "acme", late, 1000).code, ERR_NONE);
    }
    check_invariants(w);
}

static void test_backlog_is_bounded(void **state)
{
    struct world *w = *state;
    limit(w, "acme", -1, -1, -1);
    OK(queue_set(w->q, "max_backlog_ms", 10000, e));
    offer_many(w, "acme", "a", DITFLEET__V1__PRIORITY__PRIORITY_NORMAL, 3, 2000);
    offer_many(w, "default", "d", DITFLEET__V1__PRIORITY__PRIORITY_NORMAL, 2, 2000);
    assert_int_equal(offer(w, "default", new_job("x"), 1).code, ERR_OVERLOADED);
    claim(w, 60000);
    claim(w, 60000);
    struct err why = offer(w, "acme", new_job("x"), 9000);
    assert_string_equal(why.text,
                        "the queue has 10.000 GPU-seconds of work waiting and running, its limit is 10.000, and this "
                        "job would add 9.000; submit it again in about 5 s");
    // All of a batch is measured by what is there already, that of the batch too.
    OK(queue_release_all(w->q, "w1", NULL, &gpu_fault, NULL, e));
    while (next_job(w) != '-')
        ;
    for (int i = 0; i < 8; i++) {
        char id[8];
        snprintf(id, sizeof id, "b%d", i);
        submit(w, id); // 10 GPU-seconds each
    }
    struct queue_admitted out = admit(w);
    assert_int_equal(out.admitted, 1);
    assert_int_equal(out.refused, 7);
    check_invariants(w);
}

static void test_limits_are_checked(void **state)
{
    struct world *w = *state;
    const struct queue_limits bad[] = {{0, -1, -1, -1},  {1001, -1, -1, -1}, {1, 1e10, -1, -1},
                                       {1, NAN, -1, -1}, {1, -1, 2e9, -1},   {1, -1, -1, INFINITY}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        FAILS(ERR_INVALID, queue_tenant_limit(w->q, "acme", &bad[i], e));
    limit(w, "acme", 0.25, 1.5, 1e9);
    limit(w, "acme", -1, 2, -1);
    struct queue_tenant *list;
    size_t n;
    OK(queue_tenants(w->q, &list, &n, e));
    for (size_t i = 0; i < n; i++)
        if (strcmp(list[i].name, "acme") == 0)
            assert_true(list[i].limits.weight == 1 && list[i].limits.rate == 0.25 && list[i].limits.burst_s == 2 &&
                        list[i].limits.max_queued_s == 1e9);
    assert_int_equal(n, 2);
    free(list);
}

// A flood of one class does not keep a lower one from its share, nor does that come before its time.
static void test_no_class_is_starved(void **state)
{
    struct world *w = *state;
    int last[128] = {0}, n[128] = {0};
    offer_many(w, "default", "h", DITFLEET__V1__PRIORITY__PRIORITY_HIGH, 150, 1000);
    offer_many(w, "default", "n", DITFLEET__V1__PRIORITY__PRIORITY_NORMAL, 10, 1000);
    offer_many(w, "default", "l", DITFLEET__V1__PRIORITY__PRIORITY_LOW, 5, 1000);
    for (int i = 0; i < 100; i++) {
        char c = next_job(w);
        n[(int)c]++;
        last[(int)c] = i;
        assert_true(c == 'h' || i >= (c == 'n' ? 4 : 16));
    }
    assert_int_equal(n['n'], 10);
    assert_int_equal(n['l'], 5);
    assert_in_range(last['n'], 48, 56); // one of five, and some low ones between
    assert_in_range(last['l'], 80, 88); // one of seventeen
    // A turn is of GPU-seconds, not of jobs.
    offer_many(w, "default", "L", DITFLEET__V1__PRIORITY__PRIORITY_LOW, 2, 3000);
    offer_many(w, "default", "H", DITFLEET__V1__PRIORITY__PRIORITY_HIGH, 20, 1000);
    int at[2] = {0}, seen = 0;
    for (int i = 0; seen < 2; i++)
        if (next_job(w) == 'L')
            at[seen++] = i;
    assert_in_range(at[1] - at[0], 48, 50);
    while (next_job(w) != '-')
        ;
    check_invariants(w);
}

static struct err offer_until(struct world *w, const char *id, uint64_t not_before_ms, uint64_t deadline_ms,
                              uint64_t gpu_ms)
{
    Ditfleet__V1__Job *job = new_job(id);
    job->not_before_ms = not_before_ms;
    job->deadline_ms = deadline_ms;
    return offer(w, "default", job, gpu_ms);
}

static void test_deadlines_that_cannot_be_met(void **state)
{
    struct world *w = *state;
    const uint64_t now = server_ms(w), hour = 3600000;
    OK(queue_set(w->q, "max_speed", 4, e));
    // Eight hours of one GPU are two at least; whether others wait does not count.
    struct err why = offer_until(w, "a", 0, now + hour, 8 * hour);
    assert_int_equal(why.code, ERR_EXPIRED);
    assert_non_null(strstr(why.text, "a job of 28800.000 GPU-seconds takes at least 7200.000 s (max_speed is 4)"));
    assert_int_equal(offer_until(w, "a", 0, now + 3 * hour, 8 * hour).code, ERR_NONE);
    assert_int_equal(offer_until(w, "b", 0, now + 3 * hour, 8 * hour).code, ERR_NONE);
    // It starts no sooner than it may.
    assert_int_equal(offer_until(w, "c", now + 2 * hour, now + 3 * hour, 8 * hour).code, ERR_EXPIRED);
    assert_int_equal(offer_until(w, "e", now + hour / 2, now + 3 * hour, 8 * hour).code, ERR_NONE);
    // What has passed is no refusal, but a job that expired.
    assert_int_equal(offer_until(w, "f", 0, 1, 1).code, ERR_NONE);
    assert_string_equal(state_of(w, "f"), "EXPIRED");
    OK(queue_set(w->q, "max_speed", 0, e));
    assert_int_equal(offer_until(w, "c", 0, now + hour, 8 * hour).code, ERR_NONE);
    check_invariants(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_rate_delays),         TEST(test_rate_is_no_credit),  TEST(test_quota_refuses),
        TEST(test_backlog_is_bounded),  TEST(test_limits_are_checked), TEST(test_deadlines_that_cannot_be_met),
        TEST(test_no_class_is_starved),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
