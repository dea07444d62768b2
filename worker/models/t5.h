// t5.h: T5's encoder (Raffel et al. 2020; version 1.1: gated GELU, transformers T5EncoderModel).
#ifndef DITFLEET_T5_H
#define DITFLEET_T5_H

#include "worker/exec.h"

struct t5;
struct weights;
struct home;

int t5_load(const char *dir, const struct home *home, struct t5 **out, struct err *err); // the folder "text_encoder_2"
void t5_free(struct t5 *t);
int64_t t5_hidden(const struct t5 *t);
int64_t t5_vocabulary(const struct t5 *t);
const struct weights *t5_weights(const struct t5 *t);

// out (tokens, hidden): every position, padding included, attends to every other (FLUX passes no mask). ids[tokens] on
// the host, each below the vocabulary.
void t5_encode(const struct t5 *t, struct exec *x, const int32_t *ids, struct tensor out);

#endif
