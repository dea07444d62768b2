// comm_internal.h: what the backends of comm.h share. comm.c checks arguments, counts bytes and keeps the sticky error,
// then calls through comm_ops; a backend moves the bytes. Nobody outside worker/comm includes this but its test.
#ifndef DITFLEET_COMM_INTERNAL_H
#define DITFLEET_COMM_INTERNAL_H

#include <stdatomic.h>
#include <stddef.h>

#include "worker/comm/comm.h"

struct message;
enum comm_op {
    COMM_BARRIER,
    COMM_ALL_TO_ALL,
    COMM_ALL_GATHER,
    COMM_BROADCAST,
    COMM_GROUP,
    COMM_EXCHANGE,
    COMM_FETCH,
    COMM_MEET
};

// Called with checked arguments, never after a failure. A failure is told by comm_fail.
struct comm_ops {
    void (*all_to_all)(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                       void *recv, const int64_t *recv_counts, const int64_t *recv_offsets);
    void (*exchange)(struct comm *c, int sends, const struct link_piece *send, int recvs,
                     const struct link_piece *recv); // NULL: takes no pieces
    void (*all_gather)(struct comm *c, const void *send, void *recv, const int64_t *counts);
    void (*broadcast)(struct comm *c, void *buffer, int64_t bytes, int root);
    void (*barrier)(struct comm *c);
    int (*move)(struct comm *c, const struct message *m); // of backends that have the four above from message.h
    // Makes the backend's struct with rank and size set; comm.c links it to root and parent.
    int (*group)(struct comm *c, int first, int stride, int count, struct comm **out, struct err *err);
    struct comm_times (*times)(struct comm *c); // NULL: as the host's clock has them
    // NULL, as the six after it: there is none
    int (*open_memory)(struct comm *c, bool willing, struct err *err);
    int (*close_memory)(struct comm *c, struct err *err);
    bool (*memory_is_open)(struct comm *c);
    void (*fetch)(struct comm *c, const struct comm_lot *lots, bool at_once);
    void (*fetched)(struct comm *c, bool at_once);
    void (*meet)(struct comm *c, bool beside);
    bool (*attention)(struct comm *c, int n, const struct link_piece *to, struct tensor q, struct tensor k,
                      struct tensor v, const struct attention_opts *opts);
    void (*set_timeout)(struct comm *c, int timeout_ms); // NULL: the backend reads the root's
    void (*wake)(struct comm *c);                        // an abort was noted: nobody may sleep through it. Any thread.
    void (*free)(struct comm *c);
};

// An abort. For shm it lies in the region, seen by every rank. Who aborts draws a slot of its own, writes its reason
// and then makes it the one that counts unless another is: nobody waits for a writer that died half way.
#define ABORT_SLOTS 4
struct abort_note {
    atomic_uint drawn;                 // slots drawn
    atomic_uint chosen;                // 1 + the slot that counts; 0: no abort
    char reason[ABORT_SLOTS + 1][240]; // the last stays empty, for those who come too late to draw
};

// First member of every backend's struct.
struct comm {
    const struct comm_ops *ops;
    struct comm *root;   // what all groups descend from: keeps error, note and timeout for them all
    struct comm *parent; // NULL: this is the root
    int rank, size;
    uint64_t sequence; // collectives begun: errors name it
    uint64_t bytes_sent;
    uint64_t collectives; // of this and its groups, where there is another rank
    // of the root alone
    struct err error; // the first failure
    struct abort_note *note;
    int timeout_ms;
    double began;           // the collective in hand
    double within, waiting; // seconds in collectives; of these, waiting for others: the backend adds to it
};

// To other ranks, by c and what it was made from. comm.c counts what it can see; an exchange counts its pieces itself.
void comm_count_sent(struct comm *c, int64_t bytes);
// Fills a root's common part.
void comm_init(struct comm *c, const struct comm_ops *ops, int rank, int size, struct abort_note *note);
// Keeps the failure unless there is one; returns code. The text begins with the collective's name and number.
int comm_fail(struct comm *c, enum err_code code, enum comm_op op, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
int comm_fail_aborted(struct comm *c); // as above, with the abort's reason
// ERR_TIMEOUT: these ranks of the whole, a bit each, did not do it within the timeout.
int comm_fail_late(struct comm *c, enum comm_op op, const char *did_not, uint64_t missing);
static inline uint64_t rank_bit(int rank)
{
    return UINT64_C(1) << rank;
}
static inline bool comm_aborted(const struct comm *c)
{
    return atomic_load(&c->root->note->chosen) != 0;
}

// The piece for oneself. May be empty, or in its place already.
void comm_copy(void *to, int64_t to_offset, const void *from, int64_t from_offset, int64_t bytes);

// shm over a mapping that outlives the communicator: ranks that are threads share one, as a race detector needs.
int comm_shm_attach_mapped(void *region, int64_t bytes, int rank, struct comm **out, struct err *err);

#endif
