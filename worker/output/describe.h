// describe.h: what a picture's text chunks say of how it was made: everything needed to make it again, and nothing that
// differs between two runs of the same job and plan.
#ifndef DITFLEET_OUTPUT_DESCRIBE_H
#define DITFLEET_OUTPUT_DESCRIBE_H

#include "proto/job.h"
#include "worker/output/png.h"

enum { DESCRIPTION_TEXTS = 5 };

struct description {
    struct picture_text texts[DESCRIPTION_TEXTS];
    char seed[24], index[12];
    char *parameters; // prompt, negative prompt and settings in the layout that image tools read
};

// job as model_resolve_job left it; model_hash and plan are borrowed. Freed by description_free.
int describe_picture(const Ditfleet__V1__Job *job, const char *model_hash, const char *plan, uint32_t index,
                     struct description *out, struct err *err);
void description_free(struct description *d);

#endif
