// http.h: one HTTP request to a URL that a stranger chose, under the target policy; uploads and callbacks are made of
// it.
//
// The policy has the last word on the very address that is connected to. Redirects are not followed, no proxy is asked,
// an answer is read up to a bound. A URL's query is a secret: errors show the URL without it.
#ifndef DITFLEET_OUTPUT_HTTP_H
#define DITFLEET_OUTPUT_HTTP_H

#include "proto/err.h"
#include "worker/output/target.h"

#include <curl/curl.h>
#include <stddef.h>

enum { HTTP_ANSWER_KEPT = 4096 }; // bytes of an answer's body

// A handle that keeps its connection for the requests that follow one another. Used by one thread at a time.
struct http;

struct http_request {
    const char *method; // "PUT", "POST", "GET"
    const char *url;
    struct curl_slist *lines; // headers
    const void *body;         // (length); NULL: none
    size_t length;
    double seconds;       // limit of the whole request
    double stall_seconds; // no byte moved for so long: given up
    const struct upload_policy *policy;
    // Asked about once a second; not 0 (an enum err_code, *e filled) ends the request. May be NULL.
    int (*stop)(void *context, struct err *e);
    void *context;
};

struct http_answer {
    long status;        // 0: there was none
    double retry_after; // seconds that the host asks for by Retry-After (a number or a date); 0: it does not
    const char *body;   // its first bytes with a zero behind them; good until the next request
    size_t body_kept;   // at most HTTP_ANSWER_KEPT
};

// connect_seconds: name resolution, TCP and TLS. NULL with *e: ERR_NO_MEMORY, ERR_INTERNAL.
struct http *http_new(double connect_seconds, struct err *e);
void http_free(struct http *h); // NULL is fine

// One more header at the end of *lines, which the caller frees by curl_slist_free_all. ERR_NO_MEMORY.
int http_line(struct curl_slist **lines, const char *name, const char *value, struct err *e);

// A request in one call. 0: there was an answer, of whatever status. Else ERR_REFUSED (policy), ERR_INVALID,
// ERR_UPLOAD (an untrusted certificate), ERR_TIMEOUT, ERR_UNAVAILABLE, ERR_NO_MEMORY, or what stop gave.
int http_send(struct http *h, const struct http_request *request, struct http_answer *answer, struct err *e);

// The same in parts, for who performs several at once through libcurl's multi interface: http_begin, then http_curl's
// handle to curl_multi_add_handle, and when libcurl says that it is done (result) and it was removed, http_end. All
// that request points to must last until then. After http_begin failed there is nothing to end.
int http_begin(struct http *h, const struct http_request *request, struct err *e);
CURL *http_curl(struct http *h);
int http_end(struct http *h, CURLcode result, struct http_answer *answer, struct err *e);

#endif
