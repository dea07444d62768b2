// precision.h: what a job's precision means where it is computed.
#ifndef DITFLEET_PRECISION_H
#define DITFLEET_PRECISION_H

#include "kernels/kernels.h"
#include "proto/job.h"

// fp8 and int8: the linear layers of blocks and their inputs are E4M3, or I8; the rest has the activation type, bf16.
// With I8 the blocks' attention is in 8 bits, too (attention_opts in kernels.h); with E4M3 it is not, since what layers
// of E4M3 lose leaves no room for more (kernels/NOTES.md).
struct precision {
    enum dtype activation;
    enum dtype codes; // E4M3 or I8; others: no numbers of 8 bits
};

// wanted: a job's; preferred: what PRECISION_DEFAULT stands for with this model (model_limits.precision), itself
// PRECISION_DEFAULT where the model does not say, then it is the backend's own type. The CPU computes in float32 and
// leaves a model's preference alone. ERR_UNSUPPORTED: not on this backend; names what it can do.
int precision_of(const struct kernels *k, Ditfleet__V1__Precision wanted, Ditfleet__V1__Precision preferred,
                 struct precision *out, struct err *err);
const char *precision_name(const struct precision *p); // as jobs spell it

#endif
