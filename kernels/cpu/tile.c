// tile.c: the register tile and the packing of its right operand.
#include "kernels/cpu/tile.h"

INLINE void multiply(const int rows, const int vecs, struct tile_rows a, const float *b, float *c, int64_t c_ld)
{
    vf acc[TILE_ROWS][2] = {0};
    for (int s = 0; s < a.segments; s++) {
        const float *p = a.p + s * a.segment;
        for (int64_t k = 0; k < a.k; k++, b += vecs * LANES) {
            vf b0 = vload(b), b1 = vecs > 1 ? vload(b + LANES) : b0;
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                acc[r][0] += p[r * a.ld + k] * b0;
                if (vecs > 1)
                    acc[r][1] += p[r * a.ld + k] * b1;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        vstore(c + r * c_ld, acc[r][0]);
        if (vecs > 1)
            vstore(c + r * c_ld + LANES, acc[r][1]);
    }
}

// One function for each number of rows, so that the accumulators are registers.
typedef void tile_fn(struct tile_rows a, const float *b, float *c, int64_t c_ld);
#define TILE(R)                                                                                                        \
    static void tile_##R##_1(struct tile_rows a, const float *b, float *c, int64_t c_ld)                               \
    {                                                                                                                  \
        multiply((R) < TILE_ROWS ? (R) : TILE_ROWS, 1, a, b, c, c_ld);                                                 \
    }                                                                                                                  \
    static void tile_##R##_2(struct tile_rows a, const float *b, float *c, int64_t c_ld)                               \
    {                                                                                                                  \
        multiply((R) < TILE_ROWS ? (R) : TILE_ROWS, 2, a, b, c, c_ld);                                                 \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)
TILE(7)
TILE(8)
TILE(9)
TILE(10)
TILE(11)
TILE(12)
TILE(13)
TILE(14)

#define TILES(V)                                                                                                       \
    {                                                                                                                  \
        tile_1_##V, tile_2_##V, tile_3_##V, tile_4_##V, tile_5_##V, tile_6_##V, tile_7_##V, tile_8_##V, tile_9_##V,    \
            tile_10_##V, tile_11_##V, tile_12_##V, tile_13_##V, tile_14_##V                                            \
    }
static tile_fn *const tiles[2][14] = {TILES(1), TILES(2)};
_Static_assert(TILE_ROWS <= 14, "a function for each number of rows");

void tile_multiply(int rows, int vecs, struct tile_rows a, const float *b, float *c, int64_t c_ld)
{
    tiles[vecs - 1][rows - 1](a, b, c, c_ld);
}

// Transposes LANES vectors in place: log2(LANES) rounds, each swapping off-diagonal blocks of half the size.
INLINE void transpose(vf t[LANES])
{
#pragma GCC unroll 4
    for (int s = LANES / 2; s; s /= 2) {
        const vi j = vlanes(), second = (j & s) != 0;
        const vi low = j + (second & (LANES - s)), high = low + s;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & s)
                continue;
            vf a = t[i], b = t[i + s];
            t[i] = __builtin_shuffle(a, b, low);
            t[i + s] = __builtin_shuffle(a, b, high);
        }
    }
}

INLINE void pack_transposed(float *b, int vecs, const void *w, enum dtype dtype, int64_t ld, int64_t columns, int64_t k)
{
    for (int v = 0; v < vecs; v++)
        for (int64_t i = 0; i < k; i += LANES) {
            vf t[LANES];
            for (int64_t j = 0; j < LANES; j++) {
                int64_t column = v * LANES + j;
                t[j] = column < columns ? weight_load(w, dtype, column * ld + i, k - i) : vset(0);
            }
            transpose(t);
            for (int64_t j = 0; j < LANES && i + j < k; j++)
                vstore(b + ((i + j) * vecs + v) * LANES, t[j]);
        }
}

void tile_pack_transposed(float *b, int vecs, const void *w, enum dtype dtype, int64_t ld, int64_t columns, int64_t k)
{
    if (dtype == DT_F32)
        pack_transposed(b, vecs, w, DT_F32, ld, columns, k);
    else if (dtype == DT_BF16)
        pack_transposed(b, vecs, w, DT_BF16, ld, columns, k);
    else
        pack_transposed(b, vecs, w, DT_F16, ld, columns, k);
}

void tile_pack(float *b, int vecs, const float *v, int64_t ld, int64_t columns, int64_t k)
{
    for (int64_t i = 0; i < k; i++, v += ld, b += vecs * LANES) {
        vstore(b, vload_n(v, columns));
        if (vecs > 1)
            vstore(b + LANES, vload_n(v + LANES, columns - LANES));
    }
}
