// actors.c: who uses the queue: clients, admitters, workers with their heralds, supervisors, callers of callbacks, an
// operator. Each act is one call of queue.h, in which anything may go wrong; what an actor does next depends on its
// answer as in the programs (job_run.c, herald.c, deliver.c, queue_thread.c, callback.c).
#include "world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LEASE_MS = 6000, LIVE_MAX = 50, RECENT = 80 };

static unsigned job_number(const char *id)
{
    return (unsigned)strtoul(id + 1, NULL, 10);
}

static bool refused(int rc) // the job is not ours any more
{
    return rc == ERR_STALE || rc == ERR_CANCELLED || rc == ERR_EXPIRED;
}

// ---- clients

static Ditfleet__V1__Job *make_job(const struct world *w, unsigned k)
{
    struct err unused;
    char text[32];
    Ditfleet__V1__Job *job = job_new();
    snprintf(text, sizeof text, "j%u", k);
    job_set_field(job, "id", text, &unused);
    job_set_field(job, "model", k % 97 == 5 ? "unknown" : k % 5 == 0 ? "n" : k % 5 == 1 ? "m@1" : "m", &unused);
    job_set_field(job, "output.url", "http://127.0.0.1:9/{id}.png", &unused);
    if (k % 4 == 0)
        job_set_field(job, "callback_url", "http://127.0.0.1:9/told?secret=1", &unused);
    job->width = 256 << k % 3;
    job->priority = (Ditfleet__V1__Priority)(k / 3 % 3);
    job->max_attempts = k % 7 == 0 ? 1 + k % 3 : 0;
    job->deadline_ms = w->plans[k].deadline_ms;
    job->not_before_ms = w->plans[k].not_before_ms;
    return job;
}

static void submit(struct world *w, struct actor *a, unsigned k, bool other_bytes)
{
    void *bytes;
    size_t length;
    char entry[QUEUE_ENTRY_SIZE];
    struct err e;
    Ditfleet__V1__Job *job = make_job(w, k);
    if (other_bytes)
        job_set_field(job, "prompt", "other bytes", &e);
    if (job_pack(job, &bytes, &length, &e) == 0) {
        (void)queue_submit(a->q, check_tenant(k), bytes, length, entry, &e);
        free(bytes);
    }
    job_free(job);
}

static void submit_new(struct world *w, struct actor *a)
{
    if (w->calm || w->n_jobs == CHECK_JOBS || check_live(w->check) >= LIVE_MAX)
        return;
    unsigned k = w->n_jobs++;
    const uint64_t now = (uint64_t)server_ms(w);
    w->plans[k].deadline_ms = once_in(w, 6) ? now + draw(w, 20000) : 0;
    w->plans[k].not_before_ms = once_in(w, 6) ? now + draw(w, 10000) : 0;
    submit(w, a, k, false);
}

static void look_at(struct world *w, struct actor *a, unsigned k)
{
    struct queue_record r;
    struct err e;
    char id[16];
    snprintf(id, sizeof id, "j%u", k);
    if (queue_get(a->q, check_tenant(k), id, &r, &e) != 0)
        return;
    if (r.payload_length > 0 && job_state_final(r.state) && r.state != DITFLEET__V1__STATE__STATE_DEAD)
        check_fail(w->check, "final: job j%u is %s and keeps its payload", k, job_state_name(r.state));
    queue_record_free(&r);
}

static void await(struct world *w, struct actor *a, unsigned k)
{
    Ditfleet__V1__Result *result = NULL;
    struct err e;
    char id[16];
    unsigned long failovers = w->counts.failovers;
    const Ditfleet__V1__State before = check_state(w->check, k); // 0: no job yet, and a refusal leaves the id free
    snprintf(id, sizeof id, "j%u", k);
    if (queue_await(a->q, check_tenant(k), id, NULL, 0, NULL, NULL, &result, &e) != 0)
        return;
    Ditfleet__V1__State now = check_state(w->check, k);
    if (now != result->state && before != 0 && now != 0 && failovers == w->counts.failovers)
        check_fail(w->check, "final: the result of job j%u says %s, it is %s", k, job_state_name(result->state),
                   job_state_name(now));
    result_free(result);
}

static void cancel(struct world *w, struct actor *a, unsigned k)
{
    Ditfleet__V1__State state;
    struct err e;
    char id[16];
    unsigned long failovers = w->counts.failovers;
    snprintf(id, sizeof id, "j%u", k);
    if (queue_cancel(a->q, check_tenant(k), id, &state, &e) != 0)
        return;
    Ditfleet__V1__State now = check_state(w->check, k);
    if ((!job_state_final(state) || (now != 0 && now != state)) && failovers == w->counts.failovers)
        check_fail(w->check, "final: cancel of job j%u answered %s, it is %s", k, job_state_name(state),
                   job_state_name(now));
}

static void client_act(struct world *w, struct actor *a)
{
    const unsigned what = draw(w, 100), recent = w->n_jobs < RECENT ? w->n_jobs : RECENT;
    char entry[QUEUE_ENTRY_SIZE];
    struct err e;
    if (what < 45 || recent == 0) {
        submit_new(w, a);
        return;
    }
    const unsigned k = w->n_jobs - 1 - draw(w, recent);
    if (what < 68 && w->calm)
        return;
    // The same again; or what a failover lost, perhaps.
    if (what < 55 || (what >= 86 && check_state(w->check, k) == 0 && !w->calm))
        submit(w, a, k, false);
    else if (what < 58)
        submit(w, a, k, true);
    else if (what < 60)
        (void)queue_submit(a->q, check_tenant(k), "no job", 6, entry, &e);
    else if (what < 68)
        cancel(w, a, k);
    else if (what < 78)
        look_at(w, a, k);
    else if (what < 86)
        await(w, a, k);
}

// ---- admitters

static void admitter_act(struct world *w, struct actor *a)
{
    const struct queue_admission admission = {.consumer = a->name, .callbacks = true};
    struct queue_admitted out;
    struct err e;
    (void)queue_admit(a->q, &admission, once_in(w, 2) ? 5 : 0, &out, &e);
}

// ---- workers and their heralds

static void worker_names(const struct world *w, unsigned i, char name[16], char incarnation[16])
{
    snprintf(name, 16, "w%u", i);
    snprintf(incarnation, 16, "i%u", w->workers[i].incarnation);
}

static void claim(struct world *w, struct actor *a, struct worker *me)
{
    static const char *const pools[] = {"m@1", "n@1"};
    char name[16], incarnation[16];
    struct queue_job jobs[HELD_MAX];
    size_t n = 0;
    struct err e;
    worker_names(w, a->index, name, incarnation);
    const struct queue_claim want = {.worker = name,
                                     .incarnation = incarnation,
                                     .pools = pools,
                                     .n_pools = 1 + draw(w, 2),
                                     .lease_ms = LEASE_MS,
                                     .max = 1 + draw(w, (unsigned)(HELD_MAX - me->n))};
    int rc = queue_claim(a->q, &want, jobs, &n, NULL, &e);
    for (size_t i = 0; rc == 0 && i < n; i++) {
        if (!a->doomed)
            me->held[me->n++] = (struct held_job){.fence = jobs[i].fence};
        queue_job_free(&jobs[i]);
    }
}

static void drop(struct worker *me, const char *nonce, uint64_t epoch)
{
    for (size_t i = 0; i < me->n; i++)
        if (strcmp(me->held[i].fence.nonce, nonce) == 0 && me->held[i].fence.epoch == epoch) {
            me->held[i] = me->held[--me->n];
            return;
        }
}

static int finish(struct world *w, struct actor *a, const struct queue_fence *fence, struct err *e)
{
    const unsigned k = job_number(fence->id);
    const unsigned long failovers = w->counts.failovers;
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    void *bytes;
    size_t length;
    result.id = (char *)fence->id;
    result.state = DITFLEET__V1__STATE__STATE_SUCCEEDED;
    result.attempt = (uint32_t)fence->epoch;
    TRY(result_pack(&result, &bytes, &length, e));
    int rc = queue_finish(a->q, fence, bytes, length, e);
    free(bytes);
    Ditfleet__V1__State now = check_state(w->check, k);
    if (rc == 0 && now != DITFLEET__V1__STATE__STATE_SUCCEEDED && now != 0 && failovers == w->counts.failovers)
        check_fail(w->check, "commit: finish of job j%u succeeded, it is %s", k, job_state_name(now));
    return rc;
}

static int last_word(struct world *w, struct actor *a, const struct queue_fence *fence, struct err *e)
{
    const struct err final = {.code = ERR_INVALID, .text = "its own fault"},
                     again = {.code = ERR_IO, .retryable = true, .text = "its own fault, perhaps not again"},
                     fleet = {.code = ERR_UNAVAILABLE, .retryable = true, .text = "the fleet's fault"};
    const unsigned what = w->calm ? 0 : draw(w, 20);
    if (what < 12)
        return finish(w, a, fence, e);
    if (what < 15)
        return queue_fail(a->q, fence, QUEUE_CAUSE_APP, what == 12 ? &final : &again, NULL, e);
    if (what < 17)
        return queue_fail(a->q, fence, QUEUE_CAUSE_INFRA, &fleet, NULL, e);
    return queue_release(a->q, fence, e);
}

static void worker_act(struct world *w, struct actor *a)
{
    struct worker *me = &w->workers[a->index];
    struct err e;
    if (me->n == 0 || (me->n < HELD_MAX && once_in(w, 6))) {
        claim(w, a, me);
        return;
    }
    struct held_job *j = &me->held[draw(w, (unsigned)me->n)], now = *j; // the list may change in the middle of a call
    if (now.lost) {
        drop(me, now.fence.nonce, now.fence.epoch);
        return;
    }
    const bool last = now.phase >= 3 || once_in(w, 12);
    j->phase += !last && !once_in(w, 3);
    const struct queue_progress progress = {now.phase < 2 ? DITFLEET__V1__STATE__STATE_RUNNING
                                                          : DITFLEET__V1__STATE__STATE_UPLOADING,
                                            now.phase < 2 ? "denoise" : "upload", now.phase, 2, 1.5};
    int rc = last ? last_word(w, a, &now.fence, &e) : queue_progress(a->q, &now.fence, &progress, &e);
    // Redis does not answer: it is said again later, while the lease lasts.
    if (!a->doomed && (refused(rc) || (last && (rc == 0 || once_in(w, 4)))))
        drop(me, now.fence.nonce, now.fence.epoch);
}

static void worker_die(struct world *w, struct actor *a)
{
    struct worker *me = &w->workers[a->index];
    struct node *node = &w->nodes[a->index % NODES];
    if (node->n < RELEASES) {
        node->release[node->n].worker = a->index;
        node->release[node->n++].incarnation = me->incarnation;
    }
    me->n = 0;
    me->incarnation++;
}

static void herald_act(struct world *w, struct actor *a)
{
    struct worker *me = &w->workers[a->index];
    struct queue_fence fences[HELD_MAX];
    struct err e;
    size_t n = once_in(w, 3) ? me->n : 0; // seldom enough that most transitions are others
    for (size_t i = 0; i < n; i++)
        fences[i] = me->held[i].fence;
    for (size_t i = 0; i < n; i++) {
        bool told = refused(queue_beat(a->q, &fences[i], LEASE_MS, &e));
        for (size_t k = 0; k < me->n && told && !a->doomed; k++)
            if (strcmp(me->held[k].fence.nonce, fences[i].nonce) == 0 && me->held[k].fence.epoch == fences[i].epoch)
                me->held[k].lost = true;
    }
}

// ---- supervisors

static void supervisor_act(struct world *w, struct actor *a)
{
    struct node *node = &w->nodes[a->index];
    const struct err died = {.code = ERR_UNAVAILABLE, .retryable = true, .text = "the worker died"};
    struct queue_reaped reaped;
    struct err e;
    if (node->n > 0) {
        char name[16], incarnation[16];
        snprintf(name, sizeof name, "w%u", node->release[0].worker);
        snprintf(incarnation, sizeof incarnation, "i%u", node->release[0].incarnation);
        if (queue_release_all(a->q, name, incarnation, &died, NULL, &e) == 0 && !a->doomed)
            memmove(node->release, node->release + 1, --node->n * sizeof *node->release);
    } else if (w->monotonic_us >= node->reap_at_us && queue_reap(a->q, &reaped, &e) == 0)
        node->reap_at_us = w->monotonic_us + (int64_t)(reaped.next_ms > 10 ? reaped.next_ms : 10) * 1000;
}

// Its workers cannot outlive it, and what it had yet to give back nobody knows: leases run out.
static void supervisor_die(struct world *w, struct actor *a)
{
    for (unsigned i = a->index; i < WORKERS; i += NODES)
        world_kill(w, world_actor(w, "worker", i));
    w->nodes[a->index] = (struct node){0};
}

// ---- callers of callbacks

static void take_callbacks(struct actor *a, struct caller *me)
{
    static const char *const in_hand[] = {"acme"};
    static const unsigned n_of_tenant[] = {1};
    const struct queue_callbacks_want want = {.max = CALLBACKS,
                                              .lease_ms = LEASE_MS,
                                              .max_of_tenant = 3,
                                              .in_hand = in_hand,
                                              .n_of_tenant = n_of_tenant,
                                              .n_in_hand = 1};
    struct queue_callback list[CALLBACKS];
    size_t n = 0;
    uint64_t next_ms;
    struct err e;
    int rc = queue_callbacks(a->q, &want, list, &n, &next_ms, &e);
    for (size_t i = 0; rc == 0 && i < n; i++) {
        if (a->doomed)
            queue_callback_free(&list[i]);
        else
            me->list[me->n++] = list[i];
    }
}

static void caller_act(struct world *w, struct actor *a)
{
    struct caller *me = &w->callers[a->index];
    const struct err gone = {.code = ERR_UPLOAD, .text = "the receiver wants no more"};
    struct err e;
    if (me->n == 0) {
        take_callbacks(a, me);
        return;
    }
    struct queue_callback *c = &me->list[me->n - 1];
    const unsigned what = w->calm ? 0 : draw(w, 10);
    int rc = what < 6    ? queue_callback_done(a->q, c, &e)
             : what < 8  ? queue_callback_retry(a->q, c, draw(w, 4000), what == 6, &e)
             : what == 8 ? queue_callback_dead(a->q, c, &gone, "http://127.0.0.1:9/told", &e)
                         : 0; // forgotten: its lease runs out
    if (rc == 0 || rc == ERR_STALE) {
        queue_callback_free(c);
        me->n--;
    }
}

static void caller_die(struct world *w, struct actor *a)
{
    struct caller *me = &w->callers[a->index];
    while (me->n > 0)
        queue_callback_free(&me->list[--me->n]);
}

// ---- the operator: what a fleet is configured to, said again and again, since a failover may lose it

// A dead letter is tried again, or thrown away.
static void look_at_letters(struct world *w, struct actor *a)
{
    struct queue_letter list[QUEUE_BATCH];
    char entry[QUEUE_ENTRY_SIZE];
    size_t n;
    struct err e;
    if (w->calm || queue_dead(a->q, "", list, &n, &e) != 0 || n == 0)
        return;
    const char *letter = list[draw(w, (unsigned)n)].letter;
    if (once_in(w, 4))
        (void)queue_dead_drop(a->q, letter, &e);
    else
        (void)queue_dead_retry(a->q, letter, entry, &e);
}

static void operator_act(struct world *w, struct actor *a)
{
    static const struct {
        const char *name;
        uint64_t value;
    } settings[] = {{"retention_ms", CHECK_RETENTION_MS},
                    {"backoff_ms", 300},
                    {"backoff_cap_ms", 5000},
                    {"check_ms", 2000},
                    {"max_attempts_infra", 6},
                    {"max_backlog_ms", 300000}};
    const struct queue_limits limits = {1 + draw(w, 2), w->calm || once_in(w, 3) ? 0 : 4, 20,
                                        w->calm || once_in(w, 3) ? 0 : 100};
    struct queue_stats stats;
    struct queue_pool *pools;
    size_t n;
    struct err e;
    switch (draw(w, 7)) {
    case 0:
    case 1:
        n = draw(w, sizeof settings / sizeof *settings);
        (void)queue_set(a->q, settings[n].name, settings[n].value, &e);
        break;
    case 2:
        (void)queue_tenant_limit(a->q, check_tenant(draw(w, CHECK_TENANTS)), &limits, &e);
        break;
    case 3:
    case 4:
        (void)queue_model_publish(a->q, once_in(w, 2) ? "m" : "n", "1", &e);
        break;
    case 5:
        look_at_letters(w, a);
        break;
    default:
        (void)queue_stats(a->q, &stats, &e);
        if (queue_pools(a->q, &pools, &n, &e) == 0)
            free(pools);
    }
}

// ---- all of them

static void nothing(struct world *w, struct actor *a)
{
    (void)w, (void)a;
}

void actors_make(struct world *w)
{
    static const struct {
        const char *kind;
        unsigned n;
        actor_function *act, *die;
    } kinds[] = {
        {"client", 3, client_act, nothing},
        {"admitter", 2, admitter_act, nothing},
        {"worker", WORKERS, worker_act, worker_die},
        {"herald", WORKERS, herald_act, nothing},
        {"supervisor", NODES, supervisor_act, supervisor_die},
        {"caller", NODES, caller_act, caller_die},
        {"operator", 1, operator_act, nothing},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        for (unsigned k = 0; k < kinds[i].n; k++) {
            struct actor *a = &w->actors[w->n_actors++];
            *a = (struct actor){.kind = kinds[i].kind, .index = k, .act = kinds[i].act, .die = kinds[i].die};
            snprintf(a->name, sizeof a->name, "%s%u", a->kind, k);
        }
}
