// arena.h: activations of a forward pass: bump allocation in one block of a device's memory.
//
// The block is allocated once, as large as a dry run said; nothing is allocated per step. On the dry backend an
// arena hands out addresses without memory behind them and remembers its high-water mark, which is that prediction.
#ifndef DITFLEET_ARENA_H
#define DITFLEET_ARENA_H

#include "kernels/kernels.h"

struct arena;
#define ARENA_UNBOUNDED ((size_t)1 << 46)

// capacity in bytes, rounded down to 256; on the dry backend ARENA_UNBOUNDED is usual. *out is freed by arena_free.
int arena_new(const struct kernels *k, struct device *d, size_t capacity, struct arena **out, struct err *err);
void arena_free(struct arena *a);

// A contiguous tensor of the given shape, undefined content. When the block is full the arena is failed for good and
// returns tensors of zero rows; arena_check tells, with the sizes.
struct tensor arena_tensor(struct arena *a, enum dtype dtype, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3);
int arena_check(const struct arena *a, struct err *err);

// Everything allocated after mark is given back by release. Both speak of the stack in use.
size_t arena_mark(const struct arena *a);
void arena_release(struct arena *a, size_t mark);
// The block holds two stacks that grow towards each other; flip changes over to the other one. A chain of tensors, each
// made from the one before (a decoder), alternates: the new one on the other stack, then the old one's stack released.
void arena_flip(struct arena *a);
size_t arena_peak(const struct arena *a); // bytes, largest since arena_new or arena_peak_restart
void arena_peak_restart(struct arena *a);

#endif
