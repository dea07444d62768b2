// keep.h: a file where the user asks for it, -o of several commands.
#ifndef DITFLEET_CLI_KEEP_H
#define DITFLEET_CLI_KEEP_H

#include <stddef.h>

#include "proto/err.h"

// Writes path whole or not at all: what was there stays until all of it is written, and half a file is never left.
// A link, a pipe or a device is written through.
int keep_file(const char *path, const void *bytes, size_t len, struct err *err);

#endif
