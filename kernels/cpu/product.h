// product.h: rows times a weight, plus bias, activated: what linear and conv2d have in common.
#ifndef DITFLEET_PRODUCT_H
#define DITFLEET_PRODUCT_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

struct product {
    const struct linear *w;
    enum act act;
    int vecs;      // width of a panel, tile_vecs() of the columns
    int rows;      // rows of a tile, tile_rows_of(vecs)
    int64_t tiles; // tiles of rows
    // Where tile t's rows are: its left operand, its first output row and how many rows. May gather the operand into
    // `gathered` (gather floats).
    int (*locate)(const struct product *p, int64_t t, float *gathered, struct tile_rows *a, float **y);
    int64_t y_ld;
    int64_t gather; // floats of scratch that locate needs
    const void *ctx;
};

void product_run(struct device *d, const struct product *p);

#endif
