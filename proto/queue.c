// queue.c: the queue's operations, but for admission: script calls, and the plain reads of watchers and waiters.
#include "proto/queue_internal.h"
#include "proto/queue_lua.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

// ---- small things

int64_t monotonic_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

const char *reply_text(const redisReply *r)
{
    bool text = r && (r->type == REDIS_REPLY_STRING || r->type == REDIS_REPLY_STATUS);
    return text ? r->str : "";
}

uint64_t reply_number(const redisReply *r)
{
    if (r && r->type == REDIS_REPLY_INTEGER)
        return r->integer < 0 ? 0 : (uint64_t)r->integer;
    const char *text = reply_text(r);
    return *text == '-' ? 0 : strtoull(text, NULL, 10);
}

static double reply_real(const redisReply *r)
{
    return strtod(reply_text(r), NULL);
}

size_t reply_count(const redisReply *r)
{
    return r && r->type == REDIS_REPLY_ARRAY ? r->elements : 0;
}

const redisReply *reply_at(const redisReply *r, size_t i)
{
    return i < reply_count(r) ? r->element[i] : NULL;
}

static void free_reply(redisReply **reply)
{
    if (*reply)
        freeReplyObject(*reply);
}
#define AUTO_REPLY __attribute__((cleanup(free_reply))) redisReply *

static void copy_text(char *out, size_t size, const redisReply *r)
{
    snprintf(out, size, "%s", reply_text(r));
}

// malloc'd copy of a reply's bytes with a zero behind them; NULL when it is empty or memory ran out.
static void *copy_bytes(const redisReply *r, size_t *length)
{
    *length = 0;
    if (!r || r->type != REDIS_REPLY_STRING || !r->str)
        return NULL;
    size_t n = (size_t)r->len;
    char *copy = malloc(n + 1);
    if (copy) {
        memcpy(copy, r->str, n);
        copy[n] = 0;
        *length = n;
    }
    return copy;
}

static int no_memory(struct err *e)
{
    return err_set(e, ERR_NO_MEMORY, "out of memory for the queue");
}

void args_bytes(struct args *a, const void *bytes, size_t length)
{
    if (a->n < ARGS_MAX) {
        a->value[a->n] = bytes;
        a->length[a->n++] = length;
    }
}

void args_text(struct args *a, const char *text)
{
    args_bytes(a, text, strlen(text));
}

// Starts *a with NULL-terminated texts.
static void args_start(struct args *a, const char *const *texts)
{
    a->n = 0;
    for (; *texts; texts++)
        args_text(a, *texts);
}
#define ARGS(a, ...) args_start((a), (const char *const[]){__VA_ARGS__, NULL})

struct digits digits(uint64_t n)
{
    struct digits d;
    snprintf(d.text, sizeof d.text, "%" PRIu64, n);
    return d;
}

// In [0, 1): jitter.
static struct digits random_fraction(void)
{
    uint32_t n = 0;
    struct digits d;
    if (getrandom(&n, sizeof n, 0) != sizeof n)
        n = (uint32_t)monotonic_ms() * 2654435761u;
    snprintf(d.text, sizeof d.text, "0.%09u", n % 1000000000u);
    return d;
}

// ---- calls

// The connection broke, as opposed to a refusal or a deadline that passed.
static bool broke(const struct queue *q, int rc)
{
    return rc == ERR_UNAVAILABLE && redis_problem(q->redis) == REDIS_PROBLEM_NONE;
}

int queue_eval(struct queue *q, const struct args *a, redisReply **reply, struct err *e)
{
    int rc = redis_eval(q->redis, &q->script, reply, e, q->prefix, a->n, (const char **)a->value, a->length);
    if (broke(q, rc))
        rc = redis_eval(q->redis, &q->script, reply, e, q->prefix, a->n, (const char **)a->value, a->length);
    return rc;
}

// An operation that only reads, for users who may do no more.
static int eval_figures(struct queue *q, const char *op, redisReply **reply, struct err *e)
{
    struct args a;
    ARGS(&a, op);
    q->script.reads = true;
    int rc = queue_eval(q, &a, reply, e);
    q->script.reads = false;
    return rc;
}

int queue_command(struct queue *q, const struct args *a, int block_ms, redisReply **reply, struct err *e)
{
    int rc = redis_command_blocking(q->redis, reply, e, block_ms, a->n, (const char **)a->value, a->length);
    if (broke(q, rc))
        rc = redis_command_blocking(q->redis, reply, e, block_ms, a->n, (const char **)a->value, a->length);
    return rc;
}

// ---- opening

static void info_value(const char *info, const char *name, char *out, size_t size)
{
    const char *at = strstr(info, name);
    size_t length = at ? strcspn(at + strlen(name), "\r\n") : 0;
    snprintf(out, size, "%.*s", (int)length, at ? at + strlen(name) : "");
}

static int check_server(struct queue *q, enum queue_role role, struct err *e)
{
    AUTO_REPLY server = NULL;
    AUTO_REPLY memory = NULL;
    int rc = redis_command(q->redis, &server, e, "INFO server");
    rc = rc ? rc : redis_command(q->redis, &memory, e, "INFO memory");
    if (rc != 0)
        return role == QUEUE_PRODUCER && redis_problem(q->redis) == REDIS_PROBLEM_NOPERM ? 0 : rc;
    char version[32], policy[32];
    info_value(reply_text(server), "redis_version:", version, sizeof version);
    info_value(reply_text(memory), "maxmemory_policy:", policy, sizeof policy);
    const char *minor = strchr(version, '.');
    q->version = 100 * (int)strtol(version, NULL, 10) + (minor ? (int)strtol(minor + 1, NULL, 10) : 0);
    if (strtol(version, NULL, 10) < 7)
        return err_set(e, ERR_UNSUPPORTED, "Redis at %s is version %s; needed: 7.0 or newer", redis_address(q->redis),
                       version);
    if (strcmp(policy, "noeviction") != 0)
        return err_set(e, ERR_REFUSED,
                       "Redis at %s has maxmemory-policy %s, which loses jobs; set it: CONFIG SET maxmemory-policy "
                       "noeviction",
                       redis_address(q->redis), policy);
    return 0;
}

int queue_open(struct queue **out, const char *url, const char *name, enum queue_role role,
               const struct redis_options *options, struct err *e)
{
    *out = NULL;
    TRY(job_check_name("the queue's name", name, KEY_MAX_QUEUE, e));
    struct queue *q = calloc(1, sizeof *q);
    if (!q)
        return no_memory(e);
    snprintf(q->name, sizeof q->name, "%s", name);
    snprintf(q->prefix, sizeof q->prefix, KEY_PREFIX, name);
    redis_script(&q->script, queue_lua_start, (size_t)(queue_lua_end - queue_lua_start));
    q->script.function = true;
    int rc = redis_open(&q->redis, url, options, e);
    rc = rc ? rc : check_server(q, role, e);
    if (rc != 0) {
        queue_close(q);
        return rc;
    }
    *out = q;
    return 0;
}

void queue_close(struct queue *q)
{
    if (!q)
        return;
    redis_close(q->redis);
    queue_drop_judged(q);
    free(q->tenants);
    free(q->models);
    free(q);
}

struct redis *queue_redis(struct queue *q)
{
    return q->redis;
}

// ---- settings, tenants, models

int queue_set(struct queue *q, const char *name, uint64_t value, struct err *e)
{
    struct args a;
    AUTO_REPLY reply = NULL;
    ARGS(&a, "set", name, digits(value).text);
    TRY(queue_eval(q, &a, &reply, e));
    if (*reply_text(reply))
        return 0;
    return err_set(e, ERR_INVALID, "the queue has no setting %.40s; PROTOCOL.md lists them", name);
}

int queue_tenant_add(struct queue *q, const char *tenant, double weight, struct err *e)
{
    return queue_tenant_limit(q, tenant, &(struct queue_limits){weight, -1, -1, -1}, e);
}

int queue_tenant_limit(struct queue *q, const char *tenant, const struct queue_limits *limits, struct err *e)
{
    // The order is that of ops.tenant in queue.lua.
    const struct {
        const char *what;
        double value, min, max, scale; // scale: of a unit in the script's
    } rows[] = {{"weight", limits->weight, 0.001, 1000, 1},
                {"rate", limits->rate, 0, QUEUE_LIMIT_MAX, 1},
                {"burst", limits->burst_s, 0, QUEUE_LIMIT_MAX, 1000},
                {"limit of work in the queue", limits->max_queued_s, 0, QUEUE_LIMIT_MAX, 1000}};
    struct args a;
    char text[sizeof rows / sizeof *rows][32];
    TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    ARGS(&a, "tenant", tenant);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const double v = rows[i].value;
        if (!(v < 0) && !(v >= rows[i].min && v <= rows[i].max))
            return err_set(e, ERR_INVALID, "the %s of tenant %s is %g; allowed: %g to %g", rows[i].what, tenant, v,
                           rows[i].min, rows[i].max);
        snprintf(text[i], sizeof text[i], "%.*g", rows[i].scale > 1 ? 12 : 6, v * rows[i].scale);
        args_text(&a, v < 0 ? "" : text[i]);
    }
    return queue_eval(q, &a, NULL, e);
}

int queue_tenants(struct queue *q, struct queue_tenant **list, size_t *count, struct err *e)
{
    enum { FIELDS = 8 }; // of a tenant in the answer
    struct args a;
    AUTO_REPLY reply = NULL;
    *list = NULL;
    *count = 0;
    ARGS(&a, "doors");
    TRY(queue_eval(q, &a, &reply, e));
    size_t n = reply_count(reply) / FIELDS;
    struct queue_tenant *t = calloc(n ? n : 1, sizeof *t);
    if (!t)
        return no_memory(e);
    for (size_t i = 0; i < n; i++) {
        const size_t at = FIELDS * i;
        copy_text(t[i].name, sizeof t[i].name, reply_at(reply, at));
        t[i].waiting = reply_number(reply_at(reply, at + 2));
        t[i].ready = reply_number(reply_at(reply, at + 3));
        t[i].gpu_ms = reply_number(reply_at(reply, at + 4));
        t[i].limits = (struct queue_limits){.weight = reply_real(reply_at(reply, at + 1)),
                                            .rate = reply_real(reply_at(reply, at + 5)),
                                            .burst_s = 1e-3 * reply_real(reply_at(reply, at + 6)),
                                            .max_queued_s = 1e-3 * reply_real(reply_at(reply, at + 7))};
    }
    *list = t;
    *count = n;
    return 0;
}

static int model_op(struct queue *q, const char *op, const char *name, const char *version, struct err *e)
{
    struct args a;
    TRY(job_check_name("the model's name", name, JOB_MAX_NAME, e));
    TRY(job_check_name("the model's version", version, JOB_MAX_NAME, e));
    ARGS(&a, op, name, version);
    return queue_eval(q, &a, NULL, e);
}

int queue_model_publish(struct queue *q, const char *name, const char *version, struct err *e)
{
    return model_op(q, "publish", name, version, e);
}

int queue_serve(struct queue *q, const char *name, const char *version, const char *worker, struct err *e)
{
    struct args a;
    TRY(job_check_name("the model's name", name, JOB_MAX_NAME, e));
    TRY(job_check_name("the model's version", version, JOB_MAX_NAME, e));
    TRY(job_check_name("the worker's name", worker, JOB_MAX_NAME, e));
    ARGS(&a, "publish", name, version, worker);
    return queue_eval(q, &a, NULL, e);
}

int queue_model_withdraw(struct queue *q, const char *name, const char *version, struct err *e)
{
    return model_op(q, "withdraw", name, version, e);
}

// The value of field in a flat array of names and values; NULL if it is not there.
static const redisReply *pair_value(const redisReply *pairs, const char *field)
{
    for (size_t i = 0; i + 1 < reply_count(pairs); i += 2)
        if (strcmp(reply_text(reply_at(pairs, i)), field) == 0)
            return reply_at(pairs, i + 1);
    return NULL;
}

int queue_models(struct queue *q, struct queue_model **list, size_t *count, struct err *e)
{
    struct args a;
    char key[KEY_SIZE];
    AUTO_REPLY reply = NULL;
    *list = NULL;
    *count = 0;
    snprintf(key, sizeof key, KEY_MODELS, q->prefix);
    ARGS(&a, "HGETALL", key);
    TRY(queue_command(q, &a, 0, &reply, e));
    struct queue_model *m = calloc(reply_count(reply) / 2 + 1, sizeof *m);
    if (!m)
        return no_memory(e);
    size_t n = 0;
    for (size_t i = 0; i + 1 < reply_count(reply); i += 2) {
        const char *field = reply_text(reply_at(reply, i)), *at = strchr(field, '@');
        if (!at)
            continue; // "name" -> version, the default
        snprintf(m[n].name, sizeof m[n].name, "%.*s", (int)(at - field), field);
        snprintf(m[n].version, sizeof m[n].version, "%s", at + 1);
        m[n].published_ms = reply_number(reply_at(reply, i + 1));
        m[n].is_default = strcmp(reply_text(pair_value(reply, m[n].name)), m[n].version) == 0;
        n++;
    }
    *list = m;
    *count = n;
    return 0;
}

// ---- the producer's side

int queue_submit(struct queue *q, const char *tenant, const void *job, size_t length, char entry[QUEUE_ENTRY_SIZE],
                 struct err *e)
{
    struct args a;
    char key[KEY_SIZE];
    AUTO_REPLY reply = NULL;
    TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    snprintf(key, sizeof key, KEY_IN, q->prefix, tenant);
    ARGS(&a, "XADD", key, "*", "job");
    args_bytes(&a, job, length);
    TRY(queue_command(q, &a, 0, &reply, e));
    copy_text(entry, QUEUE_ENTRY_SIZE, reply);
    q->submitted_by = redis_connections(q->redis);
    return 0;
}

// Over the connection that submitted, and no other.
static int ask_receipt(struct queue *q, const char *command, const char *local, unsigned replicas, int timeout_ms,
                       redisReply **reply, struct err *e)
{
    struct args a;
    struct digits n = digits(replicas), timeout = digits((uint64_t)timeout_ms);
    ARGS(&a, command);
    if (local)
        args_text(&a, local);
    args_text(&a, n.text);
    args_text(&a, timeout.text);
    int rc = redis_command_blocking(q->redis, reply, e, timeout_ms, a.n, (const char **)a.value, a.length);
    if (redis_connections(q->redis) == q->submitted_by)
        return rc;
    if (*reply)
        freeReplyObject(*reply);
    *reply = NULL;
    return err_set(e, ERR_UNAVAILABLE, "the connection to Redis broke: whether the submission is safe is not known");
}

int queue_receipt(struct queue *q, unsigned replicas, int timeout_ms, struct queue_receipt *receipt, bool *confirmed,
                  struct err *e)
{
    AUTO_REPLY reply = NULL;
    int rc = ERR_UNSUPPORTED;
    *receipt = (struct queue_receipt){.on_disk = true};
    *confirmed = false;
    if (q->version == 0 || q->version >= 702)
        rc = ask_receipt(q, "WAITAOF", "1", replicas, timeout_ms, &reply, e);
    if (rc == ERR_INTERNAL && strstr(e->text, "appendonly")) // the server keeps no such file; its replicas may
        rc = ask_receipt(q, "WAITAOF", "0", replicas, timeout_ms, &reply, e);
    if (rc == 0) {
        receipt->local = (unsigned)reply_number(reply_at(reply, 0));
        receipt->replicas = (unsigned)reply_number(reply_at(reply, 1));
    } else if (rc == ERR_UNSUPPORTED || redis_problem(q->redis) == REDIS_PROBLEM_NOPERM ||
               strstr(e->text, "unknown command")) {
        TRY(ask_receipt(q, "WAIT", NULL, replicas, timeout_ms, &reply, e));
        *receipt = (struct queue_receipt){.replicas = (unsigned)reply_number(reply)};
    } else {
        return rc;
    }
    *confirmed = receipt->replicas >= replicas && (receipt->on_disk ? receipt->local > 0 : replicas > 0);
    return 0;
}

int queue_cancel(struct queue *q, const char *tenant, const char *id, Ditfleet__V1__State *state, struct err *e)
{
    struct args a;
    AUTO_REPLY reply = NULL;
    TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    TRY(job_check_name("id", id, JOB_MAX_NAME, e));
    ARGS(&a, "cancel", tenant, id);
    TRY(queue_eval(q, &a, &reply, e));
    if (!*reply_text(reply))
        return err_set(e, ERR_NOT_FOUND, "tenant %s has no job %s, or it is not admitted yet", tenant, id);
    if (state)
        *state = job_state_parse(reply_text(reply));
    return 0;
}

static int check_record_id(const char *id, struct err *e)
{
    return job_check_name("id", *id == '@' ? id + 1 : id, JOB_MAX_NAME, e);
}

static void fill_record(struct queue_record *r, const redisReply *pairs)
{
    const struct {
        const char *field;
        char *out;
        size_t size;
    } texts[] = {
        {"pool", r->pool, sizeof r->pool},       {"class", r->priority, sizeof r->priority},
        {"worker", r->worker, sizeof r->worker}, {"stage", r->stage, sizeof r->stage},
        {"entry", r->entry, sizeof r->entry},    {"error_code", r->error_code, sizeof r->error_code},
        {"error", r->error, sizeof r->error},
    };
    const struct {
        const char *field;
        uint64_t *out;
    } numbers[] = {
        {"epoch", &r->epoch},
        {"gpu_ms", &r->gpu_ms},
        {"created_ms", &r->created_ms},
        {"updated_ms", &r->updated_ms},
        {"lease_ms", &r->lease_ms},
        {"due_ms", &r->due_ms},
        {"deadline_ms", &r->deadline_ms},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        copy_text(texts[i].out, texts[i].size, pair_value(pairs, texts[i].field));
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        *numbers[i].out = reply_number(pair_value(pairs, numbers[i].field));
    r->state = job_state_parse(reply_text(pair_value(pairs, "state")));
    r->step = (uint32_t)reply_number(pair_value(pairs, "step"));
    r->steps = (uint32_t)reply_number(pair_value(pairs, "steps"));
    r->attempts_app = (uint32_t)reply_number(pair_value(pairs, "attempts_app"));
    r->attempts_infra = (uint32_t)reply_number(pair_value(pairs, "attempts_infra"));
    r->payload = copy_bytes(pair_value(pairs, "payload"), &r->payload_length);
    r->result = copy_bytes(pair_value(pairs, "result"), &r->result_length);
}

int queue_time(struct queue *q, uint64_t *now_ms, struct err *e)
{
    struct args a;
    AUTO_REPLY time = NULL;
    ARGS(&a, "TIME");
    TRY(queue_command(q, &a, 0, &time, e));
    *now_ms = reply_number(reply_at(time, 0)) * 1000 + reply_number(reply_at(time, 1)) / 1000;
    return 0;
}

int queue_get(struct queue *q, const char *tenant, const char *id, struct queue_record *record, struct err *e)
{
    struct args a;
    char key[KEY_SIZE];
    AUTO_REPLY pairs = NULL;
    memset(record, 0, sizeof *record);
    TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    TRY(check_record_id(id, e));
    snprintf(key, sizeof key, KEY_JOB, q->prefix, tenant, id);
    ARGS(&a, "HGETALL", key);
    TRY(queue_command(q, &a, 0, &pairs, e));
    const char *same_as = reply_text(pair_value(pairs, "same_as"));
    if (*same_as && *same_as != '@')
        return queue_get(q, tenant, same_as, record, e);
    if (reply_count(pairs) == 0)
        return err_set(e, ERR_NOT_FOUND, "tenant %s has no job %s, or it is not admitted yet", tenant, id);
    TRY(queue_time(q, &record->now_ms, e));
    snprintf(record->id, sizeof record->id, "%s", id);
    fill_record(record, pairs);
    return 0;
}

void queue_record_free(struct queue_record *record)
{
    free(record->payload);
    free(record->result);
    record->payload = record->result = NULL;
}

// ---- awaiting a result
// The record under the id may belong to another submission (same id, other bytes), whose result must not be taken for
// ours. It is ours if it names our entry, or if our receipt "@<entry>" says that ours was the same job.

enum owner { NOBODY, OURS, OTHERS };

struct wait {
    struct queue *q;
    const char *entry; // NULL: any
    char job_key[KEY_SIZE], receipt_key[KEY_SIZE], events_key[KEY_SIZE], receipt_events_key[KEY_SIZE];
    char cursor[QUEUE_ENTRY_SIZE]; // in events_key
    queue_on_event *on_event;
    void *arg;
};

static int look(struct wait *w, enum owner *owner, Ditfleet__V1__Result **result, struct err *e)
{
    struct args a;
    AUTO_REPLY job = NULL;
    AUTO_REPLY receipt = NULL;
    const redisReply *found = NULL;
    ARGS(&a, "HMGET", w->job_key, "entry", "result");
    TRY(queue_command(w->q, &a, 0, &job, e));
    const char *entry = reply_text(reply_at(job, 0));
    *owner = !*entry ? NOBODY : !w->entry || strcmp(entry, w->entry) == 0 ? OURS : OTHERS;
    if (*owner != OURS && w->entry) {
        ARGS(&a, "HMGET", w->receipt_key, "same_as", "result");
        TRY(queue_command(w->q, &a, 0, &receipt, e));
        if (*reply_text(reply_at(receipt, 0)))
            *owner = OURS;
        else
            found = reply_at(receipt, 1);
    }
    if (*owner == OURS)
        found = reply_at(job, 1);
    if (!found || found->type != REDIS_REPLY_STRING)
        return 0;
    return result_unpack(found->str, (size_t)found->len, result, e);
}

static int deliver(struct wait *w, const redisReply *entries, struct err *e)
{
    for (size_t i = 0; i < reply_count(entries); i++) {
        const redisReply *fields = reply_at(reply_at(entries, i), 1), *bytes = pair_value(fields, "event");
        copy_text(w->cursor, sizeof w->cursor, reply_at(reply_at(entries, i), 0));
        Ditfleet__V1__Event *event = NULL;
        if (!bytes || !w->on_event || event_unpack(bytes->str, (size_t)bytes->len, &event, e) != 0)
            continue;
        int rc = w->on_event(w->arg, event);
        event_free(event);
        TRY(rc);
    }
    return 0;
}

// Waits for events. Those of the job are delivered and passed over only when it is known to be ours.
// block_ms 0: only what is there. (A server ends a blocked read when its timer looks, up to 100 ms late.)
static int wait_events(struct wait *w, enum owner owner, int block_ms, struct err *e)
{
    struct args a;
    AUTO_REPLY reply = NULL;
    struct digits block = digits((uint64_t)block_ms);
    ARGS(&a, "XREAD", "COUNT", "100");
    if (block_ms > 0)
        args_text(&a, "BLOCK"), args_text(&a, block.text);
    args_text(&a, "STREAMS");
    if (owner != OTHERS)
        args_text(&a, w->events_key);
    if (owner != OURS && w->entry)
        args_text(&a, w->receipt_events_key);
    if (owner != OTHERS)
        args_text(&a, w->cursor);
    if (owner != OURS && w->entry)
        args_text(&a, "0-0");
    TRY(queue_command(w->q, &a, block_ms, &reply, e));
    if (owner == OURS)
        return deliver(w, reply_at(reply_at(reply, 0), 1), e);
    if (reply_count(reply) > 0 && owner == NOBODY) // events outlived their record: do not spin on them
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    return 0;
}

int queue_await(struct queue *q, const char *tenant, const char *id, const char *entry, int64_t timeout_ms,
                queue_on_event *on_event, void *arg, Ditfleet__V1__Result **result, struct err *e)
{
    struct wait w = {.q = q, .entry = entry, .cursor = "0-0", .on_event = on_event, .arg = arg};
    char receipt[QUEUE_ENTRY_SIZE + 1];
    *result = NULL;
    TRY(job_check_name("the tenant's name", tenant, JOB_MAX_TENANT, e));
    TRY(check_record_id(id, e));
    snprintf(receipt, sizeof receipt, "@%s", entry ? entry : "");
    snprintf(w.job_key, sizeof w.job_key, KEY_JOB, q->prefix, tenant, id);
    snprintf(w.receipt_key, sizeof w.receipt_key, KEY_JOB, q->prefix, tenant, receipt);
    snprintf(w.events_key, sizeof w.events_key, KEY_EVENTS, q->prefix, tenant, id);
    snprintf(w.receipt_events_key, sizeof w.receipt_events_key, KEY_EVENTS, q->prefix, tenant, receipt);
    int64_t end = timeout_ms < 0 ? INT64_MAX : monotonic_ms() + timeout_ms;
    for (;;) {
        enum owner owner;
        Ditfleet__V1__Result *found = NULL;
        TRY(look(&w, &owner, &found, e));
        int64_t left = end - monotonic_ms();
        int rc = 0;
        if (found && owner == OURS)
            rc = wait_events(&w, owner, 0, e); // what came with the result
        if (rc == 0 && !found && left <= 0)
            rc = err_set(e, ERR_TIMEOUT, "job %s is not final yet", id);
        if (rc == 0 && !found)
            rc = wait_events(&w, owner, left > 1000 ? 1000 : left < 1 ? 1 : (int)left, e);
        if (rc != 0)
            result_free(found);
        else
            *result = found;
        if (rc != 0 || found)
            return rc;
    }
}

// ---- the holder's side

// What the script answered to a holder.
static int fence_answer(const struct queue_fence *f, const char *answer, struct err *e)
{
    if (strcmp(answer, "ok") == 0)
        return 0;
    if (strcmp(answer, "CANCELLED") == 0)
        return err_set(e, ERR_CANCELLED, "job %s was cancelled", f->id);
    if (strcmp(answer, "EXPIRED") == 0)
        return err_set(e, ERR_EXPIRED, "the deadline of job %s passed", f->id);
    return err_set(e, ERR_STALE, "job %s is not held under epoch %" PRIu64 " any more; nothing was written", f->id,
                   f->epoch);
}

// Starts *a with the operation and the fence; *epoch keeps the number's text.
static void fence_args(struct args *a, const char *op, const struct queue_fence *f, struct digits *epoch)
{
    *epoch = digits(f->epoch);
    ARGS(a, op, f->tenant, f->id, epoch->text, f->nonce);
}

static int fence_call(struct queue *q, const struct args *a, const struct queue_fence *f, struct err *e)
{
    AUTO_REPLY reply = NULL;
    TRY(queue_eval(q, a, &reply, e));
    return fence_answer(f, reply_text(reply), e);
}

static int take_job(struct queue_job *job, const redisReply *r)
{
    memset(job, 0, sizeof *job);
    copy_text(job->fence.tenant, sizeof job->fence.tenant, reply_at(r, 0));
    copy_text(job->fence.id, sizeof job->fence.id, reply_at(r, 1));
    job->fence.epoch = reply_number(reply_at(r, 2));
    copy_text(job->fence.nonce, sizeof job->fence.nonce, reply_at(r, 3));
    copy_text(job->pool, sizeof job->pool, reply_at(r, 4));
    job->attempts_app = (uint32_t)reply_number(reply_at(r, 5));
    job->attempts_infra = (uint32_t)reply_number(reply_at(r, 6));
    job->created_ms = reply_number(reply_at(r, 7));
    job->lease_ms = reply_number(reply_at(r, 8));
    job->deadline_ms = reply_number(reply_at(r, 9));
    job->payload = copy_bytes(reply_at(r, 10), &job->payload_length);
    return job->payload ? 0 : ERR_NO_MEMORY;
}

static int make_nonce(char nonce[QUEUE_NONCE_SIZE], struct err *e)
{
    unsigned char bytes[16];
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
        return err_set(e, ERR_IO, "the system gave no random bytes");
    for (size_t i = 0; i < sizeof bytes; i++)
        snprintf(nonce + 2 * i, 3, "%02x", bytes[i]);
    return 0;
}

static int check_claim(const struct queue_claim *want, struct err *e)
{
    TRY(job_check_name("the worker's name", want->worker, JOB_MAX_NAME, e));
    TRY(job_check_name("the worker's incarnation", want->incarnation, JOB_MAX_NAME, e));
    if (want->max < 1 || want->max > QUEUE_BATCH || want->n_pools < 1 || want->n_pools > QUEUE_MAX_POOLS ||
        want->lease_ms < 1)
        return err_set(e, ERR_INVALID,
                       "a claim asks for %u jobs of %zu pools; allowed: 1 to %d of 1 to %d, with a lease", want->max,
                       want->n_pools, QUEUE_BATCH, QUEUE_MAX_POOLS);
    return 0;
}

int queue_claim(struct queue *q, const struct queue_claim *want, struct queue_job *jobs, size_t *count,
                char cursor[QUEUE_ENTRY_SIZE], struct err *e)
{
    struct args a;
    char nonces[QUEUE_BATCH][QUEUE_NONCE_SIZE];
    AUTO_REPLY reply = NULL;
    *count = 0;
    TRY(check_claim(want, e));
    struct digits lease = digits(want->lease_ms), n = digits(want->max);
    ARGS(&a, "claim", want->worker, want->incarnation, lease.text, n.text);
    for (unsigned i = 0; i < want->max; i++) {
        TRY(make_nonce(nonces[i], e));
        args_text(&a, nonces[i]);
    }
    for (size_t i = 0; i < want->n_pools; i++)
        args_text(&a, want->pools[i]);
    TRY(queue_eval(q, &a, &reply, e));
    if (cursor)
        copy_text(cursor, QUEUE_ENTRY_SIZE, reply_at(reply, 0));
    for (size_t i = 1; i < reply_count(reply) && *count < want->max; i++) {
        if (take_job(&jobs[*count], reply_at(reply, i)) != 0) {
            while (*count > 0)
                queue_job_free(&jobs[--*count]);
            return no_memory(e); // the leases run out
        }
        ++*count;
    }
    return 0;
}

void queue_job_free(struct queue_job *job)
{
    free(job->payload);
    job->payload = NULL;
}

int queue_wait(struct queue *q, const char *cursor, int timeout_ms, bool *woken, struct err *e)
{
    struct args a;
    char key[KEY_SIZE];
    AUTO_REPLY reply = NULL;
    struct digits block = digits((uint64_t)(timeout_ms < 1 ? 1 : timeout_ms));
    snprintf(key, sizeof key, KEY_WAKE, q->prefix);
    ARGS(&a, "XREAD", "COUNT", "1", "BLOCK", block.text, "STREAMS", key, cursor);
    TRY(queue_command(q, &a, timeout_ms, &reply, e));
    *woken = reply_count(reply) > 0;
    return 0;
}

int queue_beat(struct queue *q, const struct queue_fence *fence, uint64_t lease_ms, struct err *e)
{
    struct args a;
    struct digits epoch, lease = digits(lease_ms);
    fence_args(&a, "beat", fence, &epoch);
    args_text(&a, lease.text);
    return fence_call(q, &a, fence, e);
}

int queue_progress(struct queue *q, const struct queue_fence *fence, const struct queue_progress *p, struct err *e)
{
    struct args a;
    char eta[32];
    struct digits epoch, step = digits(p->step), steps = digits(p->steps);
    if (p->state != DITFLEET__V1__STATE__STATE_RUNNING && p->state != DITFLEET__V1__STATE__STATE_UPLOADING)
        return err_set(e, ERR_INTERNAL, "progress reports state %s; allowed: RUNNING, UPLOADING",
                       job_state_name(p->state));
    snprintf(eta, sizeof eta, "%.3f", isfinite(p->eta_seconds) && p->eta_seconds > 0 ? p->eta_seconds : 0.0);
    fence_args(&a, "beat", fence, &epoch);
    const char *rest[] = {"0", job_state_name(p->state), p->stage, step.text, steps.text, eta};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        args_text(&a, rest[i]);
    return fence_call(q, &a, fence, e);
}

int queue_finish(struct queue *q, const struct queue_fence *fence, const void *result, size_t length, struct err *e)
{
    struct args a;
    struct digits epoch;
    fence_args(&a, "finish", fence, &epoch);
    args_bytes(&a, result, length);
    return fence_call(q, &a, fence, e);
}

int queue_fail(struct queue *q, const struct queue_fence *fence, enum queue_cause cause, const struct err *why,
               Ditfleet__V1__State *state, struct err *e)
{
    struct args a;
    AUTO_REPLY reply = NULL;
    struct digits epoch, jitter = random_fraction();
    fence_args(&a, "fail", fence, &epoch);
    const char *rest[] = {cause == QUEUE_CAUSE_APP ? "app" : "infra", err_name(why->code), why->text,
                          why->retryable ? "1" : "0", jitter.text};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        args_text(&a, rest[i]);
    TRY(queue_eval(q, &a, &reply, e));
    TRY(fence_answer(fence, reply_text(reply_at(reply, 0)), e));
    if (state)
        *state = job_state_parse(reply_text(reply_at(reply, 1)));
    return 0;
}

int queue_release(struct queue *q, const struct queue_fence *fence, struct err *e)
{
    struct args a;
    struct digits epoch;
    fence_args(&a, "release", fence, &epoch);
    return fence_call(q, &a, fence, e);
}

int queue_release_all(struct queue *q, const char *worker, const char *incarnation, const struct err *why,
                      unsigned *count, struct err *e)
{
    struct args a;
    unsigned total = 0;
    TRY(job_check_name("the worker's name", worker, JOB_MAX_NAME, e));
    for (bool more = true; more;) {
        AUTO_REPLY reply = NULL;
        struct digits jitter = random_fraction();
        ARGS(&a, "release_all", worker, incarnation ? incarnation : "", err_name(why->code), why->text, jitter.text);
        TRY(queue_eval(q, &a, &reply, e));
        total += (unsigned)reply_number(reply_at(reply, 0));
        more = reply_number(reply_at(reply, 1)) != 0;
    }
    if (count)
        *count = total;
    return 0;
}

// ---- upkeep

int queue_reap(struct queue *q, struct queue_reaped *out, struct err *e)
{
    struct args a;
    AUTO_REPLY reply = NULL;
    struct digits jitter = random_fraction();
    ARGS(&a, "reap", jitter.text);
    TRY(queue_eval(q, &a, &reply, e));
    out->lost = (unsigned)reply_number(reply_at(reply, 0));
    out->due = (unsigned)reply_number(reply_at(reply, 1));
    out->expired = (unsigned)reply_number(reply_at(reply, 2));
    out->orphans = (unsigned)reply_number(reply_at(reply, 3));
    out->next_ms = reply_number(reply_at(reply, 4));
    return 0;
}

int queue_stats(struct queue *q, struct queue_stats *s, struct err *e)
{
    AUTO_REPLY reply = NULL;
    const struct {
        const char *field;
        uint64_t *out;
    } rows[] = {
        {"QUEUED", &s->queued},       {"DELAYED", &s->delayed},
        {"LEASED", &s->leased},       {"RUNNING", &s->running},
        {"UPLOADING", &s->uploading}, {"RETRY_WAIT", &s->retry_wait},
        {"SUCCEEDED", &s->succeeded}, {"DEAD", &s->dead},
        {"CANCELLED", &s->cancelled}, {"EXPIRED", &s->expired},
        {"refused", &s->refused},     {"retries", &s->retries},
        {"waiting", &s->waiting},     {"dead_letter", &s->dead_letter},
        {"gpu_ms", &s->backlog_ms},
    };
    TRY(eval_figures(q, "stats", &reply, e));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        *rows[i].out = reply_number(pair_value(reply, rows[i].field));
    return 0;
}

int queue_pools(struct queue *q, struct queue_pool **list, size_t *count, struct err *e)
{
    enum { FIELDS = 8 }; // of a pool in the answer
    AUTO_REPLY reply = NULL;
    *list = NULL;
    *count = 0;
    TRY(eval_figures(q, "pools", &reply, e));
    const size_t n = reply_count(reply) / FIELDS;
    struct queue_pool *pools = calloc(n + 1, sizeof *pools);
    if (!pools)
        return no_memory(e);
    for (size_t i = 0; i < n; i++) {
        struct queue_pool *p = &pools[i];
        uint64_t *const numbers[] = {&p->queued,     &p->delayed,    &p->working,  &p->queued_ms,
                                     &p->delayed_ms, &p->working_ms, &p->oldest_ms};
        copy_text(p->name, sizeof p->name, reply_at(reply, FIELDS * i));
        for (size_t k = 0; k < FIELDS - 1; k++)
            *numbers[k] = reply_number(reply_at(reply, FIELDS * i + 1 + k));
    }
    *list = pools;
    *count = n;
    return 0;
}

int queue_live(struct queue *q, size_t max, struct queue_name **list, size_t *count, struct err *e)
{
    struct args a;
    char key[KEY_SIZE];
    AUTO_REPLY reply = NULL;
    struct digits last = digits(max ? max - 1 : 0);
    *list = NULL;
    *count = 0;
    snprintf(key, sizeof key, KEY_LIVE, q->prefix);
    ARGS(&a, "ZRANGE", key, "0", last.text);
    TRY(queue_command(q, &a, 0, &reply, e));
    struct queue_name *names = calloc(reply_count(reply) + 1, sizeof *names);
    if (!names)
        return no_memory(e);
    for (size_t i = 0; i < reply_count(reply); i++) {
        const char *member = reply_text(reply_at(reply, i)), *colon = strchr(member, ':');
        if (!colon)
            continue;
        snprintf(names[*count].tenant, sizeof names->tenant, "%.*s", (int)(colon - member), member);
        snprintf(names[(*count)++].id, sizeof names->id, "%s", colon + 1);
    }
    *list = names;
    return 0;
}
