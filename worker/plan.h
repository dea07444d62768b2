// plan.h: how many ranks do what for one job: the degrees of parallelism, and what they must satisfy.
#ifndef DITFLEET_PLAN_H
#define DITFLEET_PLAN_H

#include "worker/models/dit.h"

// World rank r belongs to guidance branch r / ulysses (when cfg is 2) and is number r % ulysses within it.
struct plan {
    int ranks;   // cfg * ulysses
    int cfg;     // 1, or 2: the two guidance branches on two halves of the group
    int ulysses; // ranks that share the rows of one branch
};

enum { PLAN_TEXT = 48 };

// Chooses, or checks what was asked: cfg_degree and ulysses_degree 0 mean "choose". true_cfg: the job has two branches.
// ERR_UNSUPPORTED says which number does not fit and which would.
int plan_make(const struct dit_info *model, int ranks, bool true_cfg, int cfg_degree, int ulysses_degree,
              struct plan *out, struct err *err);
void plan_print(const struct plan *p, char text[PLAN_TEXT]); // "cfg=1 ulysses=2"

#endif
