// weights_internal.h: what the files of weights.h share: weights_file.c finds tensors in safetensors files, weights.c
// gives them to models by name, weights_place.c puts them where a model's home wants them.
#ifndef DITFLEET_WORKER_WEIGHTS_INTERNAL_H
#define DITFLEET_WORKER_WEIGHTS_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "worker/weights.h"

enum { WEIGHTS_NAME = 256, WEIGHTS_PATH = 1024 };

struct shard {
    char *path;
    uint8_t *map; // the whole file, read only
    size_t size;
    size_t data; // offset of the first tensor's bytes
};

struct entry {
    char *name;
    struct tensor tensor;
    const struct shard *shard; // NULL: invented
    int64_t start;             // where its bytes begin in the shard's data
    bool fetched;
};

// What is shared out as one: a block, a modulation, or all that every rank has.
struct unit {
    int64_t bytes;
    int64_t at; // of a sharded block: where this rank's piece is among the pieces
};

// A layer or a tensor that is fetched, to be placed.
struct fetched {
    enum weights_kind kind;
    int index;
    bool layer; // linear; else tensor
    struct linear *linear;
    struct tensor *tensor;
    enum dtype type; // a layer's, where it is to lie: of 8 bits, or the activation type
};

struct weights {
    struct home home;
    struct unit *units[WEIGHTS_KINDS];
    int n_units[WEIGHTS_KINDS];
    enum weights_kind kind; // of what is fetched
    int index;
    struct fetched *later; // what weights_settle is to place
    size_t n_later, room_later;
    void *pieces, *buffers; // on the device, each as one: few pieces of memory can be opened to other ranks
    int64_t piece_bytes, buffer_bytes, second_at; // bytes of them; where the second buffer begins
    bool codes;                                   // linear layers may be of 8 bits
    const char *prefix;                           // not NULL: names are the authors', behind this
    struct tensor *placed;
    size_t n_placed, room_placed;
    struct shard *shards;
    int n_shards;
    struct entry *entries; // as files have them; sorted by name, or invented: in the order they were fetched
    size_t n_entries;
    void **owned; // re-laid, re-aligned and invented ones
    size_t n_owned;
};

// Memory that lives as long as w; NULL when there is none.
void *weights_own(struct weights *w, size_t bytes);
struct entry *weights_find(const struct weights *w, const char *name); // NULL: there is none
// What was fetched goes where it is to be, now or by weights_settle.
int weights_place(struct weights *w, struct fetched f, struct err *err);
// Of weights_free: what each of the files has made.
void weights_displace(struct weights *w);
void weights_close(struct weights *w);

#endif
