// save.h: files below a directory that others cannot lead elsewhere. Every component is opened in turn and none may be
// a symbolic link; a file appears whole or not at all.
#ifndef DITFLEET_OUTPUT_SAVE_H
#define DITFLEET_OUTPUT_SAVE_H

#include "proto/err.h"

#include <stdbool.h>
#include <stddef.h>

// Writes len bytes to root/path: parents are made, a temporary file in the same directory is renamed over the name
// (replacing a file or a link that is there). durable: file and directory reach the disk first (fsync).
// ERR_REFUSED: absolute path, "." or "..", a link on the way; ERR_NO_MEMORY: disk full; ERR_IO: the rest.
int save_file(const char *root, const char *path, const void *bytes, size_t len, bool durable, struct err *e);

// Opens the regular file root/path for reading under the same rules. A descriptor, or -1 with *e: also ERR_NOT_FOUND.
int save_open(const char *root, const char *path, struct err *e);

#endif
