// supervisor.h: the node's supervisor as one call. It never touches a tensor and its loop never waits for anything but
// events.
#ifndef DITFLEET_SUPERVISOR_SUPERVISOR_H
#define DITFLEET_SUPERVISOR_SUPERVISOR_H

#include "proto/conf.h"

// Whether the worker program can be executed and every model's directory is there. Errors: ERR_NOT_FOUND.
int supervisor_check(const struct conf *conf, struct err *err);

// Runs until SIGTERM or SIGINT and then until every group has drained. Takes conf over. Blocks SIGTERM, SIGINT, SIGHUP
// and SIGCHLD in the calling thread; no other thread may run yet. Errors: ERR_NOT_FOUND (no
// worker program), ERR_CONFLICT (another supervisor has the state directory), ERR_IO.
int supervisor_run(struct conf *conf, struct err *err);

#endif
