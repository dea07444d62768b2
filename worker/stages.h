// stages.h: the stages of a job as engine.c strings them together, each written once for one rank and many, for CPU,
// GPU and the dry run.
#ifndef DITFLEET_STAGES_H
#define DITFLEET_STAGES_H

#include "worker/engine.h"

enum { BRANCHES = 2 }; // of guidance: positive, negative

// One job on one rank.
struct run {
    const struct model *model;
    const Ditfleet__V1__Job *job;
    struct plan plan;
    const struct engine_hooks *hooks; // never NULL; its members may be
    struct comm *control;
    bool dry;           // the stages run over the dry backend: no ids, no noise, no waiting for others
    struct exec world;  // all ranks: text, decoding
    struct exec branch; // the ranks of this rank's guidance branch: denoising
    const struct runner *runner;
    struct comm *pair;          // the same rows of the other branch; NULL unless plan.cfg is 2
    bool agreed;                // all ranks know that the job ends here
    int branches;               // 1, or 2 with true CFG
    int64_t latent_h, latent_w; // rows and columns of the VAE's latents
    int64_t image_tokens, text_tokens;
};

// A prompt, encoded, on every rank.
struct prompt {
    struct tensor embeds; // (text_tokens, text_dim)
    struct tensor pooled; // (1, pooled_dim)
};

// engine.c: a run, in the order of these calls; hooks and control follow the first.
void run_init(struct run *r, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *plan);
void run_use(struct run *r, const struct kernels *k, struct device *d, struct arena *arena);
// The communicators of the plan, its attention chain and its runner. Whatever it returns, run_leave frees them.
int run_join(struct run *r, struct comm *world, struct err *err);
void run_leave(struct run *r);

// encode.c: the branches' prompts; the encoders are dealt to the ranks, their outputs broadcast. cut as in
// engine_result.
int encode_prompts(struct run *r, struct prompt prompts[BRANCHES], bool cut[4], struct err *err);

// denoise.c: tokens (image_tokens, channels), whole on every rank, from noise (image_tokens, channels) on the host
// (NULL in a dry run).
int denoise(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
            struct err *err);

// decode.c: pixels (height, width, 3) on the host of rank 0 from tokens; NULL elsewhere and in a dry run.
int decode(struct run *r, struct tensor tokens, uint8_t *pixels, struct err *err);

// noise.c: initial noise of all images of the job, packed into tokens: (num_images, image_tokens, channels).
int noise_tokens(const struct run *r, float *out, struct err *err);

// Tells progress; agrees with all ranks whether to go on. The first failure of exec ends it as well.
int run_checkpoint(struct run *r, enum engine_stage stage, int step, struct err *err);
// Hands a device tensor to the trace hook of rank 0, in host memory.
void run_trace(struct run *r, const char *name, struct tensor t);

#endif
