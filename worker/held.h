// held.h: a job this leader holds the lease of, from claim to its final word. The main path denoises one while the
// deliverer uploads another; the herald renews both leases.
#ifndef DITFLEET_HELD_H
#define DITFLEET_HELD_H

#include <stdatomic.h>

#include "proto/queue.h"
#include "worker/engine.h"

struct held {
    struct queue_job claim; // fence and payload
    Ditfleet__V1__Job *job; // parsed, then resolved by the model
    const struct model *model;
    struct engine_result result;
    uint64_t claimed_ms; // wall clock, for the time it was queued
    double denoised_at;  // monotonic: gpu seconds are counted from claim to here
    double claimed_at;
    atomic_int stop; // err_code: the queue took the job away (stale, cancelled, expired); 0: go on
};

void held_free(struct held *h); // NULL is fine

// The queue's word on h as an error: ERR_STALE, ERR_CANCELLED, ERR_EXPIRED, or 0.
int held_check(const struct held *h, struct err *err);

#endif
