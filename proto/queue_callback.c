// queue_callback.c: the outbox: callbacks are taken under a lease, and settled by whoever has them in hand.
#include "proto/queue_internal.h"

#include <stdlib.h>
#include <string.h>

static void copy(char *out, size_t size, const redisReply *r)
{
    snprintf(out, size, "%s", reply_text(r));
}

static int take(struct queue_callback *c, const redisReply *r)
{
    // The order is that of take_callback in queue.lua.
    const redisReply *result = reply_at(r, 9);
    *c = (struct queue_callback){.hold = reply_number(reply_at(r, 1)),
                                 .tries = reply_number(reply_at(r, 2)),
                                 .time_ms = reply_number(reply_at(r, 8))};
    copy(c->entry, sizeof c->entry, reply_at(r, 0));
    copy(c->message, sizeof c->message, reply_at(r, 3));
    copy(c->tenant, sizeof c->tenant, reply_at(r, 4));
    copy(c->id, sizeof c->id, reply_at(r, 5));
    c->state = job_state_parse(reply_text(reply_at(r, 6)));
    c->url = strdup(reply_text(reply_at(r, 7)));
    c->result_length = *reply_text(result) ? (size_t)result->len : 0;
    c->result = c->result_length ? malloc(c->result_length) : NULL;
    if (!c->url || (c->result_length && !c->result)) {
        queue_callback_free(c);
        return ERR_NO_MEMORY;
    }
    if (c->result)
        memcpy(c->result, result->str, c->result_length);
    return 0;
}

void queue_callback_free(struct queue_callback *c)
{
    free(c->url);
    free(c->result);
    c->url = c->result = NULL;
}

int queue_callbacks(struct queue *q, const struct queue_callbacks_want *want, struct queue_callback *list,
                    size_t *count, uint64_t *next_ms, struct err *e)
{
    struct args a = {0};
    struct digits n = digits(want->max), lease = digits(want->lease_ms), most = digits(want->max_of_tenant),
                  in_hand[QUEUE_BATCH];
    redisReply *reply = NULL;
    int rc = 0;
    *count = 0;
    const char *head[] = {"callbacks", n.text, lease.text, most.text};
    for (size_t i = 0; i < sizeof head / sizeof *head; i++)
        args_text(&a, head[i]);
    for (size_t i = 0; i < want->n_in_hand && i < QUEUE_BATCH; i++) {
        in_hand[i] = digits(want->n_of_tenant[i]);
        args_text(&a, want->in_hand[i]);
        args_text(&a, in_hand[i].text);
    }
    TRY(queue_eval(q, &a, &reply, e));
    *next_ms = reply_number(reply_at(reply, 0));
    for (size_t i = 1; i < reply_count(reply) && *count < want->max && rc == 0; i++) {
        rc = take(&list[*count], reply_at(reply, i));
        *count += rc == 0;
    }
    freeReplyObject(reply);
    while (rc != 0 && *count > 0)
        queue_callback_free(&list[--*count]);
    return rc ? err_set(e, ERR_NO_MEMORY, "out of memory for callbacks") : 0; // the leases run out
}

static int settle(struct queue *q, const char *op, const struct queue_callback *c, const char *const *more, size_t n,
                  struct err *e)
{
    struct args a = {0};
    struct digits hold = digits(c->hold);
    redisReply *reply = NULL;
    args_text(&a, op);
    args_text(&a, c->entry);
    args_text(&a, hold.text);
    for (size_t i = 0; i < n; i++)
        args_text(&a, more[i]);
    TRY(queue_eval(q, &a, &reply, e));
    bool ok = strcmp(reply_text(reply), "ok") == 0;
    freeReplyObject(reply);
    return ok ? 0 : err_set(e, ERR_STALE, "the callback of job %s is settled, or somebody else's", c->id);
}

int queue_callback_done(struct queue *q, const struct queue_callback *c, struct err *e)
{
    return settle(q, "callback_done", c, NULL, 0, e);
}

int queue_callback_retry(struct queue *q, const struct queue_callback *c, uint64_t wait_ms, bool charged, struct err *e)
{
    struct digits wait = digits(wait_ms);
    return settle(q, "callback_retry", c, (const char *const[]){wait.text, charged ? "1" : "0"}, 2, e);
}

int queue_callback_dead(struct queue *q, const struct queue_callback *c, const struct err *why, const char *shown,
                        struct err *e)
{
    return settle(q, "callback_dead", c, (const char *const[]){err_name(why->code), why->text, shown}, 3, e);
}
