// kernels.h: the table of tensor operations. A model calls these and nothing else.
//
// Three backends fill the table: cpu (reference, float32), cuda, and dry, which computes nothing but checks every
// shape, counts operations and bytes, and so predicts cost. One process can hold devices of several backends.
//
// Contract, for every entry:
//  - Tensors are views in memory that the same device allocated (or, for the cpu backend, any host memory).
//  - Outputs do not overlap inputs unless the entry says "in place". Zero rows are legal everywhere and do nothing.
//  - Activations have the device's activation type (f32 on cpu). Weights come in f32, bf16 or f16, as in the file.
//    On devices that can, linear layers may be placed in 8 bits, as E4M3 (floats) or I8 (integers), with a factor for
//    each row: an output channel; they take activations of that type too, whose producers write each row's factor, its
//    largest magnitude / 448 or / 127.
//  - Errors are sticky: an operation on a failed device does nothing, and sync() reports the first failure. So a
//    forward pass reads like the paper's figure, and is checked once. dry reports shape mistakes the same way.
//  - An operation reads its inputs' rows alone unless it says otherwise; the ones that look across rows (attention,
//    conv2d, group_norm) are called through struct exec (worker/exec.h), which knows how rows are spread over ranks.
#ifndef DITFLEET_KERNELS_H
#define DITFLEET_KERNELS_H

#include "kernels/tensor.h"
#include "proto/err.h"

struct device; // each backend has its own
struct recording;
struct link;

enum act { ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_GELU_ERF, ACT_QUICK_GELU };
// silu x*sigmoid(x); gelu_tanh 0.5x(1+tanh(sqrt(2/pi)(x+0.044715x^3))); gelu_erf the exact one;
// quick_gelu x*sigmoid(1.702x).

// A linear layer whose outputs may come from several weights of a checkpoint (to_q, to_k, to_v as one product).
#define LINEAR_MAX_PARTS 4
struct linear {
    int parts;
    struct tensor w[LINEAR_MAX_PARTS]; // (n_i, k)
    struct tensor b[LINEAR_MAX_PARTS]; // (n_i), or none
    int64_t n, k;                      // n = sum of n_i
    int64_t of;                        // outputs of the layer of which this is a slice; 0: of none
    int64_t second;                    // bytes from the numbers of w[0], placed twice, to the others; 0: placed once
};

// The type that a layer asked for in this one is placed in: numbers of 8 bits want n and k to be multiples of 16.
static inline enum dtype linear_placed(const struct linear *w, enum dtype type, enum dtype activation)
{
    return dtype_quantised(type) && (w->n % 16 || w->k % 16) ? activation : type;
}

struct conv {
    struct tensor w; // (c_out, kh, kw, c_in): the channels-last layout, made from (c_out, c_in, kh, kw) when loaded
    struct tensor b; // (c_out)
};

struct attention_opts {
    float scale;        // multiplies q.k
    bool causal;        // query i sees keys 0..i; needs as many queries as keys
    struct tensor bias; // (heads, queries, keys) f32 added to the scaled scores, or none
    // In numbers of 8 bits where the device is faster so and there is neither bias nor causal: q and k as integers,
    // weights and values as E4M3. Loses about as much as the linear layers of a block do as I8.
    bool eight_bits;
};

struct device_options {
    int threads;           // cpu: threads an operation may use, 1 or more
    int gpu;               // cuda: which one, from 0, as the driver counts those it shows to this process
    enum dtype activation; // F32 (cpu has no other), BF16 or F16
    // cuda: a row of a product gets the same bits however many rows there are beside it, at some cost of speed: what
    // was fastest for a number of rows is not asked. cpu: so it is always, from 5 rows on.
    bool exact;
};

// What dry counted since it was opened.
struct kernel_cost {
    double flops;     // 2 for each multiply-add of linear, attention and conv2d
    double attention; // of these, attention's
    double bytes;     // each operand read or written once
    double copied;    // of these, copy's
    double row_bytes; // of these, of other operations without flops
    double calls;     // operations
    double codes;     // bytes of the largest input that a linear layer is to turn into 8 bits
};

// Adds what was counted between two readings.
static inline void kernel_cost_add(struct kernel_cost *to, const struct kernel_cost *now,
                                   const struct kernel_cost *before)
{
    to->flops += now->flops - before->flops;
    to->attention += now->attention - before->attention;
    to->bytes += now->bytes - before->bytes;
    to->copied += now->copied - before->copied;
    to->row_bytes += now->row_bytes - before->row_bytes;
    to->calls += now->calls - before->calls;
    to->codes = now->codes > to->codes ? now->codes : to->codes;
}

// ---- links: devices of several processes, of one host or of many, that send each other rows.
#define LINK_NAME_BYTES   128
#define LINK_KIND_BYTES   192
#define LINK_EXPORT_BYTES 2048

// Rows that go to the device of a rank, or come from it.
struct link_piece {
    int rank;
    struct tensor t;
};

// How far a link is; readable at any time from any thread.
struct link_state {
    uint64_t begun, done; // exchanges: queued by this rank, and over on its device
    const char *what;     // the first that is not over, as exchange was told; NULL: all are
    double seconds;       // the device spent in those that are over
    double waited;        // of these, waiting for others to come, as far as it is told apart
    bool direct;          // ranks have imported each other's memory
};

struct kernels {
    const char *name;
    // Type of activations unless the options of open ask for another; then the caller goes on with a copy of the table
    // in which this field says it.
    enum dtype activation;

    int (*open)(const struct device_options *options, struct device **out, struct err *err);
    void (*close)(struct device *d);
    // Waits for all work; returns the first failure since open.
    int (*sync)(struct device *d, struct err *err);
    // For a loop that may run ahead of the device, but by one round: waits for what was queued before the last pace.
    // Returns the first failure known so far.
    int (*pace)(struct device *d, struct err *err);
    void (*cost)(struct device *d, struct kernel_cost *out); // dry: what was counted; others: zeros

    // Memory of the device, 256-byte aligned; freed by free. dry hands out addresses that nobody may touch.
    int (*alloc)(struct device *d, size_t bytes, void **out, struct err *err);
    void (*free)(struct device *d, void *p);
    // Bytes of the device's own memory: free at present, by any process, and all. NULL: it computes in the host's.
    void (*memory)(struct device *d, size_t *available, size_t *total);
    // Host to device and back; host is contiguous: f32, converted on the way, for f32, bf16 and f16 tensors, else the
    // tensor's own type.
    void (*upload)(struct device *d, struct tensor dst, const void *host);
    void (*download)(struct device *d, void *host, struct tensor src);
    // *out = a weight in host memory where the device's operations can read it: the host tensor itself (cpu), or a
    // copy that the device owns until it is closed (cuda). A copy of two or more dimensions has the activation type.
    int (*place)(struct device *d, struct tensor host, struct tensor *out, struct err *err);
    // The same for a linear layer, whose parts may become one part there. type: E4M3, I8, or the activation type.
    // It gets linear_placed's. ERR_UNSUPPORTED: this device has no such type.
    // twice: of 8 bits, also rounded a second time, so that the mean of both is nearer to the weight than either: what
    // is rounded once errs the same way at every step of a loop, and that adds up.
    int (*place_linear)(struct device *d, struct linear *w, enum dtype type, bool twice, struct err *err);
    // Which of them linear layers take from here on; at first not the second. NULL: this backend places once.
    void (*take_second)(struct device *d, bool second);
    // Gives back a placed copy before the device is closed, after all work that reads it. Others: nothing to do.
    void (*displace)(struct device *d, struct tensor placed);
    // Placing may go on behind the caller's back, reading host memory until the next sync.

    // ---- recordings: a run of operations that is launched as one. NULL: this backend has none.
    // After record, operations are kept and not run, until recorded returns them. They must be of shapes that ran
    // before. NULL: could not be recorded; nothing ran, and the device goes on as if nothing had been asked.
    bool (*record)(struct device *d);
    struct recording *(*recorded)(struct device *d);
    // Runs them again on the same memory. False: that has moved since (scratch memory of the device grew); nothing ran.
    bool (*replay)(struct device *d, struct recording *r);
    void (*forget)(struct device *d, struct recording *r); // frees it

    // ---- links. NULL: this backend has none.
    // What ranks that are to be linked have to have in common: kind, the GPU and the libraries; and what each has for
    // itself: place, one GPU of one host. Texts of LINK_KIND_BYTES.
    void (*link_kind)(struct device *d, char *kind, char *place);
    // Draws a name for a new link, LINK_NAME_BYTES of it; one rank's, which all are given.
    int (*link_name)(void *name, struct err *err);
    // Joins; called by all ranks at once, once in a device's life. ERR_TIMEOUT: others did not come. Freed by unlink,
    // before the device is closed.
    int (*link)(struct device *d, const void *name, int rank, int ranks, int timeout_ms, struct link **out,
                struct err *err);
    void (*unlink)(struct link *l);
    // Pieces to and from ranks, oneself among them, in the order of the device's operations; can be recorded. Between
    // two ranks pieces match in order, in type, rows and row lengths; empty ones are left out. what: a name for it,
    // which stays.
    void (*exchange)(struct device *d, struct link *l, const char *what, int sends, const struct link_piece *send,
                     int recvs, const struct link_piece *recv);
    // From any thread. A failure of this rank's or another's that the link has noticed.
    int (*link_check)(struct link *l, struct err *err);
    void (*link_state)(struct link *l, struct link_state *out);
    // Memory from alloc that other ranks may write, for exchanges that need no library: what a rank tells of its own,
    // LINK_EXPORT_BYTES of it, goes to all. import: what all told, by rank; false: not here, and exchanges go as
    // before. Either all ranks have imported, or all have forgotten; and memory is freed only while they have. NULL:
    // there are none.
    void (*link_export)(struct link *l, void *to);
    bool (*link_import)(struct link *l, const void *all);
    void (*link_forget)(struct link *l);
    // While they have imported: bytes that a rank, which may be this one, has at its address `from` come to `to`, as
    // soon as what is queued so far is done, beside what is queued later; that rank has no part in it. Can be recorded.
    // at_once: or else where there is room between exchanges. fetched: what is queued from here on finds all of one
    // kind.
    void (*link_fetch)(struct device *d, struct link *l, int rank, const void *from, void *to, int64_t bytes,
                       bool at_once);
    void (*link_fetched)(struct device *d, struct link *l, bool at_once);
    // While they have imported: an exchange of nothing. What is queued from here on is done after what these ranks, who
    // all call it and of whom this is one, queued before. beside: what is fetched at once from here on is; all else
    // only after fetched, before which nothing more is exchanged.
    void (*link_meet)(struct device *d, struct link *l, int n, const int *ranks, bool beside);
    // While they have imported: attention whose results go straight to ranks: to[0] gets its first rows, and so on; t
    // is where that rank has it in its memory. It is all there when they have met next. False: not of these operands,
    // and nothing was done.
    bool (*link_attention)(struct device *d, struct link *l, int n, const struct link_piece *to, struct tensor q,
                           struct tensor k, struct tensor v, const struct attention_opts *opts);
    // From any thread: what waits for other ranks ends, whatever it has got; exchanges do nothing from here on.
    void (*link_abort)(struct link *l);

    // Time of each operation between start and end: each is called with an operation's name and milliseconds, in order.
    // Costs a little speed; not within a recording. NULL: this backend has none.
    void (*profile_start)(struct device *d);
    void (*profile_end)(struct device *d, void (*each)(void *arg, const char *op, double ms), void *arg);

    // ---- rows
    void (*copy)(struct device *d, struct tensor dst, struct tensor src); // same shape and type, any ld
    void (*zero)(struct device *d, struct tensor t);
    // y (m, n) = act(x (m, k) W^T + b); x may be E4M3 or I8 where W is
    void (*linear)(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act);
    void (*activate)(struct device *d, struct tensor x, enum act act);             // in place
    void (*add)(struct device *d, struct tensor x, struct tensor y);               // x += y
    void (*add_row)(struct device *d, struct tensor x, struct tensor row);         // x (m, n) += row (n)
    void (*mul)(struct device *d, struct tensor x, struct tensor y, enum act act); // x = act(x) * y: a gated layer
    void (*gate_add)(struct device *d, struct tensor x, struct tensor gate, struct tensor y); // x += gate (n) * y
    // y = (x - mean) / sqrt(var + eps) * gamma + beta, per row; gamma and beta (n) of any weight type, or none
    void (*layer_norm)(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, struct tensor beta,
                       float eps);
    // y = layer_norm(x) * (1 + scale) + shift; scale and shift (n), activation type (adaLN, Peebles & Xie 2023). y may
    // be E4M3 or I8.
    void (*modulate)(struct device *d, struct tensor y, struct tensor x, struct tensor scale, struct tensor shift,
                     float eps);
    // gate_add, then modulate of the result, in one pass: x += gate * update; y = modulate(x)
    void (*gate_add_modulate)(struct device *d, struct tensor x, struct tensor gate, struct tensor update,
                              struct tensor y, struct tensor scale, struct tensor shift, float eps);
    // y = x / sqrt(mean(x^2) + eps) * gamma (T5)
    void (*rms_norm)(struct device *d, struct tensor y, struct tensor x, struct tensor gamma, float eps);
    // In place on q and k (m, heads, dim): RMS norm over dim with gamma (dim), then rotation of the pairs
    // (2i, 2i+1) by the angles whose cosine and sine rope (m, dim/2, 2) f32 holds.
    void (*qk_norm_rope)(struct device *d, struct tensor q, struct tensor k, struct tensor gamma_q,
                         struct tensor gamma_k, float eps, struct tensor rope);
    // y (m, n) = table[ids[i]]; ids (m) i32, each within the table
    void (*embed)(struct device *d, struct tensor y, struct tensor table, struct tensor ids);

    // y (heads, queries, keys) f32 [h][i][j] = table[buckets[j - i + queries - 1]][h]; table (b, heads), buckets
    // (queries + keys - 1) i32: T5's position bias, a function of the distance alone
    void (*relative_bias)(struct device *d, struct tensor y, struct tensor table, struct tensor buckets);

    // ---- across rows
    // out (m, heads, dim) = softmax(scale q k^T + bias) v; q (m, heads, dim), k and v (s, heads, dim), m may differ
    // from s. All four may be strided views. Heads are independent.
    // A query that sees no key (s = 0, or a bias of -inf throughout) gets zeros.
    void (*attention)(struct device *d, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                      const struct attention_opts *opts);
    // Attention over some of the keys: also lse (m, heads) f32 = log of the sum of e^score over them, -inf for a query
    // that sees none. Not causal. NULL, as attention_merge: this backend has none.
    void (*attention_part)(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                           struct tensor v, const struct attention_opts *opts);
    // out (m, heads, dim) = attention over all keys from parts (n, m, heads, dim) and lse (n, m, heads) of n disjoint
    // sets of them: sum_i e^(lse_i - LSE) parts_i, LSE = log sum_i e^lse_i (Liu et al. 2023), added in the order of i.
    // A part of no keys adds nothing; a query that saw no key anywhere gets zeros.
    void (*attention_merge)(struct device *d, struct tensor out, struct tensor parts, struct tensor lse);
    // y (h, w, c_out) from x (h + kh - 1, w, c_in): the caller supplies the rows above and below (zeros at the
    // picture's edge), the operation pads kw/2 zero columns. Stride 1, kh and kw odd.
    void (*conv2d)(struct device *d, struct tensor y, struct tensor x, const struct conv *conv);
    // sums (h, groups, 2) f64 = sum and sum of squares of x (h, w, c) in each row and channel group
    void (*group_sums)(struct device *d, struct tensor sums, struct tensor x);
    // y = act(group norm of x (h, w, c)); sums (H, groups, 2) of all H rows of the picture, w and c as in x, added
    // in row order: the result does not depend on how rows were spread. y may be x.
    void (*group_norm)(struct device *d, struct tensor y, struct tensor x, struct tensor sums, struct tensor gamma,
                       struct tensor beta, float eps, enum act act);

    // ---- pictures (h, w, c)
    void (*upsample2x)(struct device *d, struct tensor y, struct tensor x); // nearest: y (2h, 2w, c)
    // latent (h, w, c) = tokens (h/2 * w/2, c * 4) / scale + shift; a token holds (c, dy, dx)
    void (*unpack_latents)(struct device *d, struct tensor latent, struct tensor tokens, float scale, float shift);
    // y (h, w, c) u8 = round(clamp(x * 0.5 + 0.5, 0, 1) * 255)
    void (*to_u8)(struct device *d, struct tensor y, struct tensor x);

    // ---- sampler
    void (*axpy)(struct device *d, struct tensor x, float a, struct tensor y); // x += a * y
    // out = negative + scale * (positive - negative); out may be either
    void (*cfg_combine)(struct device *d, struct tensor out, struct tensor negative, struct tensor positive,
                        float scale);
};

extern const struct kernels kernels_cpu;
extern const struct kernels kernels_dry;

// Fills *w from 1 to LINEAR_MAX_PARTS weights (n_i, k) and biases (b NULL: none). Shapes must agree (ERR_INVALID).
int linear_init(struct linear *w, int parts, const struct tensor *weights, const struct tensor *biases,
                struct err *err);
// Of a layer whose outputs are `runs` runs of the same length, as q, k and v are, count outputs of each, from start on;
// w's parts are one, or as many as runs.
struct linear linear_slice(const struct linear *w, int runs, int64_t start, int64_t count);

#endif
