// cuda.h: the cuda backend, as the rest of the program sees it. Where the build found no CUDA, absent.c stands in for
// it: its open says so.
//
// A device is one GPU, one stream and what its libraries keep. Operations return as soon as they are queued; sync
// waits. activation may be BF16, F16 or F32. F32 is for tests: no product is shortened to TF32.
#ifndef DITFLEET_CUDA_H
#define DITFLEET_CUDA_H

#include "kernels/kernels.h"

extern const struct kernels kernels_cuda;

#endif
