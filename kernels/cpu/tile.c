// tile.c: the register tile and the packing of its right operand.
#include "kernels/cpu/tile.h"
#include "kernels/cpu/watch.h"

INLINE void multiply(const int rows, const int vecs, struct tile_rows a, const float *b, float *c, int64_t c_ld)
{
    vf acc[14][TILE_VECS] = {0};
    for (int s = 0; s < a.segments; s++) {
        const float *p = a.p + s * a.segment;
#pragma GCC unroll 2
        for (int64_t k = 0; k < a.k; k++, b += vecs * LANES) {
            vf column[TILE_VECS];
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++)
                column[v] = vload(b + v * LANES);
#pragma GCC unroll 14
            for (int r = 0; r < rows; r++) {
                vf x = vset(p[r * a.ld + k]);
#pragma GCC unroll 4
                for (int v = 0; v < vecs; v++)
                    acc[r][v] += x * column[v];
            }
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            vstore(c + r * c_ld + v * LANES, acc[r][v]);
}

// One function for each shape, so that the accumulators are registers.
typedef void tile_fn(struct tile_rows a, const float *b, float *c, int64_t c_ld);
#define TILE(R, V)                                                                                                     \
    static void tile_##R##_##V(struct tile_rows a, const float *b, float *c, int64_t c_ld)                             \
    {                                                                                                                  \
        multiply(R, V, a, b, c, c_ld);                                                                                 \
    }
#define UP_TO_6(M, V)  M(1, V) M(2, V) M(3, V) M(4, V) M(5, V) M(6, V)
#define UP_TO_9(M, V)  UP_TO_6(M, V) M(7, V) M(8, V) M(9, V)
#define UP_TO_14(M, V) UP_TO_9(M, V) M(10, V) M(11, V) M(12, V) M(13, V) M(14, V)
UP_TO_14(TILE, 1)
UP_TO_14(TILE, 2)
UP_TO_9(TILE, 3)
UP_TO_6(TILE, 4)

#define NAME(R, V) tile_##R##_##V,
static tile_fn *const tiles[TILE_VECS][14] = {
    {UP_TO_14(NAME, 1)}, {UP_TO_14(NAME, 2)}, {UP_TO_9(NAME, 3)}, {UP_TO_6(NAME, 4)}};

enum { FLOAT = sizeof(float) };

void tile_multiply(int rows, int vecs, struct tile_rows a, const float *b, float *c, int64_t c_ld)
{
    for (int s = 0; s < a.segments; s++)
        watch_reads(a.p + s * a.segment, rows, a.ld * FLOAT, a.k * FLOAT);
    watch_reads(b, 1, 0, a.segments * a.k * vecs * LANES * FLOAT);
    watch_writes(c, rows, c_ld * FLOAT, (int64_t)vecs * LANES * FLOAT);
    int most = tile_rows_of(vecs), parts = rows <= most ? 1 : (rows + most - 1) / most;
    for (int i = 0, from = 0; i < parts; i++) {
        int to = i + 1 == parts ? rows : rows * (i + 1) / parts;
        struct tile_rows part = a;
        part.p += from * a.ld;
        tiles[vecs - 1][to - from - 1](part, b, c + from * c_ld, c_ld);
        from = to;
    }
}

// Transposes LANES vectors in place: log2(LANES) rounds, each swapping off-diagonal blocks of s by s numbers.
#define LANE_LOW(i, s)  ((i) & (s) ? LANES + (i) - (s) : (i))
#define LANE_HIGH(i, s) ((i) & (s) ? LANES + (i) : (i) + (s))
#define TRANSPOSE_ROUND(t, s)                                                                                          \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)                                                           \
    {                                                                                                                  \
        if (i & (s))                                                                                                   \
            continue;                                                                                                  \
        vf low = VSHUFFLE((t)[i], (t)[i + (s)], LANE_LOW, s);                                                          \
        (t)[i + (s)] = VSHUFFLE((t)[i], (t)[i + (s)], LANE_HIGH, s);                                                   \
        (t)[i] = low;                                                                                                  \
    }

INLINE void transpose(vf t[LANES])
{
    TRANSPOSE_ROUND(t, LANES / 2)
    TRANSPOSE_ROUND(t, LANES / 4)
    TRANSPOSE_ROUND(t, LANES / 8)
    if (LANES > 8)
        TRANSPOSE_ROUND(t, 1)
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
    const int64_t size = (int64_t)dtype_size(dtype);
    watch_reads(w, columns, ld * size, k * size);
    watch_writes(b, 1, 0, k * vecs * LANES * FLOAT);
    if (dtype == DT_F32)
        pack_transposed(b, vecs, w, DT_F32, ld, columns, k);
    else if (dtype == DT_BF16)
        pack_transposed(b, vecs, w, DT_BF16, ld, columns, k);
    else
        pack_transposed(b, vecs, w, DT_F16, ld, columns, k);
}

void tile_pack(float *b, int vecs, const float *v, int64_t ld, int64_t columns, int64_t k)
{
    watch_reads(v, k, ld * FLOAT, columns * FLOAT);
    watch_writes(b, 1, 0, k * vecs * LANES * FLOAT);
    for (int64_t i = 0; i < k; i++, v += ld, b += vecs * LANES)
        for (int64_t j = 0; j < vecs; j++)
            vstore(b + j * LANES, j * LANES < columns ? vload_n(v + j * LANES, columns - j * LANES) : vset(0));
}
