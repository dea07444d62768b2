// queue.h: the queue of jobs in Redis, as PROTOCOL.md lays it out.
//
// A struct queue is one connection and the queue's name; a thread that needs the queue opens its own. Every operation
// below that changes a job is one atomic run of queue.lua, safe to repeat: when a connection breaks, the operation is
// sent once more over a new one. A holder proves itself by the fence (epoch, nonce); with a stale fence nothing is
// written and the answer is ERR_STALE, or ERR_CANCELLED or ERR_EXPIRED when that is why the job was taken away. Times
// are server milliseconds since 1970, durations milliseconds.
#ifndef DITFLEET_QUEUE_H
#define DITFLEET_QUEUE_H

#include "proto/job.h"
#include "proto/redis.h"

#include <stdbool.h>
#include <stdint.h>

enum {
    QUEUE_ENTRY_SIZE = 48, // a stream id, "1700000000000-0", with its zero
    QUEUE_NONCE_SIZE = 33, // 32 hexadecimal digits and a zero
    QUEUE_BATCH = 64,      // most entries one script run handles
    QUEUE_MAX_POOLS = 64,
};

struct queue;

enum queue_role {
    QUEUE_NODE,     // admits, claims, reaps: refuses Redis older than 7.0 and any maxmemory-policy but noeviction
    QUEUE_PRODUCER, // submits and awaits; the same checks, but left out where access control forbids INFO
};

// Connects and checks the server. name is [A-Za-z0-9._-], at most 64 bytes; "default" is the usual one.
int queue_open(struct queue **q, const char *url, const char *name, enum queue_role role,
               const struct redis_options *options, struct err *e);
void queue_close(struct queue *q); // NULL is fine
struct redis *queue_redis(struct queue *q);

// ---- settings: names, defaults and meaning are listed in PROTOCOL.md ("retention_ms", "backoff_ms", ...)

int queue_set(struct queue *q, const char *name, uint64_t value, struct err *e);

// ---- tenants and models

// What a tenant may have. Where it is set, a negative value leaves what is there.
struct queue_limits {
    double weight;       // share of the GPUs relative to other tenants: 0.001 to 1000; 1 is usual
    double rate;         // GPU-seconds that may be claimed in a second, over time; 0: any number
    double burst_s;      // GPU-seconds that may be claimed above that, after a pause
    double max_queued_s; // GPU-seconds of jobs that are not final; what is more is refused; 0: any number
};
#define QUEUE_LIMIT_MAX 1e9 // of a rate, and of GPU-seconds

struct queue_tenant {
    char name[JOB_MAX_TENANT + 1];
    struct queue_limits limits;
    uint64_t waiting; // entries in its door, not yet admitted
    uint64_t ready;   // admitted, and claimable but for its rate
    uint64_t gpu_ms;  // GPU-milliseconds of its jobs that are not final
};

// Registers a tenant and opens its door, or changes its weight.
int queue_tenant_add(struct queue *q, const char *tenant, double weight, struct err *e);
// The same with all its limits; they hold from the next claim and the next admission on.
int queue_tenant_limit(struct queue *q, const char *tenant, const struct queue_limits *limits, struct err *e);
// *list is the caller's to free().
int queue_tenants(struct queue *q, struct queue_tenant **list, size_t *count, struct err *e);

// Who does what in Redis, each with no more rights than that takes.
enum queue_user {
    QUEUE_USER_PRODUCER, // submits as one tenant, reads that tenant's records and events
    QUEUE_USER_WORKER,   // supervisors and workers: admit, claim, finish, reap
    QUEUE_USER_SCALER,   // reads the figures: `ditfleet backlog`
    QUEUE_USER_OPERATOR, // the command line
    QUEUE_USERS,
};
extern const char *const queue_user_names[QUEUE_USERS]; // "producer", ...

// The redis-cli line that makes the user; the password stands as a placeholder. tenant: a producer's. Both names are
// [A-Za-z0-9._-].
enum { QUEUE_ACL_SIZE = 2048 };
int queue_acl(const struct queue *q, enum queue_user kind, const char *user, const char *tenant,
              char line[QUEUE_ACL_SIZE], struct err *e);

struct queue_model {
    char name[JOB_MAX_NAME + 1];
    char version[JOB_MAX_NAME + 1];
    bool is_default;       // what the bare name means
    uint64_t published_ms; // when a node last said that it serves this model
};

// Says that the fleet has model name@version; version becomes what the bare name means. Nodes repeat this from time to
// time (say every 10 s), so that it survives a server that lost its data.
int queue_model_publish(struct queue *q, const char *name, const char *version, struct err *e);
// The same, and that this worker serves it: a job over which it crashes may be tried by another, if there is one.
int queue_serve(struct queue *q, const char *name, const char *version, const char *worker, struct err *e);
int queue_model_withdraw(struct queue *q, const char *name, const char *version, struct err *e);
// *list is the caller's to free().
int queue_models(struct queue *q, struct queue_model **list, size_t *count, struct err *e);

// ---- the producer's side

// XADD of the packed job; entry receives the stream id, the receipt by which the outcome is found.
int queue_submit(struct queue *q, const char *tenant, const void *job, size_t length, char entry[QUEUE_ENTRY_SIZE],
                 struct err *e);

// How safe the last submission is, by what Redis confirms.
struct queue_receipt {
    bool on_disk;   // counts are of disks (WAITAOF, Redis 7.2); else of memory (WAIT)
    unsigned local; // 1: it is on the disk of the server that took it. 0 where Redis cannot tell, or has no such file
    unsigned replicas; // so many replicas have it
};

// Waits until the server's own disk (where it can tell) and so many replicas have what queue_submit sent last, or for
// timeout_ms (1 or more). *confirmed: they have. ERR_UNAVAILABLE: the connection broke, and nothing is known; submit
// again by the same id.
int queue_receipt(struct queue *q, unsigned replicas, int timeout_ms, struct queue_receipt *receipt, bool *confirmed,
                  struct err *e);

// Calls back for every event until the job of this submission is final, then hands out its Result (the caller frees by
// result_free). entry NULL: whichever submission has the id. A refused submission is a Result in state DEAD with the
// reason. timeout_ms < 0: no limit; ERR_TIMEOUT: not final yet. on_event may be NULL; a nonzero return of it ends the
// waiting and is returned (with *result NULL).
typedef int queue_on_event(void *arg, const Ditfleet__V1__Event *event);
int queue_await(struct queue *q, const char *tenant, const char *id, const char *entry, int64_t timeout_ms,
                queue_on_event *on_event, void *arg, Ditfleet__V1__Result **result, struct err *e);

// Final states stay as they are: *state (may be NULL) is the state after the call. ERR_NOT_FOUND: no such job.
int queue_cancel(struct queue *q, const char *tenant, const char *id, Ditfleet__V1__State *state, struct err *e);

struct queue_record {
    char id[JOB_NAME_SIZE];
    Ditfleet__V1__State state;
    char pool[JOB_MODEL_SIZE];
    char priority[16];
    char worker[JOB_MAX_NAME + 1]; // its last holder
    char stage[32];
    char entry[QUEUE_ENTRY_SIZE]; // the submission it came from
    uint32_t step, steps;
    uint64_t epoch; // claims so far: the number of the current attempt
    uint32_t attempts_app, attempts_infra;
    uint64_t gpu_ms; // the price
    uint64_t created_ms, updated_ms, lease_ms, due_ms, deadline_ms, now_ms;
    char error_code[32], error[512]; // of the last failed attempt, "" if none
    void *payload;                   // the Job; NULL once final, but for DEAD
    size_t payload_length;
    void *result; // the Result; NULL while not final
    size_t result_length;
};

// ERR_NOT_FOUND: no such job. id may be "@<entry>", which finds the outcome of a refused submission.
int queue_get(struct queue *q, const char *tenant, const char *id, struct queue_record *record, struct err *e);
void queue_record_free(struct queue_record *record);

// One row of a list of jobs.
struct queue_listed {
    char tenant[JOB_MAX_TENANT + 1];
    char id[JOB_NAME_SIZE]; // or "@<entry>": a submission that was refused; another row may tell of it by its id
    char entry[QUEUE_ENTRY_SIZE];
    Ditfleet__V1__State state;
    char pool[JOB_MODEL_SIZE];
    char worker[JOB_MAX_NAME + 1]; // its last holder
    char stage[32];
    uint32_t step, steps;
    uint64_t created_ms, updated_ms;
    char error_code[32]; // of the last failed attempt
};

// One page of all records there are, in no order, each once or (while Redis rehashes) twice; jobs that come or go
// meanwhile may be missed. No page holds the server up. cursor: "0" before the first page, "0" again after the last.
// tenant NULL: of all. *list (count) is the caller's to free(); it may be empty before the last page.
enum { QUEUE_CURSOR_SIZE = 24 };
int queue_list(struct queue *q, const char *tenant, char cursor[QUEUE_CURSOR_SIZE], struct queue_listed **list,
               size_t *count, struct err *e);
// The server's clock, to tell ages by.
int queue_time(struct queue *q, uint64_t *now_ms, struct err *e);

// ---- admission

// The price of a job in GPU-milliseconds, for fairness and the backlog.
typedef uint64_t queue_price(void *arg, const Ditfleet__V1__Job *job);
// Pixels x steps x images, scaled so that 1024 x 1024 x 28 steps is 10 GPU-seconds. For callers with no model at hand.
uint64_t queue_price_default(void *arg, const Ditfleet__V1__Job *job);

struct queue_admitted {
    unsigned read;      // entries taken from the doors
    unsigned admitted;  // now QUEUED, DELAYED or (deadline passed) EXPIRED
    unsigned duplicate; // same id, same bytes: nothing to do
    unsigned refused;   // bad bytes, out of bounds, unknown model, same id with other bytes, no room, no time
    bool no_models;     // nothing was read: the registry of models is empty, so no model can be called unknown
    unsigned judging;   // jobs in hand whose verdict is still to come: call again soon
};

// Whether a job that is fine otherwise may come in. QUEUE_DENY: why says so, without the prompt. QUEUE_LATER: it stays
// in its door and is asked about again, with the same tenant and entry, in the calls of queue_admit that follow, until
// there is a verdict; meanwhile other jobs come in. Must not block.
enum queue_verdict { QUEUE_ALLOW, QUEUE_DENY, QUEUE_LATER };
struct queue_submission {
    const char *tenant, *entry;
    const Ditfleet__V1__Job *job;
};
typedef enum queue_verdict queue_judge(void *arg, const struct queue_submission *submission, struct err *why);

// One round of admission: takes up to QUEUE_BATCH entries, waiting up to block_ms for the first, and those that a dead
// admitter left behind. consumer names this admitter ([A-Za-z0-9._-]). Call it in a loop with block_ms of 1000 or less,
// since new tenants are seen between calls. on_refusal (may be NULL) hears of each refusal.
typedef void queue_on_refusal(void *arg, const char *tenant, const char *id, const char *entry, const struct err *why);
struct queue_admission {
    const char *consumer;
    queue_price *price; // NULL: queue_price_default
    queue_on_refusal *on_refusal;
    void *arg;          // of both
    bool callbacks;     // this node makes callbacks; else a job that asks for one is refused
    queue_judge *judge; // NULL: everything is allowed
    void *judge_arg;
};
int queue_admit(struct queue *q, const struct queue_admission *admission, int block_ms, struct queue_admitted *out,
                struct err *e);

// ---- the holder's side

struct queue_fence {
    uint64_t epoch;
    char tenant[JOB_MAX_TENANT + 1];
    char id[JOB_NAME_SIZE];
    char nonce[QUEUE_NONCE_SIZE];
};

struct queue_job {
    struct queue_fence fence;
    char pool[JOB_MODEL_SIZE]; // the resolved "name@version"
    uint32_t attempts_app, attempts_infra;
    uint64_t created_ms, lease_ms, deadline_ms; // deadline_ms 0: none
    void *payload;                              // the Job, validated at admission
    size_t payload_length;
};

struct queue_claim {
    const char *worker;      // [A-Za-z0-9._-], the same over restarts
    const char *incarnation; // [A-Za-z0-9._-], new at each start of the worker
    const char *const *pools;
    size_t n_pools;
    uint64_t lease_ms;
    unsigned max; // 1 to QUEUE_BATCH; beyond the first only jobs of the same batch key (pool, size, steps, precision)
};

// Claims up to want->max jobs into jobs[], *count of them. 0: nothing to do, and cursor is where queue_wait must start
// so that no job that became ready after this claim is missed; else it is the beginning, and a wait ends at once.
int queue_claim(struct queue *q, const struct queue_claim *want, struct queue_job *jobs, size_t *count,
                char cursor[QUEUE_ENTRY_SIZE], struct err *e);
void queue_job_free(struct queue_job *job); // its payload

// Waits until something became ready after cursor, or for timeout_ms. Returns 0 in both cases.
int queue_wait(struct queue *q, const char *cursor, int timeout_ms, bool *woken, struct err *e);

// Extends the lease to lease_ms from now. Called from the renewing thread over its own connection.
// ERR_CANCELLED, ERR_EXPIRED, ERR_STALE: stop working on it.
int queue_beat(struct queue *q, const struct queue_fence *fence, uint64_t lease_ms, struct err *e);

struct queue_progress {
    Ditfleet__V1__State state; // STATE_RUNNING or STATE_UPLOADING
    const char *stage;         // "text", "denoise", "decode", "png", "upload"
    uint32_t step, steps;
    double eta_seconds;
};
// Records where the job is and tells its watchers. The same answers as queue_beat: cancel is seen here once a step.
int queue_progress(struct queue *q, const struct queue_fence *fence, const struct queue_progress *progress,
                   struct err *e);

// Commits. result is a packed Result in state SUCCEEDED. Repeating it after success is success.
int queue_finish(struct queue *q, const struct queue_fence *fence, const void *result, size_t length, struct err *e);

enum queue_cause {
    QUEUE_CAUSE_APP,  // the job's own error: counts against max_attempts; DEAD at once unless why->retryable
    QUEUE_CAUSE_INFRA // GPU fault, lost lease, killed: the job is not to blame
};
// The attempt failed: RETRY_WAIT with backoff, or DEAD. *state (may be NULL) is what it became.
int queue_fail(struct queue *q, const struct queue_fence *fence, enum queue_cause cause, const struct err *why,
               Ditfleet__V1__State *state, struct err *e);

// Back to the queue with no attempt charged: for a worker that drains.
int queue_release(struct queue *q, const struct queue_fence *fence, struct err *e);

// Everything this incarnation of worker holds fails with cause INFRA, the first time with no backoff. incarnation NULL:
// any. *count (may be NULL): jobs returned. ERR_CRASHED in why speaks against the job: the second time, at another
// worker where another serves its pool, it is DEAD.
int queue_release_all(struct queue *q, const char *worker, const char *incarnation, const struct err *why,
                      unsigned *count, struct err *e);

// ---- callbacks: what final jobs have to tell to their callback_url (supervisor/callback.c makes them)

struct queue_callback {
    char entry[QUEUE_ENTRY_SIZE];
    uint64_t hold;    // proves who has it in hand
    uint64_t tries;   // with this one
    char message[48]; // the same for each try
    char tenant[JOB_MAX_TENANT + 1];
    char id[JOB_NAME_SIZE];
    Ditfleet__V1__State state;
    uint64_t time_ms; // when the job became final
    char *url;        // its query may be a secret
    void *result;     // a packed Result, or NULL
    size_t result_length;
};

struct queue_callbacks_want {
    unsigned max;                // 1 to QUEUE_BATCH
    uint64_t lease_ms;           // what is not done, retried or dead by then is somebody else's
    unsigned max_of_tenant;      // in hand at once
    const char *const *in_hand;  // (n_in_hand) the tenants of those in hand now,
    const unsigned *n_of_tenant; // (n_in_hand) and how many
    size_t n_in_hand;            // at most QUEUE_BATCH
};

// Takes callbacks that are due into list[], *count of them; first those of tenants with the fewest in hand. *next_ms:
// when to ask again, at most 1000.
int queue_callbacks(struct queue *q, const struct queue_callbacks_want *want, struct queue_callback *list,
                    size_t *count, uint64_t *next_ms, struct err *e);
void queue_callback_free(struct queue_callback *c); // url and result

// What became of the try. ERR_STALE: it is somebody else's, or settled already.
int queue_callback_done(struct queue *q, const struct queue_callback *c, struct err *e);
// Due again in wait_ms; charged false: as if it had not been tried.
int queue_callback_retry(struct queue *q, const struct queue_callback *c, uint64_t wait_ms, bool charged,
                         struct err *e);
// A dead letter that says why; shown is the URL without what is secret.
int queue_callback_dead(struct queue *q, const struct queue_callback *c, const struct err *why, const char *shown,
                        struct err *e);

// ---- dead letters: what ended badly and waits for somebody to look at it

enum queue_letter_kind {
    QUEUE_LETTER_JOB,      // a DEAD job
    QUEUE_LETTER_REFUSED,  // a submission that made no job
    QUEUE_LETTER_CALLBACK, // a callback that was given up
};

struct queue_letter {
    char letter[QUEUE_ENTRY_SIZE]; // its name
    enum queue_letter_kind kind;
    uint64_t time_ms;
    char tenant[JOB_MAX_TENANT + 1];
    char id[JOB_NAME_SIZE]; // "" where a submission had none that could be read
    char code[32], error[512];
    char entry[QUEUE_ENTRY_SIZE]; // REFUSED: the submission
    char callback[256];           // CALLBACK: the URL without its query, its beginning
};

// Fills list[] (QUEUE_BATCH) with the letters that follow `after` ("": from the oldest), *count of them; 0: no more.
int queue_dead(struct queue *q, const char *after, struct queue_letter *list, size_t *count, struct err *e);

// Once more, and the letter is gone: a DEAD job lives again under its id, with all its attempts; the bytes of a refused
// submission go to the door again, under the new receipt entry ("" for the others); a callback is due again.
// ERR_NOT_FOUND: there is no such letter, or no such job; ERR_EXPIRED: its deadline has passed; ERR_CORRUPT: not all of
// the submission was kept. Not safe to repeat: after a lost reply ERR_NOT_FOUND may mean that it was done.
int queue_dead_retry(struct queue *q, const char *letter, char entry[QUEUE_ENTRY_SIZE], struct err *e);
// The letter is gone; so is a DEAD job's payload, but not its record.
int queue_dead_drop(struct queue *q, const char *letter, struct err *e);

// ---- upkeep

struct queue_reaped {
    unsigned lost;    // leases that ran out
    unsigned due;     // delayed jobs made ready
    unsigned expired; // deadlines passed
    unsigned orphans; // jobs in no index, put back
    uint64_t next_ms; // in how many milliseconds the next one falls due, at most 1000
};
// One round, bounded; call it again after next_ms.
int queue_reap(struct queue *q, struct queue_reaped *out, struct err *e);

struct queue_stats {
    uint64_t queued, delayed, leased, running, uploading, retry_wait; // jobs now in the state
    uint64_t succeeded, dead, cancelled, expired, refused;            // since the queue's beginning
    uint64_t retries;
    uint64_t waiting;     // entries in all doors
    uint64_t dead_letter; // entries in dlq
    uint64_t backlog_ms;  // GPU-milliseconds of all non-final jobs: what to scale on
};
int queue_stats(struct queue *q, struct queue_stats *stats, struct err *e);

// One pool's share of the backlog. queued + working is what to scale on: a delayed job needs no GPU yet.
struct queue_pool {
    char name[JOB_MODEL_SIZE];
    uint64_t queued;                            // jobs QUEUED
    uint64_t delayed;                           // DELAYED, RETRY_WAIT
    uint64_t working;                           // LEASED, RUNNING, UPLOADING
    uint64_t queued_ms, delayed_ms, working_ms; // the same in GPU-milliseconds
    uint64_t oldest_ms;                         // how long the oldest QUEUED job has been claimable; 0: there is none
};
// The pools that are published or have jobs, by name; costs the server no more for a long queue than for a short one.
// *list is the caller's to free().
int queue_pools(struct queue *q, struct queue_pool **list, size_t *count, struct err *e);

// Non-final jobs, oldest check first, for listings: at most max, *list is the caller's to free().
struct queue_name {
    char tenant[JOB_MAX_TENANT + 1];
    char id[JOB_NAME_SIZE];
};
int queue_live(struct queue *q, size_t max, struct queue_name **list, size_t *count, struct err *e);

#endif
