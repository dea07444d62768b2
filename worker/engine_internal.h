// engine_internal.h: the engine, to the files it is written in: engine.c (a job from start to end), engine_plan.c
// (how), engine_memory.c (where), pictures.c (what is done).
#ifndef DITFLEET_ENGINE_INTERNAL_H
#define DITFLEET_ENGINE_INTERNAL_H

#include "worker/cost.h"
#include "worker/run.h"

enum { ESTIMATES = 16, PRICE_LISTS = 8, ENGINE_KEY = PLAN_TEXT + 256 };

// What a job takes of a rank's memory besides weights.
struct demand {
    size_t stage[ENGINE_STAGES], most; // bytes of the arena: for each stage, and for the one that takes most
    int64_t fixed;                     // throughout: libraries, prompts
    int64_t between;                   // what one stage leaves to the next, where the arena is replaced between them
};

struct engine {
    const struct kernels *k; // table below
    struct kernels table;    // the backend's, saying the activation type that was asked for
    struct device *d;
    struct arena *arena; // grown to what a job needs, kept for the next
    size_t arena_bytes;
    struct comm *control;
    struct comm *data;       // between devices: a link of its own, or control
    char opened[ENGINE_KEY]; // the job for which data's memory is open; "": it is not
    int64_t memory_limit;
    int ranks_here; // of control's
    enum dtype codes;
    bool exact;
    struct plan held;            // of all models with this engine's home
    struct residency *residency; // NULL: the device computes in the host's memory
    struct prompt_cache *cache;
    struct demand demand; // of the job in hand
    double ended;         // when the device was done with the job before; 0: there was none
    void *between;        // not NULL: this job's arena is replaced between stages, so that weights can make way for it
    struct {
        char key[ENGINE_KEY]; // what the estimate depends on, as text
        struct engine_estimate estimate;
    } estimates[ESTIMATES]; // a ring
    int next_estimate;
    bool tuned, priced;     // priced: on rank 0, by the machine's parameters
    struct machine machine; // of this group
    struct price_list {
        char key[ENGINE_KEY];
        struct price list[PLAN_MAX_CHOICES];
        struct engine_estimate most[PLAN_MAX_CHOICES]; // memory; activation_bytes 0: not asked for yet
        int n;
    } prices[PRICE_LISTS]; // a ring
    int next_prices;
};

// engine.c: all ranks go on, or none: the first failing rank's error is everybody's.
int engine_agree(struct comm *control, int rc, struct err *err);

// engine_memory.c: what a rank may take of the host's memory.
int64_t engine_memory_share(const struct engine *e);

// engine_plan.c
// How the model's weights are had.
struct plan engine_held(const struct model *m);
// What can be known before any work: the plan, and that there is memory for it, which is reserved. Called by all ranks.
// Where images that are made side by side do not fit, they are made one after the other.
int engine_agree_on_plan(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                         const struct engine_hooks *hooks, struct plan *plan, struct err *err);

// engine_memory.c
// What an estimate depends on, besides the engine.
void engine_key(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, char key[ENGINE_KEY]);
// extra: bytes of activations that no dry run knows of.
struct demand engine_demand(const struct engine *e, const struct model *m, const Ditfleet__V1__Job *job,
                            const struct engine_estimate *estimate, size_t extra);
// limit: of activations in the host's memory.
bool engine_fits(const struct engine *e, const struct model *m, const struct demand *d, int64_t limit);
int engine_reserve_prompts(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, struct err *err);
// ERR_UNSUPPORTED: it does not fit; says the numbers, and what would.
int engine_reserve(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   size_t extra, struct err *err);
// Where memory is so short that stages take turns in it (between), this one's arena takes the place of the last one's.
int engine_take_turn(struct engine *e, enum engine_stage stage, struct err *err);

// pictures.c: noise: room for that of all images, NULL in a dry run. It is drawn while the device encodes.
int make_pictures(struct run *r, float *noise, struct engine_result *out, struct err *err);

#endif
