// model.h: a checkpoint in diffusers' layout: all parts of a FLUX.1 pipeline, and what its jobs may ask for.
#ifndef DITFLEET_MODEL_H
#define DITFLEET_MODEL_H

#include "proto/job.h"
#include "worker/models/clip.h"
#include "worker/models/dit.h"
#include "worker/models/t5.h"
#include "worker/models/vae.h"
#include "worker/sampler.h"
#include "worker/text/clip_tokenizer.h"
#include "worker/text/t5_tokenizer.h"

// What ditfleet.json beside model_index.json may say (all optional); its keys are these names.
struct model_limits {
    int64_t default_width, default_height, default_num_inference_steps, default_max_sequence_length;
    double default_guidance_scale;
    int64_t min_side, max_side, max_pixels;
    // "default", "fp32", "bf16", "fp16" or "fp8": what PRECISION_DEFAULT means on a device that has the choice. The CPU
    // has none.
    Ditfleet__V1__Precision precision;
};

struct model {
    char *dir;
    char hash[65];                         // fingerprint of configurations and weights, hex
    struct clip_tokenizer *clip_tokenizer; // both NULL when the weights are invented: so are token ids
    struct t5_tokenizer *t5_tokenizer;
    struct clip *clip;
    struct t5 *t5;
    struct dit *dit;
    struct vae *vae;
    struct dit_info info;
    struct sampler sampler;
    struct model_limits limits;
    int64_t side_multiple; // width and height are multiples of it
};

struct home;

// Maps the weights; nothing is read ahead. Errors name file, key or tensor. Freed by model_free.
int model_load(const char *dir, struct model **out, struct err *err);
// The same with the weights on a device (worker/weights.h).
int model_load_on(const char *dir, const struct home *home, struct model **out, struct err *err);
void model_free(struct model *m);
int64_t model_bytes(const struct model *m); // of all weights

// Fills in what the job leaves open (sizes, steps, guidance, seed when absent: drawn) and refuses what this model does
// not do. After this the job says exactly what will run. The error names the field and what is allowed.
int model_resolve_job(const struct model *m, Ditfleet__V1__Job *job, struct err *err);

// Whether the job's guidance has two branches, as the reference decides it.
bool job_true_cfg(const Ditfleet__V1__Job *job);

#endif
