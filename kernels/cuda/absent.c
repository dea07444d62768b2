// absent.c: kernels_cuda in a build without CUDA. open fails, so nothing else is ever called.
#include "kernels/cuda/cuda.h"

static int absent_open(const struct device_options *options, struct device **out, struct err *err)
{
    (void)options;
    *out = NULL;
    return err_set(err, ERR_UNSUPPORTED,
                   "this program was built without CUDA: build it where nvcc, cuBLAS and cuDNN 9 are installed, or use "
                   "the cpu backend");
}

const struct kernels kernels_cuda = {.name = "cuda", .activation = DT_BF16, .open = absent_open};
