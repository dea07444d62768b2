// weights.h: the tensors of one part of a checkpoint, memory-mapped from safetensors files.
//
// A part is a folder with NAME.safetensors, or NAME.safetensors.index.json and its shards; a FLUX.1 transformer may be
// one file of any name, and in it have its authors' names (worker/original.h). Nothing is read until a
// tensor's pages are touched. Every offset is checked against the file; a tensor asked for must have the shape the
// model's configuration implies, or the error names tensor, file, what is there and what was expected.
#ifndef DITFLEET_WORKER_WEIGHTS_H
#define DITFLEET_WORKER_WEIGHTS_H

#include "kernels/kernels.h"
#include "worker/plan.h"

struct weights;
struct invention;
struct residency;

// Where a model's weights are to be: a device that computes with them. NULL, or k NULL: where the files are mapped.
struct home {
    const struct kernels *k;
    struct device *d;                  // outlives the model
    enum dtype codes;                  // E4M3 or I8: linear layers that the model offers for it become so,
    bool twice;                        // and are placed twice (place_linear in kernels.h), where the model finds room
    const struct invention *invention; // not NULL: no file is opened, weights are windows into it (worker/invent.h)
    struct residency *residency;       // not NULL: it says which parts are there, and when (worker/residency.h)
    bool plan;                         // shapes and types alone are wanted: k computes nothing
    struct plan held;                  // of plan_hold: how the ranks of a group have transformers, and
    int rank;                          // which of them this is. weights PLAN_REPLICATED: all of them
    int64_t room;                      // bytes of the host's memory that sharded weights may take; 0: not known
};

// stem: "diffusion_pytorch_model" or "model". What is fetched is placed in the home (NULL: none), and displaced by
// weights_free, which frees w; the tensors point into it.
int weights_open(const char *dir, const char *stem, const struct home *home, struct weights **out, struct err *err);
// The same of a transformer in one file. Its tensors are asked for by diffusers' names, whichever the file has; errors
// name them as the file does.
int weights_open_file(const char *path, const struct home *home, struct weights **out, struct err *err);
// Whether the linear layers fetched from here on may be of 8 bits where the home asks for it; at first they may not.
void weights_offer_codes(struct weights *w, bool offered);
void weights_free(struct weights *w);
bool weights_has(const struct weights *w, const char *name);
// Refuses a tensor by this name: a configuration whose key stops short of it would run half a model.
int weights_refuse(const struct weights *w, const char *key, struct err *err, const char *name_format, ...)
    __attribute__((format(printf, 4, 5)));
// After everything is fetched: refuses what was not, with its name.
int weights_refuse_rest(const struct weights *w, struct err *err);

// ---- weights that not every rank has (worker/ownership.h)

// Weights of all ranks, of a block, of a modulation.
enum weights_kind { WEIGHTS_COMMON, WEIGHTS_BLOCK, WEIGHTS_ONCE, WEIGHTS_KINDS };
// Buffers that gathered blocks use in turns; bytes: a tensor in them begins at a multiple.
enum { WEIGHTS_BUFFERS = 2, WEIGHTS_GRAIN = 256 };

// Before anything is fetched: w is of so many blocks and modulations.
int weights_divide(struct weights *w, int blocks, int once, struct err *err);
// What is fetched from here on, at first WEIGHTS_COMMON, index 0. Where the home has some of it elsewhere, what fetches
// fill in stays where it is until weights_settle, and is good from then on.
void weights_belong(struct weights *w, enum weights_kind kind, int index);
// After everything is fetched: places what this rank has. The tensors of what it has not have no data; those of sharded
// blocks point to where the blocks are gathered. ERR_NO_MEMORY: beyond the home's room, with the numbers.
int weights_settle(struct weights *w, struct err *err);
int weights_count(const struct weights *w, enum weights_kind kind);
int64_t weights_unit_bytes(const struct weights *w, enum weights_kind kind, int index);
// Of a block that was settled sharded, on the device; NULLs of others.
struct weights_sharded {
    const void *piece; // this rank's bytes
    void *buffer;      // of the block, gathered
};
struct weights_sharded weights_sharded(const struct weights *w, int block);

int64_t weights_bytes(const struct weights *w);        // of all tensors; of invented ones, those fetched so far
int64_t weights_placed_bytes(const struct weights *w); // of what was placed, on its device
// Every tensor as the files have it, in the order of names; file: its path.
typedef void weights_on_tensor(void *arg, const char *file, const char *name, struct tensor t);
void weights_each(const struct weights *w, weights_on_tensor *on_tensor, void *arg);
// Fingerprint of names, types, shapes, sizes and 64 sampled pages a file: tells checkpoints apart without reading
// all of them.
void weights_fingerprint(const struct weights *w, uint8_t sha256[32]);

// Writes all tensors (of invented ones, those fetched so far) as files have them, before anything was re-laid or
// placed, to dir/stem.safetensors, straight from where they are. ERR_INVALID: it exists, and stays. What could not be
// written whole is removed.
int weights_save(const struct weights *w, const char *dir, const char *stem, struct err *err);

// *out: the tensor called by the printf-style name, of exactly this shape (dims 1 to 4), type f32, bf16 or f16.
int weights_get(struct weights *w, struct tensor *out, int dims, int64_t n0, int64_t n1, int64_t n2, int64_t n3,
                struct err *err, const char *name_format, ...) __attribute__((format(printf, 9, 10)));

// One linear layer from parts prefix.names[i].weight (n[i], k) and, when bias, prefix.names[i].bias.
int weights_linear(struct weights *w, struct linear *out, const char *prefix, int parts, const char *const *names,
                   const int64_t *n, int64_t k, bool bias, struct err *err);
// The common case: one weight, with bias or without.
int weights_linear1(struct weights *w, struct linear *out, int64_t n, int64_t k, bool bias, struct err *err,
                    const char *name_format, ...) __attribute__((format(printf, 7, 8)));
// NAME.weight (c_out, c_in, size, size) re-laid channels last in memory that w owns, and NAME.bias.
int weights_conv(struct weights *w, struct conv *out, int64_t c_out, int64_t c_in, int size, struct err *err,
                 const char *name_format, ...) __attribute__((format(printf, 7, 8)));
// NAME.weight and NAME.bias, (n) each.
int weights_norm(struct weights *w, struct tensor *gamma, struct tensor *beta, int64_t n, struct err *err,
                 const char *name_format, ...) __attribute__((format(printf, 6, 7)));

#endif
