// engine.h: one job's pictures on a group of ranks: text, noise, denoise, decode. Every rank of the group calls
// engine_run with the same job; rank 0 gets the pixels.
#ifndef DITFLEET_ENGINE_H
#define DITFLEET_ENGINE_H

#include "worker/exec.h"
#include "worker/model.h"
#include "worker/plan.h"
#include "worker/precision.h"
#include "worker/residency.h"
#include "worker/weights.h"

struct engine;

// Borrowed things outlive the engine. control carries small words between the ranks' hosts; rows between their devices
// too, where the devices have no links of their own (kernels.h).
struct engine_options {
    const struct kernels *kernels;
    struct device_options device; // exact: so are the plans, and none has a ring unless it is asked for
    enum dtype codes;             // of linear layers that models offer for it, as struct precision has it
    struct comm *control;
    int64_t memory_limit; // bytes of activations a rank may take; 0: what the host has free. In the host's memory alone
    // Of a device with memory of its own: bytes of it that this process may take for everything, context and libraries
    // included; 0: what is free now.
    int64_t memory_budget;
    int ranks_here;   // of control's, those on this host, which share its memory; 0: all
    struct plan held; // of plan_hold: how the ranks have the transformers of models that are placed on this engine
    // Of several ranks: rank 0 chooses the degrees that are 0 by price, where this machine was measured
    // (worker/tuned.h), and all follow it. All ranks say the same.
    bool tuned;
};

// Of a budget, what contexts and the workspaces of libraries take.
#define ENGINE_LIBRARY_BYTES ((int64_t)1229 << 20)
#define ENGINE_CODES_BYTES   ((int64_t)272 << 20) // of these, for inputs that become 8 bits on their way

// Called by all ranks at once. ERR_INVALID: a budget beyond the device's memory; GPUs that are not alike.
int engine_new(const struct engine_options *options, struct engine **out, struct err *err);
void engine_free(struct engine *e);
// Where models are to be loaded that this engine runs. They are freed before the engine.
struct home engine_home(const struct engine *e);

// Of this rank, since the engine was made.
struct comm_times engine_comm_times(const struct engine *e);

// Bytes the host could still give, from the operating system's own estimate.
int64_t engine_host_memory_free(void);

enum engine_stage { ENGINE_TEXT, ENGINE_DENOISE, ENGINE_DECODE, ENGINE_STAGES };

// Asked at the start of each stage and after each denoising step, on every rank. On rank 0 a nonzero return (an
// err_code, with *err filled) ends the job on all ranks; elsewhere the return is ignored.
struct engine_hooks {
    int (*progress)(void *arg, enum engine_stage stage, int step, int steps, struct err *err);
    // NULL, or on every rank of the group: hands out what passes through, named as in the reference's recordings. Only
    // rank 0 is called. data is host memory, valid during the call.
    void (*trace)(void *arg, const char *name, struct tensor data);
    void *arg;
};

// Of a rank, seconds of a job. compute holds all that is no talk between ranks: loading of weights, the host's work. A
// device does not tell waiting from moving: exchange is the least that any rank spent in both, wait what is above it.
struct rank_times {
    double compute, exchange, wait;
};

struct engine_result {
    uint8_t *pixels; // (num_images, height, width, 3) on rank 0, freed by engine_result_free; NULL elsewhere
    struct plan plan;
    double encode_seconds, denoise_seconds, decode_seconds; // loading of weights included
    // That the device had nothing to do between the job before and this one: the claim, its examination, the plan, the
    // tokens. 0 for the first job.
    double idle_seconds;
    bool prompt_cached;                      // no prompt had to be encoded: all were among the last few
    struct residency_moves moves;            // of weights, on this rank, for this job
    struct rank_times ranks[COMM_MAX_RANKS]; // of every rank of the plan, on all of them
    bool direct;                             // devices wrote rows into each other's memory
    bool prompt_cut[4]; // prompt, prompt_2, negative_prompt, negative_prompt_2 were longer than the encoders take
};
void engine_result_free(struct engine_result *r);

// job as model_resolve_job left it. want: degrees, 0 where the engine is to choose (its ranks are ignored).
// A job that cannot run, or that does not fit into memory (the error says what would), is refused on all ranks alike,
// and so is one that progress ended. Any other failure aborts the communicator: comm_check(control) fails from then on,
// on every rank, and the processes are to exit.
int engine_run(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
               const struct engine_hooks *hooks, struct engine_result *out, struct err *err);

// Of a rank: what it computes, and what it says to others.
struct engine_work {
    struct kernel_cost cost;
    double sent, collectives; // bytes to other ranks; messages, each of which waits for them
};

// What engine_run would take on a rank, from the same forward pass over the dry backend.
struct engine_estimate {
    size_t activation_bytes;           // the largest live set
    size_t stage_bytes[ENGINE_STAGES]; // that of each stage
    struct kernel_cost cost;           // of all
    struct engine_work loop;           // of the denoising steps alone, all of them
};
// Any rank of a plan, without an engine. k: what the ranks compute by, saying their activation type; it is not opened.
int engine_predict_rank(const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan, int rank,
                        const struct kernels *k, struct engine_estimate *out, struct err *err);
// This rank. The last few are remembered.
int engine_predict(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan,
                   struct engine_estimate *out, struct err *err);

#endif
