// loop.h: what the loops over the steps share: denoise.c takes the whole picture through each step, pipefusion.c takes
// it patch by patch.
#ifndef DITFLEET_LOOP_H
#define DITFLEET_LOOP_H

#include "worker/parallel/stale.h"
#include "worker/stages.h"

struct schedule {
    int steps;
    float sigmas[SAMPLER_MAX_STEPS + 1], timesteps[SAMPLER_MAX_STEPS];
};

// What a rank carries of some rows: text rows first, then image rows.
struct share {
    struct dit_rows rows;
    struct spread spread;            // of these image rows, over the ranks of the branch, or of a stage
    int64_t of_rank[COMM_MAX_RANKS]; // where rows points to
};

void loop_schedule(const struct run *r, struct schedule *s);
// Of the two branches of guidance, whether this rank computes b.
bool loop_my_branch(const struct run *r, int b);
// Deals text rows, and behind them image rows that lie together, evenly over r->branch.comm (by the time they take), so
// that each rank has rows that follow each other. The turns of the positions of those it projects are in the arena:
// text is at the origin, image token (y, x) at (0, y, x). *out stays where it is.
int loop_deal(struct run *r, int64_t text_rows, struct span image, struct share *out, struct err *err);
// What the prompts of my branches contribute to every step, in the arena.
void loop_condition(struct run *r, const struct schedule *s, const struct prompt prompts[BRANCHES],
                    struct dit_cond cond[BRANCHES]);
// Guidance parallel: v[0] and v[1], which lie side by side, get the prediction of the other branch's ranks.
void loop_exchange(struct run *r, struct tensor v[BRANCHES]);
void loop_trace_schedule(struct run *r, const struct schedule *s);

// pipefusion.c: denoise (stages.h) of a plan with patches.
int pipefusion(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
               struct err *err);

#endif
