// exec.h: the execution context: which backend computes, and how one image's rows are spread over ranks.
//
// A model is written once against this. What acts on a row alone is called in the table of operations (x->k->linear and
// so on); the three operations that look across rows go through the functions below, which exchange what is needed
// with the other ranks. With one rank they are plain calls.
#ifndef DITFLEET_EXEC_H
#define DITFLEET_EXEC_H

#include "kernels/arena.h"
#include "kernels/kernels.h"
#include "worker/comm/comm.h"
#include "worker/parallel/spread.h"

struct ownership;

// Bytes that lie in one place for a whole loop, so that other ranks can reach them.
struct shared_room {
    struct tensor bytes;
    bool direct; // others' are reached at
    const void *theirs[COMM_MAX_RANKS];
};

// Ranks that share heads bring their rows together before these are projected to queries, keys and values, instead of
// after: a row of the input is a third of what it is projected to, in 8 bits a sixth, and GPUs fetch it beside their
// work. Each rank then projects all of their rows to its share of the heads. That is less to send than Ulysses'
// for P ranks where P < 3, in 8 bits P < 6. The bits of an exact device do not change.
struct input_sharing {
    struct comm *comm; // these ranks, neighbours in x->comm
    int first;         // of them, its rank there
    struct shared_room room;
};

struct exec {
    const struct kernels *k;
    struct device *d;
    struct arena *arena;
    struct comm *comm;                      // ranks that share the rows of one image
    const struct attention_link *attention; // first link of the chain
    struct ownership *ownership;            // of the model's weights (worker/ownership.h); NULL: this rank has all
    const struct input_sharing *sharing;    // NULL: each rank projects its own rows
    const struct shared_room *results;      // where attention's results come to; NULL: anywhere
};

// One attention over the rows of all ranks. This rank holds rows[rank] of them.
struct attention_call {
    int layer;                  // counts a model's attentions; links that keep keys and values tell them apart by it
    struct tensor out;          // (rows, heads, dim)
    struct tensor q, k, v;      // (rows, heads, dim), any ld
    const int64_t *rows;        // of every rank, in the order of x->comm
    struct attention_opts opts; // no bias and not causal where rows are spread
};

// A way to attend across ranks. Links form a chain, outermost first; each transforms the call and hands it to next;
// the last one, local or ring, computes. A link is chosen by the plan; no model knows which are there.
// A call's rows are spread over the ranks of the x->comm that comes with it. A link that has brought rows together
// hands on an exec with the communicator of those that are still apart.
struct attention_link {
    void (*attend)(const struct attention_link *self, struct exec *x, const struct attention_call *call);
    const struct attention_link *next;
    void *state; // the link's own
};

// Keys and values are here whole: compute.
extern const struct attention_link attention_local;
// Each rank gathers everybody's keys and values and attends with its own queries. Any number of heads.
extern const struct attention_link attention_gathered;
// DeepSpeed-Ulysses (Jacobs et al. 2023): all-to-all from rows to heads and back, among the ranks of inside; heads %
// their number == 0. x->comm is cut into groups of so many neighbours; inside is this rank's, across has the ranks of
// the same place in every group, in order: what the next link works over (one rank, where there is one group).
// Copied, with state, and next where it is not local.
struct ulysses_groups {
    struct comm *inside, *across;
    struct shared_room results; // of the ranks of inside, who write each other's where they can
};
extern const struct attention_link attention_ulysses;
// Where inputs are shared (struct input_sharing): q, k and v have all rows of the ranks of inside, and this rank's
// share of the heads. Its state, next and copies as Ulysses'; back from heads to rows as there.
extern const struct attention_link attention_by_heads;
// Ring attention (Liu et al. 2023): keys and values go round the ranks of x->comm. Any number of heads. Sums are added
// slice by slice, so results equal local's to rounding. Needs attention_part of the backend. Copied, with state.
struct ring {
    struct shared_room room; // for the keys and values of two layers, of the ranks of x->comm
    int layer;               // the last one; at first -1
};
extern const struct attention_link attention_ring;

static inline void exec_attend(struct exec *x, const struct attention_call *call)
{
    x->attention->attend(x->attention, x, call);
}

// A convolution's input (h, w, c): an arena tensor with EXEC_HALO rows of room above and below what is returned.
#define EXEC_HALO 1
struct tensor exec_conv_input(struct exec *x, int64_t h, int64_t w, int64_t c);

// y (h, w, c_out) = conv of this rank's rows of a picture spread as rows says. Kernels of 1 or 3; for 3, in comes from
// exec_conv_input, and the rows around it are fetched from their owners into its room.
void exec_conv(struct exec *x, struct tensor y, struct tensor in, const struct conv *conv, const struct spread *rows);

// y = act(group norm(x)) over the whole picture of which x holds this rank's rows. y may be x. The sums of all ranks
// are added in row order, so the result does not depend on the spread.
void exec_group_norm(struct exec *x, struct tensor y, struct tensor in, struct tensor gamma, struct tensor beta,
                     int64_t groups, float eps, enum act act, const struct spread *rows);

// whole (all rows, n) gets every rank's rows of it; mine (this rank's rows) may lie in its place. Row-contiguous.
void exec_gather(struct exec *x, struct tensor whole, struct tensor mine, const struct spread *rows);

// all gets where each rank of c, who all call it, has what it calls mine, for comm_fetch, while memory is open. What it
// takes of the arena it gives back.
void exec_tell_address(struct exec *x, struct comm *c, const void *mine, const void *all[COMM_MAX_RANKS]);

// Rows to ranks of c and from them, as they lie: comm_exchange, by copies through the arena where c wants them side by
// side.
void exec_exchange(struct exec *x, struct comm *c, int sends, const struct link_piece *send, int recvs,
                   const struct link_piece *recv);

// Waits for the device and the other ranks' messages; the first failure of arena, device or communicator.
int exec_check(struct exec *x, struct err *err);

// The same without waiting for more than a loop's last round but one (pace in kernels.h).
int exec_pace(struct exec *x, struct err *err);

// An undefined tensor of the activation type in the arena.
static inline struct tensor exec_tensor(struct exec *x, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
    return arena_tensor(x->arena, x->k->activation, dims, n0, n1, n2, n3);
}

// An undefined input (rows, w->k) for a linear layer: of the activation type or, as the layer's weights, of 8 bits.
struct tensor exec_input(struct exec *x, int64_t rows, const struct linear *w);

// What an attention reads, on its way to queries, keys and values.
struct attention_input {
    struct tensor mine;        // (rows of this rank, k): to be filled
    struct tensor rows;        // (rows that are projected here, k): these; or where inputs are shared, all the ranks'
    int64_t first_row;         // of mine among them
    int64_t first_head, heads; // that they are projected to here
    const int64_t *of_rank;
};

// For the layer w, which projects to heads, and so many rows of this rank; of_rank as in an attention_call. The next
// one may lie in the same place.
struct attention_input exec_attention_input(struct exec *x, const struct linear *w, int64_t heads, int64_t rows,
                                            const int64_t *of_rank);
// What attention's results come to: an undefined (rows, columns) of the activation type, in which they have the first
// columns. The next one may lie in the same place.
struct tensor exec_attention_output(struct exec *x, int64_t rows, int64_t columns);
// mine is filled: the others may have it. Theirs come beside what is queued from here on, and what is queued after
// exec_input_shared finds them.
void exec_share_input(struct exec *x, const struct attention_input *in);
void exec_input_shared(struct exec *x);

#endif
