// upload.h: delivers a finished picture: HTTP PUT with retries, or a file below an allowed root.
//
// Delivery is at least once; what commits a job is the queue's finish, not the PUT. Header values and URL queries are
// secrets: no log line, error or result holds them.
#ifndef DITFLEET_OUTPUT_UPLOAD_H
#define DITFLEET_OUTPUT_UPLOAD_H

#include "proto/err.h"
#include "proto/job.pb-c.h"
#include "proto/log.h"
#include "worker/output/target.h"

#include <stddef.h>
#include <stdint.h>

struct upload_options {
    uint32_t attempts;              // tries in all, 1 or more
    double backoff_base_seconds;    // the k-th wait is uniform in [0, min(cap, base * 2^k)] (full jitter)
    double backoff_cap_seconds;     //
    double connect_timeout_seconds; // name resolution, TCP and TLS of one try
    double stall_seconds;           // a try that moves no byte for so long is given up
    double total_timeout_seconds;   // all tries and waits together
};

// 5 attempts, base 0.5 s, cap 20 s, connect 10 s, stall 30 s, total 120 s.
extern const struct upload_options upload_defaults;

// Asked before every try and about once a second in waits and transfers. 0: go on; else an enum err_code with *e filled
// (ERR_STALE, ERR_CANCELLED, ERR_EXPIRED ...), which ends the delivery. The fence check lives here.
typedef int upload_stop(void *context, struct err *e);

struct upload_result {
    char *location; // URL without its query, or the path as written; malloc'ed, the caller frees it; NULL on failure
    uint32_t tries; // PUTs that were started
    long status;    // last HTTP status, 0: none
    double seconds; // all tries and waits
};

// Keeps one connection for the uploads that follow one another. Used by one thread at a time.
struct uploader;

// policy, log (NULL: silent) are borrowed; options are copied. NULL with *e: ERR_INVALID (names the option or entry),
// ERR_NO_MEMORY.
struct uploader *uploader_new(const struct upload_policy *policy, const struct upload_options *options,
                              const struct log *log, struct err *e);
void uploader_free(struct uploader *u); // NULL is fine

// The jitter's generator starts from here: for tests.
void uploader_seed(struct uploader *u, uint64_t seed);

// The whole of an output before any work is spent on it: exactly one of url and file, placeholders known, policy,
// headers well formed. ERR_INVALID or ERR_REFUSED. Names are resolved, and judged again, at the upload itself.
int uploader_check(struct uploader *u, const Ditfleet__V1__Output *output, const char *id, struct err *e);

// Delivers len bytes of image/png (or the Content-Type among output's headers) to where output says, with id, attempt
// and index in place of its placeholders. stop may be NULL. *result is filled on failure as well (tries, status).
// Final: ERR_INVALID, ERR_REFUSED (policy), ERR_UPLOAD (a status no retry mends, an untrusted certificate), and what
// stop gave. Retryable, after this call's own retries: ERR_UNAVAILABLE, ERR_TIMEOUT, ERR_NO_MEMORY, ERR_IO.
int uploader_put(struct uploader *u, const Ditfleet__V1__Output *output, const char *id, uint32_t attempt,
                 uint32_t index, const void *bytes, size_t len, upload_stop *stop, void *context,
                 struct upload_result *result, struct err *e);

#endif
