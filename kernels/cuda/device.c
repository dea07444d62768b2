// device.c: the cuda device: open, memory, transfers, the small operations, and the table itself.
#include "kernels/cuda/device.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/graph.h"
#include "kernels/cuda/loader.h"

#include <stdlib.h>

enum { OLDEST = 80 }; // compute capability, tens and ones
static const int64_t STAGE_BYTES = 64 << 20;

// ---- errors

// The one sentence about a failed call; what: the operation. ERR_UNSUPPORTED: this host will answer so the next time
// too, ERR_UNAVAILABLE: it may not.
static int explain(struct err *err, cudaError_t e, const char *what)
{
    const char *why = cudaGetErrorString(e);
    switch (e) {
    case cudaErrorMemoryAllocation:
        return err_set(err, ERR_NO_MEMORY,
                       "%s: the GPU has no memory left for it: %s; nvidia-smi lists what else uses it, and a smaller "
                       "memory budget leaves it room",
                       what, why);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
        return err_set(
            err, ERR_UNSUPPORTED,
            "%s: %s: nvidia-smi on this host tells whether it has this GPU and a driver of CUDA %d or newer; "
            "after an update of the driver it has to be loaded anew, or the host restarted",
            what, why, CUDART_VERSION / 1000);
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
        return err_set(err, ERR_UNSUPPORTED, "%s: %s: build with this GPU's architecture in CMAKE_CUDA_ARCHITECTURES",
                       what, why);
    case cudaErrorInitializationError:
    case cudaErrorSystemNotReady:
    case cudaErrorDevicesUnavailable:
        return err_set(err, ERR_UNAVAILABLE,
                       "%s: %s: nvidia-smi on this host tells its GPUs' state; those of an NVSwitch need "
                       "nvidia-fabricmanager",
                       what, why);
    default:
        return err_set(
            err, ERR_INTERNAL,
            "%s: the GPU failed: %s (%s); a line with Xid in the kernel's log tells when it is the GPU's fault", what,
            why, cudaGetErrorName(e));
    }
}

bool cuda_ok(struct device *d, cudaError_t e, const char *op)
{
    struct err err;
    if (e == cudaSuccess)
        return true;
    return check_fail(&d->check, (enum err_code)explain(&err, e, op), "%s", err.text);
}

bool cuda_launched(struct device *d, const char *op)
{
    if (d->profile)
        cuda_profile_mark(d, op);
    return cuda_ok(d, cudaGetLastError(), op);
}

void cuda_enter(struct device *d)
{
    cudaSetDevice(d->gpu);
    loader_wait(d);
}

bool cuda_capturing(const struct device *d)
{
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(d->stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

void *cuda_scratch(struct device *d, enum slot slot, size_t bytes)
{
    if (d->scratch[slot].bytes >= bytes)
        return d->scratch[slot].data;
    if (cuda_capturing(d)) {
        check_fail(&d->check, ERR_INTERNAL, "a recording needs more scratch memory than the runs before it");
        return NULL;
    }
    d->scratch_moves++;
    // cudaFree waits for the work that may still use the old block.
    cudaFree(d->scratch[slot].data);
    d->scratch[slot].data = NULL;
    d->scratch[slot].bytes = 0;
    if (!cuda_ok(d, cudaMalloc(&d->scratch[slot].data, bytes), "scratch memory") ||
        !cuda_ok(d, cudaMemsetAsync(d->scratch[slot].data, 0, bytes, d->stream), "scratch memory"))
        return NULL;
    d->scratch[slot].bytes = bytes;
    return d->scratch[slot].data;
}

// ---- open and close

static void cuda_close(struct device *d)
{
    if (!d)
        return;
    cudaSetDevice(d->gpu);
    loader_free(d->loader);
    if (d->stream)
        cudaStreamSynchronize(d->stream);
    cuda_profile_end(d, NULL, NULL);
    for (int i = 0; i < 2; i++)
        if (d->pace[i])
            cudaEventDestroy(d->pace[i]);
    graphs_free(d->plans);
    products_free(d->products);
    if (d->dnn)
        cudnnDestroy(d->dnn);
    if (d->blas)
        cublasLtDestroy(d->blas);
    for (int i = 0; i < SLOTS; i++)
        cudaFree(d->scratch[i].data);
    for (size_t i = 0; i < d->n_placed; i++)
        cudaFree(d->placed[i]);
    free(d->placed);
    cudaFreeHost(d->bad);
    if (d->stream)
        cudaStreamDestroy(d->stream);
    free(d);
}

// Ten times its number.
static int capability_of(int gpu, int *out, struct err *err)
{
    int major = 0, minor = 0;
    cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, gpu);
    *out = major * 10 + minor;
    return e == cudaSuccess ? 0 : explain(err, e, "opening the GPU");
}

static int check_gpu(int gpu, struct err *err)
{
    int count = 0, capability;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess)
        return explain(err, e, "opening the GPU");
    if (gpu < 0 || gpu >= count)
        return err_set(err, ERR_INVALID, "GPU %d: this process sees %d, numbered from 0 (CUDA_VISIBLE_DEVICES chooses)",
                       gpu, count);
    TRY(capability_of(gpu, &capability, err));
    if (capability < OLDEST)
        return err_set(err, ERR_UNSUPPORTED, "GPU %d has compute capability %d.%d: 8.0 (A100) or newer is needed", gpu,
                       capability / 10, capability % 10);
    return 0;
}

static int open_libraries(struct device *d, struct err *err)
{
    cudaError_t e;
    TRY(capability_of(d->gpu, &d->capability, err));
    if ((e = cudaSetDevice(d->gpu)) != cudaSuccess ||
        (e = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking)) != cudaSuccess ||
        (e = cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, d->gpu)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&d->pace[0], cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&d->pace[1], cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaHostAlloc((void **)&d->bad, sizeof *d->bad, cudaHostAllocMapped)) != cudaSuccess)
        return explain(err, e, "opening the GPU");
    *d->bad = 0;
    cublasStatus_t blas = cublasLtCreate(&d->blas);
    if (blas != CUBLAS_STATUS_SUCCESS)
        return err_set(err, ERR_UNAVAILABLE, "cuBLASLt does not start: %s", cublasLtGetStatusString(blas));
    cudnnStatus_t dnn = cudnnCreate(&d->dnn);
    if (dnn == CUDNN_STATUS_SUCCESS)
        dnn = cudnnSetStream(d->dnn, d->stream);
    if (dnn != CUDNN_STATUS_SUCCESS)
        return err_set(err, ERR_UNAVAILABLE, "cuDNN does not start: %s", cudnnGetErrorString(dnn));
    return 0;
}

static int cuda_open(const struct device_options *options, struct device **out, struct err *err)
{
    *out = NULL;
    enum dtype type = options->activation;
    if (type != DT_BF16 && type != DT_F16 && type != DT_F32)
        return err_set(err, ERR_UNSUPPORTED, "activations of type %s on the GPU: F32, BF16 or F16 are allowed",
                       type < DT_COUNT ? dtype_name(type) : "unknown");
    TRY(check_gpu(options->gpu, err));
    struct device *d = calloc(1, sizeof *d);
    if (!d)
        return err_set(err, ERR_NO_MEMORY, "no memory for a cuda device");
    d->check = (struct check){.activation = type, .memory = true, .quantised = true};
    d->gpu = options->gpu;
    d->type = type;
    d->exact = options->exact;
    d->products = products_new();
    int code = d->products ? open_libraries(d, err) : err_set(err, ERR_NO_MEMORY, "no memory for a cuda device");
    if (code) {
        cuda_close(d);
        return code;
    }
    *out = d;
    return 0;
}

static int cuda_sync(struct device *d, struct err *err)
{
    cuda_enter(d);
    cuda_ok(d, cudaStreamSynchronize(d->stream), "the GPU's work");
    products_keep(d->products);
    graphs_keep(d->plans);
    // Ids come from the text of a job, so the failure does not name them.
    if (*d->bad)
        check_fail(&d->check, ERR_INVALID, "embed or relative_bias: an id is outside its table");
    return check_report(&d->check, err);
}

static int cuda_pace(struct device *d, struct err *err)
{
    cuda_enter(d);
    const uint64_t now = d->paces++;
    cuda_ok(d, cudaEventRecord(d->pace[now % 2], d->stream), "the GPU's work");
    if (now > 0)
        cuda_ok(d, cudaEventSynchronize(d->pace[(now + 1) % 2]), "the GPU's work");
    return check_report(&d->check, err);
}

static void cuda_cost(struct device *d, struct kernel_cost *out)
{
    (void)d;
    *out = (struct kernel_cost){0};
}

// ---- memory

int cuda_alloc(struct device *d, size_t bytes, void **out, struct err *err)
{
    size_t available = 0, total = 0;
    *out = NULL;
    cudaSetDevice(d->gpu);
    cudaError_t e = bytes > SIZE_MAX / 2 ? cudaErrorMemoryAllocation : cudaMalloc(out, bytes ? bytes : 1);
    if (e == cudaSuccess)
        return 0;
    cudaGetLastError();
    if (e != cudaErrorMemoryAllocation || cudaMemGetInfo(&available, &total) != cudaSuccess)
        return explain(err, e, "allocating");
    return err_set(err, ERR_NO_MEMORY,
                   "no memory for %zu bytes on GPU %d: %zu of its %zu are free; nvidia-smi lists "
                   "what else uses it, and a smaller memory budget leaves it room",
                   bytes, d->gpu, available, total);
}

static void track(struct device *d, void *base, size_t bytes)
{
    for (int i = 0; i < DEVICE_BLOCKS; i++)
        if (!d->blocks[i].base) {
            d->blocks[i].base = base;
            d->blocks[i].bytes = bytes;
            return;
        }
    d->untracked++;
}

static void untrack(struct device *d, const void *base)
{
    for (int i = 0; i < DEVICE_BLOCKS; i++)
        if (d->blocks[i].base == base) {
            d->blocks[i].base = NULL;
            d->blocks[i].bytes = 0;
            return;
        }
    d->untracked--;
}

// Others of a link may come to write here: whole granules, so that nothing else is exported along.
static int cuda_alloc_tracked(struct device *d, size_t bytes, void **out, struct err *err)
{
    const size_t whole = bytes < SIZE_MAX / 2 ? (bytes + DEVICE_GRANULE - 1) / DEVICE_GRANULE * DEVICE_GRANULE : bytes;
    TRY(cuda_alloc(d, whole, out, err));
    track(d, *out, whole);
    return 0;
}

static void cuda_free(struct device *d, void *p)
{
    if (!p)
        return;
    cuda_enter(d);
    untrack(d, p);
    cudaFree(p);
}

static void cuda_memory(struct device *d, size_t *available, size_t *total)
{
    cuda_enter(d);
    if (cudaMemGetInfo(available, total) != cudaSuccess)
        *available = *total = 0;
}

// Rows of a tensor that a stage of the scratch memory holds as f32, 1 at least.
static int64_t staged_rows(int64_t rows, int64_t row)
{
    int64_t fit = STAGE_BYTES / (row * 4);
    return min64(rows, fit > 0 ? fit : 1);
}

static void cuda_upload(struct device *d, struct tensor dst, const void *host)
{
    if (!check_transfer(&d->check, "upload", dst, host) || tensor_count(dst) == 0)
        return;
    cuda_enter(d);
    int64_t rows = rows_of(dst), row = tensor_count(dst) / rows;
    size_t bytes = (size_t)row * (is_half(dst.dtype) ? sizeof(float) : dtype_size(dst.dtype));
    if (!is_half(dst.dtype)) {
        cuda_ok(d,
                cudaMemcpy2DAsync(dst.data, dst.dims == 1 ? bytes : (size_t)dst.ld * dtype_size(dst.dtype), host, bytes,
                                  bytes, (size_t)rows, cudaMemcpyDefault, d->stream),
                "upload");
        return;
    }
    for (int64_t some = staged_rows(rows, row), i = 0; i < rows; i += some) {
        struct tensor to = matrix_rows(dst, row, i, min64(some, rows - i)),
                      from = tensor_2d(NULL, DT_F32, to.n[0], row);
        from.data = cuda_scratch(d, SLOT_OPERAND, (size_t)some * bytes);
        if (!from.data || !cuda_ok(d,
                                   cudaMemcpyAsync(from.data, (const char *)host + i * (int64_t)bytes,
                                                   tensor_bytes(from), cudaMemcpyDefault, d->stream),
                                   "upload"))
            return;
        launch_convert(d->stream, to, from);
    }
    cuda_launched(d, "upload");
}

static void cuda_download(struct device *d, void *host, struct tensor src)
{
    if (!check_transfer(&d->check, "download", src, host) || tensor_count(src) == 0)
        return;
    cuda_enter(d);
    int64_t rows = rows_of(src), row = tensor_count(src) / rows;
    size_t bytes = (size_t)row * (is_half(src.dtype) ? sizeof(float) : dtype_size(src.dtype));
    if (!is_half(src.dtype)) {
        cuda_ok(d,
                cudaMemcpy2DAsync(host, bytes, src.data, src.dims == 1 ? bytes : (size_t)src.ld * dtype_size(src.dtype),
                                  bytes, (size_t)rows, cudaMemcpyDefault, d->stream),
                "download");
        cuda_ok(d, cudaStreamSynchronize(d->stream), "download");
        return;
    }
    for (int64_t some = staged_rows(rows, row), i = 0; i < rows; i += some) {
        struct tensor from = matrix_rows(src, row, i, min64(some, rows - i)),
                      to = tensor_2d(NULL, DT_F32, from.n[0], row);
        to.data = cuda_scratch(d, SLOT_OPERAND, (size_t)some * bytes);
        if (!to.data)
            return;
        launch_convert(d->stream, to, from);
        if (!cuda_ok(d,
                     cudaMemcpyAsync((char *)host + i * (int64_t)bytes, to.data, tensor_bytes(to), cudaMemcpyDefault,
                                     d->stream),
                     "download"))
            return;
    }
    cuda_ok(d, cudaStreamSynchronize(d->stream), "download");
}

// ---- operations of one launch

static void cuda_copy(struct device *d, struct tensor dst, struct tensor src)
{
    if (!check_copy(&d->check, dst, src) || tensor_count(dst) == 0)
        return;
    cuda_enter(d);
    launch_copy(d->stream, dst, src);
    cuda_launched(d, "copy");
}

static void cuda_zero(struct device *d, struct tensor t)
{
    if (!check_zero(&d->check, t) || tensor_count(t) == 0)
        return;
    cuda_enter(d);
    launch_copy(d->stream, t, (struct tensor){0});
    cuda_launched(d, "zero");
}

static void points(struct device *d, const char *op, struct points p)
{
    if (tensor_count(p.x) == 0)
        return;
    cuda_enter(d);
    if (!tensor_none(p.row))
        p.row_n = tensor_count(p.row);
    launch_points(d->stream, &p);
    cuda_launched(d, op);
}

static void cuda_activate(struct device *d, struct tensor x, enum act act)
{
    if (check_activate(&d->check, x))
        points(d, "activate", (struct points){.op = POINT_ACT, .act = act, .x = x});
}

static void cuda_add(struct device *d, struct tensor x, struct tensor y)
{
    if (check_pair(&d->check, "add", x, y))
        points(d, "add", (struct points){.op = POINT_ADD, .x = x, .y = y});
}

static void cuda_mul(struct device *d, struct tensor x, struct tensor y, enum act act)
{
    if (check_pair(&d->check, "mul", x, y))
        points(d, "mul", (struct points){.op = POINT_MUL, .act = act, .x = x, .y = y});
}

static void cuda_axpy(struct device *d, struct tensor x, float a, struct tensor y)
{
    if (check_pair(&d->check, "axpy", x, y))
        points(d, "axpy", (struct points){.op = POINT_AXPY, .x = x, .y = y, .a = a});
}

static void cuda_add_row(struct device *d, struct tensor x, struct tensor row)
{
    if (check_add_row(&d->check, x, row))
        points(d, "add_row", (struct points){.op = POINT_ACT, .act = ACT_NONE, .x = x, .row = row});
}

static void cuda_gate_add(struct device *d, struct tensor x, struct tensor gate, struct tensor y)
{
    if (check_gate_add(&d->check, x, gate, y))
        points(d, "gate_add", (struct points){.op = POINT_GATE_ADD, .x = x, .y = y, .row = gate});
}

static void cuda_cfg_combine(struct device *d, struct tensor out, struct tensor negative, struct tensor positive,
                             float scale)
{
    if (check_cfg_combine(&d->check, out, negative, positive))
        points(d, "cfg_combine", (struct points){.op = POINT_CFG, .x = out, .y = negative, .z = positive, .a = scale});
}

static void norm(struct device *d, const char *op, struct tensor y, struct tensor x, struct tensor gamma,
                 struct tensor beta, float one, float eps, bool centred)
{
    if (tensor_count(x) == 0)
        return;
    cuda_enter(d);
    launch_norm(d->stream, y, x, gamma, beta, one, eps, centred);
    cuda_launched(d, op);
}

static void cuda_layer_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta,
                            float eps)
{
    if (check_layer_norm(&d->check, y, x, gamma, beta))
        norm(d, "layer_norm", y, x, gamma, beta, 0, eps, true);
}

// In one pass, or in as many as there are parts.
static void modulate(struct device *d, const char *op, const struct modulation *m)
{
    if (tensor_count(m->x) == 0)
        return;
    cuda_enter(d);
    if (!launch_modulate(d->stream, m)) {
        struct tensor y = m->y;
        if (dtype_quantised(y.dtype)) {
            y = tensor_2d(NULL, d->type, y.n[0], y.n[1]);
            y.data = cuda_scratch(d, SLOT_OPERAND, tensor_bytes(y));
            if (!y.data)
                return;
        }
        if (!tensor_none(m->update))
            launch_points(
                d->stream,
                &(struct points){
                    .op = POINT_GATE_ADD, .x = m->x, .y = m->update, .row = m->gate, .row_n = tensor_count(m->gate)});
        launch_norm(d->stream, y, m->x, m->scale, m->shift, 1, m->eps, true);
        if (y.data != m->y.data)
            launch_quantise(d->stream, m->y, y);
    }
    cuda_launched(d, op);
}

static void cuda_modulate(struct device *d, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift,
                          float eps)
{
    if (check_modulate(&d->check, y, x, scale, shift))
        modulate(d, "modulate", &(struct modulation){.x = x, .y = y, .scale = scale, .shift = shift, .eps = eps});
}

static void cuda_gate_add_modulate(struct device *d, struct tensor x, struct tensor gate, struct tensor update,
                                   struct tensor y, struct tensor scale, struct tensor shift, float eps)
{
    if (check_gate_add_modulate(&d->check, x, gate, update, y, scale, shift))
        modulate(d, "gate_add_modulate",
                 &(struct modulation){
                     .x = x, .gate = gate, .update = update, .y = y, .scale = scale, .shift = shift, .eps = eps});
}

static void cuda_rms_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, float eps)
{
    if (check_rms_norm(&d->check, y, x, gamma))
        norm(d, "rms_norm", y, x, gamma, (struct tensor){0}, 0, eps, false);
}

static void cuda_qk_norm_rope(struct device *d, struct tensor q, struct tensor k, struct tensor gamma_q,
                              struct tensor gamma_k, float eps, struct tensor rope)
{
    if (!check_qk_norm_rope(&d->check, q, k, gamma_q, gamma_k, rope) || tensor_count(q) == 0)
        return;
    cuda_enter(d);
    launch_qk_norm_rope(d->stream, q, k, gamma_q, gamma_k, eps, rope);
    cuda_launched(d, "qk_norm_rope");
}

static void cuda_embed(struct device *d, struct tensor y, struct tensor table, struct tensor ids)
{
    if (!check_embed(&d->check, y, table, ids) || tensor_count(y) == 0)
        return;
    cuda_enter(d);
    launch_embed(d->stream, y, table, ids, d->bad);
    cuda_launched(d, "embed");
}

static void cuda_relative_bias(struct device *d, struct tensor y, struct tensor table, struct tensor buckets)
{
    if (!check_relative_bias(&d->check, y, table, buckets) || tensor_count(y) == 0)
        return;
    cuda_enter(d);
    launch_relative_bias(d->stream, y, table, buckets, d->bad);
    cuda_launched(d, "relative_bias");
}

static void cuda_group_sums(struct device *d, struct tensor sums, struct tensor x)
{
    if (!check_group_sums(&d->check, sums, x) || tensor_count(sums) == 0)
        return;
    cuda_enter(d);
    if (tensor_count(x) == 0)
        launch_copy(d->stream, sums, (struct tensor){0});
    else
        launch_group_sums(d->stream, sums, x);
    cuda_launched(d, "group_sums");
}

static void cuda_group_norm(struct device *d, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                            struct tensor beta, float eps, enum act act)
{
    if (!check_group_norm(&d->check, y, x, sums, gamma, beta) || tensor_count(x) == 0)
        return;
    cuda_enter(d);
    // Each part 256 bytes aligned for wide reads.
    size_t part = ((size_t)x.n[2] * sizeof(float) + 255) & ~(size_t)255;
    float *mean = cuda_scratch(d, SLOT_OPERAND, 2 * part), *scale = mean + part / sizeof(float);
    if (!mean)
        return;
    launch_group_scales(d->stream, mean, scale, sums, x.n[1], gamma, eps);
    launch_group_apply(d->stream, y, x, mean, scale, beta, act);
    cuda_launched(d, "group_norm");
}

static void cuda_upsample2x(struct device *d, struct tensor y, struct tensor x)
{
    if (!check_upsample2x(&d->check, y, x) || tensor_count(x) == 0)
        return;
    cuda_enter(d);
    launch_upsample2x(d->stream, y, x);
    cuda_launched(d, "upsample2x");
}

static void cuda_unpack_latents(struct device *d, struct tensor latent, struct tensor tokens, float scale, float shift)
{
    if (!check_unpack_latents(&d->check, latent, tokens) || tensor_count(latent) == 0)
        return;
    cuda_enter(d);
    launch_unpack_latents(d->stream, latent, tokens, scale, shift);
    cuda_launched(d, "unpack_latents");
}

static void cuda_to_u8(struct device *d, struct tensor y, struct tensor x)
{
    if (!check_to_u8(&d->check, y, x) || tensor_count(x) == 0)
        return;
    cuda_enter(d);
    launch_to_u8(d->stream, y, x);
    cuda_launched(d, "to_u8");
}

const struct kernels kernels_cuda = {
    .name = "cuda",
    .activation = DT_BF16,
    .open = cuda_open,
    .close = cuda_close,
    .sync = cuda_sync,
    .pace = cuda_pace,
    .cost = cuda_cost,
    .alloc = cuda_alloc_tracked,
    .free = cuda_free,
    .memory = cuda_memory,
    .upload = cuda_upload,
    .download = cuda_download,
    .place = cuda_place,
    .place_linear = cuda_place_linear,
    .take_second = cuda_take_second,
    .displace = cuda_displace,
    .record = cuda_record,
    .recorded = cuda_recorded,
    .replay = cuda_replay,
    .forget = cuda_forget,
    .link_kind = cuda_link_kind,
    .link_name = cuda_link_name,
    .link = cuda_link,
    .unlink = cuda_unlink,
    .exchange = cuda_exchange,
    .link_check = cuda_link_check,
    .link_state = cuda_link_state,
    .link_abort = cuda_link_abort,
    .link_export = cuda_link_export,
    .link_import = cuda_link_import,
    .link_forget = cuda_link_forget,
    .link_fetch = cuda_link_fetch,
    .link_fetched = cuda_link_fetched,
    .link_meet = cuda_link_meet,
    .link_attention = cuda_link_attention,
    .profile_start = cuda_profile_start,
    .profile_end = cuda_profile_end,
    .copy = cuda_copy,
    .zero = cuda_zero,
    .linear = cuda_linear,
    .activate = cuda_activate,
    .add = cuda_add,
    .add_row = cuda_add_row,
    .mul = cuda_mul,
    .gate_add = cuda_gate_add,
    .layer_norm = cuda_layer_norm,
    .modulate = cuda_modulate,
    .gate_add_modulate = cuda_gate_add_modulate,
    .rms_norm = cuda_rms_norm,
    .qk_norm_rope = cuda_qk_norm_rope,
    .embed = cuda_embed,
    .relative_bias = cuda_relative_bias,
    .attention = cuda_attention,
    .attention_part = cuda_attention_part,
    .attention_merge = cuda_attention_merge,
    .conv2d = cuda_conv2d,
    .group_sums = cuda_group_sums,
    .group_norm = cuda_group_norm,
    .upsample2x = cuda_upsample2x,
    .unpack_latents = cuda_unpack_latents,
    .to_u8 = cuda_to_u8,
    .axpy = cuda_axpy,
    .cfg_combine = cuda_cfg_combine,
};
