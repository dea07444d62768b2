// sharing.h: where ranks bring the rows of an attention's input together (struct input_sharing of exec.h).
#ifndef DITFLEET_PARALLEL_SHARING_H
#define DITFLEET_PARALLEL_SHARING_H

#include "worker/exec.h"

// Bytes for so many rows of k numbers of the activation type or, with their factors, of 8 bits.
int64_t sharing_room(int64_t rows, int64_t k, enum dtype activation);

// Tells the ranks of s->comm, who all call it, where s->room is. Before a loop; what it takes of the arena it gives
// back.
void sharing_meet(struct input_sharing *s, struct exec *x);

#endif
