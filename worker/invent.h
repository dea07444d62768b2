// invent.h: weights, token ids and configurations that are made up where they are used, so that an architecture runs at
// its real size with no checkpoint: for measuring, not for pictures.
#ifndef DITFLEET_WORKER_INVENT_H
#define DITFLEET_WORKER_INVENT_H

#include "kernels/tensor.h"
#include "proto/err.h"

// One block of normally distributed bf16 numbers, standard deviation 0.02, none of them zero. Every tensor is a window
// into it, at a place that its name chooses: billions of weights cost no more memory than the largest of them.
struct invention;

// room: bytes of the largest tensor; threads: how many make the block. The same numbers on every machine. Freed by
// invention_free after all that points into it.
int invention_new(size_t room, int threads, struct invention **out, struct err *err);
void invention_free(struct invention *v);

// The window of a tensor of this shape; read only. ERR_INVALID: larger than the room.
int invention_tensor(const struct invention *v, const char *name, int dims, const int64_t *n, struct tensor *out,
                     struct err *err);

// ids[n], each below the vocabulary, that depend on the text; the last one is vocabulary - 1, where end of text is.
void invent_ids(const char *text, int64_t vocabulary, int32_t *ids, int64_t n);

// ---- architectures: the configurations of models that are known by name

// The names, NULL at the end.
extern const char *const architecture_names[];
// Writes the architecture's configuration files, laid out as in a diffusers directory, into dir, which exists.
// *largest: bytes of its largest tensor. ERR_INVALID: no such name, and which there are; or what is there already,
// which stays. On failure nothing is left.
int architecture_write(const char *name, const char *dir, size_t *largest, struct err *err);
// Removes what architecture_write put there; dir stays.
void architecture_remove(const char *dir);

#endif
