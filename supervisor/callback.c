// One loop around libcurl's multi interface: what libcurl finished gets its verdict, verdicts are told to Redis, free
// slots are filled with callbacks that are due. A slot keeps its verdict until Redis took it.
#include "supervisor/callback.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "proto/clock.h"
#include "proto/queue.h"
#include "supervisor/callback_message.h"
#include "worker/output/http.h"

enum {
    CONNECT_MS = 2000, // to Redis
    COMMAND_MS = 2000,
    CONNECT_SECONDS = 300, // to a receiver: no limit of its own, the request's is shorter
    SLOTS = 16,            // callbacks under way at once
    TENANT_SLOTS = 8,      // of one tenant: receivers that hang leave room for the others'
    POLL_MS = 250,         // how often Redis is asked while there is room
    RETRY_MS = 500,        // the same, while it does not answer
    LEASE_MORE = 5000,     // beyond the request's own limit, to tell Redis what became of it
};

// Of one reading of the configuration. A request keeps that with which it was begun.
struct settings {
    int users; // slots; of the thread alone
    struct callback_secrets secrets;
    struct upload_policy policy; // its list is ours
    uint64_t attempts;
    double backoff_min_s, backoff_max_s, timeout_s;
    struct log log;
};

enum slot_state { FREE, CALLING, DONE, RETRY, DEAD };

struct slot {
    enum slot_state state;
    struct queue_callback callback;
    struct settings *settings;
    struct http *http;
    struct curl_slist *lines;
    char *body;
    char shown[256]; // the URL without its query
    double begun;    // monotonic seconds
    long status;
    double wait_s;  // RETRY
    struct err why; // RETRY, DEAD
};

struct callback {
    pthread_t thread;
    char *url, *name;
    CURLM *multi;
    pthread_mutex_t mutex;
    struct settings *fresh; // under the mutex: of a reload, not taken over yet
    atomic_bool ending;
    // of the thread alone
    struct settings *settings;
    struct queue *queue;
    bool down;        // Redis did not answer last time
    double ask_at;    // when to ask for callbacks; also after a failure, when to try again
    unsigned n_slots; // whose http could be made
    struct slot slots[SLOTS];
};

// ---- settings

static void free_settings(struct settings *s)
{
    if (!s)
        return;
    target_free_hosts(&s->policy);
    callback_secrets_wipe(&s->secrets);
    free(s);
}

static int make_settings(const struct conf *conf, const struct log *log, struct settings **out, struct err *err)
{
    struct settings *s = calloc(1, sizeof *s);
    *out = s;
    if (!s)
        return err_set(err, ERR_NO_MEMORY, "no memory for callbacks");
    s->policy.what = "callback";
    s->attempts = (uint64_t)conf->callback.attempts;
    s->backoff_min_s = conf->callback.backoff_min_s;
    s->backoff_max_s = conf->callback.backoff_max_s;
    s->timeout_s = conf->callback.timeout_s;
    s->log = *log;
    int rc = target_copy_hosts(&s->policy, (const char *const *)conf->callback.allow.items,
                               (size_t)conf->callback.allow.count, err);
    rc = rc ? rc : target_check_policy(&s->policy, err);
    rc = rc ? rc : callback_secrets_load(conf->callback.secret_file, &s->secrets, err);
    if (rc != 0)
        free_settings(s);
    return rc;
}

static void drop_settings(struct callback *c, struct settings *s)
{
    s->users--;
    if (s->users == 0 && s != c->settings)
        free_settings(s);
}

// A reload's, if there are any.
static void take_settings(struct callback *c)
{
    pthread_mutex_lock(&c->mutex);
    struct settings *fresh = c->fresh;
    c->fresh = NULL;
    pthread_mutex_unlock(&c->mutex);
    if (!fresh)
        return;
    if (c->settings->users == 0)
        free_settings(c->settings);
    c->settings = fresh;
    log_line(&fresh->log, LOG_INFO, "callback.ready", "secrets=%d reloaded=true", fresh->secrets.count);
}

// ---- one request

static double random_fraction(void)
{
    uint32_t n = 0;
    if (getrandom(&n, sizeof n, 0) != sizeof n)
        n = (uint32_t)(1e6 * monotonic_seconds()); // jitter needs no more
    return n * 0x1p-32;
}

// The signature is made anew for each try, since the time in it says when it was sent.
static int make_lines(struct slot *s, struct err *err)
{
    char stamp[24], signature[CALLBACK_SIGNATURE_SIZE];
    const int64_t now = (int64_t)time(NULL);
    snprintf(stamp, sizeof stamp, "%lld", (long long)now);
    TRY(callback_sign(&s->settings->secrets, s->callback.message, now, s->body, signature, err));
    TRY(http_line(&s->lines, "Content-Type", "application/json", err));
    TRY(http_line(&s->lines, "webhook-id", s->callback.message, err));
    TRY(http_line(&s->lines, "webhook-timestamp", stamp, err));
    TRY(http_line(&s->lines, "webhook-signature", signature, err));
    return http_line(&s->lines, "Expect", "", err); // no waiting for 100 Continue
}

static int begin(struct slot *s, struct err *err)
{
    if (s->callback.tries > s->settings->attempts + 1) // of one try nobody may know: it is made up for
        return err_set(err, ERR_TIMEOUT, "what became of the last of %llu tries is not known",
                       (unsigned long long)s->callback.tries - 1);
    TRY(callback_body(&s->callback, &s->body, err));
    TRY(make_lines(s, err));
    const struct http_request request = {.method = "POST",
                                         .url = s->callback.url,
                                         .lines = s->lines,
                                         .body = s->body,
                                         .length = strlen(s->body),
                                         .seconds = s->settings->timeout_s,
                                         .stall_seconds = s->settings->timeout_s,
                                         .policy = &s->settings->policy};
    return http_begin(s->http, &request, err);
}

// Tried again, or given up where that is of no use or its budget is spent.
static void judge_failure(struct slot *s, const struct err *why, double asked_for)
{
    const struct settings *set = s->settings;
    const bool final = why->code == ERR_REFUSED || why->code == ERR_INVALID || why->code == ERR_CORRUPT ||
                       s->status == 410 || s->callback.tries >= set->attempts;
    s->why = *why;
    s->state = final ? DEAD : RETRY;
    s->wait_s = callback_wait(set->backoff_min_s, set->backoff_max_s, s->callback.tries, asked_for, random_fraction());
}

static void judge(struct slot *s, CURLcode result)
{
    struct http_answer answer;
    struct err err = {0};
    int rc = http_end(s->http, result, &answer, &err);
    s->status = answer.status;
    if (rc == 0 && answer.status >= 200 && answer.status < 300) {
        s->state = DONE;
        return;
    }
    if (rc == 0) // what the receiver says besides is of no interest, and may repeat what was sent
        err_set(&err, answer.status == 410 ? ERR_UPLOAD : ERR_UNAVAILABLE, "POST %s: answered %ld%s", s->shown,
                answer.status,
                answer.status == 410                          ? ": it wants no more callbacks"
                : answer.status >= 300 && answer.status < 400 ? "; redirects are not followed"
                                                              : "");
    judge_failure(s, &err, answer.retry_after);
}

static void start_slot(struct callback *c, struct slot *s, const struct queue_callback *callback)
{
    struct err err = {0};
    s->callback = *callback;
    s->settings = c->settings;
    s->settings->users++;
    s->begun = monotonic_seconds();
    s->status = 0;
    target_redact(callback->url, s->shown, sizeof s->shown);
    if (begin(s, &err) != 0)
        judge_failure(s, &err, 0);
    else if (curl_multi_add_handle(c->multi, http_curl(s->http)) == CURLM_OK)
        s->state = CALLING;
    else {
        err_set(&err, ERR_NO_MEMORY, "libcurl cannot begin a request");
        judge_failure(s, &err, 0);
    }
}

static void clear_slot(struct callback *c, struct slot *s)
{
    curl_slist_free_all(s->lines);
    free(s->body);
    queue_callback_free(&s->callback);
    drop_settings(c, s->settings);
    *s = (struct slot){.http = s->http};
}

// Reads what libcurl finished.
static void collect(struct callback *c)
{
    int running = 0, left = 0;
    curl_multi_perform(c->multi, &running);
    for (const CURLMsg *m; (m = curl_multi_info_read(c->multi, &left));) {
        if (m->msg != CURLMSG_DONE)
            continue;
        CURL *curl = m->easy_handle;
        CURLcode result = m->data.result; // m is gone with the next call
        curl_multi_remove_handle(c->multi, curl);
        for (unsigned i = 0; i < c->n_slots; i++)
            if (c->slots[i].state == CALLING && http_curl(c->slots[i].http) == curl)
                judge(&c->slots[i], result);
    }
}

// ---- the queue

static int tell_queue(struct callback *c, const struct slot *s, struct err *err)
{
    if (s->state == DONE)
        return queue_callback_done(c->queue, &s->callback, err);
    if (s->state == RETRY)
        return queue_callback_retry(c->queue, &s->callback, (uint64_t)(1000 * s->wait_s), true, err);
    return queue_callback_dead(c->queue, &s->callback, &s->why, s->shown, err);
}

static void log_verdict(const struct slot *s, bool stale)
{
    const struct queue_callback *k = &s->callback;
    const struct log *log = &s->settings->log;
    const unsigned long long tries = k->tries;
    if (s->state == DONE)
        log_line(log, LOG_INFO, "callback.delivered",
                 "tenant=%s job=%s message=%s url=\"%s\" status=%ld try=%llu seconds=%.3f stale=%d", k->tenant, k->id,
                 k->message, s->shown, s->status, tries, monotonic_seconds() - s->begun, stale);
    else if (s->state == RETRY)
        log_line(log, LOG_WARN, "callback.retry",
                 "tenant=%s job=%s message=%s url=\"%s\" status=%ld try=%llu wait_s=%.3f error=\"%s\"", k->tenant,
                 k->id, k->message, s->shown, s->status, tries, s->wait_s, s->why.text);
    else
        log_line(log, LOG_ERROR, "callback.dead",
                 "tenant=%s job=%s message=%s url=\"%s\" status=%ld try=%llu code=%s error=\"%s\"", k->tenant, k->id,
                 k->message, s->shown, s->status, tries, err_name(s->why.code), s->why.text);
}

static int settle(struct callback *c, struct err *err)
{
    for (unsigned i = 0; i < c->n_slots; i++) {
        struct slot *s = &c->slots[i];
        if (s->state == FREE || s->state == CALLING)
            continue;
        int rc = tell_queue(c, s, err);
        if (rc != 0 && rc != ERR_STALE) // stale: told already, or somebody else's since the lease ran out
            return rc;
        log_verdict(s, rc == ERR_STALE);
        clear_slot(c, s);
        c->ask_at = 0; // there is room
    }
    return 0;
}

// Who has how much in hand; the free slots are counted, too.
static struct queue_callbacks_want count_hand(const struct callback *c, const char *tenants[SLOTS], unsigned n[SLOTS])
{
    struct queue_callbacks_want want = {.lease_ms = (uint64_t)(1000 * c->settings->timeout_s) + LEASE_MORE,
                                        .max_of_tenant = TENANT_SLOTS,
                                        .in_hand = tenants,
                                        .n_of_tenant = n};
    for (unsigned i = 0; i < c->n_slots; i++) {
        const struct slot *s = &c->slots[i];
        size_t k = 0;
        if (s->state == FREE) {
            want.max++;
            continue;
        }
        while (k < want.n_in_hand && strcmp(tenants[k], s->callback.tenant) != 0)
            k++;
        if (k == want.n_in_hand) {
            tenants[want.n_in_hand++] = s->callback.tenant;
            n[k] = 0;
        }
        n[k]++;
    }
    return want;
}

static int ask(struct callback *c, struct err *err)
{
    struct queue_callback list[SLOTS];
    const char *tenants[SLOTS];
    unsigned n[SLOTS];
    size_t count = 0;
    uint64_t next_ms = 0;
    const struct queue_callbacks_want want = count_hand(c, tenants, n);
    if (want.max == 0)
        return 0;
    TRY(queue_callbacks(c->queue, &want, list, &count, &next_ms, err));
    for (size_t i = 0, at = 0; i < count; i++, at++) {
        while (c->slots[at].state != FREE)
            at++;
        start_slot(c, &c->slots[at], &list[i]);
    }
    const double ms = count ? 0 : fmin(POLL_MS, fmax(20, (double)next_ms));
    c->ask_at = monotonic_seconds() + 1e-3 * ms;
    return 0;
}

static int round_of_work(struct callback *c, struct err *err)
{
    const struct redis_options options = {.connect_ms = CONNECT_MS, .command_ms = COMMAND_MS};
    if (!c->queue)
        TRY(queue_open(&c->queue, c->url, c->name, QUEUE_NODE, &options, err));
    TRY(settle(c, err));
    return monotonic_seconds() >= c->ask_at ? ask(c, err) : 0;
}

static void turn(struct callback *c)
{
    struct err err = {0};
    if (c->down && monotonic_seconds() < c->ask_at)
        return;
    const bool failed = round_of_work(c, &err) != 0;
    if (failed)
        c->ask_at = monotonic_seconds() + 1e-3 * RETRY_MS;
    if (failed && !c->down)
        log_line(&c->settings->log, LOG_WARN, "callback.waiting", "error=\"%s\"", err.text);
    if (!failed && c->down)
        log_line(&c->settings->log, LOG_INFO, "callback.resumed", "queue=%s", c->name);
    c->down = failed;
}

// Milliseconds until there is something to do but for what libcurl waits for.
static int time_to_wait(const struct callback *c)
{
    bool room = false, told = true;
    for (unsigned i = 0; i < c->n_slots; i++) {
        room |= c->slots[i].state == FREE;
        told &= c->slots[i].state == FREE || c->slots[i].state == CALLING;
    }
    if (!told && !c->down)
        return 0;
    const double left = 1000 * (c->ask_at - monotonic_seconds());
    return !room && told ? 1000 : (int)fmax(0, fmin(1000, ceil(left)));
}

// What is in hand at the end goes to others at once, and not at its cost.
static void give_back(struct callback *c)
{
    struct err err = {0};
    bool answers = c->queue && !c->down && settle(c, &err) == 0;
    for (unsigned i = 0; i < c->n_slots; i++) {
        struct slot *s = &c->slots[i];
        struct http_answer ignored;
        if (s->state == CALLING) {
            curl_multi_remove_handle(c->multi, http_curl(s->http));
            http_end(s->http, CURLE_ABORTED_BY_CALLBACK, &ignored, &err);
            if (answers) { // else its lease runs out
                const int rc = queue_callback_retry(c->queue, &s->callback, 0, false, &err);
                answers = rc == 0 || rc == ERR_STALE;
            }
        }
        if (s->state != FREE)
            clear_slot(c, s);
    }
}

static void *run(void *arg)
{
    struct callback *c = arg;
    while (!atomic_load(&c->ending)) {
        take_settings(c);
        collect(c);
        turn(c);
        curl_multi_poll(c->multi, NULL, 0, time_to_wait(c), NULL);
    }
    give_back(c);
    queue_close(c->queue);
    return NULL;
}

// ---- from outside

int callback_check(const struct conf *conf, struct err *err)
{
    const struct log silent = {.fd = -1, .level = LOG_ERROR, .prog = ""};
    struct settings *s = NULL;
    TRY(make_settings(conf, &silent, &s, err));
    free_settings(s);
    return 0;
}

static void free_callback(struct callback *c)
{
    for (unsigned i = 0; i < c->n_slots; i++)
        http_free(c->slots[i].http);
    curl_multi_cleanup(c->multi);
    free_settings(c->settings);
    free_settings(c->fresh);
    pthread_mutex_destroy(&c->mutex);
    free(c->url);
    free(c->name);
    free(c);
}

int callback_start(struct callback **out, const struct conf *conf, const struct log *log, struct err *err)
{
    struct callback *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NO_MEMORY, "no memory for callbacks");
    pthread_mutex_init(&c->mutex, NULL);
    int rc = make_settings(conf, log, &c->settings, err);
    if (rc != 0)
        c->settings = NULL;
    for (; rc == 0 && c->n_slots < SLOTS; c->n_slots++) {
        c->slots[c->n_slots].http = http_new(CONNECT_SECONDS, err);
        if (!c->slots[c->n_slots].http) {
            rc = ERR_NO_MEMORY;
            break;
        }
    }
    c->url = strdup(conf->redis.url);
    c->name = strdup(conf->redis.queue);
    c->multi = curl_multi_init();
    if (rc == 0 && !(c->url && c->name && c->multi && pthread_create(&c->thread, NULL, run, c) == 0))
        rc = err_set(err, ERR_NO_MEMORY, "cannot start the thread of callbacks");
    if (rc != 0) {
        free_callback(c);
        return rc;
    }
    log_line(log, LOG_INFO, "callback.ready", "secrets=%d", c->settings->secrets.count);
    *out = c;
    return 0;
}

void callback_stop(struct callback *c)
{
    if (!c)
        return;
    atomic_store(&c->ending, true);
    curl_multi_wakeup(c->multi);
    pthread_join(c->thread, NULL);
    free_callback(c);
}

int callback_configure(struct callback *c, const struct conf *conf, const struct log *log, struct err *err)
{
    struct settings *fresh = NULL;
    TRY(make_settings(conf, log, &fresh, err));
    pthread_mutex_lock(&c->mutex);
    struct settings *unused = c->fresh;
    c->fresh = fresh;
    pthread_mutex_unlock(&c->mutex);
    free_settings(unused);
    curl_multi_wakeup(c->multi);
    return 0;
}
