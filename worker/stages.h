// stages.h: the stages of a job as pictures.c strings them together, each written once for one rank and many, for CPU,
// GPU and the dry run.
#ifndef DITFLEET_STAGES_H
#define DITFLEET_STAGES_H

#include "worker/run.h"

// encode.c: the branches' prompts, from the run's cache or else encoded: the encoders are dealt to the ranks, their
// outputs broadcast. cut as in engine_result. The device may still be at it on return.
int encode_prompts(struct run *r, struct prompt prompts[BRANCHES], bool cut[4], struct err *err);

// denoise.c: tokens (image_tokens, channels), whole on every rank, from noise (image_tokens, channels) on the host
// (NULL in a dry run).
int denoise(struct run *r, const struct prompt prompts[BRANCHES], const float *noise, struct tensor tokens,
            struct err *err);

// decode.c: pixels (height, width, 3) on the host of rank 0 from tokens; NULL elsewhere and in a dry run.
int decode(struct run *r, struct tensor tokens, uint8_t *pixels, struct err *err);

// noise.c: initial noise of all images of the job, packed into tokens: (num_images, image_tokens, channels).
int noise_tokens(const struct run *r, float *out, struct err *err);

#endif
