#include "worker/parallel/stale.h"

// The pass's rows of t, text first, to their places in the whole.
static void put(struct exec *x, const struct stale *s, struct tensor whole, struct tensor t)
{
    const int64_t text = s->text ? s->text_rows : 0;
    if (text > 0)
        x->k->copy(x->d, tensor_rows(whole, 0, text), tensor_rows(t, 0, text));
    x->k->copy(x->d, tensor_rows(whole, s->text_rows + s->image.start, s->image.count),
               tensor_rows(t, text, s->image.count));
}

static void attend(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const struct stale *s = self->state;
    const int layer = call->layer - s->first_layer;
    struct attention_call whole = *call;
    put(x, s, s->k[layer], call->k);
    put(x, s, s->v[layer], call->v);
    whole.k = s->k[layer];
    whole.v = s->v[layer];
    self->next->attend(self->next, x, &whole);
}

const struct attention_link attention_stale = {.attend = attend};
