#include "worker/output/upload.h"

#include "worker/output/save.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <curl/curl.h>
#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>

enum {
    ANSWER_KEPT = 4096,      // of an answer's body, to quote from
    ANSWER_LIMIT = 64 << 10, // more than this is not read
    EXCERPT = 200,           // characters of an answer that an error may quote
};

const struct upload_options upload_defaults = {
    .attempts = 5,
    .backoff_base_seconds = 0.5,
    .backoff_cap_seconds = 20,
    .connect_timeout_seconds = 10,
    .stall_seconds = 30,
    .total_timeout_seconds = 120,
};

struct uploader {
    CURL *curl; // one handle, so that its connection is used again
    const struct upload_policy *policy;
    struct upload_options options;
    const struct log *log;
    uint64_t random; // state of the jitter's generator
};

// One delivery by HTTP, as libcurl's callbacks see it.
struct delivery {
    struct uploader *u;
    const Ditfleet__V1__Output *output;
    const char *url;          // expanded: its query is a secret
    char shown[256];          // redacted, for logs and errors
    struct curl_slist *lines; // request headers: secrets
    bool allow_private;
    upload_stop *stop;
    void *context;
    double asked;     // when stop was asked last
    bool stopped;     // stop said no: *e holds its words
    curl_off_t moved; // bytes of this try, both ways,
    double moved_at;  // when they last grew,
    bool stalled;     // and whether that is too long ago
    uint32_t opened;  // sockets of this try that passed the policy
    uint32_t refused; // and that did not
    char refused_address[INET6_ADDRSTRLEN];
    char answer[ANSWER_KEPT + 1];
    size_t answer_kept, answer_len;
    struct err *err;
};

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// splitmix64 (Steele, Lea, Flood 2014), in [0, 1).
static double uniform(struct uploader *u)
{
    uint64_t z = u->random += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// ---- libcurl's callbacks

static bool may_go_on(struct delivery *d)
{
    if (!d->stopped && d->stop) {
        d->asked = now_seconds();
        int code = d->stop(d->context, d->err);
        d->stopped = code != 0;
        if (d->stopped && d->err->code == ERR_NONE)
            err_set(d->err, (enum err_code)code, "upload stopped: %s", err_name((enum err_code)code));
    }
    return !d->stopped;
}

static int on_progress(void *context, curl_off_t dltotal, curl_off_t dlnow, curl_off_t ultotal, curl_off_t ulnow)
{
    struct delivery *d = context;
    (void)dltotal, (void)ultotal;
    double now = now_seconds();
    if (dlnow + ulnow != d->moved) {
        d->moved = dlnow + ulnow;
        d->moved_at = now;
    }
    d->stalled = now - d->moved_at > d->u->options.stall_seconds;
    return d->stalled || (now - d->asked >= 1 && !may_go_on(d));
}

// The policy's last word, on the very address that is about to be connected to.
static curl_socket_t on_open_socket(void *context, curlsocktype purpose, struct curl_sockaddr *a)
{
    struct delivery *d = context;
    (void)purpose;
    if (!d->allow_private && !target_address_public(&a->addr)) {
        d->refused++;
        getnameinfo(&a->addr, a->addrlen, d->refused_address, sizeof d->refused_address, NULL, 0, NI_NUMERICHOST);
        return CURL_SOCKET_BAD;
    }
    d->opened++;
    return socket(a->family, a->socktype | SOCK_CLOEXEC, a->protocol);
}

static size_t on_answer(char *bytes, size_t one, size_t n, void *context)
{
    struct delivery *d = context;
    (void)one;
    size_t keep = n < ANSWER_KEPT - d->answer_kept ? n : ANSWER_KEPT - d->answer_kept;
    memcpy(d->answer + d->answer_kept, bytes, keep);
    d->answer_kept += keep;
    d->answer_len += n;
    return d->answer_len > ANSWER_LIMIT ? 0 : n;
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
static void excerpt(const struct delivery *d, char out[EXCERPT + 1])
{
    size_t n = 0;
    for (size_t i = 0; i < d->answer_kept && n < EXCERPT; i++) {
        unsigned char c = (unsigned char)d->answer[i];
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

static int judge_status(struct delivery *d, long status)
{
    if (status >= 200 && status < 300)
        return 0;
    if (status >= 300 && status < 400)
        return err_set(d->err, ERR_UPLOAD, "PUT %s: answered %ld; redirects are not followed", d->shown, status);
    char quote[EXCERPT + 1];
    excerpt(d, quote);
    return err_set(d->err, status_may_mend(status) ? ERR_UNAVAILABLE : ERR_UPLOAD, "PUT %s: answered %ld%s%s", d->shown,
                   status, *quote ? ": " : "", quote);
}

static int judge_failure(struct delivery *d, CURLcode result)
{
    const char *text = curl_easy_strerror(result);
    if (d->refused > 0 && d->opened == 0)
        return err_set(d->err, ERR_REFUSED,
                       "PUT %s: its address %s is loopback, private or reserved, and the node's configuration does not "
                       "allow this host and port",
                       d->shown, d->refused_address);
    if (d->stalled)
        return err_set(d->err, ERR_TIMEOUT, "PUT %s: no byte moved for %g s", d->shown, d->u->options.stall_seconds);
    long os_error = 0;
    curl_easy_getinfo(d->u->curl, CURLINFO_OS_ERRNO, &os_error);
    switch (result) {
    case CURLE_OPERATION_TIMEDOUT:
        return err_set(d->err, ERR_TIMEOUT, "PUT %s: no answer in time", d->shown);
    case CURLE_OUT_OF_MEMORY:
        return err_set(d->err, ERR_NO_MEMORY, "PUT %s: no memory", d->shown);
    case CURLE_PEER_FAILED_VERIFICATION:
        return err_set(d->err, ERR_UPLOAD, "PUT %s: the host's certificate is not trusted", d->shown);
    case CURLE_URL_MALFORMAT:
    case CURLE_UNSUPPORTED_PROTOCOL:
        return err_set(d->err, ERR_INVALID, "PUT %s: %s", d->shown, text);
    default:
        return err_set(d->err, ERR_UNAVAILABLE, "PUT %s: %s%s%s", d->shown, text, os_error ? ": " : "",
                       os_error ? strerror((int)os_error) : "");
    }
}

// *wait is what the host asks for by Retry-After (seconds or a date), 0 if nothing.
static int try_once(struct delivery *d, double seconds, long *status, double *wait)
{
    CURL *curl = d->u->curl;
    d->opened = d->refused = 0;
    d->moved = 0;
    d->moved_at = now_seconds();
    d->stalled = false;
    d->answer_kept = d->answer_len = 0;
    memset(d->answer, 0, sizeof d->answer);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, seconds > 0.001 ? (long)(seconds * 1000) : 1L);
    CURLcode result = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, status);
    curl_off_t retry_after = 0;
    curl_easy_getinfo(curl, CURLINFO_RETRY_AFTER, &retry_after);
    *wait = (double)retry_after;
    if (d->stopped)
        return d->err->code;
    // A host may refuse before it has read the body and hang up, or say more than we care to read: its status counts.
    if (result == CURLE_OK || *status >= 400 || (result == CURLE_WRITE_ERROR && d->answer_len > ANSWER_LIMIT))
        return judge_status(d, *status);
    *status = 0;
    return judge_failure(d, result);
}

// ---- tries

static void wait_seconds(struct delivery *d, double seconds)
{
    for (double end = now_seconds() + seconds, left; (left = end - now_seconds()) > 0;) {
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
    double deadline = now_seconds() + o->total_timeout_seconds;
    double ceiling = o->backoff_base_seconds;
    for (;;) {
        if (!may_go_on(d))
            return d->err->code;
        double asked_for;
        r->tries++;
        int code = try_once(d, deadline - now_seconds(), &r->status, &asked_for);
        if (code == 0 || d->stopped || !d->err->retryable)
            return code;
        if (ceiling > o->backoff_cap_seconds)
            ceiling = o->backoff_cap_seconds;
        double wait = asked_for + uniform(d->u) * ceiling;
        ceiling *= 2;
        if (r->tries >= o->attempts)
            return err_context(d->err, "given up after %u tries", r->tries);
        if (now_seconds() + wait >= deadline)
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

// What every delivery shares. Protocols, proxy and redirects are the policy's business too.
static CURLcode set_up(CURL *curl, const struct upload_options *o)
{
    CURLcode bad = 0;
    bad |= curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    bad |= curl_easy_setopt(curl, CURLOPT_DISALLOW_USERNAME_IN_URL, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 0L);
    bad |= curl_easy_setopt(curl, CURLOPT_PROXY, ""); // not even the environment's
    bad |= curl_easy_setopt(curl, CURLOPT_NETRC, (long)CURL_NETRC_IGNORED);
    bad |= curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    bad |= curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    bad |= curl_easy_setopt(curl, CURLOPT_OPENSOCKETFUNCTION, on_open_socket);
    bad |= curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_answer);
    bad |= curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, (long)(o->connect_timeout_seconds * 1000));
    bad |= curl_easy_setopt(curl, CURLOPT_USERAGENT, "ditfleet");
    return bad;
}

struct uploader *uploader_new(const struct upload_policy *policy, const struct upload_options *options,
                              const struct log *log, struct err *e)
{
    if (check_options(options, e) || target_check_policy(policy, e))
        return NULL;
    struct uploader *u = calloc(1, sizeof *u);
    if (!u || curl_global_init(CURL_GLOBAL_DEFAULT)) {
        free(u);
        err_set(e, ERR_NO_MEMORY, "no memory for an uploader");
        return NULL;
    }
    *u = (struct uploader){.policy = policy, .options = *options, .log = log, .curl = curl_easy_init()};
    if (getrandom(&u->random, sizeof u->random, 0) != sizeof u->random)
        u->random = (uint64_t)time(NULL); // jitter needs no more
    if (!u->curl || set_up(u->curl, options)) {
        err_set(e, ERR_INTERNAL, "libcurl (%s) refuses an option that uploads need", curl_version());
        uploader_free(u);
        return NULL;
    }
    return u;
}

void uploader_free(struct uploader *u)
{
    if (!u)
        return;
    curl_easy_cleanup(u->curl);
    curl_global_cleanup();
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

static int put_url(struct delivery *d, const void *bytes, size_t len, struct upload_result *r)
{
    TRY(target_check_url(d->u->policy, d->url, &d->allow_private, d->err));
    TRY(make_lines(d->output, &d->lines, d->err));
    target_redact(d->url, d->shown, sizeof d->shown);
    CURL *curl = d->u->curl;
    CURLcode bad = curl_easy_setopt(curl, CURLOPT_URL, d->url);
    bad |= curl_easy_setopt(curl, CURLOPT_HTTPHEADER, d->lines);
    // A body given as a whole has a known length, and libcurl can send it again on a fresh connection.
    bad |= curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)len);
    bad |= curl_easy_setopt(curl, CURLOPT_POSTFIELDS, bytes);
    bad |= curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, "PUT");
    bad |= curl_easy_setopt(curl, CURLOPT_XFERINFODATA, d);
    bad |= curl_easy_setopt(curl, CURLOPT_OPENSOCKETDATA, d);
    bad |= curl_easy_setopt(curl, CURLOPT_WRITEDATA, d);
    if (bad)
        return err_set(d->err, ERR_NO_MEMORY, "no memory for an upload");
    TRY(deliver(d, r));
    size_t room = strlen(d->url) + 64; // an address may be spelled longer than it came
    r->location = malloc(room);
    if (!r->location)
        return err_set(d->err, ERR_NO_MEMORY, "no memory for an upload's location");
    target_redact(d->url, r->location, room);
    return 0;
}

// *path becomes the result's location.
static int put_file(struct delivery *d, char **path, const void *bytes, size_t len, struct upload_result *r)
{
    const char *root, *rest;
    TRY(target_check_file(d->u->policy, *path, &root, &rest, d->err));
    if (!may_go_on(d))
        return d->err->code;
    r->tries = 1;
    TRY(save_file(root, rest, bytes, len, true, d->err));
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
    double start = now_seconds();
    *result = (struct upload_result){0};
    TRY(expand(output, id, attempt, index, &where, e));
    struct delivery d = {.u = u, .output = output, .url = where, .stop = stop, .context = context, .err = &local};
    int code = has(output->file) ? put_file(&d, &where, bytes, len, result) : put_url(&d, bytes, len, result);
    curl_easy_setopt(u->curl, CURLOPT_HTTPHEADER, NULL); // nothing of the caller's stays in the handle
    curl_easy_setopt(u->curl, CURLOPT_POSTFIELDS, NULL);
    curl_slist_free_all(d.lines);
    free(where);
    result->seconds = now_seconds() - start;
    if (code && e)
        *e = local;
    else if (!code)
        log_line(u->log, LOG_INFO, "upload.done", "to=\"%s\" bytes=%zu tries=%u seconds=%.3f", result->location, len,
                 result->tries, result->seconds);
    return code;
}
