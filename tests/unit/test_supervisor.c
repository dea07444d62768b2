// The supervisor as a program, with workers that misbehave on request (fake_worker.c), seen through its control socket.
#include "supervisor/control.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "proto/clock.h"
#include "proto/gather.h"
#include "proto/queue.h"
#include "tests/unit/private_redis.h"

static struct private_redis redis;
static const char no_redis[] = "unix:///nonexistent/redis.sock";

static char dir[64];    // of this test: config, state, behaviours, log
static const char *url; // of its Redis
static pid_t supervisor;

static char *path(const char *name)
{
    static char paths[4][160];
    static int next;
    char *p = paths[next++ % 4];
    snprintf(p, sizeof paths[0], "%s/%s", dir, name);
    return p;
}

static void write_file(const char *name, const char *format, ...)
{
    va_list args;
    FILE *f = fopen(path(name), "w");
    assert_non_null(f);
    va_start(args, format);
    vfprintf(f, format, args);
    va_end(args);
    fclose(f);
}

static const char common[] = "[redis]\nurl = %s\nqueue = %s\n"
                             "[fleet]\nnode = n1\nstate_dir = %s/state\nworker_program = %s/tests/fake_worker\n"
                             "[deadline]\nload = 1s\ndenoise = 700ms\n"
                             "[restart]\nbackoff_min = 100ms\nbackoff_max = 400ms\nhealthy = 10s\ngrace = %s\n"
                             "[log]\nlevel = debug\n%s";

static void configure(const char *grace, const char *groups)
{
    write_file("f.ini", common, url, dir + strlen("/tmp/"), dir, getenv("DITFLEET_BUILD"), grace, groups);
}

static pid_t launch(const char *notify_socket)
{
    char program[300];
    snprintf(program, sizeof program, "%s/ditfleet-supervisor", getenv("DITFLEET_BUILD"));
    pid_t pid = fork();
    if (pid == 0) {
        setenv("FAKE_DIR", dir, 1);
        if (notify_socket) {
            setenv("NOTIFY_SOCKET", notify_socket, 1);
            setenv("WATCHDOG_USEC", "400000", 1);
        }
        if (!freopen(path("log"), "a", stderr))
            _exit(126);
        execl(program, program, "--config", path("f.ini"), (char *)NULL);
        _exit(126);
    }
    return pid;
}

static json_t *ask(const char *request)
{
    json_t *reply = NULL;
    struct err err = {0};
    control_request(path("state/control.sock"), request, &reply, &err);
    return reply;
}

static json_t *group_of(const json_t *status, const char *name)
{
    size_t i;
    json_t *g;
    json_array_foreach(json_object_get(status, "groups"), i,
                       g) if (strcmp(json_string_value(json_object_get(g, "name")), name) == 0) return g;
    return NULL;
}

static const char *text_of(const json_t *g, const char *key)
{
    const char *s = json_string_value(json_object_get(g, key));
    return s ? s : "";
}

static long number_of(const json_t *g, const char *key)
{
    return (long)json_integer_value(json_object_get(g, key));
}

static pid_t pid_of(const json_t *g, size_t rank)
{
    return (pid_t)number_of(json_array_get(json_object_get(g, "ranks"), rank), "pid");
}

typedef bool condition(const json_t *status);

// Waits until the status meets the condition; the caller owns the status.
static json_t *await_status(condition *met, const char *what, double seconds)
{
    for (double end = monotonic_seconds() + seconds; monotonic_seconds() < end; usleep(20000)) {
        json_t *status = ask("{\"cmd\":\"status\"}");
        if (status && met(status))
            return status;
        json_decref(status);
    }
    json_t *status = ask("{\"cmd\":\"status\"}");
    char *last = json_dumps(status, JSON_COMPACT);
    json_decref(status);
    print_error("%s\n", last ? last : "no status");
    free(last);
    fail_msg("not in %.1f s: %s", seconds, what);
    return NULL;
}
#define AWAIT(met, seconds) await_status(met, #met, seconds)

static bool await_end(pid_t pid, double seconds, int *status)
{
    for (double end = monotonic_seconds() + seconds; monotonic_seconds() < end; usleep(10000))
        if (waitpid(pid, status, WNOHANG) == pid)
            return true;
    return false;
}

// A process that nobody waits for any more is gone when it is not there or a zombie.
static bool is_gone(pid_t pid)
{
    char name[40], state = 'X';
    snprintf(name, sizeof name, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(name, "r");
    if (!f)
        return true;
    if (fscanf(f, "%*d %*s %c", &state) != 1)
        state = 'X';
    fclose(f);
    return state == 'Z' || state == 'X';
}

static int set_up(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/ditfleet-test-XXXXXX");
    supervisor = 0;
    url = redis.url;
    return mkdtemp(dir) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    char command[100];
    int status;
    if (supervisor > 0) {
        kill(supervisor, SIGKILL);
        waitpid(supervisor, &status, 0);
    }
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command); // a fixed command on a name from mkdtemp
}

static void stop(int want)
{
    int status = 0;
    kill(supervisor, SIGTERM);
    if (!await_end(supervisor, 9, &status))
        fail_msg("the supervisor does not leave");
    supervisor = 0;
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), want);
}

static bool is(const json_t *status, const char *group, const char *state)
{
    return strcmp(text_of(group_of(status, group), "state"), state) == 0;
}

static bool failed_with(const json_t *status, const char *group, const char *reason, long restarts)
{
    const json_t *g = group_of(status, group);
    return strstr(text_of(g, "last_failure"), reason) && number_of(g, "restarts") >= restarts;
}

#define GROUP(name) "[group " name "]\nmodel = flux@1=/m\nslab = 64K\n"

static bool all_is_as_told(const json_t *s)
{
    return is(s, "good", "ready") && is(s, "fatal", "failed") && failed_with(s, "fatal", "the model is missing", 0) &&
           failed_with(s, "crash", "rank 1 was killed by signal 11 (SEGV)", 2) &&
           failed_with(s, "early", "status 1: cannot load", 3) && failed_with(s, "leave", "status 0: had enough", 1) &&
           failed_with(s, "never", "stage loading", 1) && failed_with(s, "hang", "stage denoise, step 3 of 20", 1) &&
           failed_with(s, "garbage", "message of 7 bytes", 1) && failed_with(s, "silent", "no heartbeat for 5.0 s", 1);
}

// Every way to fail at once, each in its group: none disturbs the good one or the one that works.
static void each_failure_has_its_answer(void **state)
{
    (void)state;
    static const char *const behaviours[] = {"crash 1", "leave", "never", "hang", "silent",
                                             "garbage", "fatal", "early", "work"};
    configure("2s", "[group good]\nranks = 3\nmodel = flux@1=/m\n"
                    "[group crash]\nranks = 2\nmodel = flux@1=/m\n" GROUP("leave") GROUP("never") GROUP("hang")
                        GROUP("silent") GROUP("garbage") GROUP("fatal") GROUP("early") GROUP("work"));
    for (size_t i = 0; i < sizeof behaviours / sizeof *behaviours; i++) {
        char name[20];
        sscanf(behaviours[i], "%19s", name);
        write_file(name, "%s", behaviours[i]);
    }
    supervisor = launch(NULL);
    json_decref(AWAIT(all_is_as_told, 12));
    json_t *s = ask("{\"cmd\":\"status\"}");
    assert_int_equal(number_of(group_of(s, "good"), "restarts"), 0);
    assert_int_equal(number_of(group_of(s, "work"), "restarts"), 0);
    assert_int_equal(number_of(group_of(s, "fatal"), "restarts"), 0);
    assert_string_equal(text_of(json_array_get(json_object_get(group_of(s, "work"), "ranks"), 0), "stage"), "denoise");
    assert_string_equal(text_of(group_of(s, "good"), "worker"), "n1.good");
    assert_string_equal(text_of(s, "node"), "n1");
    json_decref(s);
    stop(0);
}

static bool one_is_ready(const json_t *s)
{
    return is(s, "g", "ready");
}

static bool one_came_back(const json_t *s)
{
    return is(s, "g", "ready") && number_of(group_of(s, "g"), "restarts") == 1;
}

static void a_killed_rank_takes_its_group_along_within_a_second(void **state)
{
    (void)state;
    configure("2s", "[group g]\nranks = 2\nmodel = flux@1=/m\n");
    supervisor = launch(NULL);
    json_t *before = AWAIT(one_is_ready, 5);
    double start = monotonic_seconds();
    kill(pid_of(group_of(before, "g"), 1), SIGKILL);
    while (!is_gone(pid_of(group_of(before, "g"), 0)))
        assert_true(monotonic_seconds() - start < 1);
    json_t *after = AWAIT(one_came_back, 5);
    assert_string_not_equal(text_of(group_of(before, "g"), "incarnation"),
                            text_of(group_of(after, "g"), "incarnation"));
    json_decref(before);
    json_decref(after);
    stop(0);
}

static void killed_itself_it_leaves_no_worker_behind(void **state)
{
    (void)state;
    int status;
    configure("2s", "[group g]\nranks = 2\nmodel = flux@1=/m\n" GROUP("stubborn"));
    write_file("stubborn", "stubborn");
    supervisor = launch(NULL);
    json_t *s = AWAIT(one_is_ready, 5);
    pid_t pids[] = {pid_of(group_of(s, "g"), 0), pid_of(group_of(s, "g"), 1), pid_of(group_of(s, "stubborn"), 0)};
    json_decref(s);
    kill(supervisor, SIGKILL);
    waitpid(supervisor, &status, 0);
    supervisor = 0;
    double start = monotonic_seconds();
    for (int i = 0; i < 3; i++)
        while (!is_gone(pids[i]))
            assert_true(monotonic_seconds() - start < 1);
}

static bool two_are_ready(const json_t *s)
{
    return is(s, "g", "ready") && is(s, "stubborn", "ready");
}

static void who_ignores_the_drain_is_killed_after_the_grace_time(void **state)
{
    (void)state;
    configure("500ms", GROUP("g") GROUP("stubborn"));
    write_file("stubborn", "stubborn");
    supervisor = launch(NULL);
    json_decref(AWAIT(two_are_ready, 5));
    double start = monotonic_seconds();
    stop(0);
    assert_in_range((uintmax_t)(1000 * (monotonic_seconds() - start)), 500, 1500);
}

static int lines_with(const char *what)
{
    char line[3000];
    int n = 0;
    FILE *f = fopen(path("log"), "r");
    while (f && fgets(line, sizeof line, f))
        n += strstr(line, what) != NULL;
    if (f)
        fclose(f);
    return n;
}

// Nothing that concerns processes depends on Redis: only the exit gives it a moment to take the jobs back.
static void without_redis_a_second_signal_does_not_wait(void **state)
{
    (void)state;
    url = no_redis;
    configure("1h", GROUP("g") GROUP("stubborn"));
    write_file("stubborn", "stubborn");
    supervisor = launch(NULL);
    json_t *s = AWAIT(two_are_ready, 5);
    assert_false(json_is_true(json_object_get(json_object_get(s, "redis"), "up")));
    json_decref(s);
    double start = monotonic_seconds();
    kill(supervisor, SIGINT);
    usleep(200000);
    stop(0);
    assert_true(monotonic_seconds() - start < 3);
    assert_int_equal(lines_with("event=redis.down"), 1); // said once, not at every try
}

static bool both_a_and_b(const json_t *s)
{
    return is(s, "a", "ready") && is(s, "b", "ready");
}

static bool reformed(const json_t *s)
{
    const json_t *b = json_object_get(group_of(s, "b"), "ranks");
    return is(s, "a", "ready") && is(s, "b", "ready") && is(s, "c", "ready") && json_array_size(b) == 2 &&
           !group_of(s, "d");
}

static void a_reload_touches_only_what_changed(void **state)
{
    (void)state;
    configure("2s", GROUP("a") GROUP("b") GROUP("d"));
    supervisor = launch(NULL);
    json_t *before = AWAIT(both_a_and_b, 5);
    configure("2s", GROUP("a") GROUP("b") "ranks = 2\n" GROUP("c"));
    kill(supervisor, SIGHUP);
    json_t *after = AWAIT(reformed, 5);
    assert_int_equal(pid_of(group_of(before, "a"), 0), pid_of(group_of(after, "a"), 0));
    assert_int_not_equal(pid_of(group_of(before, "b"), 0), pid_of(group_of(after, "b"), 0));
    json_decref(before);
    json_decref(after);
    write_file("f.ini", "[nonsense]\n"); // refused: all stays
    kill(supervisor, SIGHUP);
    usleep(300000);
    json_decref(AWAIT(reformed, 1));
    stop(0);
}

static bool g_is_stopped(const json_t *s)
{
    return is(s, "g", "stopped");
}

static void drain_and_resume_by_the_control_socket(void **state)
{
    (void)state;
    configure("2s", GROUP("g") GROUP("h"));
    supervisor = launch(NULL);
    json_decref(AWAIT(one_is_ready, 5));
    json_t *reply = ask("{\"cmd\":\"drain\",\"group\":\"g\"}");
    assert_true(json_is_true(json_object_get(reply, "ok")));
    json_decref(reply);
    json_t *s = AWAIT(g_is_stopped, 5);
    assert_true(is(s, "h", "ready"));
    json_decref(s);
    kill(supervisor, SIGHUP); // a drained group stays drained
    usleep(200000);
    json_decref(AWAIT(g_is_stopped, 1));
    json_decref(ask("{\"cmd\":\"resume\"}"));
    json_decref(AWAIT(one_is_ready, 5));
    static const char *const wrong[] = {"{\"cmd\":\"drain\",\"group\":\"x\"}", "{\"cmd\":\"dance\"}", "[]", "{", ""};
    for (int i = 0; i < 5; i++) {
        struct err err = {0};
        assert_int_equal(control_request(path("state/control.sock"), wrong[i], &reply, &err), ERR_REFUSED);
        assert_true(strlen(err.text) > 10);
        json_decref(reply);
    }
    struct stat st;
    assert_int_equal(stat(path("state/control.sock"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    stop(0);
    struct err err = {0};
    assert_int_equal(control_request(path("state/control.sock"), "{}", &reply, &err), ERR_UNAVAILABLE);
}

static void a_second_supervisor_is_refused(void **state)
{
    (void)state;
    int status = 0;
    char want[60];
    configure("2s", GROUP("g"));
    supervisor = launch(NULL);
    json_decref(AWAIT(one_is_ready, 5));
    pid_t second = launch(NULL);
    assert_true(await_end(second, 5, &status));
    assert_int_equal(WEXITSTATUS(status), 1);
    snprintf(want, sizeof want, "another supervisor (pid %d)", (int)supervisor);
    assert_int_equal(lines_with(want), 1);
    json_decref(AWAIT(one_is_ready, 1)); // the first keeps its socket
    stop(0);
}

static void systemd_hears_ready_status_and_the_watchdog(void **state)
{
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char text[300];
    bool ready = false, status = false, stopping = false, watchdog = false;
    const struct timeval limit = {.tv_sec = 1};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/notify", dir);
    int s = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(s, (struct sockaddr *)&address, sizeof address), 0);
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    configure("2s", GROUP("g") GROUP("fatal"));
    write_file("fatal", "fatal");
    supervisor = launch(address.sun_path);
    for (double end = monotonic_seconds() + 8; monotonic_seconds() < end && !(ready && status && stopping);) {
        ssize_t n = recv(s, text, sizeof text - 1, 0);
        text[n > 0 ? n : 0] = 0;
        ready |= strstr(text, "READY=1") != NULL;
        status |= strstr(text, "STATUS=1 of 2 groups ready, 1 failed") != NULL;
        stopping |= strstr(text, "STOPPING=1") != NULL;
        watchdog |= strstr(text, "WATCHDOG=1") != NULL;
        if (ready && status && watchdog && !stopping)
            kill(supervisor, SIGTERM);
    }
    close(s);
    assert_true(ready && status && watchdog && stopping);
    int ended;
    assert_true(await_end(supervisor, 8, &ended));
    supervisor = 0;
}

// ---- with jobs

static struct queue *open_queue(void)
{
    struct queue *q = NULL;
    struct err err = {0};
    if (queue_open(&q, url, dir + strlen("/tmp/"), QUEUE_NODE, NULL, &err) != 0 ||
        queue_model_publish(q, "flux", "1", &err) != 0)
        fail_msg("%s", err.text);
    return q;
}

static void submit(struct queue *q, const char *id)
{
    struct err err = {0};
    char entry[QUEUE_ENTRY_SIZE];
    void *bytes = NULL;
    size_t n = 0;
    Ditfleet__V1__Job *job = job_new();
    if (job_set_field(job, "id", id, &err) || job_set_field(job, "model", "flux", &err) ||
        job_set_field(job, "prompt", "x", &err) || job_set_field(job, "output.url", "http://h/{id}", &err) ||
        job_pack(job, &bytes, &n, &err) || queue_submit(q, "default", bytes, n, entry, &err))
        fail_msg("%s", err.text);
    free(bytes);
    job_free(job);
}

static struct queue_record record_of(struct queue *q, const char *id)
{
    struct queue_record r = {0};
    struct err err = {0};
    int rc = queue_get(q, "default", id, &r, &err);
    if (rc != 0 && rc != ERR_NOT_FOUND)
        fail_msg("%s", err.text);
    queue_record_free(&r);
    return r; // for its plain fields
}

static void admit_here(struct queue *q)
{
    const struct queue_admission admission = {.consumer = "test"};
    struct queue_admitted out;
    struct err err = {0};
    if (queue_admit(q, &admission, 1000, &out, &err) != 0 || out.admitted != 1)
        fail_msg("not admitted: %s", err.text);
}

static bool g_holds_a_job(const json_t *s)
{
    return strcmp(text_of(json_array_get(json_object_get(group_of(s, "g"), "ranks"), 0), "job"), "job-1") == 0;
}

static double seconds_until_returned(struct queue *q, unsigned infra)
{
    double start = monotonic_seconds(), took = 0;
    while (record_of(q, "job-1").attempts_infra < infra && took < 5) {
        usleep(5000);
        took = monotonic_seconds() - start;
    }
    return took;
}

static void a_dead_workers_jobs_are_back_within_a_second(void **state)
{
    (void)state;
    struct queue *q = open_queue();
    configure("2s", "[group g]\nranks = 2\nmodel = flux@1=/m\n");
    write_file("g", "claim 0");
    submit(q, "job-1");
    admit_here(q);
    supervisor = launch(NULL);
    json_t *s = AWAIT(g_holds_a_job, 5);
    assert_int_equal(record_of(q, "job-1").state, DITFLEET__V1__STATE__STATE_LEASED);
    kill(pid_of(group_of(s, "g"), 1), SIGKILL); // not the one that holds it
    json_decref(s);
    assert_true(seconds_until_returned(q, 1) < 1);

    // Killed itself: the next supervisor knows from the state directory what the last one's workers held.
    // The record tells that it is the new incarnation that holds it; status may still show the old one's last beat.
    for (int i = 0; i < 1000 && record_of(q, "job-1").epoch < 2; i++)
        usleep(5000);
    assert_int_equal(record_of(q, "job-1").epoch, 2);
    json_decref(AWAIT(g_holds_a_job, 5));
    int status;
    kill(supervisor, SIGKILL);
    waitpid(supervisor, &status, 0);
    write_file("g", "work");
    supervisor = launch(NULL);
    assert_true(seconds_until_returned(q, 2) < 2);
    queue_close(q);
    stop(0);
}

// A worker that crashes over its job speaks against it, once for each group where there are two; one on a GPU does not.
static void a_job_over_which_two_groups_crash_is_poison(void **state)
{
    (void)state;
    struct queue *q = open_queue();
    struct queue_record r = {0};
    struct err err = {0};
    // Whichever of the two is back first takes the job again: no growing wait between.
    assert_int_equal(queue_set(q, "backoff_cap_ms", 100, &err), 0);
    submit(q, "job-1");
    admit_here(q);
    configure("2s", GROUP("gpu0") "device = cuda\n");
    write_file("gpu0", "poisoned");
    supervisor = launch(NULL);
    assert_true(seconds_until_returned(q, 2) < 5);
    assert_int_not_equal(record_of(q, "job-1").state, DITFLEET__V1__STATE__STATE_DEAD);
    stop(0);
    configure("2s", GROUP("g") GROUP("h"));
    write_file("g", "poisoned");
    write_file("h", "poisoned");
    assert_int_equal(queue_serve(q, "flux", "1", "n1.g", &err), 0);
    assert_int_equal(queue_serve(q, "flux", "1", "n1.h", &err), 0);
    supervisor = launch(NULL);
    for (int i = 0; i < 4000 && r.state != DITFLEET__V1__STATE__STATE_DEAD; i++) {
        usleep(5000);
        r = record_of(q, "job-1");
    }
    assert_int_equal(r.state, DITFLEET__V1__STATE__STATE_DEAD);
    assert_string_equal(r.error_code, "crashed");
    assert_non_null(strstr(r.error, "poison: "));
    assert_true(strstr(r.error, "n1.g") && strstr(r.error, "n1.h") && strstr(r.error, "signal 11 (SEGV)"));
    queue_close(q);
    stop(0);
}

static void a_node_without_groups_admits_and_redis_may_come_later(void **state)
{
    (void)state;
    struct private_redis late = {0};
    assert_int_equal(private_redis_start(&late, NULL), 0); // to know its place
    kill(late.pid, SIGSTOP);
    url = late.url;
    configure("2s", "[queue]\nmax_attempts = 7\n");
    supervisor = launch(NULL);
    usleep(300000);
    kill(late.pid, SIGCONT);
    struct queue *q = open_queue();
    submit(q, "job-2");
    double start = monotonic_seconds();
    while (record_of(q, "job-2").state != DITFLEET__V1__STATE__STATE_QUEUED)
        assert_true(monotonic_seconds() - start < 5);
    json_t *s = ask("{\"cmd\":\"status\"}");
    assert_string_equal(text_of(s, "role"), "queue");
    json_decref(s);
    queue_close(q);
    stop(0);
    private_redis_stop(&late);
}

static int start_redis(void **state)
{
    (void)state;
    return private_redis_start(&redis, NULL);
}

static int stop_redis(void **state)
{
    (void)state;
    private_redis_stop(&redis);
    return 0;
}

static bool all_gpus_are_seen(const json_t *s)
{
    return is(s, "gpu0", "ready") && is(s, "gpu3", "ready") && is(s, "gpu4-6", "ready");
}

// A worker of the group gpuN (fake_worker.c) asks for CUDA_VISIBLE_DEVICES=N, of gpuN-M for N,M.
static void a_gpu_group_sees_its_gpus_alone(void **state)
{
    (void)state;
    configure("2s", GROUP("gpu0") "device = cuda\n" GROUP("gpu3") "device = cuda\ngpu = 3\n" GROUP(
                        "gpu4-6") "device = cuda\ngpu = 4,6\n");
    setenv("CUDA_VISIBLE_DEVICES", "7", 1);
    supervisor = launch(NULL);
    unsetenv("CUDA_VISIBLE_DEVICES");
    json_decref(AWAIT(all_gpus_are_seen, 5));
    stop(0);
}

// The other node of a group, played by the test: says where it stands until the supervisor's group is in this state.
static void play_node_until(struct queue *q, struct gather_node *n2, const char *state)
{
    const char *const names[] = {"n1", "n2"};
    for (double end = monotonic_seconds() + 5; monotonic_seconds() < end; usleep(20000)) {
        struct gather_view view;
        struct err err = {0};
        assert_int_equal(gather(q, "gpu0", names, 2, 1, n2, &view, &err), 0);
        if (n2->phase == GATHER_OFFER && *view.formation) {
            n2->phase = GATHER_RUN;
            snprintf(n2->mark, sizeof n2->mark, "%s", view.formation);
        }
        gather_view_free(&view);
        json_t *status = ask("{\"cmd\":\"status\"}");
        const bool met = status && is(status, "gpu0", state);
        json_decref(status);
        if (met)
            return;
    }
    fail_msg("the group was not %s in 5 s", state);
}

// A supervisor of one node, and n2, ready to offer itself for the other.
static struct queue *launch_one_of_two(struct gather_node *n2)
{
    struct queue *q = NULL;
    struct err err = {0};
    *n2 = (struct gather_node){.phase = GATHER_AWAY, .reason = "tests"};
    configure("2s", "[fleet]\naddress = 127.0.0.1\n" GROUP("gpu0") "device = cuda\nnodes = n1:1, n2:1\n");
    supervisor = launch(NULL);
    assert_int_equal(queue_open(&q, url, dir + strlen("/tmp/"), QUEUE_NODE, NULL, &err), 0);
    play_node_until(q, n2, "gathering");
    // The terms are those of the configuration: offered as the supervisor itself offers them.
    struct gather_view view;
    const char *const names[] = {"n1", "n2"};
    for (int i = 0; i < 200; i++, usleep(20000)) {
        assert_int_equal(gather(q, "gpu0", names, 2, 1, n2, &view, &err), 0);
        snprintf(n2->terms, sizeof n2->terms, "%s", view.nodes[0].terms);
        gather_view_free(&view);
        if (*n2->terms)
            break;
    }
    assert_non_null(strstr(n2->terms, "group.nodes=n1:1, n2:1"));
    n2->phase = GATHER_OFFER;
    snprintf(n2->mark, sizeof n2->mark, "0123456789abcdef");
    snprintf(n2->places, sizeof n2->places, "127.0.0.1:9");
    return q;
}

static void expect_last_failure(const char *text)
{
    json_t *status = ask("{\"cmd\":\"status\"}");
    assert_non_null(strstr(text_of(group_of(status, "gpu0"), "last_failure"), text));
    json_decref(status);
}

static void a_group_forms_and_ends_with_another_node(void **state)
{
    (void)state;
    struct gather_node n2;
    struct queue *q = launch_one_of_two(&n2);
    play_node_until(q, &n2, "ready"); // where fake_worker.c found what it must
    n2.phase = GATHER_AWAY;           // its ranks are gone: so are this node's, and it offers again
    play_node_until(q, &n2, "gathering");
    expect_last_failure("node n2 ended its ranks: tests");
    queue_close(q);
    stop(0);
}

// What ranks that load have to say themselves counts.
static void ended_by_another_node_while_it_loads(void **state)
{
    (void)state;
    struct gather_node n2;
    write_file("gpu0", "late");
    struct queue *q = launch_one_of_two(&n2);
    play_node_until(q, &n2, "starting");
    n2.phase = GATHER_AWAY;
    play_node_until(q, &n2, "failed");
    expect_last_failure("the others have another model");
    queue_close(q);
    stop(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(each_failure_has_its_answer, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_killed_rank_takes_its_group_along_within_a_second, set_up, tear_down),
        cmocka_unit_test_setup_teardown(killed_itself_it_leaves_no_worker_behind, set_up, tear_down),
        cmocka_unit_test_setup_teardown(who_ignores_the_drain_is_killed_after_the_grace_time, set_up, tear_down),
        cmocka_unit_test_setup_teardown(without_redis_a_second_signal_does_not_wait, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_reload_touches_only_what_changed, set_up, tear_down),
        cmocka_unit_test_setup_teardown(drain_and_resume_by_the_control_socket, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_second_supervisor_is_refused, set_up, tear_down),
        cmocka_unit_test_setup_teardown(systemd_hears_ready_status_and_the_watchdog, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_dead_workers_jobs_are_back_within_a_second, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_job_over_which_two_groups_crash_is_poison, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_gpu_group_sees_its_gpus_alone, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_group_forms_and_ends_with_another_node, set_up, tear_down),
        cmocka_unit_test_setup_teardown(ended_by_another_node_while_it_loads, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_node_without_groups_admits_and_redis_may_come_later, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, start_redis, stop_redis);
}
