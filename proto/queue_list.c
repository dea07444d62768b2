// queue_list.c: all records, page by page, for people who look for one.
#include "proto/queue_internal.h"

#include <stdlib.h>
#include <string.h>

// In this order in the replies; job is the part of the key behind "job:".
static const char *const fields[] = {"state",      "pool",       "worker",     "stage",   "step", "steps",
                                     "created_ms", "updated_ms", "error_code", "refused", "entry"};
enum { STATE, POOL, WORKER, STAGE, STEP, STEPS, CREATED, UPDATED, CODE, REFUSED, ENTRY, FIELDS };

static void copy(char *out, size_t size, const redisReply *r)
{
    snprintf(out, size, "%s", reply_text(r));
}

// False: no job, but a submission's way to one, or gone since.
static bool take(struct queue_listed *l, const char *job, const redisReply *r)
{
    const char *colon = strchr(job, ':');
    if (!colon || r->type != REDIS_REPLY_ARRAY || (colon[1] == '@' && !*reply_text(reply_at(r, REFUSED))))
        return false;
    *l = (struct queue_listed){.state = job_state_parse(reply_text(reply_at(r, STATE))),
                               .step = (uint32_t)reply_number(reply_at(r, STEP)),
                               .steps = (uint32_t)reply_number(reply_at(r, STEPS)),
                               .created_ms = reply_number(reply_at(r, CREATED)),
                               .updated_ms = reply_number(reply_at(r, UPDATED))};
    snprintf(l->tenant, sizeof l->tenant, "%.*s", (int)(colon - job), job);
    snprintf(l->id, sizeof l->id, "%s", colon + 1);
    copy(l->entry, sizeof l->entry, reply_at(r, ENTRY));
    copy(l->pool, sizeof l->pool, reply_at(r, POOL));
    copy(l->worker, sizeof l->worker, reply_at(r, WORKER));
    copy(l->stage, sizeof l->stage, reply_at(r, STAGE));
    copy(l->error_code, sizeof l->error_code, reply_at(r, CODE));
    return l->state != DITFLEET__V1__STATE__STATE_UNKNOWN;
}

static int ask(struct queue *q, const redisReply *keys, struct err *e)
{
    for (size_t i = 0; i < reply_count(keys); i++) {
        const char *argv[2 + FIELDS] = {"HMGET", reply_text(reply_at(keys, i))};
        memcpy(argv + 2, fields, sizeof fields);
        TRY(redis_append_argv(q->redis, e, 2 + FIELDS, argv, NULL));
    }
    return 0;
}

static int read_records(struct queue *q, const redisReply *keys, struct queue_listed *list, size_t *count,
                        struct err *e)
{
    const size_t prefix = strlen(q->prefix) + strlen("job:");
    TRY(ask(q, keys, e));
    for (size_t i = 0; i < reply_count(keys); i++) {
        redisReply *reply = NULL;
        TRY(redis_get_reply(q->redis, &reply, e));
        *count += take(&list[*count], reply_text(reply_at(keys, i)) + prefix, reply);
        freeReplyObject(reply);
    }
    return 0;
}

int queue_list(struct queue *q, const char *tenant, char cursor[QUEUE_CURSOR_SIZE], struct queue_listed **list,
               size_t *count, struct err *e)
{
    struct args a = {0};
    char match[KEY_SIZE];
    redisReply *page = NULL;
    *list = NULL;
    *count = 0;
    if (tenant)
        TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    snprintf(match, sizeof match, KEY_JOB, q->prefix, tenant ? tenant : "*", "*");
    const char *const words[] = {"SCAN", cursor, "MATCH", match, "COUNT", "500"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        args_text(&a, words[i]);
    TRY(queue_command(q, &a, 0, &page, e));
    const redisReply *keys = reply_at(page, 1);
    int rc = 0;
    if (reply_count(keys) > 0 && !(*list = calloc(reply_count(keys), sizeof **list)))
        rc = err_set(e, ERR_NO_MEMORY, "out of memory for the list of jobs");
    rc = rc ? rc : read_records(q, keys, *list, count, e);
    copy(cursor, QUEUE_CURSOR_SIZE, reply_at(page, 0));
    freeReplyObject(page);
    if (rc != 0) {
        free(*list);
        *list = NULL;
    }
    return rc;
}
