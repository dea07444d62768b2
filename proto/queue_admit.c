// queue_admit.c: admission: from the doors, where anybody may write anything, to records the fleet can trust.
//
// The bytes are parsed and validated here; deduplication, the record, ready and the removal of the entry are one script
// call. An entry leaves its door only in that call, so an admitter that dies loses nothing: the next one takes over
// what was delivered to it. A job that is still being judged is kept here, its entry in the door.
#include "proto/queue_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    REFRESH_MS = 1000,         // how stale the registries may be
    STEAL_EVERY_MS = 1000,     // how often a dead admitter's entries are looked for
    STEAL_IDLE_MS = 5000,      // how long an entry may stay delivered; admission takes milliseconds
    DEAD_LETTER_BYTES = 65536, // of a refused entry, kept in dlq
    JUDGED_OF_TENANT = 16,     // while so many of a tenant's jobs are being judged, its door is not read,
    JUDGED_MAX = 256           // and while so many are in all, only those of tenants that have none
};

uint64_t queue_price_default(void *arg, const Ditfleet__V1__Job *job)
{
    (void)arg;
    double width = job->width ? job->width : 1024, height = job->height ? job->height : 1024;
    double steps = job->num_inference_steps ? job->num_inference_steps : 28,
           images = job->num_images ? job->num_images : 1;
    double ms = 10000.0 * width * height * steps * images / (1024.0 * 1024.0 * 28.0);
    return ms < 1 ? 1 : ms > 1e12 ? 1000000000000u : (uint64_t)ms;
}

// ---- the registries

static int refresh(struct queue *q, bool force, struct err *e)
{
    struct queue_tenant *tenants;
    struct queue_model *models;
    size_t n_tenants, n_models;
    if (!force && q->tenants && monotonic_ms() < q->refresh_at)
        return 0;
    TRY(queue_tenants(q, &tenants, &n_tenants, e));
    free(q->tenants);
    q->tenants = tenants;
    q->n_tenants = n_tenants;
    TRY(queue_models(q, &models, &n_models, e));
    free(q->models);
    q->models = models;
    q->n_models = n_models;
    q->refresh_at = monotonic_ms() + REFRESH_MS;
    return 0;
}

static bool find_model(const struct queue *q, const char *wanted, char pool[JOB_MODEL_SIZE])
{
    size_t name = strcspn(wanted, "@");
    const char *version = wanted[name] ? wanted + name + 1 : NULL;
    for (size_t i = 0; i < q->n_models; i++) {
        const struct queue_model *m = &q->models[i];
        bool same = strlen(m->name) == name && strncmp(m->name, wanted, name) == 0;
        if (same && (version ? strcmp(m->version, version) == 0 : m->is_default)) {
            snprintf(pool, JOB_MODEL_SIZE, "%s@%s", m->name, m->version);
            return true;
        }
    }
    return false;
}

// The pool of a job: its model as the registry knows it. A miss counts only against the registry as it is now.
static int resolve(struct queue *q, const char *wanted, bool *fresh, char pool[JOB_MODEL_SIZE], struct err *e)
{
    if (find_model(q, wanted, pool))
        return 0;
    if (!*fresh) {
        TRY(refresh(q, true, e));
        *fresh = true;
        if (find_model(q, wanted, pool))
            return 0;
    }
    char known[200] = "";
    for (size_t i = 0, used = 0; i < q->n_models && used < sizeof known; i++)
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s@%s", i ? ", " : "", q->models[i].name,
                                 q->models[i].version);
    return err_set(e, ERR_NOT_FOUND, "model %.128s is not served by this fleet; known: %s", wanted, known);
}

// ---- one entry

struct slot {
    Ditfleet__V1__Job *job; // NULL: refused
    const char *entry, *payload;
    size_t length;
    char id[JOB_NAME_SIZE];
    char pool[JOB_MODEL_SIZE], batch[JOB_MODEL_SIZE + 64];
    char size[24], gpu_ms[24], deadline[24], not_before[24], attempts[24];
    struct err why; // code ERR_NONE: admit it
};

static void put(char out[24], uint64_t n)
{
    snprintf(out, 24, "%" PRIu64, n);
}

static void fill_slot(struct slot *s, const struct queue_admission *admission)
{
    const Ditfleet__V1__Job *job = s->job;
    queue_price *price = admission->price ? admission->price : queue_price_default;
    put(s->gpu_ms, price(admission->arg, job));
    put(s->deadline, job->deadline_ms);
    put(s->not_before, job->not_before_ms);
    put(s->attempts, job->max_attempts);
    snprintf(s->batch, sizeof s->batch, "%s %ux%u %u %s", s->pool, job->width, job->height, job->num_inference_steps,
             job_precision_name(job->precision));
}

// Returns an error only when Redis failed; what is wrong with the entry is in s->why.
static int read_slot(struct queue *q, const struct queue_admission *admission, const redisReply *entry, bool *fresh,
                     struct slot *s, struct err *e)
{
    const redisReply *fields = reply_at(entry, 1), *bytes = NULL;
    s->entry = reply_text(reply_at(entry, 0));
    for (size_t i = 0; i + 1 < reply_count(fields) && !bytes; i += 2)
        if (strcmp(reply_text(reply_at(fields, i)), "job") == 0)
            bytes = reply_at(fields, i + 1);
    s->payload = bytes ? bytes->str : "";
    s->length = bytes ? (size_t)bytes->len : 0;
    put(s->size, s->length);
    if (!bytes) {
        err_set(&s->why, ERR_CORRUPT, "the entry has no field named job");
        return 0;
    }
    if (job_parse(s->payload, s->length, &s->job, s->id, &s->why) != 0)
        return 0;
    int rc = resolve(q, s->job->model, fresh, s->pool, &s->why);
    if (rc == ERR_NOT_FOUND) {
        job_free(s->job);
        s->job = NULL;
        return 0;
    }
    if (rc != 0) {
        *e = s->why;
        return rc;
    }
    if (*s->job->callback_url && !admission->callbacks) {
        err_set(&s->why, ERR_REFUSED,
                "callback_url: callbacks are off here, and it would never be called; leave it out, or have [callback] "
                "secret_file set in the configuration of the fleet's nodes");
        job_free(s->job);
        s->job = NULL;
        return 0;
    }
    fill_slot(s, admission);
    return 0;
}

static void slot_args(struct args *a, const struct slot *s)
{
    static const char *const classes[] = {"normal", "high", "low"};
    const Ditfleet__V1__Job *job = s->job;
    size_t length = !job && s->length > DEAD_LETTER_BYTES ? DEAD_LETTER_BYTES : s->length;
    // The order is that of ADMIT in queue.lua.
    args_text(a, s->entry);
    args_text(a, s->id);
    args_bytes(a, s->payload, length);
    const char *rest[] = {s->size,
                          s->pool,
                          job ? classes[job->priority] : "",
                          s->gpu_ms,
                          s->deadline,
                          s->not_before,
                          s->attempts,
                          s->batch,
                          job ? job->callback_url : "",
                          job ? "" : err_name(s->why.code),
                          job ? "" : s->why.text};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        args_text(a, rest[i]);
}

// ---- jobs that are being judged

struct judged {
    struct judged *next;
    struct slot slot; // entry and payload point to what follows
    char tenant[JOB_MAX_TENANT + 1], entry[QUEUE_ENTRY_SIZE];
    bool done; // slot says what is to become of it
    char payload[];
};

void queue_drop_judged(struct queue *q)
{
    for (struct judged *j = q->judged, *next; j; j = next) {
        next = j->next;
        job_free(j->slot.job);
        free(j);
    }
    q->judged = NULL;
    q->n_judged = 0;
}

static unsigned judged_of(const struct queue *q, const char *tenant)
{
    unsigned n = 0;
    for (const struct judged *j = q->judged; j; j = j->next)
        n += strcmp(j->tenant, tenant) == 0;
    return n;
}

static bool may_read(const struct queue *q, const char *tenant)
{
    const unsigned own = q->n_judged ? judged_of(q, tenant) : 0;
    return own == 0 || (own < JUDGED_OF_TENANT && q->n_judged < JUDGED_MAX);
}

static bool is_judged(const struct queue *q, const char *tenant, const char *entry)
{
    const struct judged *j = q->judged;
    while (j && (strcmp(j->entry, entry) != 0 || strcmp(j->tenant, tenant) != 0))
        j = j->next;
    return j != NULL;
}

// True: there is a verdict, and s says it.
static bool judge(const struct queue_admission *admission, const char *tenant, struct slot *s)
{
    if (!s->job || !admission->judge)
        return true;
    const struct queue_submission submission = {tenant, s->entry, s->job};
    const enum queue_verdict verdict = admission->judge(admission->judge_arg, &submission, &s->why);
    if (verdict == QUEUE_DENY) {
        job_free(s->job);
        s->job = NULL;
    }
    return verdict != QUEUE_LATER;
}

// Takes the slot over.
static int keep(struct queue *q, const char *tenant, struct slot *s, struct err *e)
{
    struct judged *j = malloc(sizeof *j + s->length);
    if (!j)
        return err_set(e, ERR_NO_MEMORY, "out of memory for admission");
    *j = (struct judged){.slot = *s};
    snprintf(j->tenant, sizeof j->tenant, "%s", tenant);
    snprintf(j->entry, sizeof j->entry, "%s", s->entry);
    memcpy(j->payload, s->payload, s->length);
    j->slot.entry = j->entry;
    j->slot.payload = j->payload;
    struct judged **last = &q->judged; // who came first is asked about first
    while (*last)
        last = &(*last)->next;
    *last = j;
    q->n_judged++;
    *s = (struct slot){0};
    return 0;
}

// ---- one batch of one tenant

// answer: a word, or {"refused", code, message}.
static void tally(const struct queue_admission *admission, const char *tenant, const struct slot *s,
                  const redisReply *answer, struct queue_admitted *out)
{
    struct err why = {.code = ERR_NONE};
    out->admitted += strcmp(reply_text(answer), "admitted") == 0;
    out->duplicate += strcmp(reply_text(answer), "duplicate") == 0;
    if (reply_count(answer) == 0)
        return;
    out->refused++;
    err_set(&why, err_parse(reply_text(reply_at(answer, 1))), "%s", reply_text(reply_at(answer, 2)));
    if (admission->on_refusal)
        admission->on_refusal(admission->arg, tenant, s->id, s->entry, &why);
}

static int admit_slots(struct queue *q, const struct queue_admission *admission, const char *tenant, struct slot *slots,
                       size_t n, struct queue_admitted *out, struct err *e)
{
    struct args a = {0};
    redisReply *reply = NULL;
    if (n == 0)
        return 0;
    args_text(&a, "admit");
    args_text(&a, tenant);
    for (size_t i = 0; i < n; i++)
        slot_args(&a, &slots[i]);
    TRY(queue_eval(q, &a, &reply, e));
    for (size_t i = 0; i < n; i++)
        tally(admission, tenant, &slots[i], reply_at(reply, i), out);
    freeReplyObject(reply);
    return 0;
}

static int admit_entries(struct queue *q, const struct queue_admission *admission, const char *tenant,
                         const redisReply *entries, struct queue_admitted *out, struct err *e)
{
    size_t total = reply_count(entries);
    bool fresh = false;
    struct slot *slots = calloc(QUEUE_BATCH, sizeof *slots);
    if (!slots)
        return err_set(e, ERR_NO_MEMORY, "out of memory for admission");
    int rc = 0;
    for (size_t at = 0; at < total && rc == 0;) {
        size_t n = 0;
        memset(slots, 0, QUEUE_BATCH * sizeof *slots);
        for (; at < total && n < QUEUE_BATCH && rc == 0; at++) {
            const redisReply *entry = reply_at(entries, at);
            if (is_judged(q, tenant, reply_text(reply_at(entry, 0))))
                continue;
            rc = read_slot(q, admission, entry, &fresh, &slots[n], e);
            if (rc != 0 || judge(admission, tenant, &slots[n]))
                n++;
            else
                rc = keep(q, tenant, &slots[n], e);
            out->read++;
        }
        rc = rc ? rc : admit_slots(q, admission, tenant, slots, n, out, e);
        for (size_t i = 0; i < QUEUE_BATCH; i++)
            job_free(slots[i].job);
    }
    free(slots);
    return rc;
}

// Those about which there is a verdict by now. One that Redis was not told of is kept with it.
static int admit_judged(struct queue *q, const struct queue_admission *admission, struct queue_admitted *out,
                        struct err *e)
{
    for (struct judged **at = &q->judged, *j; (j = *at);) {
        j->done = j->done || judge(admission, j->tenant, &j->slot);
        if (!j->done) {
            at = &j->next;
            continue;
        }
        TRY(admit_slots(q, admission, j->tenant, &j->slot, 1, out, e));
        *at = j->next;
        q->n_judged--;
        job_free(j->slot.job);
        free(j);
    }
    return 0;
}

// ---- reading the doors

// Entries that an admitter took and never admitted: it died, or lost its connection in between.
static int steal(struct queue *q, const struct queue_admission *admission, struct queue_admitted *out, struct err *e)
{
    if (monotonic_ms() < q->steal_at)
        return 0;
    q->steal_at = monotonic_ms() + STEAL_EVERY_MS;
    for (size_t i = 0; i < q->n_tenants; i++) {
        struct args a = {0};
        char key[KEY_SIZE], idle[24], tenant[JOB_MAX_TENANT + 1];
        redisReply *reply = NULL;
        snprintf(tenant, sizeof tenant, "%s", q->tenants[i].name); // admit_entries may read the registry anew
        if (!may_read(q, tenant))
            continue;
        snprintf(key, sizeof key, KEY_IN, q->prefix, tenant);
        put(idle, STEAL_IDLE_MS);
        const char *argv[] = {"XAUTOCLAIM", key, KEY_GROUP, admission->consumer, idle, "0-0", "COUNT", "64"};
        for (size_t k = 0; k < sizeof argv / sizeof *argv; k++)
            args_text(&a, argv[k]);
        TRY(queue_command(q, &a, 0, &reply, e));
        int rc = admit_entries(q, admission, tenant, reply_at(reply, 1), out, e);
        freeReplyObject(reply);
        TRY(rc);
    }
    return 0;
}

enum { MAX_DOORS = 480 }; // of one XREADGROUP; further tenants take turns

// *reply stays NULL when there is no door to read.
static int read_doors(struct queue *q, const char *consumer, int block_ms, redisReply **reply, struct err *e)
{
    struct args a = {0};
    char block[24], count[24];
    size_t n = q->n_tenants < MAX_DOORS ? q->n_tenants : MAX_DOORS,
           start = q->n_tenants > n ? q->door % q->n_tenants : 0, doors = 0;
    char(*keys)[KEY_SIZE] = malloc((n ? n : 1) * sizeof *keys);
    if (!keys)
        return err_set(e, ERR_NO_MEMORY, "out of memory for admission");
    for (size_t i = 0; i < n; i++) {
        const char *tenant = q->tenants[(start + i) % q->n_tenants].name;
        if (may_read(q, tenant))
            snprintf(keys[doors++], KEY_SIZE, KEY_IN, q->prefix, tenant);
    }
    q->door += n;
    put(block, (uint64_t)block_ms);
    put(count, doors && doors < QUEUE_BATCH ? QUEUE_BATCH / doors : 1);
    const char *head[] = {"XREADGROUP", "GROUP", KEY_GROUP, consumer, "COUNT", count, "BLOCK", block};
    for (size_t i = 0; i < (block_ms > 0 ? 8u : 6u); i++)
        args_text(&a, head[i]);
    args_text(&a, "STREAMS");
    for (size_t i = 0; i < doors; i++)
        args_text(&a, keys[i]);
    for (size_t i = 0; i < doors; i++)
        args_text(&a, ">");
    int rc = doors ? queue_command(q, &a, block_ms, reply, e) : 0;
    free(keys);
    return rc;
}

// The tenant's name in a door's key: what follows "...in:".
static const char *door_tenant(const struct queue *q, const char *key)
{
    size_t skip = strlen(q->prefix) + 3;
    return strlen(key) > skip ? key + skip : "";
}

int queue_admit(struct queue *q, const struct queue_admission *admission, int block_ms, struct queue_admitted *out,
                struct err *e)
{
    redisReply *reply = NULL;
    memset(out, 0, sizeof *out);
    TRY(job_check_name("the admitter's name", admission->consumer, JOB_MAX_NAME, e));
    TRY(refresh(q, false, e));
    if (q->n_models == 0) {
        out->no_models = true;
        int nap = block_ms < 100 ? block_ms : 100;
        nanosleep(&(struct timespec){.tv_nsec = nap * 1000000L}, NULL);
        return 0;
    }
    int rc = admit_judged(q, admission, out, e);
    if (rc == 0)
        rc = steal(q, admission, out, e);
    if (rc == 0)
        rc = read_doors(q, admission->consumer, out->read || q->n_judged ? 0 : block_ms, &reply, e);
    if (rc != 0 && redis_problem(q->redis) == REDIS_PROBLEM_NOGROUP) {
        // The server lost its data. The doors open again; what was in them is gone.
        TRY(refresh(q, true, e));
        return 0;
    }
    TRY(rc);
    for (size_t i = 0; i < reply_count(reply) && rc == 0; i++) {
        const redisReply *door = reply_at(reply, i);
        rc = admit_entries(q, admission, door_tenant(q, reply_text(reply_at(door, 0))), reply_at(door, 1), out, e);
    }
    freeReplyObject(reply);
    out->judging = q->n_judged;
    return rc;
}
