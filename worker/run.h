// run.h: one job on one rank, as its stages see it.
#ifndef DITFLEET_RUN_H
#define DITFLEET_RUN_H

#include "worker/engine.h"
#include "worker/ownership.h"
#include "worker/prompt_cache.h"
#include "worker/residency.h"

enum { BRANCHES = 2 }; // of guidance: positive, negative

// One job on one rank.
struct run {
    const struct model *model;
    const Ditfleet__V1__Job *job;
    struct plan plan;
    const struct engine_hooks *hooks; // never NULL; its members may be
    struct comm *control;
    struct engine *engine;       // whose job it is; NULL in a dry run
    struct residency *residency; // NULL: the model's parts are where they are computed with
    struct prompt_cache *cache;  // NULL: every prompt is encoded, into the arena
    bool prompt_cached;          // no prompt had to be encoded
    int stage;                   // enum engine_stage in hand, and since when
    double since, seconds[ENGINE_STAGES];
    double begun;                  // when the device was first given something to do; 0: not yet
    size_t peaks[ENGINE_STAGES];   // bytes of the arena in each stage, in a dry run
    struct engine_work seen, loop; // of a dry run: when a step ended last; of all steps so far
    bool dry;                      // the stages run over the dry backend: no ids, no noise, no waiting for others
    struct exec world;             // all ranks of the part: text
    struct exec decoding;          // those that share the rows of a picture: all of the part, or this one alone
    struct exec branch;            // the ranks that share the rows of one guidance branch, in one stage: denoising
    struct comm *part;             // of a group in parts: this rank's; else NULL
    int part_index;                // which it is
    bool leads;                    // rank 0 of the whole group, who is shown what passes
    struct comm *pipe;             // the same rows in the other stages, in their order
    struct attention_link stale;   // of a plan with patches
    const struct runner *runner;
    struct ring ring; // over usp.across
    struct attention_link ring_link;
    struct ulysses_groups usp;     // within the branch: neighbours share heads, groups of them make a ring
    struct attention_link ulysses; // over usp
    struct input_sharing sharing;  // of a plan that shares inputs, of the ranks of usp.inside
    struct comm *pair;             // the same rows of the other branch; NULL unless plan.cfg is 2
    struct ownership ownership;    // of a plan that is not replicated
    bool agreed;                   // all ranks know that the job ends here
    bool direct;                   // while it was denoised, devices had each other's memory open
    int branches;                  // 1, or 2 with true CFG
    int64_t latent_h, latent_w;    // rows and columns of the VAE's latents
    int64_t image_tokens, text_tokens;
};

// A run, in the order of these calls; hooks and control follow the first.
void run_init(struct run *r, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan);
void run_use(struct run *r, const struct kernels *k, struct device *d, struct arena *arena);
// The communicators of the plan, its attention chain and its runner. Whatever it returns, run_leave frees them.
int run_join(struct run *r, struct comm *world, struct err *err);
void run_leave(struct run *r);

// The device has these parts of the model (a set: worker/model.h) from here on.
int run_need(struct run *r, unsigned parts, struct err *err);
// The device has something to do from here on; the first call counts.
void run_begin(struct run *r);
// Time goes to this stage from here on.
void run_enter(struct run *r, enum engine_stage stage);
// Enters the stage when its step is 0, when the device is done with the one before. Tells progress; agrees with all
// ranks whether to go on. The first failure of exec ends it as well.
int run_checkpoint(struct run *r, enum engine_stage stage, int step, struct err *err);
// Hands a device tensor to the trace hook of rank 0, in host memory.
void run_trace(struct run *r, const char *name, struct tensor t);

#endif
