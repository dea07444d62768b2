// dense.c: the linear layer. (linear.c is its constructor, a folder up.)
#include "kernels/cpu/product.h"

// Up to this many rows a weight is read once, row by row, without packing: memory bounds the product.
enum { FEW_ROWS = 4, DOT_COLUMNS = 4, COLUMN_BLOCK = 32 };

static int locate_rows(const struct product *p, int64_t t, float *gathered, struct tile_rows *a, float **y)
{
    const struct tensor *xy = p->ctx; // x, y
    int64_t first = t * p->rows;
    (void)gathered;
    *a = (struct tile_rows){(const float *)xy[0].data + first * xy[0].ld, xy[0].ld, xy[0].n[1], 0, 1};
    *y = (float *)xy[1].data + first * xy[1].ld;
    return (int)min64(p->rows, xy[0].n[0] - first);
}

struct few {
    struct tensor x, y;
    const struct linear *w;
    enum act act;
};

// sums[j] = x . row j of w for DOT_COLUMNS rows, ld elements apart, k long.
INLINE void dots_of(float sums[DOT_COLUMNS], const float *x, const void *w, enum dtype dtype, int64_t ld, int64_t k)
{
    vf acc[DOT_COLUMNS] = {0};
    for (int64_t i = 0; i + LANES <= k; i += LANES)
        for (int j = 0; j < DOT_COLUMNS; j++)
            acc[j] += vload(x + i) * weight_load(w, dtype, j * ld + i, LANES);
    int64_t rest = k % LANES;
    for (int j = 0; j < DOT_COLUMNS; j++) {
        if (rest)
            acc[j] += vload_n(x + k - rest, rest) * weight_load(w, dtype, j * ld + k - rest, rest);
        sums[j] = vsum(acc[j]);
    }
}

static void dots(float sums[DOT_COLUMNS], const float *x, struct tensor w, int64_t first)
{
    const char *data = (const char *)w.data + first * w.ld * (int64_t)dtype_size(w.dtype);
    // The last columns of a weight may be fewer: with a stride of 0 one row is read again instead.
    int64_t ld = first + DOT_COLUMNS <= w.n[0] ? w.ld : 0;
    if (w.dtype == DT_F32)
        dots_of(sums, x, data, DT_F32, ld, w.n[1]);
    else if (w.dtype == DT_BF16)
        dots_of(sums, x, data, DT_BF16, ld, w.n[1]);
    else
        dots_of(sums, x, data, DT_F16, ld, w.n[1]);
}

// Columns first.. of one part, at most LANES of them, for every row.
static void few_columns(const struct few *f, int part, int64_t y_column, int64_t first, int64_t columns)
{
    struct tensor w = f->w->w[part], b = f->w->b[part];
    vf bias = tensor_none(b) ? vset(0) : weight_load(b.data, b.dtype, first, columns);
    for (int64_t r = 0; r < f->x.n[0]; r++) {
        const float *x = (const float *)f->x.data + r * f->x.ld;
        float sums[LANES] = {0};
        for (int64_t j = 0; j < columns;) {
            dots(sums + j, x, w, first + j);
            j += first + j + DOT_COLUMNS <= w.n[0] ? DOT_COLUMNS : 1;
        }
        vstore_n((float *)f->y.data + r * f->y.ld + y_column + first, vact(vload(sums) + bias, f->act), columns);
    }
}

// from, to: blocks of LANES columns, counted through the parts.
static void few_task(const void *ctx, int64_t from, int64_t to)
{
    const struct few *f = ctx;
    int64_t block = 0, column = 0;
    for (int part = 0; part < f->w->parts; part++) {
        int64_t n = f->w->w[part].n[0];
        for (int64_t first = 0; first < n; first += LANES, block++)
            if (block >= from && block < to)
                few_columns(f, part, column, first, min64(LANES, n - first));
        column += n;
    }
}

void cpu_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    if (!check_linear(&d->check, y, x, w) || x.n[0] == 0)
        return;
    if (x.n[0] <= FEW_ROWS) {
        struct few few = {x, y, w, act};
        int64_t blocks = 0;
        for (int i = 0; i < w->parts; i++)
            blocks += ceil_div(w->w[i].n[0], LANES);
        cpu_rows(d, blocks, LANES * w->k, few_task, &few);
        return;
    }
    struct tensor xy[2] = {x, y};
    int64_t widest = 0;
    for (int i = 0; i < w->parts; i++)
        widest = max64(widest, w->w[i].n[0]);
    struct product p = {.w = w, .act = act, .vecs = tile_vecs(widest), .locate = locate_rows, .y_ld = y.ld, .ctx = xy};
    p.rows = tile_rows_of(p.vecs);
    p.tiles = ceil_div(x.n[0], p.rows);
    product_run(d, &p);
}
