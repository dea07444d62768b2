// store.h: a model of Redis: the commands that queue.lua and its callers in C use, over a keyspace in memory, with a
// clock that its owner moves. diff.c compares it with a real server.
//
// Replies are RESP2, as a server would send them. What the model does not know is an error reply, never a guess. It
// differs where nothing of the queue may depend on it: a blocking read never waits, a hash is in order of insertion at
// any size, and XADD's MAXLEN ~ trims by hundreds of entries, not by the bytes of a node.
#ifndef DITFLEET_SIM_STORE_H
#define DITFLEET_SIM_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Bytes of somebody: who owns them says the function.
struct text {
    const char *bytes;
    size_t length;
};
struct text text_of(const char *string);
bool text_is(struct text a, const char *string);
bool text_same(struct text a, struct text b);
struct text text_copy(struct text a); // a zero stands behind it
void text_free(struct text a);

// A reply as it grows. What writes one returns 0, so that a command can end with it.
struct buffer {
    char *bytes;
    size_t length, capacity;
};
void buffer_add(struct buffer *b, const void *bytes, size_t length);
void buffer_free(struct buffer *b);
int reply_error(struct buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void reply_bulk(struct buffer *b, struct text bytes);

void *sim_alloc(size_t size);              // zeroed; ends the program when there is no memory, as the next do
void *sim_grow(void *memory, size_t size); // realloc

struct store;
struct store *store_new(void);
void store_free(struct store *s);
void store_set_clock(struct store *s, int64_t microseconds); // since 1970

// Appends the reply of one command to *out.
int store_run(struct store *s, size_t argc, const struct text *argv, struct buffer *out);

// The keys that were changed since store_clean, gone ones among them.
size_t store_dirty(const struct store *s);
struct text store_dirty_key(const struct store *s, size_t i); // valid until store_clean
void store_clean(struct store *s);

// Everything that is there now, to be put back later.
struct store_copy;
struct store_copy *store_copy(struct store *s);
void store_restore(struct store *s, const struct store_copy *copy); // NULL: nothing is there
void store_copy_free(struct store_copy *copy);                      // NULL is fine

// ---- looking inside, without a command: for who checks

enum store_type { STORE_NONE, STORE_STRING, STORE_HASH, STORE_ZSET, STORE_STREAM };
enum store_type store_type(struct store *s, struct text key);
int64_t store_expires(struct store *s, struct text key);   // milliseconds since 1970; 0: never, or no such key
struct text store_value(struct store *s, struct text key); // of a string; bytes NULL: there is none
// The value of a hash's field, valid until the key changes; bytes NULL: there is none.
struct text store_field(struct store *s, struct text key, const char *field);
bool store_score(struct store *s, struct text key, struct text member, double *score);
size_t store_size(struct store *s, struct text key);                          // fields, members or entries
void store_entry_id(struct store *s, struct text key, size_t i, char id[48]); // of a stream, at place i
// The value of a field of a stream's entry at place i; bytes NULL: it has no such field.
struct text store_entry_field(struct store *s, struct text key, size_t i, const char *field);
// Calls back for each key; stops when f returns false. f must not change the store.
typedef bool store_on_key(void *arg, struct text key);
void store_each(struct store *s, store_on_key *f, void *arg);

#endif
