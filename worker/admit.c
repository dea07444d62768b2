#include "worker/admit.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "proto/clock.h"
#include "proto/queue.h"
#include "worker/moderation.h"

enum { BLOCK_MS = 500, JUDGE_MS = 100, PUBLISH_SECONDS = 10, RETRY_MS = 500 };

struct admitter {
    const struct conf *conf;
    const struct conf_group *group;
    const struct log *log;
    const char *consumer;
    struct queue *queue;           // the thread's own
    struct moderation *moderation; // the same; NULL: everything is allowed
    pthread_t thread;
    atomic_bool ending;
};

static void on_refusal(void *arg, const char *tenant, const char *id, const char *entry, const struct err *why)
{
    const struct admitter *a = arg;
    log_line(a->log, LOG_WARN, "job.refused", "tenant=%s job=\"%s\" entry=%s code=%s error=\"%s\"", tenant, id, entry,
             err_name(why->code), why->text);
}

static int work(struct admitter *a, double *publish_at, struct err *err)
{
    struct queue_admitted admitted;
    if (!a->moderation) // while its deny list cannot be read, jobs wait in their doors
        TRY(moderation_new(a->conf, a->log, &a->moderation, err));
    const struct queue_admission admission = {.consumer = a->consumer,
                                              .on_refusal = on_refusal,
                                              .arg = a,
                                              .callbacks = *a->conf->callback.secret_file != 0,
                                              .judge = a->moderation ? moderation_judge : NULL,
                                              .judge_arg = a->moderation};
    if (!a->queue)
        TRY(queue_open(&a->queue, a->conf->redis.url, a->conf->redis.queue, QUEUE_NODE, NULL, err));
    if (monotonic_seconds() >= *publish_at) {
        for (int i = 0; i < a->group->model.count; i++)
            TRY(queue_serve(a->queue, a->group->models[i].name, a->group->models[i].version, a->consumer, err));
        *publish_at = monotonic_seconds() + PUBLISH_SECONDS;
    }
    TRY(queue_admit(a->queue, &admission, BLOCK_MS, &admitted, err));
    if (admitted.judging)
        moderation_wait(a->moderation, JUDGE_MS);
    if (admitted.no_models) // the server lost its data
        *publish_at = 0;
    return 0;
}

static void *run(void *arg)
{
    struct admitter *a = arg;
    double publish_at = 0;
    bool failing = false;
    while (!atomic_load(&a->ending)) {
        struct err err = {.code = ERR_NONE};
        int rc = work(a, &publish_at, &err);
        if (rc != 0 && !failing)
            log_line(a->log, LOG_WARN, "admission.waiting", "error=\"%s\"", err.text);
        if (rc == 0 && failing)
            log_line(a->log, LOG_INFO, "admission.resumed", "queue=%s", a->conf->redis.queue);
        failing = rc != 0;
        if (failing)
            nanosleep(&(struct timespec){.tv_nsec = RETRY_MS * 1000000L}, NULL);
    }
    queue_close(a->queue);
    moderation_free(a->moderation);
    return NULL;
}

int admitter_new(const struct conf *conf, const struct conf_group *group, const struct log *log, const char *consumer,
                 struct admitter **out, struct err *err)
{
    struct admitter *a = calloc(1, sizeof *a);
    *out = NULL;
    if (!a)
        return err_set(err, ERR_NO_MEMORY, "no memory for admission");
    *a = (struct admitter){.conf = conf, .group = group, .log = log, .consumer = consumer};
    if (pthread_create(&a->thread, NULL, run, a) != 0) {
        free(a);
        return err_set(err, ERR_NO_MEMORY, "the admission thread cannot be started");
    }
    *out = a;
    return 0;
}

void admitter_free(struct admitter *a)
{
    if (!a)
        return;
    atomic_store(&a->ending, true);
    pthread_join(a->thread, NULL);
    free(a);
}
