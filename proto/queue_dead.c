// queue_dead.c: dead letters: listed, tried again, thrown away.
#include "proto/queue_internal.h"

#include <stdlib.h>
#include <string.h>

static void copy(char *out, size_t size, const redisReply *r)
{
    snprintf(out, size, "%s", reply_text(r));
}

static void take(struct queue_letter *l, const redisReply *r)
{
    // The order is that of ops.dead in queue.lua.
    const char *kind = reply_text(reply_at(r, 1));
    *l = (struct queue_letter){.kind = strcmp(kind, "job") == 0       ? QUEUE_LETTER_JOB
                                       : strcmp(kind, "refused") == 0 ? QUEUE_LETTER_REFUSED
                                                                      : QUEUE_LETTER_CALLBACK};
    copy(l->letter, sizeof l->letter, reply_at(r, 0));
    l->time_ms = strtoull(l->letter, NULL, 10);
    copy(l->tenant, sizeof l->tenant, reply_at(r, 2));
    copy(l->id, sizeof l->id, reply_at(r, 3));
    copy(l->code, sizeof l->code, reply_at(r, 4));
    copy(l->error, sizeof l->error, reply_at(r, 5));
    copy(l->entry, sizeof l->entry, reply_at(r, 6));
    copy(l->callback, sizeof l->callback, reply_at(r, 7));
}

static int call(struct queue *q, const char *op, const char *letter, redisReply **reply, struct err *e)
{
    struct args a = {0};
    args_text(&a, op);
    args_text(&a, letter);
    return queue_eval(q, &a, reply, e);
}

int queue_dead(struct queue *q, const char *after, struct queue_letter *list, size_t *count, struct err *e)
{
    redisReply *reply = NULL;
    *count = 0;
    TRY(call(q, "dead", after, &reply, e));
    for (; *count < reply_count(reply) && *count < QUEUE_BATCH; ++*count)
        take(&list[*count], reply_at(reply, *count));
    freeReplyObject(reply);
    return 0;
}

// A stream's id, so that nothing else is asked of Redis: "1700000000000-0".
static int check_letter(const char *letter, struct err *e)
{
    size_t digits = strspn(letter, "0123456789");
    size_t more = letter[digits] == '-' ? strspn(letter + digits + 1, "0123456789") : 0;
    if (digits == 0 || more == 0 || letter[digits + 1 + more] || digits + more > 40)
        return err_set(e, ERR_INVALID, "%.40s names no dead letter; allowed: as they are listed, 1700000000000-0",
                       letter);
    return 0;
}

int queue_dead_retry(struct queue *q, const char *letter, char entry[QUEUE_ENTRY_SIZE], struct err *e)
{
    redisReply *reply = NULL;
    int rc = 0;
    TRY(check_letter(letter, e));
    TRY(call(q, "dead_retry", letter, &reply, e));
    if (reply_count(reply) == 0)
        rc = err_set(e, ERR_NOT_FOUND, "there is no dead letter %s", letter);
    else if (!*reply_text(reply_at(reply, 0)))
        rc = err_set(e, err_parse(reply_text(reply_at(reply, 1))), "dead letter %s: %s", letter,
                     reply_text(reply_at(reply, 2)));
    copy(entry, QUEUE_ENTRY_SIZE, rc ? NULL : reply_at(reply, 1));
    freeReplyObject(reply);
    return rc;
}

int queue_dead_drop(struct queue *q, const char *letter, struct err *e)
{
    redisReply *reply = NULL;
    TRY(check_letter(letter, e));
    TRY(call(q, "dead_drop", letter, &reply, e));
    bool found = *reply_text(reply);
    freeReplyObject(reply);
    return found ? 0 : err_set(e, ERR_NOT_FOUND, "there is no dead letter %s", letter);
}
