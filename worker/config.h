// config.h: the JSON files of a model directory, read with bounds.
//
// Errors are sticky: after the first one every reader leaves its output alone, and config_close returns it. So a loader
// reads like the list of what it needs. Errors name the file, the key and what is allowed.
#ifndef DITFLEET_WORKER_CONFIG_H
#define DITFLEET_WORKER_CONFIG_H

#include <stdint.h>

#include "proto/err.h"

struct config; // one JSON object; NULL stands for one that could not be read

// Reads dir/name, at most 64 MiB. err must live until config_close and be clear (code 0) or hold no error of interest.
struct config *config_open(const char *dir, const char *name, struct err *err);
// Frees c; returns the first error since config_open (the code in err) or 0.
int config_close(struct config *c, struct err *err);
// Records an error found by the caller; the text is preceded by the file's path.
void config_fail(struct config *c, enum err_code code, const char *format, ...) __attribute__((format(printf, 3, 4)));

// Required values within [min, max].
void config_int(struct config *c, const char *key, int64_t min, int64_t max, int64_t *out);
void config_float(struct config *c, const char *key, double min, double max, double *out);
// 1 to max_count integers; *count is set.
void config_ints(struct config *c, const char *key, int max_count, int64_t min, int64_t max, int64_t *out, int *count);
// Optional ones: *out keeps its value when the key is absent or null.
void config_int_or(struct config *c, const char *key, int64_t min, int64_t max, int64_t *out);
void config_float_or(struct config *c, const char *key, double min, double max, double *out);
void config_bool_or(struct config *c, const char *key, bool *out);
// *out: the index of the string in names, whose last is NULL.
void config_choice_or(struct config *c, const char *key, const char *const *names, int *out);
// Copies the string, cut to size; *out becomes "" when the key is absent or not a string.
void config_string(struct config *c, const char *key, char *out, int size);
// A path to a file, relative to the JSON file's directory; as config_string when the key is absent or null.
void config_path_or(struct config *c, const char *key, char *out, int size);
// Refuse what this engine does not compute: a key that is set (not null, not false); another string than this.
void config_refuse(struct config *c, const char *key);
void config_require(struct config *c, const char *key, const char *value);
// Refuses keys that nothing above asked for: for a file of our own, where such a key is a slip.
void config_refuse_rest(struct config *c);

#endif
