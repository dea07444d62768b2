// plan.h: how many ranks do what for one job: the degrees of parallelism, and what they must satisfy.
#ifndef DITFLEET_PLAN_H
#define DITFLEET_PLAN_H

#include "worker/models/dit.h"

// World rank r is number b = r % (ulysses * ring) of guidance branch r / (ulysses * ring) (when cfg is 2). Within the
// branch it is member b % ulysses of Ulysses group b / ulysses: neighbours, who exchange most often, share heads, and
// the ring goes from group to group.
struct plan {
    int ranks;   // cfg * ulysses * ring
    int cfg;     // 1, or 2: the two guidance branches on two halves of the group
    int ulysses; // ranks that share the attention heads of one branch
    int ring;    // groups of such ranks, which pass keys and values round
};

enum { PLAN_TEXT = 48 };

// The plan of want->ranks ranks. Its degrees are checked where they are set and chosen where they are 0: guidance
// branches apart if they can be, then as large a Ulysses degree as heads allow, then the ring. true_cfg: the job has
// two branches. k: where it is computed. ERR_INVALID: a degree that no plan has. ERR_UNSUPPORTED says what does not
// fit, and what would.
int plan_make(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
              struct plan *out, struct err *err);
void plan_print(const struct plan *p, char text[PLAN_TEXT]); // "cfg=1 ulysses=2 ring=1"

#endif
