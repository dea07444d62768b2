// device.c: the cpu device: open, memory, transfers, and the table itself.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vec.h"

#include <stdlib.h>

enum { ALIGNMENT = 256, MAX_THREADS = 1024, GRAIN = 16384 };

static bool grow(struct device *d, struct scratch *s, size_t count)
{
    if (s->count >= count)
        return true;
    free(s->data);
    *s = (struct scratch){0};
    size_t bytes = (count * sizeof(float) + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    s->data = aligned_alloc(ALIGNMENT, bytes);
    if (!s->data)
        return check_fail(&d->check, ERR_NO_MEMORY, "no memory for %zu bytes of scratch", bytes);
    s->count = count;
    return true;
}

bool cpu_scratch(struct device *d, size_t count)
{
    for (int i = 0; i < d->threads; i++)
        if (!grow(d, &d->scratch[i], count))
            return false;
    return true;
}

bool cpu_vectors(struct device *d, int vectors, const struct tensor *list, const float **out)
{
    int64_t total = 0;
    for (int i = 0; i < vectors; i++)
        total += list[i].dtype == DT_F32 ? 0 : ceil_div(tensor_count(list[i]), LANES) * LANES;
    if (!grow(d, &d->vectors, (size_t)total))
        return false;
    float *next = d->vectors.data;
    for (int i = 0; i < vectors; i++) {
        int64_t n = tensor_count(list[i]);
        out[i] = tensor_none(list[i]) ? NULL : list[i].data;
        if (list[i].dtype == DT_F32 || n == 0)
            continue;
        out[i] = next;
        for (int64_t j = 0; j < n; j += LANES, next += LANES)
            vstore(next, weight_load(list[i].data, list[i].dtype, j, n - j));
    }
    return true;
}

struct rows_job {
    cpu_rows_fn fn;
    const void *ctx;
    int64_t rows, block;
};

static void rows_task(void *ctx, int64_t task, int thread)
{
    const struct rows_job *job = ctx;
    (void)thread;
    job->fn(job->ctx, task * job->block, min64(job->rows, (task + 1) * job->block));
}

void cpu_rows(struct device *d, int64_t rows, int64_t work, cpu_rows_fn fn, const void *ctx)
{
    if (rows < 1)
        return;
    // Blocks too small to be worth waking a thread for stay whole; else four blocks a thread even out its peers.
    int64_t block = max64(ceil_div(rows, 4L * d->threads), ceil_div(GRAIN, max64(work, 1)));
    struct rows_job job = {fn, ctx, rows, block};
    pool_run(d->pool, ceil_div(rows, block), rows_task, &job);
}

static void cpu_close(struct device *d)
{
    if (!d)
        return;
    pool_free(d->pool);
    for (int i = 0; d->scratch && i < d->threads; i++)
        free(d->scratch[i].data);
    free(d->scratch);
    free(d->vectors.data);
    free(d);
}

static int cpu_open(const struct device_options *options, struct device **out, struct err *err)
{
    *out = NULL;
    if (options->threads < 1 || options->threads > MAX_THREADS)
        return err_set(err, ERR_INVALID, "%d threads for the cpu backend: 1 to %d are allowed", options->threads,
                       MAX_THREADS);
    if (options->activation != DT_F32)
        return err_set(err, ERR_UNSUPPORTED, "activations of type %s on the cpu: it computes in F32 alone",
                       options->activation < DT_COUNT ? dtype_name(options->activation) : "unknown");
    struct device *d = calloc(1, sizeof *d);
    if (!d)
        return err_set(err, ERR_NO_MEMORY, "no memory for a cpu device");
    d->check = (struct check){.activation = DT_F32, .memory = true};
    d->threads = options->threads;
    d->scratch = calloc((size_t)d->threads, sizeof *d->scratch);
    int code =
        d->scratch ? pool_new(d->threads, &d->pool, err) : err_set(err, ERR_NO_MEMORY, "no memory for a cpu device");
    if (code) {
        cpu_close(d);
        return code;
    }
    *out = d;
    return 0;
}

static int cpu_sync(struct device *d, struct err *err)
{
    return check_report(&d->check, err);
}

static void cpu_cost(struct device *d, struct kernel_cost *out)
{
    (void)d;
    *out = (struct kernel_cost){0};
}

static int cpu_alloc(struct device *d, size_t bytes, void **out, struct err *err)
{
    (void)d;
    *out = NULL;
    if (bytes <= SIZE_MAX / 2)
        *out = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) & ~(size_t)(ALIGNMENT - 1));
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for %zu bytes on the cpu", bytes);
    return 0;
}

static void cpu_free(struct device *d, void *p)
{
    (void)d;
    free(p);
}

// A row of n numbers between the host's type and the tensor's.
static void from_f32(void *to, enum dtype dtype, const float *from, int64_t n)
{
    uint16_t *h = to;
    for (int64_t i = 0; i < n; i++)
        h[i] = dtype == DT_BF16 ? f32_to_bf16(from[i]) : f32_to_f16(from[i]);
}

static void to_f32(float *to, const void *from, enum dtype dtype, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES)
        vstore_n(to + i, weight_load(from, dtype, i, n - i), n - i);
}

static bool is_half(enum dtype dtype)
{
    return dtype == DT_BF16 || dtype == DT_F16;
}

static void cpu_upload(struct device *d, struct tensor dst, const void *host)
{
    if (!check_transfer(&d->check, "upload", dst, host) || tensor_count(dst) == 0)
        return;
    int64_t row = tensor_count(dst) / dst.n[0], size = (int64_t)dtype_size(dst.dtype);
    for (int64_t i = 0; i < dst.n[0]; i++) {
        char *to = (char *)dst.data + i * dst.ld * size;
        if (is_half(dst.dtype))
            from_f32(to, dst.dtype, (const float *)host + i * row, row);
        else
            memcpy(to, (const char *)host + i * row * size, (size_t)(row * size));
    }
}

static void cpu_download(struct device *d, void *host, struct tensor src)
{
    if (!check_transfer(&d->check, "download", src, host) || tensor_count(src) == 0)
        return;
    int64_t row = tensor_count(src) / src.n[0], size = (int64_t)dtype_size(src.dtype);
    for (int64_t i = 0; i < src.n[0]; i++) {
        const char *from = (const char *)src.data + i * src.ld * size;
        if (is_half(src.dtype))
            to_f32((float *)host + i * row, from, src.dtype, row);
        else
            memcpy((char *)host + i * row * size, from, (size_t)(row * size));
    }
}

static int cpu_place(struct device *d, struct tensor host, struct tensor *out, struct err *err)
{
    (void)d, (void)err;
    *out = host;
    return 0;
}

static int cpu_place_linear(struct device *d, struct linear *w, enum dtype type, bool twice, struct err *err)
{
    (void)d, (void)w, (void)twice;
    return type == DT_F32 ? 0 : err_set(err, ERR_UNSUPPORTED, "linear layers of %s: the CPU has F32", dtype_name(type));
}

static void cpu_displace(struct device *d, struct tensor placed)
{
    (void)d, (void)placed;
}

struct bytes_job {
    char *to;
    const char *from;            // NULL: zeros
    int64_t to_ld, from_ld, row; // bytes
};

static void copy_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct bytes_job *j = ctx;
    for (int64_t i = from; i < to; i++)
        if (j->from)
            memcpy(j->to + i * j->to_ld, j->from + i * j->from_ld, (size_t)j->row);
        else
            memset(j->to + i * j->to_ld, 0, (size_t)j->row);
}

static void cpu_copy(struct device *d, struct tensor dst, struct tensor src)
{
    if (!check_copy(&d->check, dst, src) || tensor_count(dst) == 0)
        return;
    int64_t size = (int64_t)dtype_size(dst.dtype);
    struct bytes_job job = {dst.data, src.data, dst.ld * size, src.ld * size, tensor_count(dst) / dst.n[0] * size};
    cpu_rows(d, dst.n[0], ceil_div(job.row, 4), copy_rows, &job);
}

static void cpu_zero(struct device *d, struct tensor t)
{
    if (!check_zero(&d->check, t) || tensor_count(t) == 0)
        return;
    int64_t size = (int64_t)dtype_size(t.dtype);
    struct bytes_job job = {t.data, NULL, t.ld * size, 0, tensor_count(t) / t.n[0] * size};
    cpu_rows(d, t.n[0], ceil_div(job.row, 4), copy_rows, &job);
}

const struct kernels kernels_cpu = {
    .name = "cpu",
    .activation = DT_F32,
    .open = cpu_open,
    .close = cpu_close,
    .sync = cpu_sync,
    .pace = cpu_sync,
    .cost = cpu_cost,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_upload,
    .download = cpu_download,
    .place = cpu_place,
    .place_linear = cpu_place_linear,
    .displace = cpu_displace,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .linear = cpu_linear,
    .activate = cpu_activate,
    .add = cpu_add,
    .add_row = cpu_add_row,
    .mul = cpu_mul,
    .gate_add = cpu_gate_add,
    .layer_norm = cpu_layer_norm,
    .modulate = cpu_modulate,
    .gate_add_modulate = cpu_gate_add_modulate,
    .rms_norm = cpu_rms_norm,
    .qk_norm_rope = cpu_qk_norm_rope,
    .embed = cpu_embed,
    .relative_bias = cpu_relative_bias,
    .attention = cpu_attention,
    .attention_part = cpu_attention_part,
    .attention_merge = cpu_attention_merge,
    .conv2d = cpu_conv2d,
    .group_sums = cpu_group_sums,
    .group_norm = cpu_group_norm,
    .upsample2x = cpu_upsample2x,
    .unpack_latents = cpu_unpack_latents,
    .to_u8 = cpu_to_u8,
    .axpy = cpu_axpy,
    .cfg_combine = cpu_cfg_combine,
};
