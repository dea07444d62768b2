// plan.h: how many ranks do what for one job: the degrees of parallelism, and what they must satisfy.
#ifndef DITFLEET_PLAN_H
#define DITFLEET_PLAN_H

#include "worker/models/dit.h"

// How the ranks of a group have the transformer's weights (worker/ownership.h).
enum plan_weights { PLAN_REPLICATED, PLAN_SHARDED, PLAN_BY_STAGE };

// World rank r is number p = r % (ranks / data) of part r / (ranks / data). Within the part it is number
// s = p % (cfg * ulysses * ring) of stage p / (cfg * ulysses * ring): whose stage a rank is does not depend on how the
// stage deals out its ranks, for its weights lie there. Within the stage it is number b = s % (ulysses * ring) of
// guidance branch s / (ulysses * ring), and within the branch member b % ulysses of Ulysses group b / ulysses:
// neighbours, who exchange most often, share heads, and the ring goes from group to group.
struct plan {
    int ranks;   // data * cfg * pipe * ulysses * ring
    int cfg;     // 1, or 2: the two guidance branches on two halves of the group
    int ulysses; // ranks that share the attention heads of one branch
    int ring;    // groups of such ranks, which pass keys and values round
    int pipe;    // stages of PipeFusion, each with a range of the blocks
    int patches; // of the image, which follow each other through the stages; 1 with one stage: no PipeFusion
    int warmup;  // PipeFusion: steps at first that take the image whole; those after them attend to stale rows
    int data;    // parts of the group, neighbours, each of which makes some of the job's images as a group of its own
    bool exact;  // the picture has one rank's bits also where these depend on how rows are cut (struct device_options)
    int weights; // enum plan_weights
    short blocks[COMM_MAX_RANKS]; // of the model, that each stage has, so that unequal GPUs can share it; 0s: even
};

enum { PLAN_TEXT = 384, PLAN_MAX_PATCHES = 64 };

// Whether its later steps are PipeFusion's, which are close to those of one rank, not equal.
static inline bool plan_in_patches(const struct plan *p)
{
    return p->pipe > 1 || p->patches > 1;
}

// The plan of want->ranks ranks. Its degrees are checked where they are set and chosen where they are 0: guidance
// branches apart if they can be, then as large a Ulysses degree as heads allow, then the ring; never PipeFusion, whose
// patches are as many as its stages, and its warm-up one step, where that is not said. true_cfg: the job has two
// branches. k: where it is computed.
// ERR_INVALID: a degree that no plan has. ERR_UNSUPPORTED says what does not fit, and what would.
int plan_make(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
              struct plan *out, struct err *err);

// A way to deal out ranks, and why not, where it cannot be.
struct plan_choice {
    struct plan plan;
    struct err why; // code ERR_NONE: it can
};
enum { PLAN_MAX_CHOICES = 32 };
// Every way to make up want->ranks by degrees of guidance, Ulysses and ring that has want's where they are set, and
// want's PipeFusion: never one that is not asked for. What plan_make would choose comes before other legal ones.
// Returns how many.
int plan_choices(const struct dit_info *model, const struct kernels *k, const struct plan *want, bool true_cfg,
                 struct plan_choice out[PLAN_MAX_CHOICES]);

// Of a plan that is wanted: sets data, where it is 0, to as many parts as ranks without a degree and the job's images
// can be dealt to evenly. ERR_UNSUPPORTED: parts that the images cannot be dealt to.
int plan_deal_images(struct plan *want, int images, struct err *err);

// The blocks of a model with so many that a stage of the plan has.
struct span plan_stage(const struct plan *p, int blocks, int stage);

// Sets weights by text, "replicated" or "sharded"; NULL: replicated. ERR_INVALID: it is neither.
int plan_parse_weights(const char *text, struct plan *p, struct err *err);

// How a group that makes all its pictures by the degrees of want has its weights: sharded where want is, by stage where
// want has several, else replicated; and what a job's plan has to keep to therefore. ERR_UNSUPPORTED: sharded on one
// rank, or with patches.
int plan_hold(const struct plan *want, int ranks, struct plan *out, struct err *err);
// want with what it has to keep to filled in where it is open. held: of plan_hold.
struct plan plan_keep_to(const struct plan *held, const struct plan *want);
// ERR_UNSUPPORTED: a plan that does not.
int plan_check_kept(const struct plan *held, const struct plan *p, struct err *err);

// Sets blocks by text, "2,4": whole numbers, one for each stage, and pipe, where it is 0. "" sets nothing.
// ERR_INVALID: it is no such text.
int plan_parse_blocks(const char *text, struct plan *p, struct err *err);

// "cfg=1 ulysses=2 ring=1", PipeFusion's numbers and sharded weights behind
void plan_print(const struct plan *p, char text[PLAN_TEXT]);

#endif
