#include "supervisor/spot.h"

#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/clock.h"
#include "worker/output/http.h"

enum { EVERY_MS = 5000 };
#define REQUEST_SECONDS 2.0
#define TOKEN_SECONDS   "21600" // EC2's longest
#define TOKEN_RENEW     18000.0

// One look. 0: *notice says whether there is one, and detail what it says; else the source could not be asked.
typedef int look(struct spot *s, bool *notice, struct err *err);

struct spot {
    struct log log;
    look *look;
    char *base; // URL or path
    struct upload_policy policy;
    struct http *http;
    pthread_t thread;
    int notice_fd, stop_fd; // eventfds
    atomic_bool ending;
    // of the thread alone
    char token[257]; // EC2's; "": none
    double token_at; // monotonic seconds
    char name[129];  // of this machine, for Azure; "": not known yet
    char detail[200];
};

static int on_ask_stop(void *context, struct err *err)
{
    const struct spot *s = context;
    return atomic_load(&s->ending) ? err_set(err, ERR_CANCELLED, "the supervisor stops") : 0;
}

// An answer of whatever status. header NULL: none.
static int ask(struct spot *s, const char *method, const char *path, const char *header, const char *value,
               struct http_answer *answer, struct err *err)
{
    char url[400];
    struct curl_slist *lines = NULL;
    snprintf(url, sizeof url, "%s%s", s->base, path);
    int rc = header ? http_line(&lines, header, value, err) : 0;
    const struct http_request request = {.method = method,
                                         .url = url,
                                         .lines = lines,
                                         .seconds = REQUEST_SECONDS,
                                         .stall_seconds = 2 * REQUEST_SECONDS,
                                         .policy = &s->policy,
                                         .stop = on_ask_stop,
                                         .context = s};
    rc = rc ? rc : http_send(s->http, &request, answer, err);
    curl_slist_free_all(lines);
    return rc;
}

static int unexpected(const struct spot *s, const char *path, const struct http_answer *answer, struct err *err)
{
    char shown[256];
    target_redact(s->base, shown, sizeof shown);
    return err_set(err, ERR_UNAVAILABLE, "%s, asked for %.100s: answered %ld, or what no such service says", shown,
                   path, answer->status);
}

// An answer's text for our use and logs: printable, cut to room.
static void copy_text(const struct http_answer *answer, char *out, size_t room)
{
    size_t n = strcspn(answer->body, "\r\n");
    snprintf(out, room, "%.*s", (int)n, answer->body);
    for (char *c = out; *c; c++)
        if (*c < 0x20 || *c >= 0x7f || *c == '"')
            *c = '?';
}

// ---- the sources

static int renew_token(struct spot *s, struct err *err)
{
    static const char path[] = "/latest/api/token";
    struct http_answer answer;
    if (*s->token && monotonic_seconds() - s->token_at < TOKEN_RENEW)
        return 0;
    *s->token = 0;
    TRY(ask(s, "PUT", path, "X-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS, &answer, err));
    if (answer.status != 200 || answer.body_kept == 0 || answer.body_kept >= sizeof s->token)
        return unexpected(s, path, &answer, err);
    copy_text(&answer, s->token, sizeof s->token);
    s->token_at = monotonic_seconds();
    return 0;
}

static int look_ec2(struct spot *s, bool *notice, struct err *err)
{
    static const char path[] = "/latest/meta-data/spot/instance-action";
    struct http_answer answer = {.status = 401};
    for (int i = 0; i < 2 && answer.status == 401; i++) { // 401: the token is good no more
        if (i > 0)
            *s->token = 0;
        TRY(renew_token(s, err));
        TRY(ask(s, "GET", path, "X-aws-ec2-metadata-token", s->token, &answer, err));
    }
    if (answer.status != 200 && answer.status != 404)
        return unexpected(s, path, &answer, err);
    *notice = answer.status == 200;
    copy_text(&answer, s->detail, sizeof s->detail);
    return 0;
}

static int look_gce(struct spot *s, bool *notice, struct err *err)
{
    static const char path[] = "/computeMetadata/v1/instance/preempted";
    struct http_answer answer;
    TRY(ask(s, "GET", path, "Metadata-Flavor", "Google", &answer, err));
    copy_text(&answer, s->detail, sizeof s->detail);
    *notice = strcmp(s->detail, "TRUE") == 0;
    if (answer.status != 200 || (!*notice && strcmp(s->detail, "FALSE") != 0))
        return unexpected(s, path, &answer, err);
    return 0;
}

// Events name the machines they are of: several of a scale set are told of each other's.
static bool concerns(const json_t *event, const char *name)
{
    const char *type = json_string_value(json_object_get(event, "EventType"));
    size_t i;
    const json_t *resource;
    if (!type || (strcmp(type, "Preempt") != 0 && strcmp(type, "Terminate") != 0))
        return false;
    json_array_foreach(json_object_get(event, "Resources"), i,
                       resource) if (json_is_string(resource) &&
                                     strcmp(json_string_value(resource), name) == 0) return true;
    return false;
}

static int look_azure(struct spot *s, bool *notice, struct err *err)
{
    static const char name_path[] = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
    static const char path[] = "/metadata/scheduledevents?api-version=2020-07-01";
    struct http_answer answer;
    if (!*s->name) {
        TRY(ask(s, "GET", name_path, "Metadata", "true", &answer, err));
        if (answer.status != 200 || answer.body_kept == 0 || answer.body_kept >= sizeof s->name)
            return unexpected(s, name_path, &answer, err);
        copy_text(&answer, s->name, sizeof s->name);
    }
    TRY(ask(s, "GET", path, "Metadata", "true", &answer, err));
    json_t *root = json_loadb(answer.body, answer.body_kept, 0, NULL), *events = json_object_get(root, "Events"),
           *event;
    const bool good = answer.status == 200 && answer.body_kept < HTTP_ANSWER_KEPT && json_is_array(events);
    size_t i;
    json_array_foreach(events, i, event) *notice |= good && concerns(event, s->name);
    json_decref(root);
    snprintf(s->detail, sizeof s->detail, "Preempt of %s", s->name);
    return good ? 0 : unexpected(s, path, &answer, err);
}

static int look_url(struct spot *s, bool *notice, struct err *err)
{
    struct http_answer answer;
    TRY(ask(s, "GET", "", NULL, NULL, &answer, err));
    if (answer.status != 200 && answer.status != 404 && answer.status != 204)
        return unexpected(s, "", &answer, err);
    *notice = answer.status == 200;
    copy_text(&answer, s->detail, sizeof s->detail);
    return 0;
}

static int look_file(struct spot *s, bool *notice, struct err *err)
{
    struct stat st;
    *notice = stat(s->base, &st) == 0;
    if (!*notice && errno != ENOENT)
        return err_set(err, ERR_IO, "%.200s: cannot be looked at: %s", s->base, strerror(errno));
    return 0;
}

static const struct source {
    const char *name;
    const char *base;
    look *look;
} sources[] = {
    {"ec2", "http://169.254.169.254", look_ec2},
    {"gce", "http://metadata.google.internal", look_gce},
    {"azure", "http://169.254.169.254", look_azure},
};

// ---- the thread

static void *run(void *arg)
{
    struct spot *s = arg;
    bool failing = false, notice = false;
    struct pollfd stop = {.fd = s->stop_fd, .events = POLLIN};
    while (!notice && !atomic_load(&s->ending)) {
        struct err err = {0};
        const bool failed = s->look(s, &notice, &err) != 0;
        notice &= !failed;
        if (failed && !failing && !atomic_load(&s->ending))
            log_line(&s->log, LOG_WARN, "spot.unknown", "error=\"%s\"", err.text);
        if (!failed && failing)
            log_line(&s->log, LOG_INFO, "spot.known", "notice=%s", notice ? "yes" : "no");
        failing = failed;
        if (!notice)
            poll(&stop, 1, EVERY_MS);
    }
    if (notice) {
        const uint64_t one = 1;
        log_line(&s->log, LOG_WARN, "spot.notice", "detail=\"%s\"", s->detail);
        ssize_t ignored = write(s->notice_fd, &one, sizeof one);
        (void)ignored;
    }
    return NULL;
}

// The host that base names may have any address: it is the operator's word.
static int allow_host(struct spot *s, struct err *err)
{
    char host[200];
    const char *at = strstr(s->base, "://") + 3, *bracket = strchr(at, ']');
    const int n = (int)strcspn(at, "/?#");
    const bool has_port = memchr(bracket && bracket < at + n ? bracket : at, ':', (size_t)n);
    snprintf(host, sizeof host, "%.*s%s", n, at, has_port ? "" : s->base[4] == 's' ? ":443" : ":80");
    const char *hosts[] = {host};
    s->policy.what = "spot notice";
    TRY(target_copy_hosts(&s->policy, hosts, 1, err));
    return target_check_policy(&s->policy, err);
}

static int set_source(struct spot *s, const char *source, struct err *err)
{
    const char *at = strchr(source, '@'), *base = source;
    s->look = *source == '/' ? look_file : look_url;
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        const size_t n = strlen(sources[i].name);
        if (strncmp(source, sources[i].name, n) == 0 && (!source[n] || source + n == at)) {
            s->look = sources[i].look;
            base = at ? at + 1 : sources[i].base;
        }
    }
    s->base = strdup(base);
    if (!s->base)
        return err_set(err, ERR_NO_MEMORY, "no memory to look for a spot notice");
    if (s->look == look_file)
        return 0;
    TRY(allow_host(s, err));
    s->http = http_new(REQUEST_SECONDS, err);
    return s->http ? 0 : err->code;
}

static void free_spot(struct spot *s)
{
    http_free(s->http);
    target_free_hosts(&s->policy);
    if (s->notice_fd >= 0)
        close(s->notice_fd);
    if (s->stop_fd >= 0)
        close(s->stop_fd);
    free(s->base);
    free(s);
}

int spot_start(const char *source, const struct log *log, struct spot **out, struct err *err)
{
    struct spot *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NO_MEMORY, "no memory to look for a spot notice");
    s->log = *log;
    s->notice_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = set_source(s, source, err);
    if (rc == 0 && (s->notice_fd < 0 || s->stop_fd < 0 || pthread_create(&s->thread, NULL, run, s) != 0))
        rc = err_set(err, ERR_NO_MEMORY, "cannot start the thread that looks for a spot notice");
    if (rc != 0) {
        free_spot(s);
        return rc;
    }
    *out = s;
    return 0;
}

void spot_stop(struct spot *s)
{
    const uint64_t one = 1;
    if (!s)
        return;
    atomic_store(&s->ending, true);
    ssize_t ignored = write(s->stop_fd, &one, sizeof one);
    (void)ignored;
    pthread_join(s->thread, NULL);
    free_spot(s);
}

int spot_fd(const struct spot *s)
{
    return s->notice_fd;
}
