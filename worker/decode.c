// decode.c: latents to pixels; every rank decodes its rows of the picture, or in an exact plan the whole.
#include <stdlib.h>

#include "worker/stages.h"

// The decoder's output as the reference records it: (1, 3, h, w).
static void trace_decoded(struct run *r, struct tensor values, const struct spread *rows)
{
    if (!r->hooks->trace)
        return;
    struct exec *x = &r->decoding;
    const int64_t h = spread_total(rows), w = values.n[1];
    struct tensor whole = exec_tensor(x, 3, h, w, 3, 1);
    exec_gather(x, whole, values, rows);
    const size_t bytes = (size_t)tensor_count(whole) * sizeof(float);
    float *hwc = malloc(bytes), *chw = malloc(bytes);
    if (hwc && chw && r->leads) {
        x->k->download(x->d, hwc, whole);
        for (int64_t c = 0; c < 3; c++)
            for (int64_t i = 0; i < h * w; i++)
                chw[c * h * w + i] = hwc[i * 3 + c];
        r->hooks->trace(r->hooks->arg, "vae_decoded", tensor_of(chw, DT_F32, 4, 1, 3, h, w));
    }
    free(hwc);
    free(chw);
}

int decode(struct run *r, struct tensor tokens, uint8_t *pixels, struct err *err)
{
    struct exec *x = &r->decoding;
    const struct model *m = r->model;
    const int64_t scale = vae_scale(m->vae), width = r->latent_w * scale;
    const struct spread rows = spread_even(r->latent_h, comm_rank(x->comm), comm_size(x->comm));
    const struct spread pixel_rows = spread_scale(rows, scale);
    const struct span mine = spread_mine(&rows);
    const size_t mark = arena_mark(x->arena);
    float scaling, shift;
    TRY(run_checkpoint(r, ENGINE_DECODE, 0, err));

    struct tensor whole = arena_tensor(x->arena, DT_U8, 3, r->latent_h * scale, width, 3, 1);
    struct tensor bytes = arena_tensor(x->arena, DT_U8, 3, mine.count * scale, width, 3, 1);
    struct tensor latent = exec_tensor(x, 3, r->latent_h, r->latent_w, vae_latent_channels(m->vae), 1);
    struct tensor values = exec_tensor(x, 3, mine.count * scale, width, 3, 1);
    vae_normalisation(m->vae, &scaling, &shift);
    x->k->unpack_latents(x->d, latent, tokens, scaling, shift);
    vae_decode(m->vae, x, tensor_rows(latent, mine.start, mine.count), &rows, values);
    x->k->to_u8(x->d, bytes, values);
    exec_gather(x, whole, bytes, &pixel_rows);
    trace_decoded(r, values, &pixel_rows);
    if (pixels)
        x->k->download(x->d, pixels, whole);
    arena_release(x->arena, mark);
    return exec_check(x, err);
}
