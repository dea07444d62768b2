#include "worker/output/upload.h"

#include "proto/clock.h"
#include "worker/output/http.h"
#include "worker/output/save.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { EXCERPT = 200 }; // characters of an answer that an error may quote

const struct upload_options upload_defaults = {
    .attempts = 5,
    .backoff_base_seconds = 0.5,
    .backoff_cap_seconds = 20,
    .connect_timeout_seconds = 10,
    .stall_seconds = 30,
    .total_timeout_seconds = 120,
};

struct uploader {
    struct http *http; // one handle, so that its connection is used again
    const struct upload_policy *policy;
    struct upload_options options;
    const struct log *log;
    uint64_t random; // state of the jitter's generator
};

// One delivery by HTTP.
struct delivery {
    struct uploader *u;
    const Ditfleet__V1__Output *output;
    const char *url;          // expanded: its query is a secret
    char shown[256];          // redacted, for logs and errors
    struct curl_slist *lines; // request headers: secrets
    const void *body;
    size_t length;
    upload_stop *stop;
    void *context;
    bool stopped; // stop said no: *err holds its words
    struct err *err;
};

// splitmix64 (Steele, Lea, Flood 2014), in [0, 1).
static double uniform(struct uploader *u)
{
    uint64_t z = u->random += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// ---- may it go on?

static bool may_go_on(struct delivery *d)
{
    if (!d->stopped && d->stop) {
        int code = d->stop(d->context, d->err);
        d->stopped = code != 0;
        if (d->stopped && d->err->code == ERR_NONE)
            err_set(d->err, (enum err_code)code, "upload stopped: %s", err_name((enum err_code)code));
    }
    return !d->stopped;
}

// The same question, put by a request under way.
static int on_stop(void *context, struct err *e)
{
    struct delivery *d = context;
    if (may_go_on(d))
        return 0;
    *e = *d->err;
    return d->err->code;
}

// ---- what an error may quote

// True when the text repeats the beginning of a secret. Very short secrets would match by chance; they are no secrets.
static bool repeats(const char *text, const char *secret, size_t len)
{
    char head[9];
    snprintf(head, sizeof head, "%.*s", (int)(len < 8 ? len : 8), secret);
    return strlen(head) >= 4 && strstr(text, head);
}

// The beginning of the host's answer as one printable line. Some hosts echo the request (S3 sends back the signature it
// was given): an answer that repeats a header or a value of the query is not quoted at all.
static void excerpt(const struct delivery *d, const struct http_answer *a, char out[EXCERPT + 1])
{
    size_t n = 0;
    for (size_t i = 0; i < a->body_kept && n < EXCERPT; i++) {
        unsigned char c = (unsigned char)a->body[i];
        if (c == '"' || c == '\\')
            out[n++] = '\'';
        else if (c > 0x20 && c < 0x7f)
            out[n++] = (char)c;
        else if (n > 0 && out[n - 1] != ' ')
            out[n++] = ' ';
    }
    out[n] = 0;
    bool secret = false;
    for (size_t i = 0; i < d->output->n_headers; i++) {
        const char *value = d->output->headers[i]->value;
        const char *word = strchr(value, ' '); // "Bearer <token>": the token alone counts too
        secret = secret || repeats(out, value, strlen(value)) || (word && repeats(out, word + 1, strlen(word + 1)));
    }
    for (const char *p = strchr(d->url, '?'); p; p = strchr(p + 1, '&')) {
        const char *value = p + 1 + strcspn(p + 1, "=&");
        value += *value == '=';
        secret = secret || repeats(out, value, strcspn(value, "&#"));
    }
    if (secret)
        snprintf(out, EXCERPT + 1, "(not quoted: it repeats the request)");
}

// ---- one try

static bool status_may_mend(long status)
{
    return status == 408 || status == 425 || status == 429 || status >= 500;
}

static int judge_status(struct delivery *d, const struct http_answer *a)
{
    const long status = a->status;
    if (status >= 200 && status < 300)
        return 0;
    if (status >= 300 && status < 400)
        return err_set(d->err, ERR_UPLOAD, "PUT %s: answered %ld; redirects are not followed", d->shown, status);
    char quote[EXCERPT + 1];
    excerpt(d, a, quote);
    return err_set(d->err, status_may_mend(status) ? ERR_UNAVAILABLE : ERR_UPLOAD, "PUT %s: answered %ld%s%s", d->shown,
                   status, *quote ? ": " : "", quote);
}

// *wait is what the host asks for by Retry-After (seconds or a date), 0 if nothing.
static int try_once(struct delivery *d, double seconds, long *status, double *wait)
{
    const struct http_request request = {.method = "PUT",
                                         .url = d->url,
                                         .lines = d->lines,
                                         .body = d->body,
                                         .length = d->length,
                                         .seconds = seconds,
                                         .stall_seconds = d->u->options.stall_seconds,
                                         .policy = d->u->policy,
                                         .stop = on_stop,
                                         .context = d};
    struct http_answer answer;
    int code = http_send(d->u->http, &request, &answer, d->err);
    *status = answer.status;
    *wait = answer.retry_after;
    return code ? code : judge_status(d, &answer);
}

// ---- tries

static void wait_seconds(struct delivery *d, double seconds)
{
    for (double end = monotonic_seconds() + seconds, left; (left = end - monotonic_seconds()) > 0;) {
        double slice = left < 1 ? left : 1;
        struct timespec t = {.tv_sec = (time_t)slice, .tv_nsec = (long)((slice - (double)(time_t)slice) * 1e9)};
        nanosleep(&t, NULL);
        if (left > 1 && !may_go_on(d))
            return;
    }
}

static int deliver(struct delivery *d, struct upload_result *r)
{
    const struct upload_options *o = &d->u->options;
    double deadline = monotonic_seconds() + o->total_timeout_seconds;
    double ceiling = o->backoff_base_seconds;
    for (;;) {
        if (!may_go_on(d))
            return d->err->code;
        double asked_for;
        r->tries++;
        int code = try_once(d, deadline - monotonic_seconds(), &r->status, &asked_for);
        if (code == 0 || d->stopped || !d->err->retryable)
            return code;
        if (ceiling > o->backoff_cap_seconds)
            ceiling = o->backoff_cap_seconds;
        double wait = asked_for + uniform(d->u) * ceiling;
        ceiling *= 2;
        if (r->tries >= o->attempts)
            return err_context(d->err, "given up after %u tries", r->tries);
        if (monotonic_seconds() + wait >= deadline)
            return err_context(d->err, "given up after %u tries: the next, in %.0f s, would pass the limit of %.0f s",
                               r->tries, wait, o->total_timeout_seconds);
        log_line(d->u->log, LOG_WARN, "upload.retry", "url=\"%s\" try=%u wait_s=%.3f error=\"%s\"", d->shown, r->tries,
                 wait, d->err->text);
        wait_seconds(d, wait);
    }
}

// ---- headers

static bool is_token(const char *s)
{
    size_t n = strlen(s);
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)s[i]) && !strchr("!#$%&'*+-.^_`|~", s[i]))
            return false;
    return n >= 1 && n <= 256;
}

// Headers that say where a message ends or goes are the worker's own.
static int check_header(const Ditfleet__V1__Header *h, struct err *e)
{
    static const char *const own[] = {"Connection", "Content-Length", "Expect",           "Host", "Keep-Alive", "TE",
                                      "Trailer",    "Upgrade",        "Transfer-Encoding"};
    if (!is_token(h->name))
        return err_set(e, ERR_INVALID, "output header name \"%.64s\": letters, digits and -_. only", h->name);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (strcasecmp(h->name, own[i]) == 0 || strncasecmp(h->name, "Proxy-", 6) == 0)
            return err_set(e, ERR_INVALID, "output header %.64s is set by the worker; leave it out", h->name);
    for (const char *c = h->value; *c; c++)
        if ((unsigned char)*c < 0x20 && *c != '\t')
            return err_set(e, ERR_INVALID, "output header %.64s: its value has a control character", h->name);
    return 0;
}

static int add_line(struct curl_slist **lines, const char *name, const char *value, struct err *e)
{
    char *line = NULL;
    // libcurl's notation: "Name;" sends an empty header, where "Name:" would take the header away.
    bool empty = value[strspn(value, " \t")] == 0;
    if (asprintf(&line, empty ? "%s;" : "%s: %s", name, value) < 0)
        return err_set(e, ERR_NO_MEMORY, "no memory for upload headers");
    struct curl_slist *longer = curl_slist_append(*lines, line);
    free(line);
    if (!longer)
        return err_set(e, ERR_NO_MEMORY, "no memory for upload headers");
    *lines = longer;
    return 0;
}

static int make_lines(const Ditfleet__V1__Output *output, struct curl_slist **lines, struct err *e)
{
    bool typed = false;
    for (size_t i = 0; i < output->n_headers; i++) {
        const Ditfleet__V1__Header *h = output->headers[i];
        TRY(check_header(h, e));
        TRY(add_line(lines, h->name, h->value, e));
        typed = typed || strcasecmp(h->name, "Content-Type") == 0;
    }
    if (!typed)
        TRY(add_line(lines, "Content-Type", "image/png", e));
    struct curl_slist *longer = curl_slist_append(*lines, "Expect:"); // no waiting for 100 Continue
    if (!longer)
        return err_set(e, ERR_NO_MEMORY, "no memory for upload headers");
    *lines = longer;
    return 0;
}

// ---- the uploader

static int check_options(const struct upload_options *o, struct err *e)
{
    const struct {
        const char *name;
        double value, least, most;
    } bounds[] = {
        {"attempts", o->attempts, 1, 100},
        {"backoff_base_seconds", o->backoff_base_seconds, 0, 3600},
        {"backoff_cap_seconds", o->backoff_cap_seconds, 0, 3600},
        {"connect_timeout_seconds", o->connect_timeout_seconds, 0.001, 3600},
        {"stall_seconds", o->stall_seconds, 0.001, 3600},
        {"total_timeout_seconds", o->total_timeout_seconds, 0.001, 86400},
    };
    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++)
        if (!(bounds[i].value >= bounds[i].least && bounds[i].value <= bounds[i].most))
            return err_set(e, ERR_INVALID, "upload option %s is %g: %g to %g is allowed", bounds[i].name,
                           bounds[i].value, bounds[i].least, bounds[i].most);
    return 0;
}

struct uploader *uploader_new(const struct upload_policy *policy, const struct upload_options *options,
                              const struct log *log, struct err *e)
{
    if (check_options(options, e) || target_check_policy(policy, e))
        return NULL;
    struct uploader *u = calloc(1, sizeof *u);
    if (!u) {
        err_set(e, ERR_NO_MEMORY, "no memory for an uploader");
        return NULL;
    }
    *u = (struct uploader){.policy = policy, .options = *options, .log = log};
    if (getrandom(&u->random, sizeof u->random, 0) != sizeof u->random)
        u->random = (uint64_t)time(NULL); // jitter needs no more
    u->http = http_new(options->connect_timeout_seconds, e);
    if (!u->http) {
        uploader_free(u);
        return NULL;
    }
    return u;
}

void uploader_free(struct uploader *u)
{
    if (!u)
        return;
    http_free(u->http);
    free(u);
}

void uploader_seed(struct uploader *u, uint64_t seed)
{
    u->random = seed;
}

// ---- outputs

static bool has(const char *s)
{
    return s && *s;
}

// Where exactly, placeholders replaced: *out is the URL or the path, malloc'ed.
static int expand(const Ditfleet__V1__Output *output, const char *id, uint32_t attempt, uint32_t index, char **out,
                  struct err *e)
{
    *out = NULL;
    if (!output || has(output->url) == has(output->file))
        return err_set(e, ERR_INVALID, "output: exactly one of url and file is needed");
    return target_expand(has(output->url) ? output->url : output->file, id, attempt, index, out, e);
}

int uploader_check(struct uploader *u, const Ditfleet__V1__Output *output, const char *id, struct err *e)
{
    char *where;
    TRY(expand(output, id, 1, 0, &where, e));
    struct curl_slist *lines = NULL;
    const char *root, *rest;
    int code = has(output->file) ? target_check_file(u->policy, where, &root, &rest, e)
                                 : target_check_url(u->policy, where, NULL, e);
    if (!code)
        code = make_lines(output, &lines, e);
    curl_slist_free_all(lines);
    free(where);
    return code;
}

static int put_url(struct delivery *d, struct upload_result *r)
{
    TRY(target_check_url(d->u->policy, d->url, NULL, d->err));
    TRY(make_lines(d->output, &d->lines, d->err));
    target_redact(d->url, d->shown, sizeof d->shown);
    TRY(deliver(d, r));
    size_t room = strlen(d->url) + 64; // an address may be spelled longer than it came
    r->location = malloc(room);
    if (!r->location)
        return err_set(d->err, ERR_NO_MEMORY, "no memory for an upload's location");
    target_redact(d->url, r->location, room);
    return 0;
}

// *path becomes the result's location.
static int put_file(struct delivery *d, char **path, struct upload_result *r)
{
    const char *root, *rest;
    TRY(target_check_file(d->u->policy, *path, &root, &rest, d->err));
    if (!may_go_on(d))
        return d->err->code;
    r->tries = 1;
    TRY(save_file(root, rest, d->body, d->length, true, d->err));
    r->location = *path;
    *path = NULL;
    return 0;
}

int uploader_put(struct uploader *u, const Ditfleet__V1__Output *output, const char *id, uint32_t attempt,
                 uint32_t index, const void *bytes, size_t len, upload_stop *stop, void *context,
                 struct upload_result *result, struct err *e)
{
    struct err local = {0};
    char *where;
    double start = monotonic_seconds();
    *result = (struct upload_result){0};
    TRY(expand(output, id, attempt, index, &where, e));
    struct delivery d = {.u = u,
                         .output = output,
                         .url = where,
                         .body = bytes,
                         .length = len,
                         .stop = stop,
                         .context = context,
                         .err = &local};
    int code = has(output->file) ? put_file(&d, &where, result) : put_url(&d, result);
    curl_slist_free_all(d.lines);
    free(where);
    result->seconds = monotonic_seconds() - start;
    if (code && e)
        *e = local;
    else if (!code)
        log_line(u->log, LOG_INFO, "upload.done", "to=\"%s\" bytes=%zu tries=%u seconds=%.3f", result->location, len,
                 result->tries, result->seconds);
    return code;
}
