// The endpoint is asked through libcurl's multi interface. A request stands for one entry of a door and lives until its
// verdict was taken: asking, put off after a failure, or answered.
#include "worker/moderation.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/clock.h"
#include "worker/deny_list.h"
#include "worker/output/http.h"

enum {
    SLOTS = 32,            // requests under way at once
    TENANT_SLOTS = 8,      // of one tenant: what hangs for it leaves room for the others'
    CONNECT_SECONDS = 300, // no limit of its own, the request's is shorter
    REASON_SIZE = 120,     // of the endpoint's reason
    SHARED = 12,           // bytes in a row that a reason may not have from a prompt
    MAX_PROMPTS = 4,
};
#define LOOK_SECONDS      1.0 // how often the deny list's file is looked at
#define RETRY_MIN_SECONDS 1.0
#define RETRY_MAX_SECONDS 30.0

enum state { ASKING, PUT_OFF, ANSWERED };

struct request {
    struct request *next;
    char tenant[JOB_MAX_TENANT + 1], entry[QUEUE_ENTRY_SIZE];
    char id[JOB_NAME_SIZE];
    char *prompts[MAX_PROMPTS]; // while asking: a reason must not repeat them
    enum state state;
    struct http *http; // ASKING
    char *body;        // ASKING
    unsigned tries;
    double retry_at;            // PUT_OFF; monotonic seconds
    enum queue_verdict verdict; // ANSWERED, with why
    struct err why;
};

struct moderation {
    struct log log;
    char *deny_file, *url; // url NULL: nobody is asked
    int on_error;          // enum conf_on_error
    double timeout_s;
    struct upload_policy policy; // its list is ours
    struct curl_slist *lines;
    struct deny_list *deny; // NULL: none
    double look_at;
    CURLM *multi;
    struct http *idle[SLOTS]; // (n_idle) requests that are not under way
    int n_idle;
    struct request *requests;
    bool failing; // the last answer was none, which was told
};

// ---- the deny list

// A file that cannot be read, or is wrong, changes nothing: the list read last holds.
static void reread(struct moderation *m)
{
    struct deny_list *fresh;
    struct err err;
    if (!m->deny || monotonic_seconds() < m->look_at)
        return;
    m->look_at = monotonic_seconds() + LOOK_SECONDS;
    if (!deny_list_changed(m->deny))
        return;
    if (deny_list_load(m->deny_file, &fresh, &err) != 0) {
        log_line(&m->log, LOG_ERROR, "moderation.deny_file", "kept=\"the list read last\" error=\"%s\"", err.text);
        return;
    }
    deny_list_free(m->deny);
    m->deny = fresh;
    log_line(&m->log, LOG_INFO, "moderation.deny_file", "path=\"%s\" reloaded=true", m->deny_file);
}

// Negative prompts say what not to draw: there such words belong.
static enum queue_verdict look_through(const struct moderation *m, const Ditfleet__V1__Job *job, struct err *why)
{
    const char *prompts[] = {job->prompt, job->prompt_2};
    for (size_t i = 0; m->deny && i < sizeof prompts / sizeof *prompts; i++) {
        int line = 0;
        const int rc = deny_list_match(m->deny, prompts[i], &line, why);
        if (rc == ERR_NO_MEMORY)
            return QUEUE_LATER;
        if (rc != 0 && m->on_error == CONF_ON_ERROR_ALLOW)
            continue;
        if (rc != 0 || line > 0) {
            err_set(why, ERR_MODERATED, "the prompt is refused by the fleet's policy: line %d of its deny list%s", line,
                    rc ? " takes too long with it" : "");
            return QUEUE_DENY;
        }
    }
    return QUEUE_ALLOW;
}

// ---- the endpoint's answer

// Whether text has SHARED bytes in a row, or all, of one of the prompts.
static bool repeats(const char *text, char *const prompts[MAX_PROMPTS])
{
    const size_t length = strlen(text);
    for (int i = 0; i < MAX_PROMPTS && prompts[i]; i++) {
        const size_t n = strlen(prompts[i]), run = n < SHARED ? n : SHARED;
        for (size_t at = 0; run > 0 && at + run <= length; at++) {
            char part[SHARED + 1] = "";
            memcpy(part, text + at, run);
            if (strcasestr(prompts[i], part))
                return true;
        }
    }
    return false;
}

// The endpoint's words go where prompts may not: short, plain, and without what they have from a prompt.
static void take_reason(const struct request *r, const char *reason, char out[REASON_SIZE])
{
    snprintf(out, REASON_SIZE, "%s", reason);
    if (repeats(out, r->prompts))
        snprintf(out, REASON_SIZE, "%s", "the reason given repeats the prompt and is left out");
    for (char *c = out; *c; c++)
        if (*c < 0x20 || *c >= 0x7f || *c == '"' || *c == '\\')
            *c = '?';
}

static int read_answer(struct request *r, const struct http_answer *answer, struct err *err)
{
    if (answer->status != 200)
        return err_set(err, ERR_UNAVAILABLE, "it answered %ld%s; 200 is wanted", answer->status,
                       answer->status >= 300 && answer->status < 400 ? " (redirects are not followed)" : "");
    if (answer->body_kept >= HTTP_ANSWER_KEPT)
        return err_set(err, ERR_CORRUPT, "its answer has %d bytes or more", HTTP_ANSWER_KEPT);
    json_t *root = json_loadb(answer->body, answer->body_kept, JSON_REJECT_DUPLICATES, NULL);
    const json_t *allow = json_object_get(root, "allow");
    const char *reason = json_string_value(json_object_get(root, "reason"));
    const bool good = json_is_boolean(allow);
    if (good) {
        char plain[REASON_SIZE];
        r->verdict = json_is_true(allow) ? QUEUE_ALLOW : QUEUE_DENY;
        take_reason(r, reason ? reason : "", plain);
        if (r->verdict == QUEUE_DENY)
            err_set(&r->why, ERR_MODERATED, "the prompt is refused by the fleet's policy%s%s", *plain ? ": " : "",
                    plain);
    }
    json_decref(root);
    return good ? 0 : err_set(err, ERR_CORRUPT, "its answer is no JSON object with \"allow\": true or false");
}

// No verdict: as [moderation] on_error says.
static void fail(struct moderation *m, struct request *r, const struct err *why)
{
    if (!m->failing)
        log_line(&m->log, LOG_WARN, "moderation.failing", "error=\"%s\"", why->text);
    m->failing = true;
    r->state = ANSWERED;
    switch ((enum conf_on_error)m->on_error) {
    case CONF_ON_ERROR_WAIT:
        r->state = PUT_OFF;
        r->retry_at =
            monotonic_seconds() + fmin(RETRY_MAX_SECONDS, RETRY_MIN_SECONDS * exp2(r->tries < 10 ? r->tries : 10));
        r->tries++;
        break;
    case CONF_ON_ERROR_ALLOW:
        r->verdict = QUEUE_ALLOW;
        log_line(&m->log, LOG_WARN, "moderation.unjudged", "tenant=%s job=%s entry=%s", r->tenant, r->id, r->entry);
        break;
    case CONF_ON_ERROR_REFUSE:
        r->verdict = QUEUE_DENY;
        err_set(&r->why, ERR_MODERATED,
                "nobody could say whether the prompt is within the fleet's policy, and [moderation] on_error = refuse: "
                "%.300s",
                why->text);
        break;
    }
}

// ---- requests

static void stop_asking(struct moderation *m, struct request *r)
{
    if (r->http)
        m->idle[m->n_idle++] = r->http;
    r->http = NULL;
    free(r->body);
    r->body = NULL;
    for (int i = 0; i < MAX_PROMPTS; i++) {
        free(r->prompts[i]);
        r->prompts[i] = NULL;
    }
}

static void judge_answer(struct moderation *m, struct request *r, CURLcode result)
{
    struct http_answer answer;
    struct err err = {0};
    int rc = http_end(r->http, result, &answer, &err);
    rc = rc ? rc : read_answer(r, &answer, &err);
    if (rc != 0) {
        fail(m, r, &err);
    } else {
        r->state = ANSWERED;
        if (m->failing)
            log_line(&m->log, LOG_INFO, "moderation.answers", "tenant=%s job=%s", r->tenant, r->id);
        m->failing = false;
    }
    stop_asking(m, r);
}

static int make_body(struct request *r, const Ditfleet__V1__Job *job, struct err *err)
{
    const bool negative = job->negative_prompt__case == DITFLEET__V1__JOB__NEGATIVE_PROMPT__NEGATIVE_PROMPT;
    const char *const names[] = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2"};
    const char *const texts[] = {job->prompt, job->prompt_2, negative ? job->negative_prompt : "",
                                 job->negative_prompt_2};
    json_t *root = json_pack("{s:s,s:s,s:s}", "tenant", r->tenant, "id", r->id, "model", job->model);
    int kept = 0;
    bool good = root != NULL;
    for (int i = 0; good && i < MAX_PROMPTS; i++)
        if (i == 0 || *texts[i]) {
            good = json_object_set_new(root, names[i], json_string(texts[i])) == 0 &&
                   (r->prompts[kept++] = strdup(texts[i])) != NULL;
        }
    r->body = good ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    if (!r->body) {
        err_set(err, ERR_NO_MEMORY, "no memory to ask about a prompt");
        return ERR_NO_MEMORY;
    }
    return 0;
}

static int begin(struct moderation *m, struct request *r, const Ditfleet__V1__Job *job, struct err *err)
{
    TRY(make_body(r, job, err));
    r->http = m->idle[--m->n_idle];
    const struct http_request request = {.method = "POST",
                                         .url = m->url,
                                         .lines = m->lines,
                                         .body = r->body,
                                         .length = strlen(r->body),
                                         .seconds = m->timeout_s,
                                         .stall_seconds = 2 * m->timeout_s,
                                         .policy = &m->policy};
    TRY(http_begin(r->http, &request, err));
    if (curl_multi_add_handle(m->multi, http_curl(r->http)) != CURLM_OK)
        return err_set(err, ERR_NO_MEMORY, "libcurl cannot begin a request");
    r->state = ASKING;
    return 0;
}

static void ask(struct moderation *m, struct request *r, const Ditfleet__V1__Job *job)
{
    struct err err = {0};
    if (begin(m, r, job, &err) != 0) {
        fail(m, r, &err);
        stop_asking(m, r);
    }
}

static bool has_room(const struct moderation *m, const char *tenant)
{
    int asking = 0;
    for (const struct request *r = m->requests; r; r = r->next)
        asking += r->state == ASKING && strcmp(r->tenant, tenant) == 0;
    return m->n_idle > 0 && asking < TENANT_SLOTS;
}

static struct request **find(struct moderation *m, const struct queue_submission *s)
{
    struct request **at = &m->requests;
    while (*at && (strcmp((*at)->entry, s->entry) != 0 || strcmp((*at)->tenant, s->tenant) != 0))
        at = &(*at)->next;
    return at;
}

static void add(struct moderation *m, const struct queue_submission *s)
{
    struct request *r = calloc(1, sizeof *r);
    if (!r)
        return; // asked about again, later
    snprintf(r->tenant, sizeof r->tenant, "%s", s->tenant);
    snprintf(r->entry, sizeof r->entry, "%s", s->entry);
    snprintf(r->id, sizeof r->id, "%s", s->job->id);
    r->next = m->requests;
    m->requests = r;
    ask(m, r, s->job);
}

enum queue_verdict moderation_judge(void *arg, const struct queue_submission *s, struct err *why)
{
    struct moderation *m = arg;
    struct request **at = find(m, s), *r = *at;
    reread(m);
    if (!r) {
        const enum queue_verdict listed = look_through(m, s->job, why);
        if (listed != QUEUE_ALLOW || !m->url)
            return listed;
        if (has_room(m, s->tenant))
            add(m, s);
        return QUEUE_LATER;
    }
    if (r->state == PUT_OFF && monotonic_seconds() >= r->retry_at && has_room(m, s->tenant))
        ask(m, r, s->job);
    if (r->state != ANSWERED)
        return QUEUE_LATER;
    const enum queue_verdict verdict = r->verdict;
    *why = r->why;
    *at = r->next;
    free(r);
    return verdict;
}

// True: at least one request is over.
static bool collect(struct moderation *m)
{
    int running = 0, left = 0;
    bool news = false;
    curl_multi_perform(m->multi, &running);
    for (const CURLMsg *message; (message = curl_multi_info_read(m->multi, &left));) {
        CURL *curl = message->easy_handle;
        const CURLcode result = message->data.result; // message is gone with the next call
        curl_multi_remove_handle(m->multi, curl);
        for (struct request *r = m->requests; r; r = r->next)
            if (r->http && http_curl(r->http) == curl)
                judge_answer(m, r, result);
        news = true;
    }
    return news;
}

void moderation_wait(struct moderation *m, int ms)
{
    const double end = monotonic_seconds() + 1e-3 * ms;
    while (!collect(m) && monotonic_seconds() < end)
        curl_multi_poll(m->multi, NULL, 0, (int)ceil(1e3 * fmax(0, end - monotonic_seconds())), NULL);
}

// ---- from outside

static int open_endpoint(struct moderation *m, const struct conf *conf, struct err *err)
{
    m->policy.what = "moderation";
    m->url = strdup(conf->moderation.url);
    m->multi = curl_multi_init();
    if (!m->url || !m->multi)
        return err_set(err, ERR_NO_MEMORY, "no memory for moderation");
    TRY(target_copy_hosts(&m->policy, (const char *const *)conf->moderation.allow.items,
                          (size_t)conf->moderation.allow.count, err));
    TRY(target_check_policy(&m->policy, err));
    TRY(target_check_url(&m->policy, m->url, NULL, err));
    TRY(http_line(&m->lines, "Content-Type", "application/json", err));
    TRY(http_line(&m->lines, "Expect", "", err)); // no waiting for 100 Continue
    for (; m->n_idle < SLOTS; m->n_idle++) {
        m->idle[m->n_idle] = http_new(CONNECT_SECONDS, err);
        if (!m->idle[m->n_idle])
            return err->code;
    }
    return 0;
}

int moderation_new(const struct conf *conf, const struct log *log, struct moderation **out, struct err *err)
{
    *out = NULL;
    if (!*conf->moderation.deny_file && !*conf->moderation.url)
        return 0;
    struct moderation *m = calloc(1, sizeof *m);
    if (!m || !(m->deny_file = strdup(conf->moderation.deny_file))) {
        free(m);
        return err_set(err, ERR_NO_MEMORY, "no memory for moderation");
    }
    m->log = *log;
    m->on_error = conf->moderation.on_error;
    m->timeout_s = conf->moderation.timeout_s;
    int rc = *m->deny_file ? deny_list_load(m->deny_file, &m->deny, err) : 0;
    if (rc == 0 && *conf->moderation.url)
        rc = open_endpoint(m, conf, err);
    if (rc != 0) {
        moderation_free(m);
        return rc;
    }
    log_line(log, LOG_INFO, "moderation.ready", "deny_file=\"%s\" endpoint=%s", m->deny_file, m->url ? "yes" : "no");
    *out = m;
    return 0;
}

void moderation_free(struct moderation *m)
{
    if (!m)
        return;
    for (struct request *r = m->requests, *next; r; r = next) {
        next = r->next;
        if (r->http)
            curl_multi_remove_handle(m->multi, http_curl(r->http));
        stop_asking(m, r);
        free(r);
    }
    while (m->n_idle > 0)
        http_free(m->idle[--m->n_idle]);
    if (m->multi)
        curl_multi_cleanup(m->multi);
    curl_slist_free_all(m->lines);
    target_free_hosts(&m->policy);
    deny_list_free(m->deny);
    free(m->deny_file);
    free(m->url);
    free(m);
}
