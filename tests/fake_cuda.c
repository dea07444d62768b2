// fake_cuda.c: what a program loads as the CUDA backend on a machine with no GPU: it computes as the CPU does, in
// float32, and fails on request.
//
// A request is the file named by $FAKE_CUDA. It holds a point and an error: "open unsupported", "alloc no_memory",
// "pace internal". Who reaches the point first takes the file away and fails so; a failure of pace stays, as a GPU's
// does.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/kernels.h"

static struct err failed; // what stays

static int requested(const char *point, struct err *err)
{
    char at[16] = "", name[24] = "";
    const char *path = getenv("FAKE_CUDA");
    FILE *f = path ? fopen(path, "re") : NULL;
    if (!f)
        return 0;
    const bool read = fscanf(f, "%15s %23s", at, name) == 2;
    fclose(f);
    if (!read || strcmp(at, point) != 0)
        return 0;
    unlink(path);
    for (enum err_code code = 1; code < ERR_CODES; code++)
        if (strcmp(err_name(code), name) == 0)
            return err_set(err, code, "%s failed on request", point);
    return err_set(err, ERR_INTERNAL, "%s: no such error", name);
}

static int fake_open(const struct device_options *options, struct device **out, struct err *err)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    TRY(requested("open", err));
    fprintf(stderr, "fake_cuda visible=%s gpu=%d\n", visible ? visible : "all", options->gpu);
    return kernels_cpu.open(options, out, err);
}

static int fake_alloc(struct device *d, size_t bytes, void **out, struct err *err)
{
    *out = NULL;
    TRY(requested("alloc", err));
    return kernels_cpu.alloc(d, bytes, out, err);
}

static int fake_sync(struct device *d, struct err *err)
{
    if (failed.code != ERR_NONE)
        return err_set(err, failed.code, "%s", failed.text);
    return kernels_cpu.sync(d, err);
}

static int fake_pace(struct device *d, struct err *err)
{
    if (failed.code == ERR_NONE)
        requested("pace", &failed);
    return fake_sync(d, err);
}

struct kernels kernels_cuda;

__attribute__((constructor)) static void fill_table(void)
{
    kernels_cuda = kernels_cpu;
    kernels_cuda.name = "cuda";
    kernels_cuda.activation = DT_BF16; // its own type, which open refuses: a GPU that cannot do what is asked
    kernels_cuda.open = fake_open;
    kernels_cuda.alloc = fake_alloc;
    kernels_cuda.sync = fake_sync;
    kernels_cuda.pace = fake_pace;
}
