// redis.h: one connection to Redis with deadlines.
//
// The socket, its deadlines and TLS are ours (poll, OpenSSL); hiredis formats commands and parses replies, in any
// version from 0.14 on. A connection belongs to one thread at a time. It connects at the first command, and again after
// a loss. A command whose reply was lost is never sent again by this layer: whether that is safe only its caller knows.
// Passwords and the values of commands never appear in errors.
#ifndef DITFLEET_REDIS_H
#define DITFLEET_REDIS_H

#include "proto/err.h"

#include <hiredis/hiredis.h>
#include <stdbool.h>
#include <stddef.h>

struct redis;

struct redis_options {
    int connect_ms;        // deadline of connecting, TLS and AUTH; 0: 5000
    int command_ms;        // deadline of one command; 0: 5000
    const char *ca_file;   // rediss: trusted certificates, NULL: the system's
    const char *cert_file; // rediss: the client's certificate and key, or NULL
    const char *key_file;
};

// What kind of refusal the last error reply was, for callers that mend it.
enum redis_problem {
    REDIS_PROBLEM_NONE,       // no error, or not an error reply
    REDIS_PROBLEM_NOSCRIPT,   // redis_eval mends it itself, as it does the next two
    REDIS_PROBLEM_NOFUNCTION, // there is no function of this name
    REDIS_PROBLEM_NOCOMMAND,  // the server does not know the command, or this user may not use it
    REDIS_PROBLEM_NOGROUP,    // the consumer group is gone
    REDIS_PROBLEM_BUSYGROUP,
    REDIS_PROBLEM_NOPERM,
    REDIS_PROBLEM_BUSY, // LOADING, READONLY, BUSY, CLUSTERDOWN, ...: try again later
    REDIS_PROBLEM_OTHER,
};

// Parses url: redis://[user[:password]@]host[:port][/db], rediss://... (TLS), unix:///path[?db=N], or
// sentinel://[user[:password]@]host[:port][,host[:port]...]/master[/db]: whenever it connects, it asks these sentinels
// where the master of this name is, and takes it only if it is one. Percent-encoding is decoded in user, password, path
// and master. Does not connect. ERR_INVALID says what is wrong without echoing the password.
int redis_open(struct redis **redis, const char *url, const struct redis_options *options, struct err *e);
void redis_close(struct redis *redis); // NULL is fine

// Where it connects to, without user and password: "unix:/run/redis.sock", "rediss://host:6379"; with sentinels
// "redis://host:6379 (master)", before the first connection the URL.
const char *redis_address(const struct redis *redis);

// Counts connections: what was said over one means nothing to the next.
unsigned redis_connections(const struct redis *redis);

// Drops the connection; the next command connects anew.
void redis_disconnect(struct redis *redis);

// Sends one command and waits for its reply (redis_open's command_ms). *reply (reply may be NULL) is the caller's to
// free by freeReplyObject. An error reply is an error: ERR_UNAVAILABLE (LOADING, READONLY, ...), ERR_NO_MEMORY (OOM),
// ERR_IO (MISCONF), ERR_REFUSED (NOAUTH, NOPERM, WRONGPASS), ERR_NOT_FOUND (NOGROUP), ERR_INTERNAL. A lost connection
// is ERR_UNAVAILABLE, a passed deadline ERR_TIMEOUT; both leave it closed.
int redis_command(struct redis *redis, redisReply **reply, struct err *e, const char *format, ...);
int redis_command_argv(struct redis *redis, redisReply **reply, struct err *e, int argc, const char **argv,
                       const size_t *lengths);

// The same with block_ms more before the deadline: for commands that block on the server's side.
int redis_command_blocking(struct redis *redis, redisReply **reply, struct err *e, int block_ms, int argc,
                           const char **argv, const size_t *lengths);

// Pipelining: append any number of commands, then take as many replies in order. After an error other than an error
// reply the connection is closed and the outstanding replies are lost.
int redis_append_argv(struct redis *redis, struct err *e, int argc, const char **argv, const size_t *lengths);
int redis_get_reply(struct redis *redis, redisReply **reply, struct err *e);

enum redis_problem redis_problem(const struct redis *redis);

// A Lua script: text of length bytes, known to the server by its SHA-1, which redis_script fills.
struct redis_script {
    const char *text;
    size_t length;
    char sha1[41];
    bool reads;    // it writes nothing: EVALSHA_RO, for users who may not write, and replicas
    bool function; // it can also be had as a function, see below
};
void redis_script(struct redis_script *script, const char *text, size_t length);

// EVALSHA with one key and argc arguments; loads the script and repeats when the server does not know it.
//
// A script that is marked as a function and does not only read is kept by the server as one (FUNCTION LOAD, library
// "ditfleet_SHA1") and called by FCALL, which does not run all of the text each time. Its text registers FUNCTION_NAME
// where redis.register_function is there. Where a server knows no functions, or the user may not use them, it is run by
// EVALSHA as any other.
int redis_eval(struct redis *redis, const struct redis_script *script, redisReply **reply, struct err *e,
               const char *key, int argc, const char **argv, const size_t *lengths);

#endif
