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

// What ditfleet.json beside model_index.json may say (all optional); its keys are these names, and "transformer".
struct model_limits {
    int64_t default_width, default_height, default_num_inference_steps, default_max_sequence_length;
    double default_guidance_scale;
    int64_t min_side, max_side, max_pixels;
    // "default", "fp32", "bf16", "fp16", "fp8" or "int8": what PRECISION_DEFAULT means on a device that has the choice.
    // The CPU has none.
    Ditfleet__V1__Precision precision;
};

// What a stage of a job computes with: it can be away from its device while other stages run. In the order of stages.
enum model_part { PART_CLIP, PART_T5, PART_DIT, PART_VAE, PARTS };
enum { PARTS_ALL = (1 << PARTS) - 1 }; // sets of parts have bit 1 << part

struct model_parts {
    struct clip *clip;
    struct t5 *t5;
    struct dit *dit;
    struct vae *vae;
};

struct home;
struct weights;

struct model {
    char *dir;
    char transformer[1024]; // a file with the transformer's weights, as ditfleet.json says; "": its folder has them
    char hash[65];          // fingerprint of configurations and weights, hex
    struct clip_tokenizer *clip_tokenizer; // both NULL when the weights are invented: so are token ids
    struct t5_tokenizer *t5_tokenizer;
    // The parts as operations use them. Of one that is away, the plan: shapes and types, so that it can be asked and
    // run dry as ever, but no numbers.
    struct clip *clip;
    struct t5 *t5;
    struct dit *dit;
    struct vae *vae;
    unsigned here; // the set of parts that are not away
    struct dit_info info;
    struct sampler sampler;
    struct model_limits limits;
    int64_t side_multiple; // width and height are multiples of it

    struct home *home;        // NULL: the weights are where the files are mapped
    struct model_parts plans; // where the home has a residency
    struct kernels *plan_kernels;
    struct device *plan_device;
    int64_t placed_bytes[PARTS]; // on the device, when they are there
};

// Maps the weights; nothing is read ahead. Errors name file, key or tensor. Freed by model_free.
int model_load(const char *dir, struct model **out, struct err *err);
// The same with the weights on a device (worker/weights.h). Where the home has a residency, as many parts as fit are
// brought there, the rest when a job needs them: the files must stay. The model goes before the device does.
int model_load_on(const char *dir, const struct home *home, struct model **out, struct err *err);
void model_free(struct model *m);
// Writes the weights of all parts into dir, where the parts' folders are (worker/invent.h makes them): model_load's, as
// soon as the tokenizers are beside them. No file is overwritten; on failure none of them is left.
int model_save(const struct model *m, const char *dir, struct err *err);
int64_t model_bytes(const struct model *m);                         // of all weights, in their files
int64_t model_part_bytes(const struct model *m, enum model_part p); // of this part's
int64_t model_placed_bytes(const struct model *m, unsigned parts);  // of these on the device, 0 where they are mapped
const struct weights *model_weights(const struct model *m, enum model_part p);
const char *model_part_name(enum model_part part); // the folder's name

// For a residency alone. A part that is away comes to its device; one that is there is freed, when no work reads it.
int model_bring(struct model *m, enum model_part part, struct err *err);
void model_evict(struct model *m, enum model_part part);

// Fills in what the job leaves open (sizes, steps, guidance, seed when absent: drawn) and refuses what this model does
// not do. After this the job says exactly what will run. The error names the field and what is allowed.
int model_resolve_job(const struct model *m, Ditfleet__V1__Job *job, struct err *err);

// Whether the job's guidance has two branches, as the reference decides it.
bool job_true_cfg(const Ditfleet__V1__Job *job);

#endif
