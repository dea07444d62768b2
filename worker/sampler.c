#include "worker/sampler.h"

#include <math.h>
#include <string.h>

#include "worker/config.h"

int sampler_load(const char *dir, struct sampler *s, struct err *err)
{
    char kind[32];
    struct config *c = config_open(dir, "scheduler_config.json", err);
    *s = (struct sampler){
        .shift = 1, .base_shift = 0.5, .max_shift = 1.15, .base_tokens = 256, .max_tokens = 4096, .train_steps = 1000};
    config_require(c, "_class_name", "FlowMatchEulerDiscreteScheduler");
    config_bool_or(c, "use_dynamic_shifting", &s->dynamic);
    config_float_or(c, "shift", 1e-3, 1e3, &s->shift);
    config_float_or(c, "base_shift", -10, 10, &s->base_shift);
    config_float_or(c, "max_shift", -10, 10, &s->max_shift);
    config_float_or(c, "num_train_timesteps", 1000, 1000, &s->train_steps);
    config_int_or(c, "base_image_seq_len", 1, 1 << 24, &s->base_tokens);
    config_int_or(c, "max_image_seq_len", s->base_tokens + 1, 1 << 24, &s->max_tokens);
    config_string(c, "time_shift_type", kind, sizeof kind);
    s->exponential = strcmp(kind, "linear") != 0;
    if (*kind && strcmp(kind, "linear") != 0 && strcmp(kind, "exponential") != 0)
        config_fail(c, ERR_UNSUPPORTED, "time_shift_type is \"%s\"; supported: exponential, linear", kind);
    static const char *const refused[] = {"invert_sigmas",   "shift_terminal",         "stochastic_sampling",
                                          "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        config_refuse(c, refused[i]);
    return config_close(c, err);
}

static float static_shifted(float t, double shift)
{
    return (float)shift * t / (1.0F + (float)(shift - 1) * t);
}

static float dynamic_shifted(const struct sampler *s, float t, int64_t image_tokens)
{
    double slope = (s->max_shift - s->base_shift) / (double)(s->max_tokens - s->base_tokens);
    double mu = (double)image_tokens * slope + (s->base_shift - slope * (double)s->base_tokens);
    float strength = s->exponential ? (float)exp(mu) : (float)mu;
    return strength / (strength + (1.0F / t - 1.0F));
}

void sampler_schedule(const struct sampler *s, int steps, int64_t image_tokens, const float *static_shift,
                      float *sigmas, float *timesteps)
{
    const double last = 1.0 / steps, delta = steps > 1 ? (last - 1.0) / (steps - 1) : 0;
    for (int i = 0; i < steps; i++) {
        float t = (float)(i == steps - 1 && steps > 1 ? last : 1.0 + i * delta);
        if (static_shift)
            sigmas[i] = static_shifted(t, (double)*static_shift);
        else
            sigmas[i] = s->dynamic ? dynamic_shifted(s, t, image_tokens) : static_shifted(t, s->shift);
        timesteps[i] = sigmas[i] * (float)s->train_steps;
    }
    sigmas[steps] = 0;
}
