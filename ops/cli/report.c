#include "ops/cli/report.h"

#include <inttypes.h>
#include <stdio.h>

#include "ops/cli/cli.h"

void report_result(const Ditfleet__V1__Result *result)
{
    printf("state    %s\n", job_state_name(result->state));
    for (size_t i = 0; i < result->n_images; i++) {
        const Ditfleet__V1__Image *image = result->images[i];
        printf("image    %s (%" PRIu64 " bytes, sha256 %s)\n", image->location, image->bytes, image->sha256);
    }
    const Ditfleet__V1__Job *used = result->used;
    if (used)
        printf("used     %s, %ux%u, %u steps, seed %" PRIu64 "\n", used->model, used->width, used->height,
               used->num_inference_steps, used->seed);
    if (*result->plan)
        printf("plan     %s\n", result->plan);
    if (*result->worker)
        printf("worker   %s, attempt %u\n", result->worker, result->attempt);
    const Ditfleet__V1__Timing *t = result->timing;
    if (t)
        printf("seconds  queued %.3f, text %.3f, denoise %.3f, decode %.3f, png %.3f, upload %.3f; %.3f GPU-seconds\n",
               t->queued_seconds, t->encode_seconds, t->denoise_seconds, t->decode_seconds, t->png_seconds,
               t->upload_seconds, t->gpu_seconds);
    for (size_t i = 0; t && i < t->n_ranks; i++)
        printf("rank %-3zu computed %.3f, exchanged %.3f, waited %.3f s\n", i, t->ranks[i]->compute_seconds,
               t->ranks[i]->exchange_seconds, t->ranks[i]->wait_seconds);
    fflush(stdout);
    for (size_t i = 0; i < result->n_warnings; i++)
        fprintf(stderr, "ditfleet: warning: %s\n", result->warnings[i]);
}

int report_outcome(const Ditfleet__V1__Result *result)
{
    if (result->state == DITFLEET__V1__STATE__STATE_SUCCEEDED)
        return CLI_OK;
    fprintf(stderr, "ditfleet: job %s is %s: %s: %s\n", result->id, job_state_name(result->state),
            result->error ? result->error->code : "unknown",
            result->error ? result->error->message : "no reason given");
    return CLI_FAILED;
}
