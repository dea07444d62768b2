// precision.h: what a job's precision means where it is computed.
#ifndef DITFLEET_PRECISION_H
#define DITFLEET_PRECISION_H

#include "kernels/kernels.h"
#include "proto/job.h"

// fp8: the linear layers of blocks are E4M3, and so are their inputs; the rest has the activation type, bf16.
struct precision {
    enum dtype activation;
    bool fp8;
};
// wanted: a job's; preferred: what PRECISION_DEFAULT stands for with this model (model_limits.precision), itself
// PRECISION_DEFAULT where the model does not say, then it is the backend's own type. The CPU computes in float32 and
// leaves a model's preference alone. ERR_UNSUPPORTED: not on this backend; names what it can do.
int precision_of(const struct kernels *k, Ditfleet__V1__Precision wanted, Ditfleet__V1__Precision preferred,
                 struct precision *out, struct err *err);
const char *precision_name(const struct precision *p); // as jobs spell it

#endif
