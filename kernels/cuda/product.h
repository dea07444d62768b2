// product.h: what product.c and tune.c share: a shape of products and its algorithm.
#ifndef DITFLEET_CUDA_PRODUCT_H
#define DITFLEET_CUDA_PRODUCT_H

#include "kernels/algo_cache.h"
#include "kernels/cuda/device.h"

enum { LIBRARY_BYTES = 64 << 20 }; // scratch memory that the library may use

// What an algorithm depends on. Compared as bytes and written to disk: all members are int64_t. Another meaning or
// order of them, or of the enums behind them, asks for another format number in algo_cache.c.
struct key {
    int64_t m, n, k, batch, type, y_type, w_rows, x_ld, w_ld, y_ld, x_stride, w_stride, y_stride, epilogue;
    int64_t x_align, w_align, y_align;
    int64_t factors; // E4M3: the library multiplies by rows' factors
    int64_t of;      // exact devices: n of the product whose algorithm it gets; 0: its own
    int64_t fast;    // E4M3: sums stay in the tensor cores' own accumulators, of fewer bits than f32
    int64_t exact;   // of an exact device
};
enum { KEY_NUMBERS = sizeof(struct key) / sizeof(int64_t) };

struct shape {
    struct key key;
    bool usable;    // the library has an algorithm
    bool from_disk; // and it is one that an earlier process measured
    cublasLtMatmulAlgo_t algo;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t w, x, y;
};

struct products {
    size_t count, room;
    struct shape *list;
    struct algo_cache *cache; // NULL until the first shape
};

// Runs p, of this shape; false: the library would not. Sets the addresses in s->desc.
bool cuda_product_run(struct device *d, struct shape *s, const cublasLtMatmulAlgo_t *algo, const struct product *p);
// Sets s->algo and s->usable, from the disk's cache, by measuring, or as the library suggests. s is described.
void cuda_product_choose(struct device *d, struct shape *s, const struct product *p);

#endif
