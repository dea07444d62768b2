#include "worker/output/http.h"

#include "proto/clock.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { ANSWER_LIMIT = 64 << 10 }; // more than this is not read

struct http {
    CURL *curl;
    // of the request under way, as libcurl's callbacks see it
    struct http_request request;
    char shown[256]; // its URL redacted, for errors
    bool allow_private;
    double asked;     // when stop was asked last
    int stopped;      // what it said: stop_err holds its words
    curl_off_t moved; // bytes both ways,
    double moved_at;  // when they last grew,
    bool stalled;     // and whether that is too long ago
    uint32_t opened;  // sockets that passed the policy
    uint32_t refused; // and that did not
    char refused_address[INET6_ADDRSTRLEN];
    char answer[HTTP_ANSWER_KEPT + 1];
    size_t answer_kept, answer_len;
    struct err stop_err;
};

// ---- libcurl's callbacks

static void ask_stop(struct http *h, double now)
{
    const struct http_request *r = &h->request;
    h->asked = now;
    h->stopped = r->stop ? r->stop(r->context, &h->stop_err) : 0;
}

static int on_progress(void *context, curl_off_t dltotal, curl_off_t dlnow, curl_off_t ultotal, curl_off_t ulnow)
{
    struct http *h = context;
    (void)dltotal, (void)ultotal;
    double now = monotonic_seconds();
    if (dlnow + ulnow != h->moved) {
        h->moved = dlnow + ulnow;
        h->moved_at = now;
    }
    h->stalled = now - h->moved_at > h->request.stall_seconds;
    if (!h->stopped && now - h->asked >= 1)
        ask_stop(h, now);
    return h->stalled || h->stopped;
}

// The policy's last word, on the very address that is about to be connected to.
static curl_socket_t on_open_socket(void *context, curlsocktype purpose, struct curl_sockaddr *a)
{
    struct http *h = context;
    (void)purpose;
    if (!h->allow_private && !target_address_public(&a->addr)) {
        h->refused++;
        getnameinfo(&a->addr, a->addrlen, h->refused_address, sizeof h->refused_address, NULL, 0, NI_NUMERICHOST);
        return CURL_SOCKET_BAD;
    }
    h->opened++;
    return socket(a->family, a->socktype | SOCK_CLOEXEC, a->protocol);
}

static size_t on_answer(char *bytes, size_t one, size_t n, void *context)
{
    struct http *h = context;
    (void)one;
    size_t keep = n < HTTP_ANSWER_KEPT - h->answer_kept ? n : HTTP_ANSWER_KEPT - h->answer_kept;
    memcpy(h->answer + h->answer_kept, bytes, keep);
    h->answer_kept += keep;
    h->answer_len += n;
    return h->answer_len > ANSWER_LIMIT ? 0 : n;
}

// ---- the handle

// What every request shares. Protocols, proxy and redirects are the policy's business too.
static CURLcode set_up(struct http *h, double connect_seconds)
{
    CURL *curl = h->curl;
    CURLcode bad = 0;
    bad |= curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    bad |= curl_easy_setopt(curl, CURLOPT_DISALLOW_USERNAME_IN_URL, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 0L);
    bad |= curl_easy_setopt(curl, CURLOPT_PROXY, ""); // not even the environment's
    bad |= curl_easy_setopt(curl, CURLOPT_NETRC, (long)CURL_NETRC_IGNORED);
    bad |= curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    // A request that was given up does not wait for the resolver's thread: a name server that never answers, which a
    // stranger may choose, would hold up whatever else this thread does.
    bad |= curl_easy_setopt(curl, CURLOPT_QUICK_EXIT, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    bad |= curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    bad |= curl_easy_setopt(curl, CURLOPT_OPENSOCKETFUNCTION, on_open_socket);
    bad |= curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_answer);
    bad |= curl_easy_setopt(curl, CURLOPT_XFERINFODATA, h);
    bad |= curl_easy_setopt(curl, CURLOPT_OPENSOCKETDATA, h);
    bad |= curl_easy_setopt(curl, CURLOPT_WRITEDATA, h);
    bad |= curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, (long)(connect_seconds * 1000));
    bad |= curl_easy_setopt(curl, CURLOPT_USERAGENT, "ditfleet");
    return bad;
}

struct http *http_new(double connect_seconds, struct err *e)
{
    struct http *h = calloc(1, sizeof *h);
    if (!h || curl_global_init(CURL_GLOBAL_DEFAULT)) {
        free(h);
        err_set(e, ERR_NO_MEMORY, "no memory for HTTP requests");
        return NULL;
    }
    h->curl = curl_easy_init();
    if (!h->curl || set_up(h, connect_seconds)) {
        err_set(e, ERR_INTERNAL, "libcurl (%s) refuses an option that is needed", curl_version());
        http_free(h);
        return NULL;
    }
    return h;
}

void http_free(struct http *h)
{
    if (!h)
        return;
    curl_easy_cleanup(h->curl);
    curl_global_cleanup();
    free(h);
}

CURL *http_curl(struct http *h)
{
    return h->curl;
}

// ---- one request

int http_line(struct curl_slist **lines, const char *name, const char *value, struct err *e)
{
    char *line = NULL;
    struct curl_slist *longer = asprintf(&line, "%s: %s", name, value) < 0 ? NULL : curl_slist_append(*lines, line);
    free(line);
    if (!longer)
        return err_set(e, ERR_NO_MEMORY, "no memory for a header");
    *lines = longer;
    return 0;
}

int http_begin(struct http *h, const struct http_request *request, struct err *e)
{
    CURL *curl = h->curl;
    const double now = monotonic_seconds();
    TRY(target_check_url(request->policy, request->url, &h->allow_private, e));
    h->request = *request;
    target_redact(request->url, h->shown, sizeof h->shown);
    h->asked = h->moved_at = now;
    h->opened = h->refused = 0;
    h->stopped = 0;
    h->moved = 0;
    h->stalled = false;
    h->answer_kept = h->answer_len = 0;
    memset(h->answer, 0, sizeof h->answer);
    h->stop_err = (struct err){0};
    CURLcode bad = curl_easy_setopt(curl, CURLOPT_URL, request->url);
    bad |= curl_easy_setopt(curl, CURLOPT_HTTPHEADER, request->lines);
    // A body given as a whole has a known length, and libcurl can send it again on a fresh connection.
    bad |= curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)request->length);
    bad |= curl_easy_setopt(curl, CURLOPT_POSTFIELDS, request->body);
    if (strcmp(request->method, "GET") == 0) // which has no body, not even one of no bytes
        bad |= curl_easy_setopt(curl, CURLOPT_HTTPGET, 1L);
    bad |= curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request->method);
    bad |= curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, request->seconds > 0.001 ? (long)(request->seconds * 1000) : 1L);
    return bad ? err_set(e, ERR_NO_MEMORY, "no memory for an HTTP request") : 0;
}

static int judge_failure(struct http *h, CURLcode result, struct err *e)
{
    const char *text = curl_easy_strerror(result), *method = h->request.method;
    if (h->refused > 0 && h->opened == 0)
        return err_set(e, ERR_REFUSED,
                       "%s %s: its address %s is loopback, private or reserved, and the node's configuration does not "
                       "allow this host and port",
                       method, h->shown, h->refused_address);
    if (h->stalled)
        return err_set(e, ERR_TIMEOUT, "%s %s: no byte moved for %g s", method, h->shown, h->request.stall_seconds);
    long os_error = 0;
    curl_easy_getinfo(h->curl, CURLINFO_OS_ERRNO, &os_error);
    switch (result) {
    case CURLE_OPERATION_TIMEDOUT:
        return err_set(e, ERR_TIMEOUT, "%s %s: no answer in time", method, h->shown);
    case CURLE_OUT_OF_MEMORY:
        return err_set(e, ERR_NO_MEMORY, "%s %s: no memory", method, h->shown);
    case CURLE_PEER_FAILED_VERIFICATION:
        return err_set(e, ERR_UPLOAD, "%s %s: the host's certificate is not trusted", method, h->shown);
    case CURLE_URL_MALFORMAT:
    case CURLE_UNSUPPORTED_PROTOCOL:
        return err_set(e, ERR_INVALID, "%s %s: %s", method, h->shown, text);
    default:
        return err_set(e, ERR_UNAVAILABLE, "%s %s: %s%s%s", method, h->shown, text, os_error ? ": " : "",
                       os_error ? strerror((int)os_error) : "");
    }
}

int http_end(struct http *h, CURLcode result, struct http_answer *answer, struct err *e)
{
    curl_off_t retry_after = 0;
    *answer = (struct http_answer){.body = h->answer, .body_kept = h->answer_kept};
    curl_easy_getinfo(h->curl, CURLINFO_RESPONSE_CODE, &answer->status);
    curl_easy_getinfo(h->curl, CURLINFO_RETRY_AFTER, &retry_after);
    answer->retry_after = (double)retry_after;
    curl_easy_setopt(h->curl, CURLOPT_HTTPHEADER, NULL); // nothing of the caller's stays in the handle
    curl_easy_setopt(h->curl, CURLOPT_POSTFIELDS, NULL);
    if (h->stopped) {
        if (e && h->stop_err.code)
            *e = h->stop_err;
        else
            err_set(e, (enum err_code)h->stopped, "stopped: %s", err_name((enum err_code)h->stopped));
        return h->stopped;
    }
    // A host may refuse before it has read the body and hang up, or say more than we care to read: its status counts.
    if (result == CURLE_OK || answer->status >= 400 || (result == CURLE_WRITE_ERROR && h->answer_len > ANSWER_LIMIT))
        return 0;
    answer->status = 0;
    return judge_failure(h, result, e);
}

int http_send(struct http *h, const struct http_request *request, struct http_answer *answer, struct err *e)
{
    *answer = (struct http_answer){.body = ""};
    TRY(http_begin(h, request, e));
    return http_end(h, curl_easy_perform(h->curl), answer, e);
}
