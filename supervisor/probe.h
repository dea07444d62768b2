// probe.h: a function in a process of its own, for calls that may never return or may crash: drivers of broken GPUs,
// file systems of absent servers.
#ifndef DITFLEET_SUPERVISOR_PROBE_H
#define DITFLEET_SUPERVISOR_PROBE_H

#include <stddef.h>

#include "proto/err.h"

// Zeros that a child's writes reach; NULL: no memory. Freed by probe_free.
void *probe_alloc(size_t bytes);
void probe_free(void *memory, size_t bytes);

// Forks; the child runs body(arg) and leaves. No other thread may run in the caller. What body writes is seen by the
// caller only where it lies in memory of probe_alloc. Errors: ERR_TIMEOUT ("WHAT did not finish within 10 s"; the child
// is killed, or left behind where even that has to wait), ERR_INTERNAL (it died, or a library ended it), ERR_IO.
int probe_run(void (*body)(void *arg), void *arg, const char *what, double seconds, struct err *err);

#endif
