// fuzz_redis.c: a Redis that answers with anything: the first byte chooses what the queue asks, the rest is the
// answers.
#include "tests/fuzz/fuzz.h"

#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "proto/queue.h"

#define BULK(text) "$" text "\r\n"
// What a queue asks when it is opened.
static const char greeting[] = BULK("19\r\nredis_version:7.0.1") BULK("27\r\nmaxmemory_policy:noeviction");

enum { MOST = 64 << 10 };
static struct {
    int listener;
    pthread_mutex_t lock; // of what follows
    uint8_t data[MOST];
    size_t size;
} server = {.lock = PTHREAD_MUTEX_INITIALIZER};

// The greeting, and data.
static void answer_with(const void *data, size_t size)
{
    const size_t first = sizeof greeting - 1;
    pthread_mutex_lock(&server.lock);
    server.size = first + (size < MOST - first ? size : MOST - first);
    memcpy(server.data, greeting, first);
    memcpy(server.data + first, data, server.size - first);
    pthread_mutex_unlock(&server.lock);
}

// Gives each connection the same bytes, then the end, and takes what it says until it leaves.
static void *serve(void *arg)
{
    (void)arg;
    static uint8_t answer[MOST];
    char said[4096];
    for (;;) {
        const int fd = accept(server.listener, NULL, NULL);
        pthread_mutex_lock(&server.lock);
        const size_t size = server.size;
        memcpy(answer, server.data, size);
        pthread_mutex_unlock(&server.lock);
        for (size_t sent = 0; sent < size;) {
            const ssize_t n = send(fd, answer + sent, size - sent, MSG_NOSIGNAL);
            if (n <= 0)
                break;
            sent += (size_t)n;
        }
        shutdown(fd, SHUT_WR);
        while (recv(fd, said, sizeof said, 0) > 0)
            ;
        close(fd);
    }
    return NULL;
}

static const char *prepare(void)
{
    static char url[128];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    pthread_t thread;
    if (url[0])
        return url;
    fuzz_folder_make();
    snprintf(address.sun_path, sizeof address.sun_path, "%s/redis", fuzz_folder);
    snprintf(url, sizeof url, "unix://%s", address.sun_path);
    server.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    PROMISE(bind(server.listener, (struct sockaddr *)&address, sizeof address) == 0);
    PROMISE(listen(server.listener, 8) == 0 && pthread_create(&thread, NULL, serve, NULL) == 0);
    return url;
}

// ---- what may be asked

static const struct queue_fence fence = {1, "default", "job", "00112233445566778899aabbccddeeff"};

static int claim(struct queue *q, struct err *e)
{
    static const char *const pools[] = {"m@1"};
    const struct queue_claim want = {"w", "1", pools, 1, 1000, 4};
    struct queue_job jobs[4];
    size_t n = 0;
    char cursor[QUEUE_ENTRY_SIZE];
    TRY(queue_claim(q, &want, jobs, &n, cursor, e));
    PROMISE(n <= 4);
    while (n-- > 0)
        queue_job_free(&jobs[n]);
    return 0;
}

static int admit(struct queue *q, struct err *e)
{
    const struct queue_admission admission = {.consumer = "w"};
    struct queue_admitted admitted;
    return queue_admit(q, &admission, 1, &admitted, e);
}

static int get(struct queue *q, struct err *e)
{
    struct queue_record r;
    TRY(queue_get(q, "default", "job", &r, e));
    queue_record_free(&r);
    return 0;
}

static int callbacks(struct queue *q, struct err *e)
{
    const struct queue_callbacks_want want = {.max = 4, .lease_ms = 1000, .max_of_tenant = 2};
    struct queue_callback list[4];
    size_t n = 0;
    uint64_t next;
    TRY(queue_callbacks(q, &want, list, &n, &next, e));
    PROMISE(n <= 4);
    while (n-- > 0)
        queue_callback_free(&list[n]);
    return 0;
}

static int await(struct queue *q, struct err *e)
{
    Ditfleet__V1__Result *result;
    TRY(queue_await(q, "default", "job", "1-0", 2, NULL, NULL, &result, e));
    result_free(result);
    return 0;
}

static int fail(struct queue *q, struct err *e)
{
    const struct err why = {ERR_IO, true, "why"};
    Ditfleet__V1__State state;
    return queue_fail(q, &fence, QUEUE_CAUSE_APP, &why, &state, e);
}

static int beat(struct queue *q, struct err *e)
{
    return queue_beat(q, &fence, 1000, e);
}

static int submit(struct queue *q, struct err *e)
{
    char entry[QUEUE_ENTRY_SIZE];
    return queue_submit(q, "default", "x", 1, entry, e);
}

static int wait_for_jobs(struct queue *q, struct err *e)
{
    bool woken;
    return queue_wait(q, "0-0", 1, &woken, e);
}

static int cancel(struct queue *q, struct err *e)
{
    Ditfleet__V1__State state;
    return queue_cancel(q, "default", "job", &state, e);
}

static int release_all(struct queue *q, struct err *e)
{
    const struct err why = {ERR_IO, true, "why"};
    unsigned n;
    return queue_release_all(q, "w", NULL, &why, &n, e);
}

static int reap(struct queue *q, struct err *e)
{
    struct queue_reaped reaped;
    return queue_reap(q, &reaped, e);
}

static int stats(struct queue *q, struct err *e)
{
    struct queue_stats s;
    return queue_stats(q, &s, e);
}

#define LIST(name, type)                                                                                               \
    static int name(struct queue *q, struct err *e)                                                                    \
    {                                                                                                                  \
        struct type *list;                                                                                             \
        size_t count;                                                                                                  \
        TRY(queue_##name(q, &list, &count, e));                                                                        \
        free(list);                                                                                                    \
        return 0;                                                                                                      \
    }
LIST(tenants, queue_tenant)
LIST(models, queue_model)
LIST(pools, queue_pool)

static int live(struct queue *q, struct err *e)
{
    struct queue_name *list;
    size_t count;
    TRY(queue_live(q, 16, &list, &count, e));
    free(list);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int (*const asked[])(struct queue *, struct err *) = {
        claim,  admit,       get,  callbacks, await,   fail,   beat,  submit, wait_for_jobs,
        cancel, release_all, reap, stats,     tenants, models, pools, live};
    const struct redis_options options = {.connect_ms = 1000, .command_ms = 1000};
    const char *url = prepare();
    struct queue *q;
    struct err err = {0};
    if (size < 1)
        return 0;
    answer_with(data + 1, size - 1);
    PROMISE(queue_open(&q, url, "default", QUEUE_NODE, &options, &err) == 0);
    fuzz_good(asked[data[0] % (sizeof asked / sizeof *asked)](q, &err), &err);
    queue_close(q);
    return 0;
}
