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

void loop_schedule(const struct run *r, struct schedule *s);
// Of the two branches of guidance, whether this rank computes b.
bool loop_my_branch(const struct run *r, int b);
// The turns of these rows' positions, text first, in the arena. Text is at the origin, image token (y, x) at (0, y, x).
int loop_rope(struct run *r, struct span text, struct span image, struct tensor *rope, struct err *err);
// What the prompts of my branches contribute to every step, in the arena; text: of this rank.
void loop_condition(struct run *r, const struct schedule *s, const struct prompt prompts[BRANCHES], struct span text,
                    struct dit_cond cond[BRANCHES]);
// Guidance parallel: v[0] and v[1], which lie side by side, get the prediction of the other branch's ranks.
void loop_exchange(struct run *r, struct tensor v[BRANCHES]);
void loop_trace_schedule(struct run *r, const struct schedule *s);

// pipefusion.c: denoise (stages.h) of a plan with patches.
int pipefusion(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
               struct err *err);

#endif
