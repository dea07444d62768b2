// dealing.cuh: how kernels whose blocks stay deal what is left over after whole rounds. An item is a tile of results,
// and takes some steps: tiles of keys of an attention, stages of a product's sums.
#ifndef DITFLEET_CUDA_HOPPER_DEALING_CUH
#define DITFLEET_CUDA_HOPPER_DEALING_CUH

#include "kernels/cuda/vec.cuh"

// Items that every worker (a multiprocessor, or a cluster of them) has one of are taken whole. The rest would leave
// some idle: where that is a good part of the kernel's time, its steps are dealt to `parts` of them, and who is through
// last brings the parts' sums together.
struct dealing {
    int whole, parts, shares; // shares: whole items and parts of the others
};

// price: of a part beside its steps, in steps. in_parts: else all are taken whole.
inline dealing deal(int items, int steps, int workers, int price, bool in_parts)
{
    enum { MOST = 6, LEAST_STEPS = 4, WORTH = 16 };
    const int rest = items % workers, took_whole = (items / workers + 1) * steps;
    dealing best = {items, 1, items};
    int least = steps - took_whole / WORTH; // steps, instead of a whole item's
    for (int parts = 2; in_parts && rest > 0 && parts <= MOST && steps / parts >= LEAST_STEPS; parts++) {
        const int took = (int)ceil_div(rest * parts, workers) * ((int)ceil_div(steps, parts) + price);
        if (took < least) {
            least = took;
            best = {items - rest, parts, items - rest + rest * parts};
        }
    }
    return best;
}

// The n-th of what workers take, after n % workers and so on: a whole item, or a part of one.
struct share {
    int item, first, steps; // first: of its steps
    int part, slot;         // slot: among the parts of all; below 0: whole
};

__device__ inline share share_of(int n, int whole, int parts, int steps)
{
    const int slot = n - whole, rest = slot / parts;
    if (slot < 0)
        return {n, 0, steps, 0, slot};
    const int part = slot - rest * parts, first = steps * part / parts;
    return {whole + rest, first, steps * (part + 1) / parts - first, part, slot};
}

#endif
