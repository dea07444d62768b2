// child.h: starting one worker process, so that it cannot outlive the supervisor and inherits nothing but what it
// needs.
#ifndef DITFLEET_SUPERVISOR_CHILD_H
#define DITFLEET_SUPERVISOR_CHILD_H

#include <sys/types.h>

#include "proto/err.h"

// The descriptors a worker finds open besides 0 (/dev/null), 1 and 2 (the supervisor's).
enum { CHILD_CONTROL_FD = 3, CHILD_FIRST_FD = 4, CHILD_MOST_FDS = 2 };

// A descriptor that the worker is given, and the option that tells it the number; the caller's stays open.
struct child_fd {
    const char *option;
    int fd;
};

struct child {
    const char *program; // absolute path
    const char *config;
    const char *group;
    const char *incarnation;
    int rank, ranks;
    const char *gpus;    // those of its group, which are all that it sees, as nvidia-smi counts: "0,1"; NULL: what this
                         // process sees
    const char *address; // of this node, for NCCL to use that interface; NULL: it chooses
    struct child_fd fds[CHILD_MOST_FDS];
    int n_fds;
};

// Forks and executes
//   program --config FILE --group NAME --rank R --ranks N --incarnation HEX --control-fd 3 [fds' OPTION FD]...
// in its own process group, killed by the kernel when the calling thread ends. *control_fd is the caller's end of a
// SOCK_SEQPACKET pair, non-blocking and close-on-exec (the worker's end blocks). A program that cannot be executed is
// seen as exit status 127. Errors: ERR_IO, ERR_NO_MEMORY.
int child_spawn(const struct child *c, pid_t *pid, int *control_fd, struct err *err);

#endif
