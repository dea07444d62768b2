// flash8.cuh: q, k and v of an attention as numbers of 8 bits: what flash8_make.cu makes and flash8.cu computes with.
#ifndef DITFLEET_CUDA_HOPPER_FLASH8_CUH
#define DITFLEET_CUDA_HOPPER_FLASH8_CUH

#include "kernels/cuda/hopper/flash.cuh"

namespace flash8
{

using flash_hopper::DIM;  // smaller heads are filled up with zeros
using flash_hopper::TILE; // keys that have a factor in common

struct tile_factors {
    float k;     // a key's numbers are to be multiplied by it
    int v_power; // a value's by 2 to the power of it
};

// q (m, heads, DIM), k (s, heads, DIM), v (heads, DIM, tiles * TILE), whose keys are in the order of key_at.
struct eight {
    int8_t *q, *k;
    uint8_t *v;                // E4M3; zeros beyond s
    float *q_factor;           // (m, heads), times the scores' scale and log2(e)
    struct tile_factors *tile; // (heads, tiles)
    int m, s, heads, tiles;
};

// Of 16 keys, thread t of four that make their weights has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, and needs them side by
// side for the product with the values: the key at a place of v.
__device__ inline int key_at(int place)
{
    return place / 16 * 16 + place % 4 / 2 * 8 + place % 16 / 4 * 2 + place % 2;
}

// A factor of NaN says that its numbers are not all finite. scale: of scores. bf16 or f16.
void make(cudaStream_t s, const eight &e, struct tensor q, struct tensor k, struct tensor v, float scale);

} // namespace flash8

#endif
