// residency.h: which parts of which models lie in a device's own memory, within a budget.
//
// A stage of a job needs its parts and nothing else: what does not fit beside them is evicted, least recently used
// first, and brought back from its files when a stage needs it again. Where everything fits, nothing ever leaves.
//
// A model joins when it is loaded with a home that has a residency, and leaves when it is freed; it goes before the
// residency does. One thread at a time.
#ifndef DITFLEET_RESIDENCY_H
#define DITFLEET_RESIDENCY_H

#include "worker/model.h"

struct residency;

// budget: bytes for weights and for what residency_reserve says.
int residency_new(const struct kernels *k, struct device *d, int64_t budget, struct residency **out, struct err *err);
void residency_free(struct residency *r);
int residency_join(struct residency *r, struct model *m, struct err *err);
void residency_leave(struct residency *r, const struct model *m);

int64_t residency_budget(const struct residency *r);
// Of every part of every model that joined, whether here or not.
int64_t residency_all_bytes(const struct residency *r);

// Sets aside bytes for what is not weights, in place of what was set aside before. Evicts what stands in the way. The
// caller has checked that every stage to come fits beside it.
void residency_reserve(struct residency *r, int64_t bytes);
// Brings these parts of m (1 << enum model_part, or'ed) to the device; evicts others when the budget demands it.
// ERR_NO_MEMORY: they do not fit, with the numbers. Else as the loaders say.
int residency_need(struct residency *r, const struct model *m, unsigned parts, struct err *err);
// The same for as many of m's parts as fit beside what is here already.
int residency_fill(struct residency *r, const struct model *m, struct err *err);

// What happened since the last call of this function.
struct residency_moves {
    unsigned evicted, loaded; // parts, 1 << enum model_part
    int64_t loaded_bytes;
    double load_seconds;
};
struct residency_moves residency_moves(struct residency *r);

#endif
