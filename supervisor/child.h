// child.h: starting one worker process, so that it cannot outlive the supervisor and inherits nothing but what it
// needs.
#ifndef DITFLEET_SUPERVISOR_CHILD_H
#define DITFLEET_SUPERVISOR_CHILD_H

#include <sys/types.h>

#include "proto/err.h"

// The descriptors a worker finds open besides 0 (/dev/null), 1 and 2 (the supervisor's).
enum { CHILD_CONTROL_FD = 3, CHILD_SHM_FD = 4 };

struct child {
    const char *program; // absolute path
    const char *config;
    const char *group;
    const char *incarnation;
    int rank, ranks;
    const char *gpus; // those of its group, which are all that it sees, as nvidia-smi counts: "0,1"; NULL: what this
                      // process sees
    int shm_fd;       // stays the caller's
};

// Forks and executes
//   program --config FILE --group NAME --rank R --ranks N --incarnation HEX --control-fd 3 --shm-fd 4
// in its own process group, killed by the kernel when the calling thread ends. *control_fd is the caller's end of a
// SOCK_SEQPACKET pair, non-blocking and close-on-exec (the worker's end blocks). A program that cannot be executed is
// seen as exit status 127. Errors: ERR_IO, ERR_NO_MEMORY.
int child_spawn(const struct child *c, pid_t *pid, int *control_fd, struct err *err);

#endif
