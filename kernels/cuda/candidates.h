// candidates.h: the algorithms of cuBLASLt that a shape of products may get; tune.c chooses among them.
#ifndef DITFLEET_CUDA_CANDIDATES_H
#define DITFLEET_CUDA_CANDIDATES_H

#include "kernels/cuda/product.h"

enum { SUGGESTED = 24, SPLIT = 4, TILED = 64, CANDIDATES = SUGGESTED + SPLIT + TILED + 1 }; // 1: an exact device's

typedef cublasLtMatmulHeuristicResult_t candidate;

// What the library suggests, the best by its own estimate first; list: (SUGGESTED). Returns how many.
int candidates_suggested(struct device *d, struct shape *s, candidate *list);
// These, and what may be better than they; list: (CANDIDATES - 1). Some may not run, or be poor.
int candidates_of(struct device *d, struct shape *s, candidate *list);
bool candidate_allowed(struct device *d, struct shape *s, const cublasLtMatmulAlgo_t *algo);
uint32_t candidate_setting(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t which);

#endif
