// test_dead.c: dead letters: who gets one, what trying again does to jobs, submissions and callbacks.
#include "queue_world.h"

// The only letter there is.
static struct queue_letter only_letter(struct world *w)
{
    struct queue_letter list[QUEUE_BATCH];
    size_t n;
    OK(queue_dead(w->q, "", list, &n, e));
    assert_int_equal(n, 1);
    return list[0];
}

static void retry(struct world *w, const char *letter, bool new_entry)
{
    char entry[QUEUE_ENTRY_SIZE];
    OK(queue_dead_retry(w->q, letter, entry, e));
    assert_int_equal(*entry != 0, new_entry);
}

// Kills the job that is claimed next.
static void die(struct world *w)
{
    Ditfleet__V1__State s;
    struct queue_fence f = claim(w, 60000);
    OK(queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_final, &s, e));
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_DEAD);
}

static void test_dead_job_lives_again(void **state)
{
    struct world *w = *state;
    char entry[QUEUE_ENTRY_SIZE];
    Ditfleet__V1__State s;
    Ditfleet__V1__Job *job = new_job("a");
    job->max_attempts = 2;
    submit_job(w, "default", job, entry);
    admit(w);
    OK(queue_set(w->q, "backoff_ms", 0, e));
    struct queue_fence first = claim(w, 60000), f;
    OK(queue_fail(w->q, &first, QUEUE_CAUSE_APP, &app_error, &s, e));
    first = claim(w, 60000);
    OK(queue_fail(w->q, &first, QUEUE_CAUSE_APP, &app_error, &s, e));
    assert_int_equal(s, DITFLEET__V1__STATE__STATE_DEAD);
    struct queue_letter l = only_letter(w);
    assert_int_equal(l.kind, QUEUE_LETTER_JOB);
    assert_string_equal(l.tenant, "default");
    assert_string_equal(l.id, "a");
    assert_string_equal(l.code, "internal");
    assert_string_equal(l.error, app_error.text);
    submit(w, "b"); // it comes behind who waits already
    admit(w);
    retry(w, l.letter, false);
    check_invariants(w);
    struct queue_record r;
    OK(queue_get(w->q, "default", "a", &r, e));
    assert_int_equal(r.state, DITFLEET__V1__STATE__STATE_QUEUED);
    assert_int_equal(r.attempts_app, 0);
    assert_string_equal(r.entry, entry);
    assert_string_equal(r.error, "");
    assert_null(r.result);
    queue_record_free(&r);
    assert_int_equal(number(w, "PTTL " PREFIX "job:default:a"), -1);
    char none[QUEUE_ENTRY_SIZE];
    FAILS(ERR_NOT_FOUND, queue_dead_retry(w->q, l.letter, none, e));
    // With all its attempts; and who held it before holds it no more.
    f = claim(w, 60000);
    assert_string_equal(f.id, "b");
    f = claim(w, 60000);
    assert_string_equal(f.id, "a");
    assert_int_equal(f.epoch, 3);
    FAILS(ERR_STALE, queue_finish(w->q, &first, "x", 1, e));
    OK(queue_fail(w->q, &f, QUEUE_CAUSE_APP, &app_error, &s, e));
    f = claim(w, 60000);
    finish(w, &f);
    Ditfleet__V1__Result *result;
    OK(queue_await(w->q, "default", "a", entry, 0, NULL, NULL, &result, e));
    assert_int_equal(result->state, DITFLEET__V1__STATE__STATE_SUCCEEDED);
    result_free(result);
    assert_in_range(number(w, "PTTL " PREFIX "job:default:a"), 1, 86400000);
    check_invariants(w);
}

static void test_letters_of_jobs_that_are_no_more(void **state)
{
    struct world *w = *state;
    char entry[QUEUE_ENTRY_SIZE];
    Ditfleet__V1__Job *job = new_job("late");
    OK(queue_set(w->q, "max_speed", 0, e));
    job->deadline_ms = server_ms(w) + 300;
    submit_job(w, "default", job, NULL);
    admit(w);
    die(w);
    struct queue_letter l = only_letter(w);
    usleep(310000);
    FAILS(ERR_EXPIRED, queue_dead_retry(w->q, l.letter, entry, e));
    OK(queue_dead_drop(w->q, l.letter, e));
    // A job whose letter was thrown away keeps its result, not its payload, and stays dead.
    submit(w, "a");
    admit(w);
    die(w);
    l = only_letter(w);
    OK(queue_dead_drop(w->q, l.letter, e));
    FAILS(ERR_NOT_FOUND, queue_dead_drop(w->q, l.letter, e));
    assert_string_equal(state_of(w, "a"), "DEAD");
    assert_int_equal(number(w, "HSTRLEN " PREFIX "job:default:a payload"), 0);
    submit(w, "b");
    admit(w);
    die(w);
    l = only_letter(w);
    freeReplyObject(command(w, "DEL " PREFIX "job:default:b")); // its time was over
    FAILS(ERR_NOT_FOUND, queue_dead_retry(w->q, l.letter, entry, e));
    static const char *const bad[] = {"", "-", "+", "1", "1-", "-1", "(1-1", "1-1 ", "x", "$"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        FAILS(ERR_INVALID, queue_dead_retry(w->q, bad[i], entry, e));
    check_invariants(w);
}

static void test_refused_submission_again(void **state)
{
    struct world *w = *state;
    char entry[QUEUE_ENTRY_SIZE], again[QUEUE_ENTRY_SIZE];
    Ditfleet__V1__Job *job = new_job("a");
    OK(job_set_field(job, "model", "coming", e));
    submit_job(w, "default", job, entry);
    assert_int_equal(admit(w).refused, 1);
    struct queue_letter l = only_letter(w);
    assert_int_equal(l.kind, QUEUE_LETTER_REFUSED);
    assert_string_equal(l.entry, entry);
    assert_string_equal(l.code, "not_found");
    OK(queue_model_publish(w->q, "coming", "1", e));
    OK(queue_dead_retry(w->q, l.letter, again, e));
    reopen(w);
    assert_int_equal(admit(w).admitted, 1);
    struct queue_record r;
    OK(queue_get(w->q, "default", "a", &r, e));
    assert_string_equal(r.entry, again);
    queue_record_free(&r);
    // Of a large one only the beginning was kept.
    job = new_job("long");
    free(job->prompt);
    job->prompt = calloc(1, (1 << 20) + 1);
    memset(job->prompt, 'x', 1 << 20);
    submit_job(w, "default", job, NULL);
    assert_int_equal(admit(w).refused, 1);
    l = only_letter(w);
    FAILS(ERR_CORRUPT, queue_dead_retry(w->q, l.letter, again, e));
    only_letter(w);
}

static Ditfleet__V1__Job *calling_job(const char *id)
{
    Ditfleet__V1__Job *job = new_job(id);
    OK(job_set_field(job, "callback_url", "https://example.com/told?key=secret", e));
    return job;
}

static struct queue_callback next_callback(struct world *w, size_t wanted)
{
    const struct queue_callbacks_want want = {.max = 1, .lease_ms = 60000, .max_of_tenant = 10};
    struct queue_callback c = {0};
    size_t n;
    uint64_t next_ms;
    OK(queue_callbacks(w->q, &want, &c, &n, &next_ms, e));
    assert_int_equal(n, wanted);
    return c;
}

// Each life's end is told once, and told apart; what was not told before the next life is not told at all.
static void test_callbacks_of_each_life(void **state)
{
    struct world *w = *state;
    submit_job(w, "default", calling_job("a"), NULL);
    admit(w);
    die(w);
    struct queue_callback first = next_callback(w, 1);
    OK(queue_callback_done(w->q, &first, e));
    struct queue_letter l = only_letter(w);
    retry(w, l.letter, false);
    die(w); // and nobody is told before
    l = only_letter(w);
    retry(w, l.letter, false);
    next_callback(w, 0);
    assert_int_equal(number(w, "XLEN " PREFIX "outbox"), 0);
    assert_int_equal(number(w, "PTTL " PREFIX "job:default:a"), -1);
    die(w);
    struct queue_callback third = next_callback(w, 1);
    assert_int_equal(third.state, DITFLEET__V1__STATE__STATE_DEAD);
    assert_string_not_equal(first.message, third.message);
    // One that is given up and tried again is the same message.
    OK(queue_callback_dead(w->q, &third, &gpu_fault, "https://example.com/told", e));
    struct queue_letter list[QUEUE_BATCH];
    size_t n;
    OK(queue_dead(w->q, "", list, &n, e));
    assert_int_equal(n, 2);
    assert_int_equal(list[1].kind, QUEUE_LETTER_CALLBACK);
    assert_string_equal(list[1].callback, "https://example.com/told");
    retry(w, list[1].letter, false);
    struct queue_callback fourth = next_callback(w, 1);
    assert_string_equal(third.message, fourth.message);
    assert_string_equal(fourth.url, "https://example.com/told?key=secret");
    assert_int_equal(fourth.tries, 1);
    queue_callback_free(&first);
    queue_callback_free(&third);
    queue_callback_free(&fourth);
    check_invariants(w);
}

static void test_letters_by_the_page(void **state)
{
    struct world *w = *state;
    for (int i = 0; i < 150; i++)
        freeReplyObject(command(w, "XADD " PREFIX "in:default * wrong x"));
    assert_int_equal(admit(w).refused, 150);
    struct queue_letter list[QUEUE_BATCH];
    char after[QUEUE_ENTRY_SIZE] = "";
    size_t n, total = 0;
    do {
        OK(queue_dead(w->q, after, list, &n, e));
        total += n;
        if (n > 0)
            memcpy(after, list[n - 1].letter, sizeof after);
    } while (n > 0);
    assert_int_equal(total, 150);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_dead_job_lives_again),     TEST(test_letters_of_jobs_that_are_no_more),
        TEST(test_refused_submission_again), TEST(test_callbacks_of_each_life),
        TEST(test_letters_by_the_page),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
