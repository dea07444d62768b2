// noise.c: the job's initial noise, drawn as the reference pipeline draws it: all images in one draw of shape
// (images, channels, h, w), then packed 2 x 2 into tokens.
#include <stdlib.h>

#include "worker/rng.h"
#include "worker/stages.h"

int noise_tokens(const struct run *r, float *out, struct err *err)
{
    const Ditfleet__V1__Job *job = r->job;
    const int64_t h = r->latent_h, w = r->latent_w, channels = r->model->info.channels / 4;
    const int64_t total = (int64_t)job->num_images * channels * h * w;
    float *drawn = malloc((size_t)total * sizeof *drawn);
    if (!drawn)
        return err_set(err, ERR_NO_MEMORY, "no memory for the noise of %u images", job->num_images);
    int rc = rng_randn((enum rng_kind)job->rng, job->seed, (int)job->rng_sm_count, drawn, total, err);
    const float *from = drawn;
    for (uint32_t image = 0; rc == 0 && image < job->num_images; image++, out += r->image_tokens * channels * 4)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t y = 0; y < h; y++)
                for (int64_t x = 0; x < w; x++)
                    out[((y / 2) * (w / 2) + x / 2) * channels * 4 + c * 4 + (y % 2) * 2 + x % 2] = *from++;
    free(drawn);
    return rc;
}
