// norm.c: normalisations. A row is read from memory once; the later passes over it find it in cache.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vec.h"

struct rows_norm {
    struct tensor y, x;
    const float *gamma, *beta; // (n); NULL: 1 and 0. For modulate: scale and shift
    float one;                 // added to gamma: 1 for modulate
    float eps;
};

static float row_sum(const float *x, int64_t n)
{
    vf sum = vset(0);
    for (int64_t i = 0; i < n; i += LANES)
        sum += vload_n(x + i, n - i);
    return vsum(sum);
}

// Sum of (x - mean)^2.
static float row_squares(const float *x, int64_t n, float mean)
{
    vf sum = vset(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf c = vload(x + i) - mean;
        sum += c * c;
    }
    float s = vsum(sum);
    for (; i < n; i++)
        s += (x[i] - mean) * (x[i] - mean);
    return s;
}

// y = (x - mean) * rstd * (gamma + one) + beta
static void row_scale(float *y, const float *x, int64_t n, float mean, float rstd, const struct rows_norm *j)
{
    for (int64_t i = 0; i < n; i += LANES) {
        vf v = (vload_n(x + i, n - i) - mean) * rstd;
        if (j->gamma)
            v *= vload_n(j->gamma + i, n - i) + j->one;
        if (j->beta)
            v += vload_n(j->beta + i, n - i);
        vstore_n(y + i, v, n - i);
    }
}

static void layer_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct rows_norm *j = ctx;
    int64_t n = j->x.n[1];
    for (int64_t r = from; r < to; r++) {
        const float *x = (const float *)j->x.data + r * j->x.ld;
        float mean = row_sum(x, n) / (float)n;
        float variance = row_squares(x, n, mean) / (float)n;
        row_scale((float *)j->y.data + r * j->y.ld, x, n, mean, 1 / sqrtf(variance + j->eps), j);
    }
}

static void rms_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct rows_norm *j = ctx;
    int64_t n = j->x.n[1];
    for (int64_t r = from; r < to; r++) {
        const float *x = (const float *)j->x.data + r * j->x.ld;
        float rstd = 1 / sqrtf(row_squares(x, n, 0) / (float)n + j->eps);
        row_scale((float *)j->y.data + r * j->y.ld, x, n, 0, rstd, j);
    }
}

static void norm_rows(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta,
                      float one, float eps, cpu_rows_fn fn)
{
    const float *v[2];
    if (!cpu_vectors(d, 2, (struct tensor[]){gamma, beta}, v))
        return;
    struct rows_norm job = {y, x, v[0], v[1], one, eps};
    cpu_rows(d, x.n[0], 2 * x.n[1], fn, &job);
}

void cpu_layer_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta,
                    float eps)
{
    if (check_layer_norm(&d->check, y, x, gamma, beta))
        norm_rows(d, y, x, gamma, beta, 0, eps, layer_rows);
}

void cpu_modulate(struct device *d, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift,
                  float eps)
{
    if (check_modulate(&d->check, y, x, scale, shift))
        norm_rows(d, y, x, scale, shift, 1, eps, layer_rows);
}

void cpu_gate_add_modulate(struct device *d, struct tensor x, struct tensor gate, struct tensor update, struct tensor y,
                           struct tensor scale, struct tensor shift, float eps)
{
    if (!check_gate_add_modulate(&d->check, x, gate, update, y, scale, shift))
        return;
    cpu_gate_add(d, x, gate, update);
    cpu_modulate(d, y, x, scale, shift, eps);
}

void cpu_rms_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, float eps)
{
    if (check_rms_norm(&d->check, y, x, gamma))
        norm_rows(d, y, x, gamma, (struct tensor){0}, 0, eps, rms_rows);
}

struct qk {
    struct tensor x[2]; // q, k
    const float *gamma[2];
    struct tensor rope;
    float eps;
};

#define LANE_EVEN(i, s) ((i) & ~(s))
#define LANE_ODD(i, s)  ((i) | (s))

// x of `dim` numbers, normalised and turned; rope holds a cosine and a sine for each pair.
static void norm_rope(float *x, int64_t dim, const float *gamma, const float *rope, float eps)
{
    float rstd = 1 / sqrtf(row_squares(x, dim, 0) / (float)dim + eps);
    const vf sign = __builtin_convertvector((vlanes() & 1) * 2 - 1, vf);
    for (int64_t i = 0; i < dim; i += LANES) {
        vf v = vload_n(x + i, dim - i) * rstd * vload_n(gamma + i, dim - i), turn = vload_n(rope + i, dim - i);
        vf cosine = VSHUFFLE(turn, turn, LANE_EVEN, 1), sine = VSHUFFLE(turn, turn, LANE_ODD, 1) * sign;
        vstore_n(x + i, v * cosine + VSHUFFLE(v, v, LANE_XOR, 1) * sine, dim - i);
    }
}

static void qk_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct qk *j = ctx;
    int64_t heads = j->x[0].n[1], dim = j->x[0].n[2];
    for (int64_t r = from; r < to; r++)
        for (int t = 0; t < 2; t++)
            for (int64_t h = 0; h < heads; h++)
                norm_rope((float *)j->x[t].data + r * j->x[t].ld + h * dim, dim, j->gamma[t],
                          (const float *)j->rope.data + r * j->rope.ld, j->eps);
}

void cpu_qk_norm_rope(struct device *d, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                      float eps, struct tensor rope)
{
    struct qk job = {.x = {q, k}, .rope = rope, .eps = eps};
    if (check_qk_norm_rope(&d->check, q, k, gamma_q, gamma_k, rope) &&
        cpu_vectors(d, 2, (struct tensor[]){gamma_q, gamma_k}, job.gamma))
        cpu_rows(d, q.n[0], 4 * q.n[1] * q.n[2], qk_rows, &job);
}

// Sums and sums of squares of LANES neighbouring channels over the pixels of a row, ld apart.
static void pixel_sums(const float *x, int64_t pixels, int64_t ld, double *sum, double *square)
{
    vd s[2] = {{0}, {0}}, q[2] = {{0}, {0}}; // halves of the vector: a register each
    for (int64_t p = 0; p < pixels; p++) {
        __builtin_prefetch(x + (pixels + p) * ld); // the next block: strided reads escape the hardware's prefetching
        for (int i = 0; i < 2; i++) {
            vd v = vload_half(x + p * ld + i * (LANES / 2));
            s[i] += v;
            q[i] += v * v;
        }
    }
    memcpy(sum, s, sizeof s);
    memcpy(square, q, sizeof q);
}

// The same for n channels, fewer than LANES.
static void few_sums(const float *x, int64_t pixels, int64_t ld, int64_t n, double *sum, double *square)
{
    memset(sum, 0, LANES * sizeof *sum);
    memset(square, 0, LANES * sizeof *square);
    for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < n; c++) {
            double v = (double)x[p * ld + c];
            sum[c] += v;
            square[c] += v * v;
        }
}

// A block of pixels is summed slice by slice of its channels while it is in the first-level cache.
static void sum_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct tensor *sums = ctx, x = sums[1];
    int64_t channels = x.n[2], size = channels / sums->n[1], block = max64(8, 8192 / max64(1, channels));
    for (int64_t r = from; r < to; r++) {
        double *out = (double *)sums->data + r * sums->ld, sum[LANES], square[LANES];
        memset(out, 0, (size_t)sums->n[1] * 2 * sizeof *out);
        for (int64_t first = 0; first < x.n[1]; first += block)
            for (int64_t c = 0; c < channels; c += LANES) {
                const float *at = (const float *)x.data + r * x.ld + first * channels + c;
                int64_t n = min64(LANES, channels - c), pixels = min64(block, x.n[1] - first);
                if (n == LANES)
                    pixel_sums(at, pixels, channels, sum, square);
                else
                    few_sums(at, pixels, channels, n, sum, square);
                for (int64_t i = 0; i < n; i++) {
                    out[(c + i) / size * 2] += sum[i];
                    out[(c + i) / size * 2 + 1] += square[i];
                }
            }
    }
}

void cpu_group_sums(struct device *d, struct tensor sums, struct tensor x)
{
    struct tensor job[2] = {sums, x};
    if (check_group_sums(&d->check, sums, x))
        cpu_rows(d, x.n[0], x.n[1] * x.n[2], sum_rows, job);
}

struct group_norm {
    struct tensor y, x;
    const float *mean, *scale, *beta; // (c)
    enum act act;
};

INLINE void group_pixels(float *y, const float *x, int64_t pixels, const struct group_norm *j, enum act act)
{
    int64_t n = j->x.n[2];
    for (int64_t p = 0; p < pixels; p++, x += n, y += n)
        for (int64_t c = 0; c < n; c += LANES) {
            vf v = (vload_n(x + c, n - c) - vload_n(j->mean + c, n - c)) * vload_n(j->scale + c, n - c);
            vstore_n(y + c, vact(v + vload_n(j->beta + c, n - c), act), n - c);
        }
}

static void group_rows(const void *ctx, int64_t from, int64_t to)
{
    const struct group_norm *j = ctx;
    for (int64_t r = from; r < to; r++) {
        const float *x = (const float *)j->x.data + r * j->x.ld;
        float *y = (float *)j->y.data + r * j->y.ld;
        if (j->act == ACT_NONE)
            group_pixels(y, x, j->x.n[1], j, ACT_NONE);
        else if (j->act == ACT_SILU)
            group_pixels(y, x, j->x.n[1], j, ACT_SILU);
        else
            group_pixels(y, x, j->x.n[1], j, j->act);
    }
}

// Mean and gamma / standard deviation of each channel, from the sums of all rows.
static void group_scales(struct tensor sums, int64_t pixels, int64_t channels, const float *gamma, float eps,
                         float *mean, float *scale)
{
    int64_t groups = sums.n[1], size = channels / groups;
    double count = (double)sums.n[0] * (double)pixels * (double)size;
    for (int64_t g = 0; g < groups; g++) {
        double sum = 0, square = 0;
        for (int64_t r = 0; r < sums.n[0]; r++) {
            const double *s = (const double *)sums.data + r * sums.ld + g * 2;
            sum += s[0];
            square += s[1];
        }
        double m = sum / count, variance = square / count - m * m;
        double rstd = 1 / sqrt((variance > 0 ? variance : 0) + (double)eps);
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            mean[c] = (float)m;
            scale[c] = (float)(rstd * (double)gamma[c]);
        }
    }
}

void cpu_group_norm(struct device *d, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                    struct tensor beta, float eps, enum act act)
{
    const float *v[2];
    int64_t channels = x.n[2];
    if (!check_group_norm(&d->check, y, x, sums, gamma, beta) || tensor_count(x) == 0 ||
        !cpu_vectors(d, 2, (struct tensor[]){gamma, beta}, v) || !cpu_scratch(d, (size_t)channels * 2))
        return;
    float *mean = d->scratch[0].data, *scale = mean + channels;
    group_scales(sums, x.n[1], channels, v[0], eps, mean, scale);
    struct group_norm job = {y, x, mean, scale, v[1], act};
    cpu_rows(d, x.n[0], 2 * x.n[1] * channels, group_rows, &job);
}
