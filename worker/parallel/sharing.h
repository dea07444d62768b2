// sharing.h: where ranks bring the rows of an attention's input together (struct input_sharing of exec.h).
#ifndef DITFLEET_PARALLEL_SHARING_H
#define DITFLEET_PARALLEL_SHARING_H

#include "worker/exec.h"

// Bytes for so many rows of k numbers of the activation type or, with their factors, of 8 bits.
int64_t sharing_bytes(int64_t rows, int64_t k, enum dtype activation);

// Bytes in the arena for a loop, of which the ranks of c, who all call it, tell each other where they have them.
void sharing_make_room(struct shared_room *room, struct exec *x, struct comm *c, int64_t bytes);

#endif
