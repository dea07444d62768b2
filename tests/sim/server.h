// server.h: a server in memory: the model of Redis, and on it scripts and functions as Redis runs them, in Lua 5.1.
//
// Of Lua's surroundings scripts find what queue.lua uses: redis.call, pcall, sha1hex, error_reply, and struct.pack of a
// double. A global variable is an error, as in Redis.
#ifndef DITFLEET_SIM_SERVER_H
#define DITFLEET_SIM_SERVER_H

#include "store.h"

// A change of a script's text: `from`, which must be there once, becomes `to`. Its SHA-1 stays that of the text.
struct patch {
    const char *name, *from, *to;
};
// The changed text, to be freed; NULL: `from` is not there, or more than once. patch NULL: a copy.
char *patch_apply(struct text script, const struct patch *patch, size_t *length);

struct server;
// patch: of every script that it is given; NULL: none. functions: it knows FUNCTION LOAD and FCALL.
struct server *server_new(const struct patch *patch, bool functions);
void server_free(struct server *s);
struct store *server_store(struct server *s);

// Appends the reply of one command to *out.
void server_run(struct server *s, size_t argc, const struct text *argv, struct buffer *out);

// Scripts must be sent again, as to a server that was started anew.
void server_forget_scripts(struct server *s);
void server_forget_functions(struct server *s); // these, too

#endif
