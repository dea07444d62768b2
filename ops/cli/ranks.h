// ranks.h: ranks on this machine with no supervisor: this process is rank 0; the others are forked from it and die with
// it.
#ifndef DITFLEET_CLI_RANKS_H
#define DITFLEET_CLI_RANKS_H

#include "worker/comm/comm.h"

// Calls work on every rank and returns what it came to on rank 0. Called before any thread starts. Work that fails on
// one rank alone leaves the others' communicators aborted; what all ranks refuse alike does not.
int ranks_run(int ranks, int (*work)(void *arg, struct comm *comm, struct err *err), void *arg, struct err *err);

#endif
