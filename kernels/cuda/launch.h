// launch.h: the kernels of this folder as plain functions: what host code (C) may ask of device code (CUDA C++).
//
// A launch checks nothing: operands were checked before, and hold one element or more. Errors are left in
// cudaGetLastError. Tensors may be strided views; accesses are 16 bytes wide where every operand is aligned so.
#ifndef DITFLEET_CUDA_LAUNCH_H
#define DITFLEET_CUDA_LAUNCH_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

// ---- pointwise.cu
enum point { POINT_ADD, POINT_MUL, POINT_AXPY, POINT_GATE_ADD, POINT_CFG, POINT_ACT };
struct points {
    enum point op;
    enum act act;          // ACT: act(x + row); MUL: act(x) * y
    struct tensor x, y, z; // z: positive of CFG, whose negative is y
    struct tensor row;     // (row_n): gate, or what ACT adds; or none. Any weight type
    int64_t row_n;         // column i of x meets row[i % row_n]
    float a;
};
void launch_points(cudaStream_t s, const struct points *p);
// dst = src, other types and other strides allowed between f32, bf16 and f16
void launch_convert(cudaStream_t s, struct tensor dst, struct tensor src);
void launch_copy(cudaStream_t s, struct tensor dst, struct tensor src); // src none: zeros
// Ids outside the table give zeros and set *bad to 1.
void launch_embed(cudaStream_t s, struct tensor y, struct tensor table, struct tensor ids, int *bad);
void launch_relative_bias(cudaStream_t s, struct tensor y, struct tensor table, struct tensor buckets, int *bad);
void launch_upsample2x(cudaStream_t s, struct tensor y, struct tensor x);
void launch_unpack_latents(cudaStream_t s, struct tensor latent, struct tensor tokens, float scale, float shift);
void launch_to_u8(cudaStream_t s, struct tensor y, struct tensor x);

// ---- norm.cu
// y = (x - mean) / sqrt(var + eps) * (gamma + one) + beta; without centred, mean is 0 and var the mean square
void launch_norm(cudaStream_t s, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta, float one,
                 float eps, bool centred);
// x += gate * update where update is given; y = (x - mean) / sqrt(var + eps) * (scale + 1) + shift, y of x's type or
// E4M3 or I8. False: a type, width or address it is not made for, and nothing was done.
struct modulation {
    struct tensor x, gate, update, y, scale, shift;
    float eps;
};
bool launch_modulate(cudaStream_t s, const struct modulation *m);
void launch_qk_norm_rope(cudaStream_t s, struct tensor q, struct tensor k, struct tensor gamma_q, struct tensor gamma_k,
                         float eps, struct tensor rope);
void launch_group_sums(cudaStream_t s, struct tensor sums, struct tensor x);
// mean and scale (c) f32: of each channel, scale = gamma / sqrt(var + eps); pixels: of a row
void launch_group_scales(cudaStream_t s, float *mean, float *scale, struct tensor sums, int64_t pixels,
                         struct tensor gamma, float eps);
// y = act((x - mean) * scale + beta)
void launch_group_apply(cudaStream_t s, struct tensor y, struct tensor x, const float *mean, const float *scale,
                        struct tensor beta, enum act act);

// ---- digest.cu
// *sum (zero before) += a number for each 16 bits of y, by its value and its place: equal for equal bits, and for
// others as good as never. y: batches y_stride apart, of rows `row` apart, of so many columns; all in units of 16 bits.
struct bits {
    const void *y;
    int64_t batch, rows, columns, row, stride;
};
void launch_digest(cudaStream_t s, const struct bits *b, unsigned long long *sum);

// ---- quant.cu
// y E4M3 or I8 (m, n) and y.scale (m) from x (m, n) f32, bf16 or f16: a row's factor is its largest magnitude / 448 or
// / 127, or 1 for a row of zeros. What is not finite: see codes.cuh.
void launch_quantise(cudaStream_t s, struct tensor y, struct tensor x);
// again (m, n), as y lies, of y's type and with its factors: rounded so that the mean of it and y, which x was rounded
// to before, is nearer to x than y is, or y.
void launch_quantise_again(cudaStream_t s, void *again, struct tensor y, struct tensor x);
// y (m, n) f32, bf16 or f16 = the numbers of x (m, n) E4M3 or I8 without their factors, which all three hold exactly
void launch_codes(cudaStream_t s, struct tensor y, struct tensor x);
// y (m, n) = act(sums (m, n) * x_scale (m) * w_scale (n) + bias); sums f32, without gaps, 16-byte aligned
void launch_factored(cudaStream_t s, struct tensor y, const float *sums, const float *x_scale, const float *w_scale,
                     struct tensor bias, enum act act);

// ---- product.cu: products for which no library has an engine, of any type and stride
// y[b] (m, n) = x[b] (m, k) w[b]; w's element (k, n) lies at k * w_k + n * w_n
struct plain_product {
    int64_t m, n, k, batch;
    const void *x, *w;
    void *y;
    enum dtype x_type, w_type, y_type;
    int64_t x_ld, y_ld, w_k, w_n;
    int64_t x_stride, w_stride, y_stride; // elements from one product of the batch to the next
};
void launch_product(cudaStream_t s, const struct plain_product *p);
void launch_conv(cudaStream_t s, struct tensor y, struct tensor x, struct tensor w, struct tensor b);

// ---- softmax.cu
// scores (heads, rows, keys) f32, rows of ld, become softmax(scale * scores + bias) of another activation type in their
// place: row r of them begins where row r of the scores did. 16-byte aligned, ld a multiple of 4; columns from keys to
// ld become 0. first: number of the first query (causal), whose bias row is at bias.
struct softmax {
    float *scores;
    enum dtype type; // of the result
    int64_t heads, rows, keys, ld;
    float scale;
    bool causal;
    int64_t first;
    float *lse; // (queries, heads) rows of lse_ld: log of a query's sum of e^score, -inf without a key; or NULL
    int64_t lse_ld;
    const float *bias;           // of head 0 and query `first`, or NULL
    int64_t bias_head, bias_row; // elements from one head, and one query, to the next
};
void launch_softmax(cudaStream_t s, const struct softmax *p);
// y (n, m) f32 = x (m, n) f32, which has no gaps; x NULL: value
void launch_turn(cudaStream_t s, struct tensor y, const float *x, float value);
// The table's attention_merge.
void launch_merge(cudaStream_t s, struct tensor out, struct tensor parts, struct tensor lse);

// ---- link.cu
struct link_clock { // in the device's memory
    uint64_t began_ns, busy_ns, waited_ns, done;
};
struct link_mark { // in the host's
    volatile uint64_t done, busy_ns, waited_ns;
    volatile int give_up; // the host's word to kernels that wait
};
// The beginning or the end of an exchange: at its end one more is done, and the time since its beginning is added.
void launch_link_mark(cudaStream_t s, struct link_clock *clock, struct link_mark *mark, bool end);

// ---- peers.cu
#define DEVICE_BLOCKS  15                // pieces of a device's memory that others may write
#define DEVICE_GRANULE ((size_t)2 << 20) // no two of them share what the driver maps at once
enum { PEERS = 8, PEER_SLOTS = 8, PEER_PIECES = 40, PEER_CHUNK = 32768 };
struct peer_mail { // where a piece is to go, in the receiver's addresses
    uint64_t address;
    int64_t ld; // bytes
};
struct link_board { // written by the others
    struct peer_mail mail[PEERS][PEER_SLOTS];
    uint64_t ready[PEERS], done[PEERS]; // messages: that a receiver waits for; that a sender has delivered
};
struct link_counts { // messages so far, each way; blocks of this exchange that are through
    uint64_t in[PEERS], out[PEERS];
    unsigned finished;
};
struct peer_map { // a block of another rank, and where this process sees it
    uint64_t base, bytes;
    void *mapped;
};
struct peer_rows {
    char *at;
    int64_t ld, rows, bytes; // bytes of a row, and from one to the next
};
struct peer_send {
    struct peer_rows from, to; // to: of oneself, else found out when it runs
    short peer, slot;
    unsigned end; // chunks of this piece and those before it
};
struct peer_recv {
    struct peer_rows to;
    short peer, slot;
};
struct peer_exchange {
    int rank, ranks, sends, recvs;
    unsigned from, to, chunks; // sets of ranks
    struct link_board *mine, *theirs[PEERS];
    struct link_counts *counts;
    const struct peer_map *map; // (PEERS, DEVICE_BLOCKS)
    struct link_clock *clock;
    struct link_mark *mark;
    struct peer_send send[PEER_PIECES];
    struct peer_recv recv[PEER_PIECES];
};
void launch_peer_exchange(cudaStream_t s, const struct peer_exchange *x, int processors);
struct peer_meeting { // an exchange of nothing
    int rank;
    unsigned with; // set of ranks
    bool beside;   // nobody waits for its end: its time does not count
    struct link_board *mine, *theirs[PEERS];
    struct link_counts *counts;
    struct link_clock *clock;
    struct link_mark *mark;
};
void launch_peer_meeting(cudaStream_t s, const struct peer_meeting *m);

// ---- flash.cu
// The table's attention, or where lse is given attention_part, in bf16 or f16, with heads of a multiple of 8 numbers up
// to 128, one key or more, rows on 16-byte boundaries and a scale from 1e-6 to 1e6. A bias beyond f32's range times the
// scale counts as infinite. False: other operands, and nothing was done.
bool launch_flash(cudaStream_t s, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                  struct tensor v, const struct attention_opts *opts);

// ---- hopper/flash16.cu, for compute capability 9.0 alone, as what follows
enum { HOPPER_HEAD = 128 };
struct attention_out { // where results go: rows of all heads, one tensor after the other
    int n;
    struct tensor t[PEERS];
};
// As launch_flash, without mask and bias: heads of HOPPER_HEAD, one key or more, rows on 16-byte boundaries, a scale
// above 0. processors: as many as it shall use. room: flash_hopper_room(processors, q, k) bytes, zeros at first and
// then as it was left: what is left over after each processor has had its share is split among them; NULL: it is not,
// and a query's result does not depend on how many there are. False: other operands, and nothing was done.
size_t flash_hopper_room(int processors, struct tensor q, struct tensor k);
bool launch_flash16(cudaStream_t s, int processors, const struct attention_out *out, struct tensor lse, struct tensor q,
                    struct tensor k, struct tensor v, float scale, void *room);

// ---- hopper/flash8.cu
// The same in numbers of 8 bits, q and k as integers, weights and values as E4M3; heads of a multiple of 8 numbers up
// to HOPPER_HEAD. scratch: flash8_scratch(q, k) bytes.
size_t flash8_scratch(struct tensor q, struct tensor k);
bool launch_flash8(cudaStream_t s, int processors, const struct attention_out *out, struct tensor lse, struct tensor q,
                   struct tensor k, struct tensor v, float scale, void *scratch, void *room);

// ---- hopper/linear8.cu
// y (m, n) bf16 or f16 = act(x w^T + bias); x (m, k) and w (n, k) I8 with their factors; n a multiple of 8, k of 16;
// bias of y's type. Or w is (run, k), the first of several that lie `apart` rows from each other, as do their factors
// and biases, and n of them all. room: linear8_room(processors, m, n, k) bytes, zeros at first and then as it was left:
// what is left over after each processor has had its share is split among them; NULL: it is not; the result is the
// same. False: other operands, or another activation than none and gelu_tanh, and nothing was done.
size_t linear8_room(int processors, int64_t m, int64_t n, int64_t k);
bool launch_linear8(cudaStream_t s, int processors, struct tensor y, struct tensor x, struct tensor w,
                    struct tensor bias, int64_t apart, enum act act, void *room);

#endif
