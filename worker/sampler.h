// sampler.h: the noise schedule of flow matching with Euler steps (Lipman et al. 2023, Esser et al. 2024), as
// diffusers' FlowMatchEulerDiscreteScheduler computes it: in float32, operation by operation.
//
// A step is x += (sigma[i + 1] - sigma[i]) * velocity, and is one line of the loop in denoise.c.
#ifndef DITFLEET_SAMPLER_H
#define DITFLEET_SAMPLER_H

#include <stdint.h>

#include "proto/err.h"

enum { SAMPLER_MAX_STEPS = 1000 };

struct sampler {
    bool dynamic; // shift grows with the number of image tokens
    double shift; // static shift, when not dynamic
    double base_shift, max_shift;
    int64_t base_tokens, max_tokens;
    bool exponential;   // kind of the dynamic shift; else linear
    double train_steps; // timestep = sigma * train_steps
};

int sampler_load(const char *dir, struct sampler *s, struct err *err); // the folder "scheduler"

// sigmas[steps + 1], from 1 down to the closing 0; timesteps[steps]. static_shift, when not NULL, replaces the model's
// own schedule. steps in 1..SAMPLER_MAX_STEPS.
void sampler_schedule(const struct sampler *s, int steps, int64_t image_tokens, const float *static_shift,
                      float *sigmas, float *timesteps);

#endif
