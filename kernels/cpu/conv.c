// conv.c: convolution as a product: a pixel's window is one run of numbers for each of its rows, because channels lie
// innermost. Windows are read in place; only tiles at the left and right edge are gathered, for the zero columns.
#include "kernels/cpu/product.h"

struct conv_rows {
    struct tensor x, y;
    int64_t kh, kw, row_tiles; // row_tiles: tiles in one row of the picture
};

// Copies the tile's window with its zero columns: (kh, rows + kw - 1, c).
static void gather(const struct conv_rows *c, int64_t y, int64_t left, int64_t width, float *to)
{
    int64_t channels = c->x.n[2], from = max64(left, 0), end = min64(left + width, c->x.n[1]);
    for (int64_t i = 0; i < c->kh; i++, to += width * channels) {
        const float *row = (const float *)c->x.data + (y + i) * c->x.ld;
        memset(to, 0, (size_t)(width * channels) * sizeof(float));
        if (end > from)
            memcpy(to + (from - left) * channels, row + from * channels,
                   (size_t)((end - from) * channels) * sizeof(float));
    }
}

static int locate_pixels(const struct product *p, int64_t t, float *gathered, struct tile_rows *a, float **out)
{
    const struct conv_rows *c = p->ctx;
    int64_t y = t / c->row_tiles, x = t % c->row_tiles * p->rows, channels = c->x.n[2];
    int64_t rows = min64(p->rows, c->x.n[1] - x), left = x - c->kw / 2, width = rows + c->kw - 1;
    *a = (struct tile_rows){.ld = channels, .k = c->kw * channels, .segments = (int)c->kh};
    if (left >= 0 && left + width <= c->x.n[1]) {
        a->p = (const float *)c->x.data + y * c->x.ld + left * channels;
        a->segment = c->x.ld;
    } else {
        gather(c, y, left, width, gathered);
        a->p = gathered;
        a->segment = width * channels;
    }
    *out = (float *)c->y.data + y * c->y.ld + x * c->y.n[2];
    return (int)rows;
}

void cpu_conv2d(struct device *d, struct tensor y, struct tensor x, const struct conv *conv)
{
    if (!check_conv2d(&d->check, y, x, conv) || tensor_count(y) == 0)
        return;
    struct tensor w = conv->w;
    struct linear flat = {.parts = 1, .n = w.n[0], .k = w.n[1] * w.n[2] * w.n[3], .b = {conv->b}};
    flat.w[0] = tensor_2d(w.data, w.dtype, flat.n, flat.k);
    flat.w[0].ld = w.ld;
    int vecs = tile_vecs(flat.n), most = tile_rows_of(vecs);
    struct conv_rows rows = {x, y, w.n[1], w.n[2], ceil_div(x.n[1], most)};
    struct product p = {.w = &flat,
                        .vecs = vecs,
                        .rows = most,
                        .act = ACT_NONE,
                        .tiles = y.n[0] * rows.row_tiles,
                        .locate = locate_pixels,
                        .y_ld = y.n[2],
                        .gather = ceil_div(w.n[1] * (most + w.n[2] - 1) * x.n[2], LANES) * LANES,
                        .ctx = &rows};
    product_run(d, &p);
}
