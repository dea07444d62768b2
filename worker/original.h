// original.h: the tensors of a FLUX.1 transformer as its authors named and fused them, for who knows diffusers' names.
//
// Such a file holds the transformer alone: flux1-dev.safetensors, or what ComfyUI keeps in diffusion_models, there
// often with a prefix to every name.
#ifndef DITFLEET_WORKER_ORIGINAL_H
#define DITFLEET_WORKER_ORIGINAL_H

#include <stdbool.h>

enum { ORIGINAL_NAME = 128 };

// A diffusers tensor: rows first/whole to (first + rows)/whole of the original's.
struct original {
    char name[ORIGINAL_NAME]; // without prefix
    int first, rows, whole;
    bool swapped; // and the original has the second half of them first: shift and scale, not scale and shift
};

// False: diffusers has no such tensor in a FLUX.1 transformer.
bool original_of(const char *diffusers, struct original *out);

// The prefixes that files put before every name; the last is NULL. And a name that they all have.
extern const char *const original_prefixes[];
#define ORIGINAL_PROBE "img_in.weight"

#endif
