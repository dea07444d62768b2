// cost.h: what a plan's step would take on a machine, so that plans can be compared before one of them runs.
//
// The dry forward of every rank counts what it computes and what it sends. A rank's seconds of a step are
//
//     compute  = products / P + attention / A + row bytes / R + copied bytes / C + operations * o
//     exchange = bytes sent / X + (collectives + 1) * c
//
// and the step takes as long as the slowest rank. The terms are what can bound a rank: floating point operations of
// linear layers, those of attention (which has another rate), the bytes that row-wise operations read and write, those
// of copies (which are faster, and are how plans differ: Ulysses copies more than a ring), what each operation costs
// however small, the bytes that are sent, and what each collective costs however small (the one more tells whether to
// go on). These numbers are measured with all ranks at it (`ditfleet tune`), for ranks share cores, caches and
// memory. Sums, not maxima: a rank waits for what it receives, and on CPU ranks nothing overlaps. Of the bytes of
// shards that GPUs fetch beside their work, a part counts, measured as well; rows that they fetch so count as if they
// were waited for, since most of what that saves is taken back by the power cap.
//
// PipeFusion's stages wait for each other: compute is that of the slowest stage in a tick, times the ticks a step takes
// (pipefusion.c), warm-up steps included in the mean. Parts of a group that make a picture each do not wait for each
// other: a step is one of each part.
#ifndef DITFLEET_COST_H
#define DITFLEET_COST_H

#include "worker/engine.h"

// Of one rank, while all ranks of its group do the same.
struct machine {
    double products, attention; // floating point operations a second
    double rows, copies;        // bytes a second, read and written
    double operation;           // seconds each
    double exchange;            // bytes a second, sent
    double collective;          // seconds each
    double beside;              // what a byte of shards costs of one that is waited for
};

struct price {
    struct plan plan;
    double compute, exchange; // seconds of a step, of the slowest rank
    double sent;              // bytes of a step, of the rank that sends most
};

static inline double price_seconds(const struct price *p)
{
    return p->compute + p->exchange;
}

// job as model_resolve_job left it; plan: of plan_make. k: as in engine_predict_rank.
int cost_of(const struct machine *c, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
            const struct kernels *k, struct price *out, struct err *err);
// What the fullest rank takes of memory: *out's stage_bytes and activation_bytes, and nothing else of it. Apart,
// because memory asks for a dry run of all steps, where a price asks for one.
int cost_memory(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, const struct kernels *k,
                struct engine_estimate *out, struct err *err);

// The legal ones of plan_choices, in its order. *n: how many, one at least. Where there is none, plan_make's refusal.
int cost_all(const struct machine *c, const struct model *m, const struct kernels *k, const Ditfleet__V1__Job *job,
             const struct plan *want, struct price out[PLAN_MAX_CHOICES], int *n, struct err *err);

// Which of some plans to take, by their seconds in plan_choices' order; below 0: not to be had. -1: none. A price is no
// better than COST_CLOSE, so of plans as close as that to the cheapest the first is taken: what is chosen does not
// change with the noise of a measurement, and a ring, whose last bits are its own, has to be worth it.
#define COST_CLOSE 1.05
int cost_pick(const double *seconds, int n);

#endif
