// check.h: what each operation of kernels.h asks of its operands, written once for every backend.
//
// A check returns true when the operation may run. Otherwise the device has failed, now or before: the first failure
// is kept and names the operation, what it needs and the shapes it got.
#ifndef DITFLEET_CHECK_H
#define DITFLEET_CHECK_H

#include "kernels/kernels.h"

struct check {
    enum dtype activation;
    bool memory;        // operands must have an address (dry: need not)
    bool quantised;     // the device computes with E4M3 and I8
    struct err failure; // code 0: none yet
};

// Records a failure found later than by shape; returns false. The first one stays.
bool check_fail(struct check *c, enum err_code code, const char *format, ...) __attribute__((format(printf, 3, 4)));
// The answer of sync().
int check_report(const struct check *c, struct err *err);

bool check_transfer(struct check *c, const char *op, struct tensor t, const void *host);
bool check_copy(struct check *c, struct tensor dst, struct tensor src);
bool check_zero(struct check *c, struct tensor t);
bool check_linear(struct check *c, struct tensor y, struct tensor x, const struct linear *w);
bool check_activate(struct check *c, struct tensor x);
bool check_pair(struct check *c, const char *op, struct tensor x, struct tensor y); // add, mul, axpy
bool check_add_row(struct check *c, struct tensor x, struct tensor row);
bool check_gate_add(struct check *c, struct tensor x, struct tensor gate, struct tensor y);
bool check_layer_norm(struct check *c, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta);
bool check_modulate(struct check *c, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift);
bool check_gate_add_modulate(struct check *c, struct tensor x, struct tensor gate, struct tensor update,
                             struct tensor y, struct tensor scale, struct tensor shift);
bool check_rms_norm(struct check *c, struct tensor y, struct tensor x, struct tensor gamma);
bool check_qk_norm_rope(struct check *c, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                        struct tensor rope);
bool check_embed(struct check *c, struct tensor y, struct tensor table, struct tensor ids);
bool check_relative_bias(struct check *c, struct tensor y, struct tensor table, struct tensor buckets);
bool check_attention(struct check *c, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                     const struct attention_opts *opts);
bool check_attention_part(struct check *c, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                          struct tensor v, const struct attention_opts *opts);
bool check_attention_merge(struct check *c, struct tensor out, struct tensor parts, struct tensor lse);
bool check_conv2d(struct check *c, struct tensor y, struct tensor x, const struct conv *conv);
bool check_group_sums(struct check *c, struct tensor sums, struct tensor x);
bool check_group_norm(struct check *c, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                      struct tensor beta);
bool check_upsample2x(struct check *c, struct tensor y, struct tensor x);
bool check_unpack_latents(struct check *c, struct tensor latent, struct tensor tokens);
bool check_to_u8(struct check *c, struct tensor y, struct tensor x);
bool check_cfg_combine(struct check *c, struct tensor out, struct tensor negative, struct tensor positive);

#endif
