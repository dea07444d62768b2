// queue_acl.c: the users of access control. What each may do is listed here, and nothing else is.
#include "proto/queue_internal.h"

#include <string.h>

const char *const queue_user_names[QUEUE_USERS] = {[QUEUE_USER_PRODUCER] = "producer",
                                                   [QUEUE_USER_WORKER] = "worker",
                                                   [QUEUE_USER_SCALER] = "scaler",
                                                   [QUEUE_USER_OPERATOR] = "operator"};

// Of every connection.
#define CONNECTION "+auth +ping +select +role"
// What queue.lua calls, and how it is called. Not by FCALL: who may load functions may replace those that others run.
// Access control sees through a script, but not which operation it runs.
#define SCRIPT                                                                                                         \
    "+evalsha +eval +evalsha_ro +eval_ro +time +exists +del +get +set +persist +pexpire +pttl "                        \
    "+hget +hset +hsetnx "                                                                                             \
    "+hdel "                                                                                                           \
    "+hmget +hgetall +hkeys +hincrby +hstrlen +zadd +zrem +zcard +zscore +zrange +zrangebyscore +zremrangebyscore "    \
    "+xadd +xack +xdel "                                                                                               \
    "+xlen "                                                                                                           \
    "+xrange +xrevrange +xgroup|create"

struct user {
    struct {
        const char *right, *name; // the pattern: right, prefix, name
        const char *tail;         // and, where it is not NULL, the producer's tenant and this
    } keys[16];                   // ends at NULL
    const char *commands;
};

static const struct user users[QUEUE_USERS] = {
    [QUEUE_USER_PRODUCER] = {{{"%W~", "in:", ""}, {"%R~", "job:", ":*"}, {"%R~", "ev:", ":*"}},
                             "+xadd +xread +hmget +hgetall +time +wait"},
    [QUEUE_USER_WORKER] = {{{"~", "*", NULL}}, SCRIPT " +info +xreadgroup +xautoclaim +xread"},
    // The figures, and how long the doors are; no record, and no door's content: there is no command that reads it.
    [QUEUE_USER_SCALER] = {{{"%R~", "", NULL},
                            {"%R~", "stats", NULL},
                            {"%R~", "tenants", NULL},
                            {"%R~", "tenant:*", NULL},
                            {"%R~", "models", NULL},
                            {"%R~", "in:*", NULL},
                            {"%R~", "ring:*", NULL},
                            {"%R~", "ready:*", NULL},
                            {"%R~", "due", NULL},
                            {"%R~", "lease", NULL},
                            {"%R~", "delayed", NULL},
                            {"%R~", "dlq", NULL}},
                           "+evalsha_ro +eval_ro +time +hgetall +hkeys +hget +xlen +zcard +zrange"},
    [QUEUE_USER_OPERATOR] = {{{"~", "*", NULL}}, SCRIPT " +info +xread +wait +scan"},
};

int queue_acl(const struct queue *q, enum queue_user kind, const char *user, const char *tenant,
              char line[QUEUE_ACL_SIZE], struct err *e)
{
    const struct user *u = &users[kind];
    TRY(job_check_name("the user's name", user, JOB_MAX_NAME, e));
    if (kind == QUEUE_USER_PRODUCER)
        TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    size_t n = (size_t)snprintf(line, QUEUE_ACL_SIZE, "ACL SETUSER %s reset on '>PASSWORD'", user);
    for (size_t i = 0; u->keys[i].right; i++) {
        const char *tail = u->keys[i].tail;
        n += (size_t)snprintf(line + n, QUEUE_ACL_SIZE - n, " '%s%s%s%s%s'", u->keys[i].right, q->prefix,
                              u->keys[i].name, tail ? tenant : "", tail ? tail : "");
    }
    // A server that does not know a command refuses the whole line.
    const bool waitaof = strstr(u->commands, "+wait") && q->version >= 702;
    snprintf(line + n, QUEUE_ACL_SIZE - n, " -@all " CONNECTION " %s%s", u->commands, waitaof ? " +waitaof" : "");
    return 0;
}
