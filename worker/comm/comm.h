// comm.h: what ranks of a group say to each other. Backends: self (one rank), shm (processes of one host), dry
// (counts bytes); nccl later. A collective is called by every rank of the communicator in the same order.
//
// Errors are sticky, as in kernels.h: after a failure every call returns at once and comm_check reports the first one.
// Buffers are memory of the device the communicator was made for.
#ifndef DITFLEET_COMM_H
#define DITFLEET_COMM_H

#include <stdint.h>

#include "proto/err.h"

#define COMM_MAX_RANKS 64

struct comm;

int comm_rank(const struct comm *c);
int comm_size(const struct comm *c);
int comm_check(struct comm *c, struct err *err);
void comm_free(struct comm *c);
uint64_t comm_bytes_sent(const struct comm *c); // to other ranks, since it was made

// Rank r gets send_counts[r] bytes from send + send_offsets[r] and puts what rank r sends at recv + recv_offsets[r].
// Counts may be zero. recv_counts[r] equals what rank r sends here (each rank derives both from the plan).
// The piece for oneself is copied too. send and recv do not overlap.
void comm_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                     void *recv, const int64_t *recv_counts, const int64_t *recv_offsets);
// recv holds every rank's piece, rank order, counts[r] bytes each. send may be its own place in recv.
void comm_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts);
void comm_broadcast(struct comm *c, void *buffer, int64_t bytes, int root);
void comm_barrier(struct comm *c);

// The ranks that pass the same color form a communicator, ordered by their rank here. Collective. Freed by comm_free,
// before its parent.
int comm_split(struct comm *c, int color, struct comm **out, struct err *err);

// ---- self
int comm_self_new(struct comm **out, struct err *err);

// ---- dry: behaves as rank of size ranks, moves nothing, counts bytes
int comm_dry_new(int rank, int size, struct comm **out, struct err *err);

// ---- shm: processes of one host over a memfd, woken by futex, never spinning for long
// Makes the shared region for size ranks and returns its file descriptor (close-on-exec), or -1 with *err.
// slab_bytes is each rank's window for messages; longer messages go through it in pieces.
int comm_shm_region(int size, int64_t slab_bytes, struct err *err);
// Attaches to the region as rank. The fd stays the caller's. timeout_ms: how long a collective may wait for a peer
// before it fails with ERR_TIMEOUT naming the collective and the ranks missing; 0: for ever (an idle rank waiting for
// its next job).
int comm_shm_attach(int fd, int rank, struct comm **out, struct err *err);
void comm_set_timeout(struct comm *c, int timeout_ms);
// Makes every rank's present and future collective fail with ERR_UNAVAILABLE and this reason; callable from any
// thread, and from a parent that attached with rank -1.
void comm_abort(struct comm *c, const char *reason);

#endif
