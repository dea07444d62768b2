// random.h: numbers from a seed, the same on every machine (splitmix64).
#ifndef DITFLEET_SIM_RANDOM_H
#define DITFLEET_SIM_RANDOM_H

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// In [0, n); 0 when n is 0.
static inline unsigned random_below(uint64_t *state, unsigned n)
{
    return n > 0 ? (unsigned)(random_next(state) % n) : 0;
}

// True once in n times.
static inline bool random_once_in(uint64_t *state, unsigned n)
{
    return random_below(state, n) == 0;
}

#endif
