// cpu.h: what the files of the cpu backend share: the device, its threads and their scratch memory.
#ifndef DITFLEET_CPU_H
#define DITFLEET_CPU_H

#include "kernels/check.h"
#include "kernels/cpu/pool.h"

// Memory of one thread, kept between operations and grown when an operation needs more.
struct scratch {
    float *data; // 64-byte aligned
    size_t count;
};

struct device {
    struct check check;
    struct pool *pool;
    int threads;
    struct scratch *scratch; // (threads)
    struct scratch vectors;  // row vectors converted to f32 for the running operation
};

// Sees to count floats for each thread (scratch[thread].data). False: the device has failed.
bool cpu_scratch(struct device *d, size_t count);
// Vectors of an operation as f32: out[i] points to list[i]'s numbers, NULL for none. False: the device has failed.
bool cpu_vectors(struct device *d, int vectors, const struct tensor *list, const float **out);

// Runs fn on blocks of rows that together cover 0..rows-1; work is about the number of floats a row touches.
typedef void (*cpu_rows_fn)(const void *ctx, int64_t from, int64_t to);
void cpu_rows(struct device *d, int64_t rows, int64_t work, cpu_rows_fn fn, const void *ctx);

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

// The entries of the table, by file.
// product.c
void cpu_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act);
// conv.c
void cpu_conv2d(struct device *d, struct tensor y, struct tensor x, const struct conv *conv);
// attention.c
void cpu_attention(struct device *d, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                   const struct attention_opts *opts);
void cpu_attention_part(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                        struct tensor v, const struct attention_opts *opts);
void cpu_attention_merge(struct device *d, struct tensor out, struct tensor parts, struct tensor lse);
// norm.c
void cpu_layer_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta,
                    float eps);
void cpu_modulate(struct device *d, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift,
                  float eps);
void cpu_gate_add_modulate(struct device *d, struct tensor x, struct tensor gate, struct tensor update, struct tensor y,
                           struct tensor scale, struct tensor shift, float eps);
void cpu_rms_norm(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, float eps);
void cpu_qk_norm_rope(struct device *d, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                      float eps, struct tensor rope);
void cpu_group_sums(struct device *d, struct tensor sums, struct tensor x);
void cpu_group_norm(struct device *d, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                    struct tensor beta, float eps, enum act act);
// pointwise.c
void cpu_activate(struct device *d, struct tensor x, enum act act);
void cpu_add(struct device *d, struct tensor x, struct tensor y);
void cpu_add_row(struct device *d, struct tensor x, struct tensor row);
void cpu_mul(struct device *d, struct tensor x, struct tensor y, enum act act);
void cpu_gate_add(struct device *d, struct tensor x, struct tensor gate, struct tensor y);
void cpu_axpy(struct device *d, struct tensor x, float a, struct tensor y);
void cpu_cfg_combine(struct device *d, struct tensor out, struct tensor negative, struct tensor positive, float scale);
void cpu_embed(struct device *d, struct tensor y, struct tensor table, struct tensor ids);
void cpu_relative_bias(struct device *d, struct tensor y, struct tensor table, struct tensor buckets);
void cpu_upsample2x(struct device *d, struct tensor y, struct tensor x);
void cpu_unpack_latents(struct device *d, struct tensor latent, struct tensor tokens, float scale, float shift);
void cpu_to_u8(struct device *d, struct tensor y, struct tensor x);

#endif
