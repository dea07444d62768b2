// pool.h: the threads of one cpu device. The caller works too; idle threads sleep.
#ifndef DITFLEET_POOL_H
#define DITFLEET_POOL_H

#include "proto/err.h"
#include <stdint.h>

struct pool;
typedef void (*pool_task)(void *ctx, int64_t task, int thread); // thread: 0 (the caller) to threads - 1

enum { POOL_MAX_TASKS = 1 << 20 };

// threads counts the caller; 1 starts none. pool_free joins them.
int pool_new(int threads, struct pool **out, struct err *err);
void pool_free(struct pool *p);

// Runs task(ctx, 0..tasks-1, thread) in any order on any thread and returns when all are done. tasks is at most
// POOL_MAX_TASKS. One caller at a time.
void pool_run(struct pool *p, int64_t tasks, pool_task task, void *ctx);

#endif
