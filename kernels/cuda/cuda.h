// cuda.h: the cuda backend, as tests see it; programs find it by kernels/backend.h.
//
// A device is one GPU, one stream and what its libraries keep. Operations return as soon as they are queued; sync
// waits. activation may be BF16, F16 or F32. F32 is for tests: no product is shortened to TF32.
#ifndef DITFLEET_CUDA_H
#define DITFLEET_CUDA_H

#include "kernels/kernels.h"

extern const struct kernels kernels_cuda;

#endif
