// spread.h: how n rows of something are dealt to ranks: contiguous slices in rank order, uneven and empty ones legal.
#ifndef DITFLEET_SPREAD_H
#define DITFLEET_SPREAD_H

#include "worker/comm/comm.h"

struct span {
    int64_t start, count;
};

struct spread {
    int rank, ranks;
    int64_t start[COMM_MAX_RANKS + 1]; // rank r has rows start[r] to start[r + 1]
};

// As even as can be: slice sizes differ by at most one.
static inline struct spread spread_even(int64_t n, int rank, int ranks)
{
    struct spread s = {.rank = rank, .ranks = ranks};
    for (int r = 0; r <= ranks; r++)
        s.start[r] = n * r / ranks;
    return s;
}

static inline int64_t spread_total(const struct spread *s)
{
    return s->start[s->ranks];
}

static inline struct span spread_of(const struct spread *s, int rank)
{
    return (struct span){s->start[rank], s->start[rank + 1] - s->start[rank]};
}

static inline struct span spread_mine(const struct spread *s)
{
    return spread_of(s, s->rank);
}

// The same slices of something with factor rows for each row here (a picture after upsampling).
static inline struct spread spread_scale(struct spread s, int64_t factor)
{
    for (int r = 0; r <= s.ranks; r++)
        s.start[r] *= factor;
    return s;
}

#endif
