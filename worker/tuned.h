// tuned.h: where the parameters of a machine (worker/cost.h) are kept once `ditfleet tune` has measured them.
//
// A JSON file in the user's cache folder for each device, number of ranks, threads of a rank, precision and version of
// ditfleet; a hash of them is in its name, and it says them itself. It is a cache: a file that is missing, unreadable,
// somebody else's, damaged or of another key counts as none. It is never changed in place: a new one takes its name.
#ifndef DITFLEET_TUNED_H
#define DITFLEET_TUNED_H

#include "worker/cost.h"

struct tuned_key {
    char device[128];   // what computes: the CPU's or the GPU's name
    int ranks, threads; // threads of each; GPUs: 0
    char precision[8];
};

// Of a group on this machine.
void tuned_key_of(const struct kernels *k, int ranks, int threads, const struct precision *p, struct tuned_key *out);

// folder: the cache's; NULL: the user's. False: no such file, or none to be trusted. GPUs that were not measured
// together have what one measured alone, and for what they exchange the defaults.
bool tuned_load(const char *folder, const struct tuned_key *key, struct machine *out);
// *path, where it is not NULL: the file that was written. ERR_IO: it could not be; what was there stays.
int tuned_save(const char *folder, const struct tuned_key *key, const struct machine *c, char *path, size_t size,
               struct err *err);

// What is taken where nothing was measured. A CPU's core: 100 GFLOP/s in products, 60 in attention, 15 GB/s row by
// row and 30 in copies, copies through shared memory at 6 GB/s and 20 us a collective. A GPU: the H100 of
// kernels/NOTES.md in bf16, and NCCL over NVLink (306 GB/s each way, 24 us a call). Shards: FLUX.1-dev's 8.6 GB a step,
// 28 ms alone on NVLink, made a step of 70.1 ms take 77.9 (Ulysses), one of 71.5 79.1 (ring).
struct machine machine_default(const struct tuned_key *key);

#endif
