// rng.h: the normal numbers that torch.randn gives for the same seed, so that a seed means the same picture here.
//
// Reference pipelines draw in the dtype of the embeddings and on the device of the generator, so there are several: the
// CPU's Mersenne twister in float32, bfloat16 or float16, and the Philox counter of CUDA devices.
#ifndef DITFLEET_RNG_H
#define DITFLEET_RNG_H

#include "proto/err.h"

#include <stdint.h>

// The first four are numbered as Rng in job.proto. torch 2.13 changed what bfloat16 and float16 draws are on the CPU:
// since then they are float32 draws, rounded; up to 2.12 the uniforms have 8 or 11 bits and every operation rounds.
// The two give unrelated pictures.
enum rng_kind {
    RNG_CPU_F32,
    RNG_CPU_BF16, // torch 2.13 and later
    RNG_CPU_F16,  // torch 2.13 and later
    RNG_CUDA,
    RNG_CPU_BF16_TORCH_2_12, // torch 2.12 and earlier
    RNG_CPU_F16_TORCH_2_12,  // torch 2.12 and earlier
    RNG_KINDS,
};

// out: (n), what torch.randn(n, generator=torch.Generator(device).manual_seed(seed), dtype=...) gives in its first
// call. The CPU kinds look at the low 32 bits of the seed alone, as torch does. CPU draws equal torch's on x86 bit for
// bit; CUDA draws differ by a few 1e-6 (its fast sine) and are float32: round them to the model's type as torch does.
// sm_count: multiprocessors of the CUDA device imitated (132 on an H200), of 2048 threads each; used by RNG_CUDA alone.
// ERR_INVALID: unknown kind, n < 0, and with RNG_CUDA n over 2^31 - 1 or sm_count < 1. Allocates nothing.
int rng_randn(enum rng_kind kind, uint64_t seed, int sm_count, float *out, int64_t n, struct err *e);

// One block of Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011), here for its
// known-answer test.
void rng_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

// A seed nobody chose, from the kernel's random source. ERR_IO if there is none.
int rng_fresh_seed(uint64_t *seed, struct err *e);

#endif
