// doctor: the CUDA backend: its libraries, whether the driver is new enough for them, and whether it opens every GPU.
#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "ops/cli/doctor.h"
#include "proto/clock.h"

enum { CUDNN_OLDEST = 91400 }; // has attention as one operation
static const double LOAD_SECONDS = 60, OPEN_SECONDS = 30;

// ---- the libraries that the backend brought along

struct wanted {
    const char *prefix; // "/libcudnn.so"
    char path[256];     // "" until it is found
};

// Stops at the first one.
static int match_library(struct dl_phdr_info *info, size_t size, void *arg)
{
    struct wanted *w = arg;
    (void)size;
    if (!info->dlpi_name || !strstr(info->dlpi_name, w->prefix))
        return 0;
    snprintf(w->path, sizeof w->path, "%s", info->dlpi_name);
    return 1;
}

// A function of a loaded library; NULL when either is not there. *path: the library's.
static void *function_of(struct wanted *w, const char *name)
{
    dl_iterate_phdr(match_library, w);
    void *library = *w->path ? dlopen(w->path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    return library ? dlsym(library, name) : NULL;
}

// Versions as each library numbers them; 0: unknown.
static int cudart_version(void)
{
    struct wanted w = {.prefix = "/libcudart.so"};
    int version = 0;
    int (*ask)(int *) = NULL;
    *(void **)&ask = function_of(&w, "cudaRuntimeGetVersion");
    return ask && ask(&version) == 0 ? version : 0;
}

static int library_version(struct wanted *w, const char *function)
{
    size_t (*ask)(void) = NULL;
    *(void **)&ask = function_of(w, function);
    return ask ? (int)ask() : 0;
}

static void check_libraries(struct doctor *d)
{
    struct wanted blas_at = {.prefix = "/libcublasLt.so"}, dnn_at = {.prefix = "/libcudnn.so"};
    const int blas = library_version(&blas_at, "cublasLtGetVersion"), dnn = library_version(&dnn_at, "cudnnGetVersion");
    if (!*blas_at.path && !*dnn_at.path)
        return;
    const bool old = dnn > 0 && dnn < CUDNN_OLDEST;
    doctor_add(d, old ? VERDICT_FAIL : VERDICT_OK, "libraries",
               old ? "install cuDNN 9.14 or newer; LD_LIBRARY_PATH may point to an old one (PyTorch brings its own)"
                   : NULL,
               "cuBLASLt %d.%d.%d (%s), cuDNN %d.%d.%d (%s)", blas / 10000, blas / 100 % 100, blas % 100, blas_at.path,
               dnn / 10000, dnn / 100 % 100, dnn % 100, dnn_at.path);
}

// A newer minor version of CUDA runs on any driver of its major one.
static void check_driver_for(struct doctor *d, int runtime)
{
    static const struct {
        int cuda, driver;
    } oldest[] = {{12, 525}, {13, 580}};
    const int major = runtime / 1000, driver = atoi(d->gpus->driver);
    int needed = 0;
    for (size_t i = 0; i < sizeof oldest / sizeof *oldest; i++)
        if (oldest[i].cuda == major)
            needed = oldest[i].driver;
    const bool old = (d->gpus->cuda > 0 && d->gpus->cuda / 1000 < major) || (driver > 0 && driver < needed);
    char needs[64] = "";
    if (needed)
        snprintf(needs, sizeof needs, ", which needs driver %d or newer", needed);
    if (runtime)
        doctor_add(d, old ? VERDICT_FAIL : VERDICT_OK, "backend",
                   old ? "update the driver, or build with the CUDA toolkit of an older major version" : NULL,
                   "CUDA %d.%d%s; the driver is %s", major, runtime % 1000 / 10, needs,
                   *d->gpus->driver ? d->gpus->driver : "of unknown version");
    else
        doctor_add(d, VERDICT_OK, "backend", NULL, "loaded; the version of its CUDA is unknown");
}

static void backend_part(struct doctor *d)
{
    const struct kernels *k;
    struct err err = {.code = ERR_NONE};
    const int rc = backend_find("cuda", &k, &err);
    if (rc == ERR_NOT_FOUND) {
        doctor_add(d, VERDICT_WARN, "backend",
                   "build where nvcc, cuBLAS and cuDNN 9.14 or newer are installed, unless the CPU is to compute",
                   "this build has no CUDA backend: the GPUs stay idle");
    } else if (rc != 0) {
        doctor_add(
            d, VERDICT_FAIL, "backend",
            "install the missing library (CUDA runtime, cuBLAS, cuDNN 9), or name its folder in /etc/ld.so.conf.d",
            "%s", err.text);
    } else {
        check_driver_for(d, cudart_version());
        check_libraries(d);
    }
}

static bool backend_is_good(const struct doctor *d)
{
    for (int i = 0; i < d->findings->n; i++)
        if (strcmp(d->findings->list[i].name, "backend") == 0 && d->findings->list[i].verdict != VERDICT_OK)
            return false;
    return true;
}

// ---- opening

// The environment of CUDA, which the process that calls this ends with: GPUs count as NVML counts them, and a worker
// sees no other than its own. What the caller of doctor made visible stays so. Returns the GPU's number there.
static int narrow(const struct doctor *d, bool visible)
{
    char index[16];
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1);
    if (visible || d->gpus->n == 0)
        return d->gpu;
    snprintf(index, sizeof index, "%d", d->gpu);
    setenv("CUDA_VISIBLE_DEVICES", index, 1);
    return 0;
}

// As a worker does: in a process of its own, so that a GPU that hangs or dies leaves the others their turn.
static void open_part(struct doctor *d)
{
    const bool visible = getenv("CUDA_VISIBLE_DEVICES");
    const struct device_options options = {.threads = 1, .gpu = narrow(d, visible), .activation = DT_F32};
    const double start = monotonic_seconds();
    const struct kernels *k;
    struct err err = {.code = ERR_NONE};
    struct device *device = NULL;
    char left[DOCTOR_SIZE];
    size_t available = 0, total = 0;
    int rc = backend_find("cuda", &k, &err);
    rc = rc ? rc : k->open(&options, &device, &err);
    if (rc == ERR_INVALID && d->gpu > 0 && !visible && d->gpus->n == 0) // the end of a list of unknown length
        return;
    if (rc != 0) {
        doctor_add(d, VERDICT_FAIL, d->opens,
                   visible ? "unset CUDA_VISIBLE_DEVICES and try again; see NVRM lines in dmesg"
                           : "see the lines on the driver and on this GPU above, and NVRM lines in dmesg",
                   "%s", err.text);
        return;
    }
    if (k->memory)
        k->memory(device, &available, &total);
    doctor_add(d, VERDICT_OK, d->opens, NULL, "in %.1f s%s%s%s", monotonic_seconds() - start, total ? ", " : "",
               total ? doctor_size(left, (double)available) : "", total ? " free" : "");
    k->close(device);
}

// How many to try.
static int gpus_to_open(const struct doctor *d)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int n = d->gpus->n > 0 ? (int)d->gpus->n : NVML_MAX_GPUS;
    if (visible)
        n = *visible != '\0';
    for (const char *c = visible; c && *c; c++)
        n += *c == ',';
    return n;
}

void doctor_cuda(struct doctor *d)
{
    const bool blind = d->gpus->rc == NVML_LIBRARY_NOT_FOUND && d->host.device_nodes;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (d->gpus->n == 0 && !blind)
        return;
    doctor_guard(d, "backend", LOAD_SECONDS, backend_part, "check whether the disk that holds the libraries answers");
    const int most = backend_is_good(d) ? gpus_to_open(d) : 0;
    for (d->gpu = 0; d->gpu < most; d->gpu++) {
        const int before = d->findings->n;
        snprintf(d->opens, sizeof d->opens, "%sgpu%d opens", visible ? "visible " : "", d->gpu);
        doctor_guard(d, d->opens, OPEN_SECONDS, open_part,
                     "drain this machine and reset that GPU (nvidia-smi --gpu-reset), or reboot");
        const int after = d->findings->n;
        if (blind && (after == before || d->findings->list[after - 1].verdict != VERDICT_OK)) // nobody counted them
            break;
    }
}
