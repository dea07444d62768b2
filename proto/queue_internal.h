// queue_internal.h: what queue.c and the queue_*.c share; nobody else includes it.
#ifndef DITFLEET_QUEUE_INTERNAL_H
#define DITFLEET_QUEUE_INTERNAL_H

#include "proto/keys.h"
#include "proto/queue.h"

struct queue {
    struct redis *redis;
    struct redis_script script;
    char name[KEY_MAX_QUEUE + 1];
    char prefix[KEY_MAX_QUEUE + 16];
    unsigned submitted_by; // the connection that submitted last
    int version;           // of Redis: 702 for 7.2; 0 where access control hides it
    // admission's view of the registries, read again every second
    struct queue_tenant *tenants;
    struct queue_model *models;
    size_t n_tenants, n_models;
    int64_t refresh_at, steal_at; // monotonic milliseconds
    size_t door;                  // where the next turn starts when there are more doors than one call reads
    struct judged *judged;        // jobs whose verdict is still to come, see queue_admit.c
    unsigned n_judged;
};
void queue_drop_judged(struct queue *q); // their entries stay in the doors

// The arguments of one script call. Values are kept by reference until the call.
enum { ARGS_MAX = 1000 };
struct args {
    int n;
    const char *value[ARGS_MAX];
    size_t length[ARGS_MAX];
};
void args_bytes(struct args *a, const void *bytes, size_t length);
void args_text(struct args *a, const char *text);

struct digits {
    char text[24];
};
struct digits digits(uint64_t n);

// Runs the script; sent once more when the connection broke. The caller frees *reply.
int queue_eval(struct queue *q, const struct args *a, redisReply **reply, struct err *e);

// A plain command under the same rule; block_ms is added to its deadline.
int queue_command(struct queue *q, const struct args *a, int block_ms, redisReply **reply, struct err *e);

// Reply access that never trusts shape: "" or 0 for what is not there.
const char *reply_text(const redisReply *r);
uint64_t reply_number(const redisReply *r);
const redisReply *reply_at(const redisReply *r, size_t i);
size_t reply_count(const redisReply *r);

int64_t monotonic_ms(void);

#endif
