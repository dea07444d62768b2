// pool.c: hands out tasks by one atomic word. A thread that wakes late never delays the caller: a run is over when its
// tasks are done, not when every thread has looked.
//
// word = generation (22 bits) | tasks (21) | next task (21): only a compare-and-swap of the whole word claims a task.
// So a claim succeeds only in the generation whose task and ctx the thread read before: they change only between two
// generations.
#include "kernels/cpu/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

// A wait looks this often (about 30 us) before it sleeps: operations of a forward pass follow one another closely.
enum { SPINS = 600, FIELD = 21 };
#define FIELD_MASK (((uint64_t)1 << FIELD) - 1)
_Static_assert(POOL_MAX_TASKS < 1 << FIELD, "tasks fit their field");

struct pool {
    int threads;
    pthread_t *ids; // (threads - 1)
    _Atomic uint64_t word;
    _Atomic pool_task task;
    _Atomic(void *) ctx;
    atomic_llong done; // tasks finished of this generation
    atomic_int sleepers;
    atomic_bool stop, caller_sleeps;
    pthread_mutex_t lock;
    pthread_cond_t wake, finished;
};

struct worker {
    struct pool *p;
    int index;
};

static uint64_t next_of(uint64_t word)
{
    return word & FIELD_MASK;
}

static uint64_t tasks_of(uint64_t word)
{
    return word >> FIELD & FIELD_MASK;
}

static void relax(void)
{
    __builtin_ia32_pause();
}

// Runs tasks until none is left to claim; returns the word that said so.
static uint64_t work(struct pool *p, int thread)
{
    uint64_t word = atomic_load(&p->word);
    while (next_of(word) < tasks_of(word)) {
        pool_task task = atomic_load(&p->task);
        void *ctx = atomic_load(&p->ctx);
        if (!atomic_compare_exchange_weak(&p->word, &word, word + 1))
            continue;
        task(ctx, (int64_t)next_of(word), thread);
        if ((uint64_t)atomic_fetch_add(&p->done, 1) + 1 == tasks_of(word) && atomic_load(&p->caller_sleeps)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->finished);
            pthread_mutex_unlock(&p->lock);
        }
        word = atomic_load(&p->word);
    }
    return word;
}

static void *worker_main(void *arg)
{
    struct worker w = *(struct worker *)arg;
    struct pool *p = w.p;
    free(arg);
    while (!atomic_load(&p->stop)) {
        uint64_t seen = work(p, w.index);
        for (int i = 0; i < SPINS && atomic_load(&p->word) == seen && !atomic_load(&p->stop); i++)
            relax();
        if (atomic_load(&p->word) != seen)
            continue;
        pthread_mutex_lock(&p->lock);
        atomic_fetch_add(&p->sleepers, 1);
        while (atomic_load(&p->word) == seen && !atomic_load(&p->stop))
            pthread_cond_wait(&p->wake, &p->lock);
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->lock);
    }
    return NULL;
}

void pool_run(struct pool *p, int64_t tasks, pool_task task, void *ctx)
{
    if (p->threads == 1 || tasks == 1) {
        for (int64_t i = 0; i < tasks; i++)
            task(ctx, i, 0);
        return;
    }
    if (tasks <= 0)
        return;
    atomic_store(&p->task, task);
    atomic_store(&p->ctx, ctx);
    atomic_store(&p->done, 0);
    uint64_t generation = (atomic_load(&p->word) >> 2 * FIELD) + 1;
    atomic_store(&p->word, generation << 2 * FIELD | (uint64_t)tasks << FIELD);
    if (atomic_load(&p->sleepers) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    work(p, 0);
    for (int i = 0; i < SPINS && atomic_load(&p->done) < tasks; i++)
        relax();
    if (atomic_load(&p->done) == tasks)
        return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_sleeps, true);
    while (atomic_load(&p->done) < tasks)
        pthread_cond_wait(&p->finished, &p->lock);
    atomic_store(&p->caller_sleeps, false);
    pthread_mutex_unlock(&p->lock);
}

static int start(struct pool *p, int index)
{
    struct worker *w = malloc(sizeof *w);
    if (!w)
        return 1;
    *w = (struct worker){p, index};
    if (pthread_create(&p->ids[index - 1], NULL, worker_main, w) == 0)
        return 0;
    free(w);
    return 1;
}

int pool_new(int threads, struct pool **out, struct err *err)
{
    *out = NULL;
    struct pool *p = calloc(1, sizeof *p);
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    if (!p || !ids) {
        free(p);
        free(ids);
        return err_set(err, ERR_NO_MEMORY, "no memory for %d threads", threads);
    }
    p->ids = ids;
    p->threads = 1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->finished, NULL);
    for (; p->threads < threads; p->threads++)
        if (start(p, p->threads)) {
            int started = p->threads;
            pool_free(p);
            return err_set(err, ERR_NO_MEMORY, "only %d of %d threads could be started: allow this process more",
                           started, threads);
        }
    *out = p;
    return 0;
}

void pool_free(struct pool *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->stop, true);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->threads - 1; i++)
        pthread_join(p->ids[i], NULL);
    pthread_cond_destroy(&p->finished);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p->ids);
    free(p);
}
