// dit.h: a diffusion transformer as runners see it: embed, block(i), head over some rows of one image.
//
// The loop over blocks belongs to the runner (worker/parallel/), and so does the choice of rows: all of this rank's, or
// one patch of them, with the text rows or without. A model derives nothing from height and width: it gets spans of
// rows and their position ids.
#ifndef DITFLEET_DIT_H
#define DITFLEET_DIT_H

#include "worker/exec.h"

struct dit; // a loaded model; each model file has its own

// What one prompt contributes to every step: prepared once before the loop, kept in the arena.
struct dit_cond {
    struct tensor text; // (text rows of the whole, hidden) the prompt, embedded
    struct tensor mod;  // (steps, width) every block's modulation at every step: they depend on time and prompt alone
    struct tensor now;  // (1, width) the row of the step in hand, which dit_step puts there: every step reads it at one
                        // address, so that a step can be recorded once and replayed
};

// The rows a pass carries: text rows first, then image rows. Spans count within the whole text and image. Ranks have
// rows that follow each other: none has text behind another's image.
struct dit_rows {
    struct span text, image;
    const int64_t *of_rank; // rows that each rank of x->comm carries in this pass
    // Of the rows that this rank projects to queries, keys and values, its own or more (exec_attention_input):
    int64_t projected_text; // how many are text; they come first
    struct tensor rope;     // (rows, head_dim / 2, 2) cosines and sines of their positions
};

struct dit_pass {
    const struct dit_cond *cond;
    const struct dit_rows *rows;
    struct tensor hidden; // (text.count + image.count, hidden)
    // The last block's residual is added by whoever norms hidden next, in one pass over memory: where pending, hidden
    // still lacks gate * update. embed allocates update in the arena.
    bool pending;
    struct tensor update;                // as hidden
    struct tensor text_gate, image_gate; // (hidden)
};

struct dit_info {
    int blocks;
    int64_t heads, head_dim, hidden;
    int64_t channels;      // of an image token, in and out
    int64_t position_axes; // numbers in a position id
    int64_t text_dim, pooled_dim;
    bool guidance;             // takes the distilled guidance scale
    bool eight_bits;           // attentions read rows of 8 bits
    bool twice;                // its weights are placed twice: even and odd steps compute with other numbers
    int64_t attention_columns; // the most that an exec_attention_output has
};

struct dit_ops {
    void (*info)(const struct dit *m, struct dit_info *out);
    // sigmas[steps] of the schedule, 1 to 0; prompt (text rows of the whole, text_dim); pooled (1, pooled_dim).
    // Allocates cond's tensors in x->arena.
    void (*prepare)(const struct dit *m, struct exec *x, const float *sigmas, int steps, float guidance,
                    struct tensor prompt, struct tensor pooled, struct dit_cond *cond);
    // rope (rows, head_dim / 2, 2) host floats from ids (rows, position_axes).
    void (*rope)(const struct dit *m, const float *ids, int64_t rows, float *out);
    void (*embed)(const struct dit *m, struct exec *x, struct dit_pass *p, struct tensor tokens);
    void (*block)(const struct dit *m, struct exec *x, struct dit_pass *p, int i);
    void (*head)(const struct dit *m, struct exec *x, struct dit_pass *p, struct tensor out);
    void (*free)(struct dit *m);
};

struct weights;
struct dit {
    const struct dit_ops *ops;
    struct weights *weights; // for its fingerprint, for memory, and for those who have them in parts
};

// Block i, its weights being in their place (worker/ownership.c): how runners call ops->block.
void dit_block(const struct dit *m, struct exec *x, struct dit_pass *p, int i);

// FLUX.1 (dev and schnell). dir: the folder "transformer" of a diffusers directory. file: the weights in one file, by
// diffusers' names or their authors'; NULL: they are in dir.
struct home;
int flux_load(const char *dir, const char *file, const struct home *home, struct dit **out, struct err *err);

// Makes step the one that passes with this cond are of. Weights that are placed twice take turns.
static inline void dit_step(struct exec *x, const struct dit_cond *cond, int step)
{
    if (x->k->take_second)
        x->k->take_second(x->d, step % 2);
    x->k->copy(x->d, cond->now, tensor_rows(cond->mod, step, 1));
}

// A runner takes tokens (image rows, channels) through the model to out (same shape): predicts the velocity of the step
// that cond is at; step tells its number to runners that act by it.
struct runner {
    void (*run)(const struct runner *self, const struct dit *m, struct exec *x, const struct dit_cond *cond,
                const struct dit_rows *rows, int step, struct tensor tokens, struct tensor out);
    void *state;
};

// Every block on every rank, each with its own rows.
extern const struct runner runner_whole;

#endif
