#include "worker/output/describe.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static void write_parameters(FILE *to, const Ditfleet__V1__Job *job)
{
    fprintf(to, "%s\n", job->prompt);
    if (job->negative_prompt__case)
        fprintf(to, "Negative prompt: %s\n", job->negative_prompt);
    fprintf(to, "Steps: %u, Sampler: FlowMatchEulerDiscrete, Guidance scale: %g, Seed: %" PRIu64 ", Size: %ux%u",
            job->num_inference_steps, (double)job->guidance_scale, job->seed, job->width, job->height);
    if (job->true_cfg_scale > 1)
        fprintf(to, ", CFG scale: %g", (double)job->true_cfg_scale);
    if (job->shift__case)
        fprintf(to, ", Shift: %g", (double)job->shift);
    fprintf(to, ", Max sequence length: %u, RNG: %s", job->max_sequence_length, job_rng_name(job->rng));
}

int describe_picture(const Ditfleet__V1__Job *job, const char *model_hash, const char *plan, uint32_t index,
                     struct description *out, struct err *err)
{
    size_t length;
    *out = (struct description){0};
    FILE *to = open_memstream(&out->parameters, &length);
    if (to)
        write_parameters(to, job);
    if (!to || fclose(to) != 0)
        return err_set(err, ERR_NO_MEMORY, "no memory for a picture's description");
    snprintf(out->seed, sizeof out->seed, "%" PRIu64, job->seed);
    snprintf(out->index, sizeof out->index, "%u", index);
    const struct picture_text texts[DESCRIPTION_TEXTS] = {{"parameters", out->parameters},
                                                          {"ditfleet.seed", out->seed},
                                                          {"ditfleet.index", out->index},
                                                          {"ditfleet.model_hash", model_hash},
                                                          {"ditfleet.plan", plan}};
    for (int i = 0; i < DESCRIPTION_TEXTS; i++)
        out->texts[i] = texts[i];
    return 0;
}

void description_free(struct description *d)
{
    free(d->parameters);
    d->parameters = NULL;
}
