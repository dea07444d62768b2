// ownership.h: which rank of a group has which of a transformer's weights in its memory.
//
// A transformer has the weights of its blocks, those of its modulations (linear layers of time and prompt, gone through
// once a picture), and a few others that embed and head need. By plan.weights (worker/plan.h):
//  - PLAN_REPLICATED: every rank has all of them, and no ownership.
//  - PLAN_BY_STAGE: a rank has the blocks of its stage of PipeFusion.
//  - PLAN_SHARDED: a rank has an equal part of each block's bytes. Before a block computes, the parts are gathered into
//    one of two buffers, while the block before computes from the other.
// By the latter two a modulation is one rank's, who computes it for all; they are dealt so that ranks have equally many
// bytes. The few others are everywhere.
//
// To gather and to tell modulations are collectives of the whole group: all its ranks go through modulations and blocks
// in the same order, whatever part of the group or branch of guidance they are.
#ifndef DITFLEET_OWNERSHIP_H
#define DITFLEET_OWNERSHIP_H

#include "worker/plan.h"

struct weights;

struct ownership {
    int rank, ranks; // of the group
    bool sharded;
    struct span blocks;           // that are whole here
    int once[COMM_MAX_RANKS + 1]; // rank r has modulations once[r] to once[r + 1]
    // In a run:
    struct comm *comm;                  // the group's, for this alone: a backend may gather on a stream of its own
    const void *theirs[COMM_MAX_RANKS]; // where each has its parts, while devices fetch them
    int coming;                         // the block whose bytes are on their way; -1: none
};

// Of a rank under a plan that is not replicated. w: as fetched (worker/weights.h).
void ownership_make(const struct weights *w, const struct plan *p, int rank, struct ownership *out);
// Bytes of a transformer that a rank has under any plan, buffers of gathered blocks included: as placed, or else as
// the files have them.
int64_t ownership_bytes(const struct weights *w, const struct plan *p, int rank);
// Of these, parts of blocks and buffers: copies, where all others stay in mapped files. 0 unless p is sharded.
int64_t ownership_shard_bytes(const struct weights *w, const struct plan *p);
// Of a sharded block with so many bytes, those that each of the ranks has.
int64_t ownership_piece(int64_t block_bytes, int ranks);

// Sharded weights lie where they do from show to hide, and devices fetch others' parts from their memory where they
// can. Called by all ranks. Of other weights: nothing to do.
int ownership_show(struct ownership *o, struct exec *x, const struct weights *w, struct err *err);
int ownership_hide(struct ownership *o, struct err *err);
// Whether this rank computes a modulation. o NULL: every rank computes all.
bool ownership_computes(const struct ownership *o, int modulation);
// All ranks have all columns of whole (rows, n) from here on, each having computed those from start[rank] to
// start[rank + 1]. x->ownership NULL: nothing to do.
void ownership_share(struct exec *x, struct tensor whole, const int64_t *start);

#endif
