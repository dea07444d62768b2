// device.h: what the host files of the cuda backend share: the device and its scratch memory.
#ifndef DITFLEET_CUDA_DEVICE_H
#define DITFLEET_CUDA_DEVICE_H

#include <cublasLt.h>
#include <cudnn.h>

#include "kernels/check.h"
#include "kernels/cuda/launch.h"

// Memory kept between operations and grown when one needs more. Work on the stream is in order, so the next operation
// may write it as soon as it is queued.
enum slot {
    SLOT_LIBRARY,
    SLOT_SCORES,
    SLOT_OPERAND,
    SLOT_QUANTISED,
    SLOT_LINK,
    SLOT_PARTS,
    SLOT_SUMS,
    SLOT_DIGEST,
    SLOTS
}; // of cuBLASLt and cuDNN; of attention, its numbers of 8 bits, and sums in f32; a converted operand; one converted to
   // E4M3; rows on their way; parts of an attention (flash_hopper_room) and of a product (linear8_room),
   // who both count on what they left there; tune.c's digest

struct device {
    struct check check;
    int gpu, processors, capability; // capability: ten times its number
    enum dtype type;                 // of activations
    bool exact;                      // as device_options has it
    bool second;                     // as take_second has it
    cudaStream_t stream;
    cublasLtHandle_t blas;
    cudnnHandle_t dnn;
    struct {
        void *data;
        size_t bytes;
    } scratch[SLOTS];
    uint64_t scratch_moves, recording_memory; // counts blocks that moved; the count when the recording began
    struct profile *profile;                  // record.c; NULL: none goes on
    cudaEvent_t pace[2];
    uint64_t paces;
    int *bad;      // in host memory that kernels write: 1 when an id was outside its table
    void **placed; // weights
    size_t n_placed, room_placed;
    struct loader *loader;     // loader.c: brings them; NULL until there are some
    struct products *products; // product.c: algorithms by shape
    struct plans *plans;       // graph.c: cuDNN plans by shape
    struct link *link;         // link.c; NULL: this device is alone
    struct {
        void *base;
        size_t bytes;
    } blocks[DEVICE_BLOCKS]; // from alloc
    int untracked;           // those that found no place there
};

// True when e is no error; else the device fails, naming the operation.
bool cuda_ok(struct device *d, cudaError_t e, const char *op);
// After launches: what they left in cudaGetLastError. op is its name in profiles.
bool cuda_launched(struct device *d, const char *op);
// At least `bytes` of the slot, zeros when it is new; NULL: the device has failed.
void *cuda_scratch(struct device *d, enum slot slot, size_t bytes);
// Before an operation: makes the device's GPU the calling thread's, and waits for weights that are still on their way.
void cuda_enter(struct device *d);
// Whether the stream is being captured into a graph: then nothing may be measured or allocated.
bool cuda_capturing(const struct device *d);

// Whether this GPU runs what is in hopper/.
static inline bool cuda_hopper(const struct device *d)
{
    return d->capability == 90;
}

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// The largest power of two up to 16 that divides the address and the stride in bytes.
static inline int64_t alignment_of(const void *p, int64_t stride)
{
    uintptr_t bits = (uintptr_t)p | (uintptr_t)stride | 16;
    return (int64_t)(bits & -bits);
}

// ---- tensors as rows
static inline bool is_half(enum dtype type)
{
    return type == DT_BF16 || type == DT_F16;
}

static inline int64_t rows_of(struct tensor t) // a vector is one row
{
    return t.dims == 1 ? 1 : t.n[0];
}

// Rows from.. of t as a matrix of `row` columns.
static inline struct tensor matrix_rows(struct tensor t, int64_t row, int64_t from, int64_t rows)
{
    struct tensor m = tensor_2d((char *)t.data + from * t.ld * (int64_t)dtype_size(t.dtype), t.dtype, rows, row);
    m.ld = t.dims == 1 ? row : t.ld;
    m.scale = t.scale ? t.scale + from : NULL;
    return m;
}

// ---- device.c
int cuda_alloc(struct device *d, size_t bytes, void **out, struct err *err);

// ---- place.c
int cuda_place(struct device *d, struct tensor host, struct tensor *out, struct err *err);
int cuda_place_linear(struct device *d, struct linear *w, enum dtype type, bool twice, struct err *err);
void cuda_displace(struct device *d, struct tensor placed);

// ---- product.c
// y[b] (m, n) = act(x[b] (m, k) w[b] + bias): through cuBLASLt, or a plain kernel where it has no algorithm. x and w
// have one type; y this one or f32. E4M3, for cuda_product_library alone: y of any type.
struct product {
    int64_t m, n, k, batch;
    const void *x, *w;
    void *y;
    enum dtype type, y_type;
    bool w_rows; // w is (k, n), rows of w_ld; else (n, k)
    int64_t x_ld, w_ld, y_ld, x_stride, w_stride, y_stride;
    struct tensor bias;  // (n) or none, any weight type
    int64_t bias_stride; // of a batch with bias
    enum act act;
    const float *x_scale, *w_scale; // E4M3: factors (m) and (n), both 16-byte aligned; or NULL: the bare sums
    // n of the product whose bits its outputs are to have, on an exact device; 0: its own.
    int64_t of;
};
void cuda_product(struct device *d, const struct product *p);
// The epilogue that does act(. + bias), or -1 where cuda_epilogue_after must.
int64_t cuda_epilogue(const struct product *p);
void cuda_epilogue_after(struct device *d, const struct product *p); // y = act(y + bias)
// One way of doing it alone; false: the library has no algorithm for it, and nothing was done. fast: see product.h.
bool cuda_product_library(struct device *d, const struct product *p, int64_t epilogue, bool fast);
struct products *products_new(void); // NULL: no memory
void products_free(struct products *p);
void products_keep(struct products *p); // tune.c: what was measured, on disk
// tune.c: what is known on disk of this GPU, driver and library; NULL: no memory for it.
struct algo_cache;
struct algo_cache *cuda_cache(const struct device *d, const char *library, size_t version, int key_n);
// ---- linear.c
void cuda_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act);
void cuda_take_second(struct device *d, bool second);

// ---- record.c
bool cuda_record(struct device *d);
struct recording *cuda_recorded(struct device *d);
bool cuda_replay(struct device *d, struct recording *r);
void cuda_forget(struct device *d, struct recording *r);
void cuda_profile_start(struct device *d);
void cuda_profile_end(struct device *d, void (*each)(void *arg, const char *op, double ms), void *arg);
void cuda_profile_mark(struct device *d, const char *op); // op has been launched; a profile goes on

// ---- link.c
enum { LINK_HOST = 40 };
void cuda_host_of(char text[LINK_HOST]); // of one host, as long as it runs; "": not known
void cuda_link_kind(struct device *d, char *kind, char *place);
int cuda_link_name(void *name, struct err *err);
int cuda_link(struct device *d, const void *name, int rank, int ranks, int timeout_ms, struct link **out,
              struct err *err);
void cuda_unlink(struct link *l);
void cuda_exchange(struct device *d, struct link *l, const char *what, int sends, const struct link_piece *send,
                   int recvs, const struct link_piece *recv);
int cuda_link_check(struct link *l, struct err *err);
void cuda_link_state(struct link *l, struct link_state *out);
void cuda_link_abort(struct link *l);
void cuda_link_export(struct link *l, void *to);
bool cuda_link_import(struct link *l, const void *all);
void cuda_link_forget(struct link *l);
void cuda_link_fetch(struct device *d, struct link *l, int rank, const void *from, void *to, int64_t bytes,
                     bool at_once);
void cuda_link_fetched(struct device *d, struct link *l, bool at_once);
void cuda_link_meet(struct device *d, struct link *l, int n, const int *ranks, bool beside);
bool cuda_link_attention(struct device *d, struct link *l, int n, const struct link_piece *to, struct tensor q,
                         struct tensor k, struct tensor v, const struct attention_opts *opts);
// For record.c. What was exchanged since begin is in a recording, which is over now or was given up; each replay is one
// more round of it.
struct link_round;
void cuda_link_record(struct link *l);
struct link_round *cuda_link_recorded(struct link *l); // NULL: nothing was exchanged, or no memory
void cuda_link_replay(struct link *l, const struct link_round *round);
// ---- attention.c
void cuda_attention(struct device *d, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                    const struct attention_opts *opts);
// Of one query and one key or more, to several places; false: not on this GPU, or of these operands.
bool cuda_attention_out(struct device *d, const struct attention_out *out, struct tensor q, struct tensor k,
                        struct tensor v, const struct attention_opts *opts);
void cuda_attention_part(struct device *d, struct tensor out, struct tensor lse, struct tensor q, struct tensor k,
                         struct tensor v, const struct attention_opts *opts);
void cuda_attention_merge(struct device *d, struct tensor out, struct tensor parts, struct tensor lse);
// ---- conv.c
void cuda_conv2d(struct device *d, struct tensor y, struct tensor x, const struct conv *conv);

#endif
