// vae.h: the decoder of diffusers' AutoencoderKL (Rombach et al. 2022): latents to pixels, rows split over ranks.
#ifndef DITFLEET_VAE_H
#define DITFLEET_VAE_H

#include "worker/exec.h"

struct vae;
struct weights;
struct home;

int vae_load(const char *dir, const struct home *home, struct vae **out, struct err *err); // the folder "vae"
void vae_free(struct vae *v);
int64_t vae_latent_channels(const struct vae *v);
int64_t vae_scale(const struct vae *v); // pixels a latent row stands for: 8 for FLUX.1
const struct weights *vae_weights(const struct vae *v);

// latent (h, w, channels): this rank's rows of the latents, spread as rows says, normalised as vae_normalisation tells.
// pixels (h * scale, w * scale, 3): this rank's rows of the picture, values in about -1 to 1.
void vae_decode(const struct vae *v, struct exec *x, struct tensor latent, const struct spread *rows,
                struct tensor pixels);
// What unpack_latents is to apply: latent = token / scaling_factor + shift_factor.
void vae_normalisation(const struct vae *v, float *scaling_factor, float *shift_factor);

#endif
