// queue_bench.c: how many jobs a second pass through enqueue, admission, claim and finish, with no model.
//
//   queue_bench [JOBS [WORKERS [BATCH]]]
//   queue_bench --depth JOBS: how long a claim takes with 1,000 and with JOBS queued, and what a queued job takes in
//   memory
//   queue_bench --scripts N [CONNECTIONS]: how many scripts a second, of one kind and of a holder's four
//
// Everything is the production path over one private Redis with an append-only file (everysec): producers that XADD one
// job at a time, one admitter, workers that claim BATCH jobs and finish each. First the highest
// rate, then the delay from submission to commit at a steady 500 jobs a second, each with the calls of every operation
// that did something.
#include "proto/queue.h"
#include "tests/unit/private_redis.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

// Calls of one operation that did something, timed where they are made.
struct timing {
    const char *name;
    atomic_uint n;
    double *took; // (jobs) milliseconds
};
enum { ENQUEUE, ADMIT, CLAIM, FINISH, TIMINGS };

struct bench {
    const char *url;
    pid_t server;
    unsigned jobs, producers, workers, batch;
    double rate; // jobs a second of all producers; 0: as fast as they can
    atomic_uint submitted, finished, next_worker;
    double *began, *ended; // seconds by job
    struct timing timing[TIMINGS];
};

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// CPU seconds of a process so far.
static double cpu_seconds(pid_t pid)
{
    char path[32];
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "r");
    if (!f)
        return 0;
    if (fscanf(f, "%*d (%*[^)]) %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
        user = system = 0;
    fclose(f);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

// A benchmark has nobody to hand an error to.
static void must(int rc, const struct err *e)
{
    if (rc == 0)
        return;
    fprintf(stderr, "queue_bench: %s\n", e->text);
    _exit(1);
}

// No operation does something more often than there are jobs.
static void timed(struct bench *b, int what, double start)
{
    struct timing *t = &b->timing[what];
    if (t->took)
        t->took[atomic_fetch_add(&t->n, 1)] = 1e3 * (seconds() - start);
}

static struct queue *open_queue(const struct bench *b)
{
    struct queue *q;
    struct err e = {0};
    must(queue_open(&q, b->url, "bench", QUEUE_NODE, NULL, &e), &e);
    return q;
}

static void *produce(void *arg)
{
    struct bench *b = arg;
    struct err e = {0};
    struct queue *q = open_queue(b);
    Ditfleet__V1__Job *job = job_new();
    must(!job || job_set_field(job, "model", "none", &e), &e);
    must(job_set_field(job, "prompt", "a small red circle above a large blue square", &e), &e);
    must(job_set_field(job, "output.url", "https://store.example/pictures/{id}.png", &e), &e);
    double start = seconds();
    for (unsigned i; (i = atomic_fetch_add(&b->submitted, 1)) < b->jobs;) {
        char id[32], entry[QUEUE_ENTRY_SIZE];
        void *bytes;
        size_t length;
        while (b->rate > 0 && seconds() < start + i / b->rate)
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        snprintf(id, sizeof id, "job-%u", i);
        must(job_set_field(job, "id", id, &e), &e);
        must(job_pack(job, &bytes, &length, &e), &e);
        b->began[i] = seconds();
        must(queue_submit(q, "default", bytes, length, entry, &e), &e);
        timed(b, ENQUEUE, b->began[i]);
        free(bytes);
    }
    job_free(job);
    queue_close(q);
    return NULL;
}

static void *admit(void *arg)
{
    struct bench *b = arg;
    struct err e = {0};
    struct queue *q = open_queue(b);
    struct queue_admission admission = {.consumer = "bench"};
    struct queue_admitted out;
    while (atomic_load(&b->finished) < b->jobs) {
        const double start = seconds(); // a round waits for its first entry: where producers are slow, that is in it
        must(queue_admit(q, &admission, 100, &out, &e), &e);
        if (out.read > 0)
            timed(b, ADMIT, start);
    }
    queue_close(q);
    return NULL;
}

static void commit(struct bench *b, struct queue *q, struct queue_job *job)
{
    struct err e = {0};
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    void *bytes;
    size_t length;
    result.id = job->fence.id;
    result.state = DITFLEET__V1__STATE__STATE_SUCCEEDED;
    must(result_pack(&result, &bytes, &length, &e), &e);
    const double start = seconds();
    must(queue_finish(q, &job->fence, bytes, length, &e), &e);
    timed(b, FINISH, start);
    free(bytes);
    b->ended[strtoul(job->fence.id + 4, NULL, 10)] = seconds();
    atomic_fetch_add(&b->finished, 1);
    queue_job_free(job);
}

static void *work(void *arg)
{
    static const char *const pools[] = {"none@1"};
    struct bench *b = arg;
    struct err e = {0};
    struct queue *q = open_queue(b);
    struct queue_job *jobs = calloc(QUEUE_BATCH, sizeof *jobs);
    char name[32], cursor[QUEUE_ENTRY_SIZE];
    snprintf(name, sizeof name, "worker-%u", atomic_fetch_add(&b->next_worker, 1));
    struct queue_claim want = {name, "1", pools, 1, 60000, b->batch};
    while (jobs && atomic_load(&b->finished) < b->jobs) {
        size_t n;
        bool woken;
        const double start = seconds();
        must(queue_claim(q, &want, jobs, &n, cursor, &e), &e);
        if (n > 0)
            timed(b, CLAIM, start);
        for (size_t i = 0; i < n; i++)
            commit(b, q, &jobs[i]);
        if (n == 0)
            must(queue_wait(q, cursor, 100, &woken, &e), &e);
    }
    free(jobs);
    queue_close(q);
    return NULL;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void time_each(struct bench *b)
{
    static const char *const names[TIMINGS] = {"enqueue", "admit", "claim", "finish"};
    for (int i = 0; i < TIMINGS; i++) {
        b->timing[i] = (struct timing){.name = names[i], .took = calloc(b->jobs, sizeof(double))};
        if (!b->timing[i].took)
            _exit(1);
    }
}

static void print_timings(struct bench *b)
{
    for (int i = 0; i < TIMINGS; i++) {
        struct timing *t = &b->timing[i];
        qsort(t->took, t->n, sizeof *t->took, by_value);
        printf("  %-8s %6u calls  p50 %7.3f ms  p99 %7.3f ms\n", t->name, t->n, t->took[t->n / 2],
               t->took[(size_t)t->n * 99 / 100]);
        free(t->took);
        t->took = NULL;
    }
}

static void run(struct bench *b, const char *what)
{
    pthread_t threads[64];
    unsigned n = 0;
    struct err e = {0};
    struct queue *q = open_queue(b);
    must(redis_command(queue_redis(q), NULL, &e, "FLUSHALL"), &e);
    must(queue_model_publish(q, "none", "1", &e), &e);
    b->submitted = b->finished = b->next_worker = 0;
    b->began = calloc(b->jobs, sizeof *b->began);
    b->ended = calloc(b->jobs, sizeof *b->ended);
    if (!b->began || !b->ended)
        _exit(1);
    time_each(b);
    double start = seconds(), server = cpu_seconds(b->server), clients = cpu_seconds(getpid());
    for (unsigned i = 0; i < b->producers; i++)
        pthread_create(&threads[n++], NULL, produce, b);
    pthread_create(&threads[n++], NULL, admit, b);
    for (unsigned i = 0; i < b->workers; i++)
        pthread_create(&threads[n++], NULL, work, b);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    double wall = seconds() - start;
    server = 1e6 * (cpu_seconds(b->server) - server) / b->jobs;
    clients = 1e6 * (cpu_seconds(getpid()) - clients) / b->jobs;
    for (unsigned i = 0; i < b->jobs; i++)
        b->ended[i] -= b->began[i];
    qsort(b->ended, b->jobs, sizeof *b->ended, by_value);
    printf("%-8s %6u jobs  %u workers  batch %2u  %7.0f jobs/s  p50 %8.2f ms  p99 %8.2f ms  CPU a job: Redis %.0f us, "
           "clients %.0f us\n",
           what, b->jobs, b->workers, b->batch, b->jobs / wall, 1e3 * b->ended[b->jobs / 2],
           1e3 * b->ended[(size_t)b->jobs * 99 / 100], server, clients);
    print_timings(b);
    free(b->began);
    free(b->ended);
    queue_close(q);
}

// ---- a long queue

// A number of INFO; field ends in a colon.
static double info(struct queue *q, const char *section, const char *field)
{
    struct err e = {0};
    redisReply *reply;
    must(redis_command(queue_redis(q), &reply, &e, "INFO %s", section), &e);
    const char *line = strstr(reply->str, field);
    const double value = line ? strtod(line + strlen(field), NULL) : 0;
    freeReplyObject(reply);
    return value;
}

// Jobs from b->submitted on until so many are admitted.
static void fill(struct bench *b, struct queue *q, unsigned depth)
{
    pthread_t producers[2];
    struct err e = {0};
    struct queue_admission admission = {.consumer = "bench"};
    struct queue_admitted out;
    b->jobs = depth;
    for (int i = 0; i < 2; i++)
        pthread_create(&producers[i], NULL, produce, b);
    while (b->finished < depth) {
        must(queue_admit(q, &admission, 100, &out, &e), &e);
        b->finished += out.admitted;
    }
    for (int i = 0; i < 2; i++)
        pthread_join(producers[i], NULL);
    b->submitted = depth; // each producer took a number too many
}

// There is one, or the measurement is worth nothing.
static void claim_one(struct queue *q, const char *worker, struct queue_job *job)
{
    static const char *const pools[] = {"none@1"};
    const struct queue_claim want = {worker, "1", pools, 1, 60000, 1};
    struct err e = {0};
    char cursor[QUEUE_ENTRY_SIZE];
    size_t n;
    must(queue_claim(q, &want, job, &n, cursor, &e), &e);
    if (n != 1) {
        fprintf(stderr, "queue_bench: no job to claim\n");
        _exit(1);
    }
}

// Claims one job and gives it back, so that the queue stays as long as it is. Milliseconds of the claim.
static double time_claim(struct queue *q)
{
    struct err e = {0};
    struct queue_job job;
    const double start = seconds();
    claim_one(q, "worker", &job);
    const double took = 1e3 * (seconds() - start);
    must(queue_release(q, &job.fence, &e), &e);
    queue_job_free(&job);
    return took;
}

// By turns, so that whatever else the machine does is in both. Returns the second's p99 by the first's.
static double compare_claims(struct queue *q[2], const unsigned depths[2])
{
    enum { CLAIMS = 10000 };
    static double took[2][CLAIMS];
    for (int i = 0; i < CLAIMS; i++)
        for (int k = 0; k < 2; k++)
            took[k][i] = time_claim(q[k]);
    for (int k = 0; k < 2; k++) {
        qsort(took[k], CLAIMS, sizeof(double), by_value);
        printf("%8u queued  claim p50 %.3f ms  p99 %.3f ms  longest %.3f ms\n", depths[k], took[k][CLAIMS / 2],
               took[k][CLAIMS * 99 / 100], took[k][CLAIMS - 1]);
    }
    return took[1][CLAIMS * 99 / 100] / took[0][CLAIMS * 99 / 100];
}

// Fills a server's queue; *bytes is what a job takes of its memory.
static struct queue *filled(const struct private_redis *server, unsigned jobs, double *bytes)
{
    struct bench b = {.url = server->url, .server = server->pid, .began = calloc(jobs, sizeof(double))};
    struct err e = {0};
    if (!b.began)
        _exit(1);
    struct queue *q = open_queue(&b);
    must(queue_model_publish(q, "none", "1", &e), &e);
    const double empty = info(q, "memory", "used_memory:");
    fill(&b, q, jobs);
    *bytes = (info(q, "memory", "used_memory:") - empty) / jobs;
    free(b.began);
    return q;
}

// Twice: at once, while Redis may be rewriting the file that filling it made long, and when it is done with that.
static void depth(const struct private_redis *few, const struct private_redis *many, unsigned jobs)
{
    const unsigned depths[] = {1000, jobs};
    double bytes;
    struct queue *q[] = {filled(few, depths[0], &bytes), NULL};
    const double start = seconds();
    q[1] = filled(many, jobs, &bytes);
    printf("%.0f bytes of Redis' memory a queued job; filled in %.0f s\n", bytes, seconds() - start);
    for (int round = 0; round < 2; round++) {
        while (round == 1 && info(q[1], "persistence", "aof_rewrite_in_progress:") > 0)
            nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
        const bool rewrites = info(q[1], "persistence", "aof_rewrite_in_progress:") > 0;
        const double ratio = compare_claims(q, depths);
        printf("p99 %.2f x, %s\n", ratio, rewrites ? "while the append-only file is rewritten" : "no rewrite");
    }
    for (int k = 0; k < 2; k++)
        queue_close(q[k]);
}

// ---- scripts a second

// What a holder does with a job, but for its end: 4 scripts, until each of b->jobs rounds is taken.
static void *hold(void *arg)
{
    static const struct queue_progress progress = {
        .state = DITFLEET__V1__STATE__STATE_RUNNING, .stage = "denoise", .step = 1, .steps = 20};
    struct bench *b = arg;
    struct err e = {0};
    struct queue *q = open_queue(b);
    char name[32];
    snprintf(name, sizeof name, "worker-%u", atomic_fetch_add(&b->next_worker, 1));
    while (atomic_fetch_add(&b->finished, 1) < b->jobs) {
        struct queue_job job;
        claim_one(q, name, &job);
        must(queue_progress(q, &job.fence, &progress, &e), &e);
        must(queue_beat(q, &job.fence, 60000, &e), &e);
        must(queue_release(q, &job.fence, &e), &e);
        queue_job_free(&job);
    }
    queue_close(q);
    return NULL;
}

static void *renew(void *arg)
{
    struct bench *b = arg;
    struct err e = {0};
    struct queue *q = open_queue(b);
    struct queue_job job;
    char name[32];
    snprintf(name, sizeof name, "worker-%u", atomic_fetch_add(&b->next_worker, 1));
    claim_one(q, name, &job);
    while (atomic_fetch_add(&b->finished, 1) < b->jobs)
        must(queue_beat(q, &job.fence, 60000, &e), &e);
    must(queue_release(q, &job.fence, &e), &e);
    queue_job_free(&job);
    queue_close(q);
    return NULL;
}

static void rate(struct bench *b, const char *what, void *thread(void *), unsigned scripts_a_round, unsigned rounds)
{
    pthread_t threads[32];
    b->jobs = rounds;
    b->finished = 0;
    const double start = seconds(), server = cpu_seconds(b->server);
    for (unsigned i = 0; i < b->workers; i++)
        pthread_create(&threads[i], NULL, thread, b);
    for (unsigned i = 0; i < b->workers; i++)
        pthread_join(threads[i], NULL);
    const double n = (double)rounds * scripts_a_round;
    printf("%-34s %u connections  %7.0f scripts/s  Redis' CPU %.0f us a script\n", what, b->workers,
           n / (seconds() - start), 1e6 * (cpu_seconds(b->server) - server) / n);
}

static void scripts(struct bench *b, const struct private_redis *server, unsigned n)
{
    double bytes;
    queue_close(filled(server, 1000, &bytes));
    rate(b, "beat", renew, 1, n);
    rate(b, "claim + progress + beat + release", hold, 4, n / 4 + 1);
}

static unsigned number(int argc, char **argv, int i, unsigned fallback, unsigned most)
{
    unsigned long n = argc > i ? strtoul(argv[i], NULL, 10) : fallback;
    return n < 1 ? 1 : n > most ? most : (unsigned)n;
}

int main(int argc, char **argv)
{
    static const char *const durable[] = {"--appendonly", "yes", "--appendfsync", "everysec", NULL};
    struct private_redis server = {0}, other = {0};
    if (private_redis_start(&server, durable) != 0) {
        fprintf(stderr, "queue_bench: no Redis server could be started; install redis-tools\n");
        private_redis_stop(&server);
        return 1;
    }
    struct bench b = {.url = server.url, .server = server.pid, .producers = 2};
    if (argc > 1 && strcmp(argv[1], "--depth") == 0) {
        const int rc = private_redis_start(&other, durable);
        if (rc == 0)
            depth(&server, &other, number(argc, argv, 2, 1000000, 10000000));
        private_redis_stop(&other);
        private_redis_stop(&server);
        return rc ? 1 : 0;
    }
    if (argc > 1 && strcmp(argv[1], "--scripts") == 0) {
        b.workers = number(argc, argv, 3, 4, 32);
        scripts(&b, &server, number(argc, argv, 2, 100000, 10000000));
        private_redis_stop(&server);
        return 0;
    }
    b.jobs = number(argc, argv, 1, 20000, 1000000);
    b.workers = number(argc, argv, 2, 4, 32);
    b.batch = number(argc, argv, 3, 8, QUEUE_BATCH);
    run(&b, "highest");
    b.jobs = b.jobs < 2000 ? b.jobs : 2000;
    b.rate = 500;
    b.batch = 1;
    run(&b, "steady");
    private_redis_stop(&server);
    return 0;
}
