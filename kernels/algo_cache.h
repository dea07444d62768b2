// algo_cache.h: what was measured once and holds for a machine, on disk: for each key of some numbers, the algorithm
// that was fastest. Plain numbers: nothing here knows a library or a GPU.
//
// A file belongs to one combination of GPU, driver and library, told in words in its first line; a hash of the words is
// in its name. Every further line is an entry and ends with a checksum. The file is a cache: what is missing,
// unreadable, somebody else's, damaged or of another combination is passed over, and a full disk is no error. It is
// never changed in place: a new file takes its name, so that several processes may read and write at once. Of entries
// written at the same moment some may be lost, and are then measured again.
#ifndef DITFLEET_ALGO_CACHE_H
#define DITFLEET_ALGO_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ALGO_KEY_MAX = 32, ALGO_WORDS = 8 };

struct algo_cache;

// The user's folder for it, $XDG_CACHE_HOME/ditfleet or ~/.cache/ditfleet, without a slash at its end; false: none.
bool algo_cache_folder(char *out, size_t size);
// Makes it (0700) and the folders above it, where they are missing. What fails shows when a file is opened there.
void algo_cache_make_folder(const char *folder);

// Reads <folder>/<library>-<hash of words>.txt. words: a line, printable; key_n: numbers in a key, 1 to ALGO_KEY_MAX.
// folder NULL: nothing is read or written. NULL: no memory.
struct algo_cache *algo_cache_open(const char *folder, const char *library, const char *words, int key_n);
bool algo_cache_find(const struct algo_cache *c, const int64_t *key, uint64_t algo[ALGO_WORDS]);
void algo_cache_put(struct algo_cache *c, const int64_t *key, const uint64_t algo[ALGO_WORDS]);
// Writes what was put since, beside what others wrote meanwhile; makes the folder (0700) when it is missing. Cheap when
// there is nothing new.
void algo_cache_save(struct algo_cache *c);
void algo_cache_close(struct algo_cache *c); // saves first; NULL is allowed

#endif
