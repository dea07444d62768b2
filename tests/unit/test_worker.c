// The worker's threads beside the main path: the pulse, which speaks with the supervisor, and the herald, which renews
// leases only while there is progress and brings back what the queue says.
#include "private_redis.h"
#include "worker/herald.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/socket.h>
#include <time.h>

#include <cmocka.h>

#include "proto/clock.h"

static void check(int rc, const struct err *e, int line)
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

static void nap(double seconds)
{
    nanosleep(&(struct timespec){(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)}, NULL);
}

// ---- the pulse

struct pair {
    int supervisor; // its end of the control socket
    struct pulse *pulse;
    atomic_int orphaned;
};

static void on_orphaned(void *arg)
{
    atomic_store((atomic_int *)arg, 1);
}

static void pair_open(struct pair *p)
{
    int fds[2];
    atomic_init(&p->orphaned, 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
    p->supervisor = fds[0];
    OK(pulse_new(fds[1], NULL, on_orphaned, &p->orphaned, &p->pulse, e));
}

// The next message of a kind; others are passed over.
static struct msg next(struct pair *p, enum msg_kind kind)
{
    struct msg m;
    do {
        OK(msg_receive(p->supervisor, &m, e));
    } while (m.kind != kind);
    return m;
}

static void a_pulse_tells_where_the_main_path_is(void **state)
{
    (void)state;
    struct pair p;
    enum stage stage;
    pair_open(&p);
    assert_int_equal(next(&p, MSG_HELLO).pid, getpid());
    assert_int_equal(next(&p, MSG_BEAT).stage, STAGE_STARTING);
    pulse_ready(p.pulse);
    next(&p, MSG_READY);
    pulse_busy(p.pulse, 1.5);
    pulse_report(p.pulse, STAGE_DENOISE, 3, 20, "job-1"); // a new stage is told at once, not after a second
    struct msg beat;
    do
        beat = next(&p, MSG_BEAT);
    while (beat.stage != STAGE_DENOISE);
    assert_int_equal(beat.step, 3);
    assert_int_equal(beat.steps, 20);
    assert_string_equal(beat.job, "job-1");
    assert_true(beat.busy_seconds == 1.5);
    nap(0.05);
    assert_true(pulse_stalled(p.pulse, &stage) >= 0.05);
    assert_int_equal(stage, STAGE_DENOISE);
    pulse_report(p.pulse, STAGE_DENOISE, 3, 20, NULL); // the same place: progress all the same
    assert_true(next(&p, MSG_BEAT).progress > beat.progress);
    pulse_free(p.pulse, "drained");
    assert_string_equal(next(&p, MSG_BYE).reason, "drained");
    assert_int_equal(atomic_load(&p.orphaned), 0);
    close(p.supervisor);
}

static void wait_drain(struct pair *p)
{
    const double end = monotonic_seconds() + 5;
    while (!pulse_draining(p->pulse, NULL) && monotonic_seconds() < end)
        nap(0.001);
    assert_true(pulse_draining(p->pulse, NULL));
}

static void a_drain_leaves_time_to_give_jobs_back(void **state)
{
    (void)state;
    struct pair p;
    const struct msg drain = {.kind = MSG_DRAIN};
    double since;
    pair_open(&p);
    assert_false(pulse_draining(p.pulse, &since));
    assert_false(pulse_must_release(p.pulse, 0, 0)); // nobody asked to stop
    OK(msg_send(p.supervisor, &drain, e));
    wait_drain(&p);
    assert_false(pulse_must_release(p.pulse, 30, 0));
    assert_false(pulse_must_release(p.pulse, 30, 20));
    assert_true(pulse_must_release(p.pulse, 30, 29)); // another step would take too long
    assert_true(pulse_must_release(p.pulse, 1, 0));
    nap(0.02);
    assert_true(pulse_draining(p.pulse, &since) && since >= 0.02);
    kill(getpid(), SIGTERM); // again, and by signal: counted from the first time
    OK(msg_send(p.supervisor, &drain, e));
    nap(0.02);
    double later;
    assert_true(pulse_draining(p.pulse, &later) && later >= since);
    pulse_free(p.pulse, "drained");
    close(p.supervisor);
}

static void a_signal_drains_too(void **state)
{
    (void)state;
    struct pair p;
    pair_open(&p);
    kill(getpid(), SIGTERM);
    wait_drain(&p);
    pulse_free(p.pulse, "drained");
    close(p.supervisor);
}

static void a_worker_hears_that_its_supervisor_is_gone(void **state)
{
    (void)state;
    struct pair p;
    pair_open(&p);
    close(p.supervisor);
    const double end = monotonic_seconds() + 5;
    while (!atomic_load(&p.orphaned) && monotonic_seconds() < end)
        nap(0.001);
    assert_int_equal(atomic_load(&p.orphaned), 1);
    pulse_free(p.pulse, "");
}

// ---- the herald

struct world {
    struct private_redis server;
    struct queue *q;
    struct conf conf;
    char name[8];
    struct pair pair;
    struct herald *herald;
    struct held held;
};

static void claim_one(struct world *w)
{
    static const char *const pools[] = {"shapes@1"};
    const struct queue_claim want = {"w1", "i1", pools, 1, (uint64_t)(w->conf.queue.lease_s * 1000), 1};
    const struct queue_admission admission = {.consumer = "node1"};
    struct queue_admitted admitted;
    char entry[QUEUE_ENTRY_SIZE], cursor[QUEUE_ENTRY_SIZE];
    void *bytes;
    size_t length, count;
    Ditfleet__V1__Job *job = job_new();
    OK(job_set_field(job, "id", "one", e));
    OK(job_set_field(job, "model", "shapes", e));
    OK(job_set_field(job, "output.url", "http://127.0.0.1:9/x.png", e));
    OK(job_pack(job, &bytes, &length, e));
    OK(queue_model_publish(w->q, "shapes", "1", e));
    OK(queue_submit(w->q, "default", bytes, length, entry, e));
    OK(queue_admit(w->q, &admission, 0, &admitted, e));
    OK(queue_claim(w->q, &want, &w->held.claim, &count, cursor, e));
    assert_int_equal(count, 1);
    free(bytes);
    job_free(job);
}

static int begin(void **state)
{
    struct world *w = calloc(1, sizeof *w);
    if (!w || private_redis_start(&w->server, NULL) != 0)
        return -1;
    *state = w;
    snprintf(w->name, sizeof w->name, "test");
    w->conf.redis.url = w->server.url;
    w->conf.redis.queue = w->name;
    w->conf.queue.lease_s = 0.6;
    w->conf.deadline.denoise_s = 0.5;
    pair_open(&w->pair);
    OK(queue_open(&w->q, w->server.url, "test", QUEUE_NODE, NULL, e));
    claim_one(w);
    OK(herald_new(&w->conf, NULL, w->pair.pulse, &w->herald, e));
    pulse_report(w->pair.pulse, STAGE_DENOISE, 0, 10, "one");
    herald_hold(w->herald, &w->held);
    return 0;
}

static int end(void **state)
{
    struct world *w = *state;
    herald_drop(w->herald, &w->held);
    herald_free(w->herald);
    queue_job_free(&w->held.claim);
    queue_close(w->q);
    pulse_free(w->pair.pulse, "");
    close(w->pair.supervisor);
    private_redis_stop(&w->server);
    free(w);
    return 0;
}

static struct queue_record look(struct world *w)
{
    struct queue_record record;
    struct queue_reaped reaped;
    OK(queue_reap(w->q, &reaped, e));
    OK(queue_get(w->q, "default", "one", &record, e));
    queue_record_free(&record);
    return record; // its numbers
}

// Reports step after step for some seconds, as the main path does.
static void work(struct world *w, double seconds)
{
    const double end = monotonic_seconds() + seconds;
    for (uint32_t step = 1; monotonic_seconds() < end && !atomic_load(&w->held.stop); step++) {
        const struct queue_progress progress = {DITFLEET__V1__STATE__STATE_RUNNING, "denoise", step, 1000, 1};
        pulse_report(w->pair.pulse, STAGE_DENOISE, step, 1000, NULL);
        herald_report(w->herald, &w->held, &progress);
        nap(0.01);
    }
}

static void assert_stopped(struct world *w, enum err_code expected)
{
    struct err err = {.code = ERR_NONE};
    held_check(&w->held, &err);
    assert_int_equal(err.code, expected);
}

static void a_lease_lives_as_long_as_there_is_progress(void **state)
{
    struct world *w = *state;
    work(w, 1.5); // more than two leases
    struct queue_record record = look(w);
    assert_int_equal(record.state, DITFLEET__V1__STATE__STATE_RUNNING);
    assert_int_equal(record.epoch, 1);
    assert_true(record.step > 10);
    // The main path hangs: no renewal, and the reaper takes the job.
    const double end = monotonic_seconds() + 10;
    while (record.attempts_infra == 0 && monotonic_seconds() < end) {
        nap(0.01);
        record = look(w);
    }
    assert_int_equal(record.attempts_infra, 1);
    assert_int_equal(record.attempts_app, 0);
    work(w, 5); // it moves again: too late
    assert_stopped(w, ERR_STALE);
}

static void a_cancel_arrives_with_the_next_step(void **state)
{
    struct world *w = *state;
    work(w, 0.1);
    OK(queue_cancel(w->q, "default", "one", NULL, e));
    const double asked = monotonic_seconds();
    work(w, 10);
    assert_true(monotonic_seconds() - asked < 2);
    assert_stopped(w, ERR_CANCELLED);
}

static void a_lost_connection_is_made_anew(void **state)
{
    struct world *w = *state;
    redisReply *reply = NULL;
    work(w, 0.1);
    OK(redis_command(queue_redis(w->q), &reply, e, "CLIENT KILL TYPE normal SKIPME yes"));
    freeReplyObject(reply);
    work(w, 1);
    assert_int_equal(look(w).state, DITFLEET__V1__STATE__STATE_RUNNING);
    assert_int_equal(atomic_load(&w->held.stop), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pulse_tells_where_the_main_path_is),
        cmocka_unit_test(a_drain_leaves_time_to_give_jobs_back),
        cmocka_unit_test(a_signal_drains_too),
        cmocka_unit_test(a_worker_hears_that_its_supervisor_is_gone),
        cmocka_unit_test_setup_teardown(a_lease_lives_as_long_as_there_is_progress, begin, end),
        cmocka_unit_test_setup_teardown(a_cancel_arrives_with_the_next_step, begin, end),
        cmocka_unit_test_setup_teardown(a_lost_connection_is_made_anew, begin, end),
    };
    sigset_t term; // as main.c does, before any thread
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
