// clip.h: CLIP's text encoder (Radford et al. 2021; transformers CLIPTextModel).
#ifndef DITFLEET_CLIP_H
#define DITFLEET_CLIP_H

#include "worker/exec.h"

struct clip;
struct weights;
struct home;

int clip_load(const char *dir, const struct home *home, struct clip **out,
              struct err *err); // the folder "text_encoder"
void clip_free(struct clip *c);
int64_t clip_hidden(const struct clip *c);
int64_t clip_positions(const struct clip *c); // tokens it takes, 77
int64_t clip_vocabulary(const struct clip *c);
const struct weights *clip_weights(const struct clip *c);

// pooled (1, hidden) = the last layer, normed, at the first end-of-text token; ids[clip_positions] on the host, each
// below the vocabulary.
void clip_encode(const struct clip *c, struct exec *x, const int32_t *ids, struct tensor pooled);

#endif
