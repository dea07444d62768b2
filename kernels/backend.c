#include "kernels/backend.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PATH_ROOM = 4096 };
static const char MODULE[] = "libditfleet_cuda.so";

// Beside the program that runs.
static void module_path(char path[PATH_ROOM])
{
    ssize_t n = readlink("/proc/self/exe", path, PATH_ROOM - sizeof MODULE - 1);
    path[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(path, '/');
    memcpy(slash ? slash + 1 : path, MODULE, sizeof MODULE);
}

static int load_cuda(const struct kernels **out, struct err *err)
{
    char path[PATH_ROOM];
    module_path(path);
    if (access(path, F_OK) != 0)
        return err_set(
            err, ERR_NOT_FOUND,
            "no CUDA backend: %s is not there; build where nvcc, cuBLAS and cuDNN 9 are installed, or use cpu", path);
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const struct kernels *k = module ? dlsym(module, "kernels_cuda") : NULL;
    if (!k)
        return err_set(err, ERR_UNSUPPORTED,
                       "the CUDA backend cannot be loaded: %s; ldd %s lists the libraries that it misses: install "
                       "those of the CUDA toolkit and cuDNN 9, or name their folder in /etc/ld.so.conf.d",
                       dlerror(), path);
    *out = k;
    return 0;
}

int backend_find(const char *name, const struct kernels **out, struct err *err)
{
    *out = strcmp(name, "cpu") == 0 ? &kernels_cpu : strcmp(name, "dry") == 0 ? &kernels_dry : NULL;
    if (*out)
        return 0;
    if (strcmp(name, "cuda") == 0)
        return load_cuda(out, err);
    return err_set(err, ERR_INVALID, "device %.40s: it may be cpu or cuda", name);
}
