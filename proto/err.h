// err.h: how a function says what went wrong.
//
// A function that can fail returns int, 0 or an enum err_code, and writes a sentence into the caller's struct err:
// what was wrong, where, what is allowed, what to do. Nothing here is global. Text never holds prompts or secrets.
#ifndef DITFLEET_ERR_H
#define DITFLEET_ERR_H

#include <stdbool.h>

enum err_code {
    ERR_NONE = 0,
    ERR_INVALID,     // an argument, field, flag or config value is out of bounds          final
    ERR_UNSUPPORTED, // well formed, but this model, plan or backend cannot do it          final
    ERR_NOT_FOUND,   // no such model, file, job or tenant                                 final
    ERR_CORRUPT,     // bytes that break their own format (file, message, reply)           final
    ERR_CONFLICT,    // the id exists with another payload                                 final
    ERR_REFUSED,     // policy says no: upload target, file root, access control           final
    ERR_MODERATED,   // policy says no to the prompt                                       final
    ERR_CANCELLED,   // somebody asked to stop                                             final
    ERR_EXPIRED,     // the job's own deadline passed                                      final
    ERR_STALE,       // the fence (epoch, nonce) is somebody else's by now                 final for this holder
    ERR_UPLOAD,      // the upload host answered with a status no retry mends (403, 404)   final
    ERR_OVERLOADED,  // a limit of the queue or of the tenant is reached                   retryable, by its sender
    ERR_NO_MEMORY,   // memory or space ran out                                            retryable
    ERR_IO,          // a read, write or system call failed                                retryable
    ERR_TIMEOUT,     // a deadline of ours passed                                          retryable
    ERR_UNAVAILABLE, // a peer (Redis, upload host, another rank) cannot be reached        retryable
    ERR_CRASHED,     // a worker's process crashed over the job                            retryable
    ERR_INTERNAL,    // a broken promise of our own: a bug                                 retryable
    ERR_CODES,
};

struct err {
    enum err_code code;
    bool retryable;
    char text[512]; // one sentence, no newline
};

// Fills *e (which may be NULL) and returns code; retryable follows the table above. Control characters become '?'.
int err_set(struct err *e, enum err_code code, const char *format, ...) __attribute__((format(printf, 3, 4)));

// Puts "context: " before the text that is there; returns e->code. For callers that know which file or job it was.
int err_context(struct err *e, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The stable name that results, logs and PROTOCOL.md use: "invalid", "not_found", ...
const char *err_name(enum err_code code);
enum err_code err_parse(const char *name); // ERR_INTERNAL: none has this name
bool err_code_retryable(enum err_code code);

// Unwinds: returns from the calling function when call fails. Resources are freed by __attribute__((cleanup)) or by
// the caller's own label; use TRY only where neither is missing.
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        int try_code_ = (call);                                                                                        \
        if (try_code_ != 0)                                                                                            \
            return try_code_;                                                                                          \
    } while (0)

#endif
