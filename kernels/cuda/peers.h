// peers.h: exchanges of GPUs of one host, without a library between: a kernel writes rows where the receiver wants
// them, strides and all, in the receiver's own memory. What link.c uses wherever it can.
#ifndef DITFLEET_CUDA_PEERS_H
#define DITFLEET_CUDA_PEERS_H

#include "kernels/cuda/device.h"

struct peers;

// NULL: these ranks cannot be peers.
struct peers *peers_new(struct device *d, int rank, int ranks, struct link_clock *clock, struct link_mark *mark);
void peers_free(struct peers *p);
// As link_export, link_import, link_forget, link_fetch, link_fetched and link_meet of kernels.h.
void peers_export(struct peers *p, void *to);
bool peers_import(struct peers *p, const void *all);
void peers_forget(struct peers *p);
void peers_fetch(struct peers *p, int rank, const void *from, void *to, int64_t bytes, bool at_once);
void peers_fetched(struct peers *p, bool at_once);
void peers_meet(struct peers *p, int n, const int *ranks, bool beside);
// Where this process sees what a rank has at that address; NULL: nowhere.
void *peers_at(const struct peers *p, int rank, void *address);
// Whether all have imported: then each exchange goes this way.
bool peers_ready(const struct peers *p);
void peers_exchange(struct peers *p, const char *what, int sends, const struct link_piece *send, int recvs,
                    const struct link_piece *recv);

#endif
