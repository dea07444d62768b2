// stale.h: keys and values that stay from pass to pass, for runners that take a picture patch by patch.
#ifndef DITFLEET_PARALLEL_STALE_H
#define DITFLEET_PARALLEL_STALE_H

#include "worker/exec.h"

// Of one sequence of passes. Rows lie in the order of the whole sequence, text first, whatever pass brought them.
struct stale {
    int first_layer, layers;
    int64_t text_rows;    // of the whole text, and beside it of the whole image
    struct tensor *k, *v; // (layers) of (text + image rows, heads, dim)
    struct span image;    // the image rows of the pass in hand
    bool text;            // whether it brings the text's rows, too
};

// Attends with the pass's queries over all rows of the sequence: its own keys and values take their places first; those
// of the rows that are not in it are what an earlier pass left (PipeFusion, Fang et al. 2024). Copied, with state, and
// next, which sees every row as its own.
extern const struct attention_link attention_stale;

#endif
