// comm.h: what ranks of a group say to each other. Backends: self (one rank), shm (processes of one host), tcp (of
// several), link (their devices), dry (counts bytes). A collective is called by every rank of the communicator in the
// same order.
//
// Errors are sticky, as in kernels.h: after a failure in any communicator of this rank every call returns at once and
// comm_check of each reports the first one. Ranks that call different collectives, or disagree about sizes, get
// ERR_INTERNAL.
// Buffers are memory of the device the communicator was made for.
#ifndef DITFLEET_COMM_H
#define DITFLEET_COMM_H

#include <stdint.h>

#include "kernels/kernels.h"
#include "proto/err.h"

#define COMM_MAX_RANKS  64
#define COMM_MAX_PIECES (5 * COMM_MAX_RANKS)

struct comm;

int comm_rank(const struct comm *c);
int comm_size(const struct comm *c);
int comm_check(struct comm *c, struct err *err);
void comm_free(struct comm *c);
// To other ranks since c was made, by c and the groups made from it; a piece sent to k ranks counts k times.
uint64_t comm_bytes_sent(const struct comm *c);
// Collectives begun since c was made, by c and the groups made from it, where there was another rank to wait for.
uint64_t comm_collectives(const struct comm *c);
// Seconds of this rank in collectives, in all its communicators since the first was made: moving bytes, and waiting for
// ranks that came later. A link may not tell the two apart: then all is exchange.
struct comm_times {
    double exchange, wait;
};
struct comm_times comm_times(const struct comm *c);

// Rank r gets send_counts[r] bytes from send + send_offsets[r] and puts what rank r sends at recv + recv_offsets[r].
// Counts may be zero. recv_counts[r] equals what rank r sends here (each rank derives both from the plan).
// The piece for oneself is copied too. send and recv do not overlap.
void comm_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                     void *recv, const int64_t *recv_counts, const int64_t *recv_offsets);
// Around the ring: send goes to the next rank (rank + 1, the first after the last), recv comes from the one before.
// Counts may differ from rank to rank and be zero; recv_bytes equals what the rank before sends. Called by all ranks.
void comm_shift(struct comm *c, const void *send, int64_t send_bytes, void *recv, int64_t recv_bytes);
// recv holds every rank's piece, rank order, counts[r] bytes each. send may be its own place in recv.
void comm_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts);
// Whether collectives are operations of the device: queued and recorded like these, with messages in its memory.
bool comm_on_device(const struct comm *c);
// Rows as they lie, to ranks and from them, COMM_MAX_PIECES each way at most; see exchange in kernels.h. Only on a
// device: others want them side by side (exec_exchange).
void comm_exchange(struct comm *c, int sends, const struct link_piece *send, int recvs, const struct link_piece *recv);
void comm_broadcast(struct comm *c, void *buffer, int64_t bytes, int root);
void comm_barrier(struct comm *c);

// The ranks first, first + stride, ... (count of them, ranks of c) form a communicator, ordered as listed. Called by
// exactly these ranks, each with the same arguments; the others need not know. Freed by comm_free, before its parent.
// ERR_INVALID: ranks that c has not, or the caller is none of them. More groups alive at once than the backend keeps
// (shm: 32 led by one rank) is a failure of all. Freed groups are reused, however many are made over a life.
int comm_group(struct comm *c, int first, int stride, int count, struct comm **out, struct err *err);

// How long a collective of this rank, in any of its communicators, may wait for a peer before it fails with
// ERR_TIMEOUT naming the collective and the ranks missing. 0, as at first: for ever (an idle rank waits for its job).
void comm_set_timeout(struct comm *c, int timeout_ms);
// Makes every rank's present and future collective, in every communicator, fail with ERR_UNAVAILABLE and this reason;
// callable from any thread while c lives. The first reason stands.
void comm_abort(struct comm *c, const char *reason);

// ---- self
int comm_self_new(struct comm **out, struct err *err);

// ---- dry: behaves as rank of size ranks, moves nothing, counts bytes. linked: as those of a link (comm_on_device).
int comm_dry_new(int rank, int size, bool linked, struct comm **out, struct err *err);

// ---- link: devices that send each other rows, in the order of their operations: a collective is queued like one, and
// fails where they do. Its messages lie in memory of the device.
// Called by all ranks of control at once, whose device each opens before; control, k and d outlive it. ERR_INVALID:
// GPUs or libraries differ, or two ranks have the same GPU. An abort of control is one of the link, and the other way
// round. A collective that waits for more than the timeout (at first 5 minutes) aborts both.
// Where ranks can write each other's memory, opening it makes exchanges faster; any memory of the device that a message
// comes to is allocated before, and freed after it was closed. Called by all ranks at once; others have nothing to
// open. Unless each is willing, nothing is opened.
int comm_open_memory(struct comm *c, bool willing, struct err *err);
int comm_close_memory(struct comm *c, struct err *err);
bool comm_memory_is_open(struct comm *c);
// While it is open: what each rank, this one among them, has at an address of its own comes here, beside what the
// device does, once what is queued so far is done. Called by all ranks, but none waits for another: what they fetch is
// not written meanwhile. lots: (ranks). lent: bytes that others fetch from here. at_once: before anything else; else
// where there is room between exchanges. What is queued after comm_fetched finds those of its kind; where no memory is
// open it does nothing.
struct comm_lot {
    const void *from; // in that rank's memory
    void *to;
    int64_t bytes;
};
void comm_fetch(struct comm *c, const struct comm_lot *lots, int64_t lent, bool at_once);
void comm_fetched(struct comm *c, bool at_once);
// While it is open: what is queued from here on is done after what every rank queued before. beside: what is fetched at
// once from here on is; all else only after comm_fetched, before which there is no other collective.
void comm_meet(struct comm *c, bool beside);
// While it is open: attention whose results go straight to ranks (link_attention in kernels.h); there when they have
// met next. False: not by this device, or not of these operands, and nothing was done; alike on all ranks.
bool comm_attention(struct comm *c, int n, const struct link_piece *to, struct tensor q, struct tensor k,
                    struct tensor v, const struct attention_opts *opts);
int comm_link_new(struct comm *control, const struct kernels *k, struct device *d, int timeout_ms, struct comm **out,
                  struct err *err);

// ---- shm: processes of one host over a memfd, woken by futex, never spinning for long
// Makes the shared region for size ranks and returns its file descriptor (close-on-exec), or -1 with *err.
// slab_bytes is each rank's window for messages; longer messages go through it in pieces. The region has no name: it is
// gone with the last process that holds it.
int comm_shm_region(int size, int64_t slab_bytes, struct err *err);
// Attaches to the region as rank, or as -1: a watcher, who may only abort. The fd stays the caller's. A rank attaches
// once in a region's life (else ERR_CONFLICT); a group that lost a rank gets a new region.
// ERR_CORRUPT: fd is not a region of this version. Calls of one rank come from one thread at a time, but comm_abort.
int comm_shm_attach(int fd, int rank, struct comm **out, struct err *err);

// ---- tcp: processes of several hosts
enum { COMM_TCP_PLACE = 64, COMM_TCP_SECRET = 40 };
// Where the ranks of a group are, which all of them are told alike.
struct comm_tcp_meeting {
    int size;
    char secret[COMM_TCP_SECRET];                // proves who belongs to it; zeros behind its end
    char places[COMM_MAX_RANKS][COMM_TCP_PLACE]; // by rank: "10.0.0.1:4000", "[fd00::1]:4000"
};
// A socket that other ranks call at this address of the host's, an IPv4 or IPv6 address as text; place: where that is.
// Returns the descriptor (close-on-exec), or -1 with *err. It is made before any rank starts, so that nobody calls in
// vain; the rank it is for inherits it.
int comm_tcp_listen(const char *address, char place[COMM_TCP_PLACE], struct err *err);
// Meets the other ranks within timeout_ms, all of which do so at once; the listener stays the caller's. What is sent is
// neither encrypted nor proven later: for networks that strangers have no part in. ERR_TIMEOUT, ERR_UNAVAILABLE: which
// rank did not come, or cannot be reached. A rank that ends without comm_free, or whose host is silent for 5 s, is an
// abort of all.
int comm_tcp_join(const struct comm_tcp_meeting *where, int listener, int rank, int timeout_ms, struct comm **out,
                  struct err *err);

#endif
