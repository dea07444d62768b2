// tile.h: the matrix product every heavy operation is made of.
//
// A tile is some rows by up to TILE_VECS vectors of columns, summed in registers over the whole inner length in one
// order: a result does not depend on which rows share its tile, so not on how rows are spread over threads or ranks.
#ifndef DITFLEET_TILE_H
#define DITFLEET_TILE_H

#include "kernels/cpu/vec.h"

enum { TILE_VECS = 4, TILE_FLOATS = 2 * 16 * LANES }; // TILE_FLOATS: room for any tile

// Rows of a tile that is vecs wide: as many accumulators as registers allow beside the columns and one number. Wide
// tiles do best, because they load least for each multiplication.
static inline int tile_rows_of(int vecs)
{
    int rows = (REGISTERS - 1 - vecs) / vecs;
    return rows < 14 ? rows : 14;
}

// Vectors of a panel's columns, for a matrix of that many columns.
static inline int tile_vecs(int64_t columns)
{
    if (columns <= 3L * LANES)
        return 1 + (columns > LANES) + (columns > 2L * LANES);
    return columns % (4L * LANES) != 0 && columns % (3L * LANES) == 0 ? 3 : 4;
}

// Rows of the left operand: row r's inner numbers are `segments` runs of k floats, a run every `segment` floats.
// (A linear layer has one run; a convolution one for each row of its window, kw * c_in long.)
struct tile_rows {
    const float *p;
    int64_t ld, k, segment;
    int segments;
};

// c (rows, vecs * LANES) = a (rows, K) b (K, vecs * LANES), K = segments * k; any rows, vecs 1 to TILE_VECS;
// b is packed: contiguous, columns beyond its matrix zero. c's whole vectors are written.
void tile_multiply(int rows, int vecs, struct tile_rows a, const float *b, float *c, int64_t c_ld);

// Packs `columns` (1 to vecs * LANES) rows of a weight (n, k), ld elements apart, transposed: b (k, vecs * LANES).
void tile_pack_transposed(float *b, int vecs, const void *w, enum dtype dtype, int64_t ld, int64_t columns, int64_t k);
// Packs k rows of columns numbers: b (k, vecs * LANES).
void tile_pack(float *b, int vecs, const float *v, int64_t ld, int64_t columns, int64_t k);

#endif
