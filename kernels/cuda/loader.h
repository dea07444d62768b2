// loader.h: weights on their way from host memory to the GPU, at the speed of its link.
//
// Memory that a file is mapped to is not pinned, so the driver would copy it piece by piece with one thread, a fifth as
// fast as the link. Here a few threads copy into pinned memory of their own while what they copied before travels.
#ifndef DITFLEET_CUDA_LOADER_H
#define DITFLEET_CUDA_LOADER_H

#include "kernels/cuda/device.h"

struct loader;

// dst (any shape, without gaps, on the device) = src (the same shape, host memory), converted where their types differ
// and quantised to 8 bits in whole rows; second: bytes from there to where they are rounded again, or 0. Returns before
// it is done; src stays as it is until loader_wait. Starts the threads when there are none yet.
int loader_put(struct device *d, struct tensor dst, struct tensor src, int64_t second, struct err *err);
// Until all that was put has arrived; a failure on the way is the device's. Cheap where nothing was put.
void loader_wait(struct device *d);
void loader_free(struct loader *l); // waits; NULL is fine

#endif
