// pointwise.c: operations on single numbers, and those that only move them.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vec.h"

// x op= y, with a row vector or a factor where the operation has one.
enum op { OP_ADD, OP_MUL, OP_AXPY, OP_ADD_ROW, OP_GATE_ADD, OP_CFG, OP_ACT };

struct points {
    enum op op;
    enum act act;
    float *x;
    const float *y, *z, *row; // z: cfg_combine's positive
    int64_t x_ld, y_ld, z_ld;
    int64_t n; // numbers in a row
    float a;
};

INLINE vf point(const struct points *j, enum op op, const float *x, const float *y, const float *z, int64_t i,
                int64_t n)
{
    vf v = op == OP_CFG ? vload_n(y + i, n) : vload_n(x + i, n);
    switch (op) {
    case OP_ADD:
        return v + vload_n(y + i, n);
    case OP_MUL:
        return vact(v, j->act) * vload_n(y + i, n);
    case OP_AXPY:
        return v + j->a * vload_n(y + i, n);
    case OP_ADD_ROW:
        return v + vload_n(j->row + i, n);
    case OP_GATE_ADD:
        return v + vload_n(j->row + i, n) * vload_n(y + i, n);
    case OP_CFG:
        return v + j->a * (vload_n(z + i, n) - v);
    case OP_ACT:
        return vact(v, j->act);
    }
    return v;
}

INLINE void points_row(const struct points *j, enum op op, int64_t r)
{
    float *x = j->x + r * j->x_ld;
    const float *y = j->y + r * j->y_ld, *z = j->z + r * j->z_ld;
    for (int64_t i = 0; i < j->n; i += LANES)
        vstore_n(x + i, point(j, op, x, y, z, i, j->n - i), j->n - i);
}

#define ROWS_OF(OP)                                                                                                    \
    case OP:                                                                                                           \
        for (int64_t r = from; r < to; r++)                                                                            \
            points_row(j, OP, r);                                                                                      \
        break

static void points_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct points *j = ctx;
    switch (j->op) {
        ROWS_OF(OP_ADD);
        ROWS_OF(OP_MUL);
        ROWS_OF(OP_AXPY);
        ROWS_OF(OP_ADD_ROW);
        ROWS_OF(OP_GATE_ADD);
        ROWS_OF(OP_CFG);
        ROWS_OF(OP_ACT);
    }
}

// Rows of x, whatever its dimensions; a vector is one row.
static void run(struct device *d, struct points job, struct tensor x, struct tensor y, struct tensor z)
{
    if (tensor_count(x) == 0)
        return;
    int64_t rows = x.dims == 1 ? 1 : x.n[0];
    // An absent operand is never read; x stands in for it, so that pointer arithmetic stays within one.
    job.x = x.data;
    job.y = tensor_none(y) ? x.data : y.data;
    job.z = tensor_none(z) ? x.data : z.data;
    job.x_ld = x.ld;
    job.y_ld = tensor_none(y) ? x.ld : y.ld;
    job.z_ld = tensor_none(z) ? x.ld : z.ld;
    job.n = tensor_count(x) / rows;
    cpu_rows(d, rows, job.op == OP_ACT || job.act != ACT_NONE ? 4 * job.n : job.n, points_rows, &job);
}

static const struct tensor none = {0};

void cpu_activate(struct device *d, struct tensor x, enum act act)
{
    if (check_activate(&d->check, x))
        run(d, (struct points){.op = OP_ACT, .act = act}, x, none, none);
}

void cpu_add(struct device *d, struct tensor x, struct tensor y)
{
    if (check_pair(&d->check, "add", x, y))
        run(d, (struct points){.op = OP_ADD}, x, y, none);
}

void cpu_mul(struct device *d, struct tensor x, struct tensor y, enum act act)
{
    if (check_pair(&d->check, "mul", x, y))
        run(d, (struct points){.op = OP_MUL, .act = act}, x, y, none);
}

void cpu_axpy(struct device *d, struct tensor x, float a, struct tensor y)
{
    if (check_pair(&d->check, "axpy", x, y))
        run(d, (struct points){.op = OP_AXPY, .a = a}, x, y, none);
}

void cpu_add_row(struct device *d, struct tensor x, struct tensor row)
{
    struct points job = {.op = OP_ADD_ROW};
    if (check_add_row(&d->check, x, row) && cpu_vectors(d, 1, &row, &job.row))
        run(d, job, x, none, none);
}

void cpu_gate_add(struct device *d, struct tensor x, struct tensor gate, struct tensor y)
{
    struct points job = {.op = OP_GATE_ADD};
    if (check_gate_add(&d->check, x, gate, y) && cpu_vectors(d, 1, &gate, &job.row))
        run(d, job, x, y, none);
}

void cpu_cfg_combine(struct device *d, struct tensor out, struct tensor negative, struct tensor positive, float scale)
{
    if (check_cfg_combine(&d->check, out, negative, positive))
        run(d, (struct points){.op = OP_CFG, .a = scale}, out, negative, positive);
}

// Ids come from the text of a job, so the failure does not name them.
static bool ids_within(struct device *d, const char *op, struct tensor ids, struct tensor table)
{
    const int32_t *id = ids.data;
    for (int64_t i = 0; i < ids.n[0]; i++)
        if (id[i] < 0 || id[i] >= table.n[0])
            return check_fail(&d->check, ERR_INVALID, "%s: the id at %lld is outside the table of %lld rows", op,
                              (long long)i, (long long)table.n[0]);
    return true;
}

void cpu_embed(struct device *d, struct tensor y, struct tensor table, struct tensor ids)
{
    if (!check_embed(&d->check, y, table, ids) || !ids_within(d, "embed", ids, table))
        return;
    for (int64_t r = 0; r < y.n[0]; r++) {
        float *to = (float *)y.data + r * y.ld;
        int64_t from = ((const int32_t *)ids.data)[r] * table.ld;
        for (int64_t i = 0; i < y.n[1]; i += LANES)
            vstore_n(to + i, weight_load(table.data, table.dtype, from + i, y.n[1] - i), y.n[1] - i);
    }
}

struct relative {
    struct tensor y, table;
    const int32_t *buckets;
};

static void relative_heads(const void *ctx, int64_t from, int64_t to)
{
    const struct relative *j = ctx;
    int64_t m = j->y.n[1], s = j->y.n[2];
    for (int64_t h = from; h < to; h++)
        for (int64_t q = m - 1; q >= 0; q--) {
            float *y = (float *)j->y.data + h * j->y.ld + q * s;
            // A row is the one below it moved by one key: only its last number, or the whole last row, is looked up.
            int64_t known = q == m - 1 ? 0 : s - 1;
            if (known)
                memcpy(y, y + s + 1, (size_t)known * sizeof *y);
            for (int64_t k = known; k < s; k++)
                y[k] = weight_load(j->table.data, j->table.dtype, j->buckets[k - q + m - 1] * j->table.ld + h, 1)[0];
        }
}

void cpu_relative_bias(struct device *d, struct tensor y, struct tensor table, struct tensor buckets)
{
    struct relative job = {y, table, buckets.data};
    if (check_relative_bias(&d->check, y, table, buckets) && tensor_count(y) > 0 &&
        ids_within(d, "relative_bias", buckets, table))
        cpu_rows(d, y.n[0], y.n[1] * y.n[2], relative_heads, &job);
}

struct move {
    struct tensor y, x;
    float scale, shift;
};

static void upsample_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct move *m = ctx;
    int64_t c = m->x.n[2];
    size_t pixel = (size_t)c * sizeof(float);
    for (int64_t r = from; r < to; r++) {
        const float *x = (const float *)m->x.data + r * m->x.ld;
        float *y = (float *)m->y.data + 2 * r * m->y.ld, *first = y;
        for (int64_t i = 0; i < m->x.n[1]; i++, x += c, y += 2 * c) {
            memcpy(y, x, pixel);
            memcpy(y + c, x, pixel);
        }
        memcpy(first + m->y.ld, first, pixel * 2 * (size_t)m->x.n[1]);
    }
}

void cpu_upsample2x(struct device *d, struct tensor y, struct tensor x)
{
    struct move job = {.y = y, .x = x};
    if (check_upsample2x(&d->check, y, x) && tensor_count(x) > 0)
        cpu_rows(d, x.n[0], 4 * x.n[1] * x.n[2], upsample_rows, &job);
}

// Rows are those of the latent.
static void unpack_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct move *m = ctx;
    int64_t w = m->y.n[1], channels = m->y.n[2];
    for (int64_t r = from; r < to; r++)
        for (int64_t i = 0; i < w; i++) {
            const float *token = (const float *)m->x.data + (r / 2 * (w / 2) + i / 2) * m->x.ld + r % 2 * 2 + i % 2;
            float *y = (float *)m->y.data + r * m->y.ld + i * channels;
            for (int64_t c = 0; c < channels; c++)
                y[c] = token[c * 4] / m->scale + m->shift;
        }
}

void cpu_unpack_latents(struct device *d, struct tensor latent, struct tensor tokens, float scale, float shift)
{
    struct move job = {latent, tokens, scale, shift};
    if (check_unpack_latents(&d->check, latent, tokens))
        cpu_rows(d, latent.n[0], 4 * latent.n[1] * latent.n[2], unpack_rows, &job);
}

static void u8_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct move *m = ctx;
    int64_t n = m->x.n[1] * m->x.n[2] * m->x.n[3];
    for (int64_t r = from; r < to; r++) {
        const float *x = (const float *)m->x.data + r * m->x.ld;
        uint8_t *y = (uint8_t *)m->y.data + r * m->y.ld;
        for (int64_t i = 0; i < n; i++) {
            float v = x[i] * 0.5f + 0.5f;
            v = v > 0 ? v : 0; // NaN becomes 0
            v = v < 1 ? v : 1;
            y[i] = (uint8_t)rintf(v * 255);
        }
    }
}

void cpu_to_u8(struct device *d, struct tensor y, struct tensor x)
{
    struct move job = {.y = y, .x = x};
    if (check_to_u8(&d->check, y, x) && tensor_count(x) > 0)
        cpu_rows(d, x.n[0], x.n[1] * x.n[2] * x.n[3], u8_rows, &job);
}
