// conv.c: convolution through cuDNN, channels last, the bias in the same pass; else as a plain product.
#include "kernels/cuda/graph.h"

static bool packed(struct tensor t)
{
    return t.n[0] < 2 || t.ld == t.n[1] * t.n[2] * t.n[3];
}

// y = conv(x, w) [+ b], all (n, c, h, w) to cuDNN whatever their strides.
static void describe(struct graph *g, const int64_t *key)
{
    enum dtype type = (enum dtype)key[0];
    int64_t h = key[1], w = key[2], in = key[3], out = key[4], kh = key[5], kw = key[6], x_ld = key[7], y_ld = key[8];
    bool bias = key[9] != 0;
    int x = graph_tensor(g, type, GRAPH_GIVEN, (int64_t[]){1, in, h + kh - 1, w},
                         (int64_t[]){(h + kh - 1) * x_ld, 1, x_ld, in});
    int f = graph_tensor(g, type, GRAPH_GIVEN, (int64_t[]){out, in, kh, kw}, (int64_t[]){kh * kw * in, 1, kw * in, in});
    int b = graph_tensor(g, bias ? (enum dtype)(key[9] - 1) : type, bias ? GRAPH_GIVEN : GRAPH_UNUSED,
                         (int64_t[]){1, out, 1, 1}, (int64_t[]){out, 1, out, out});
    const int64_t dims[] = {1, out, h, w}, strides[] = {h * y_ld, 1, y_ld, out};
    int y = graph_tensor(g, type, GRAPH_GIVEN, dims, strides);
    int sum = bias ? graph_tensor(g, DT_F32, GRAPH_VIRTUAL, dims, strides) : y;
    graph_conv(g, x, f, sum, kw / 2);
    if (bias)
        graph_point(g, CUDNN_POINTWISE_ADD, sum, b, y);
}

static bool through_cudnn(struct device *d, struct tensor y, struct tensor x, struct tensor w, struct tensor b)
{
    bool aligned = alignment_of(x.data, 16) == 16 && alignment_of(y.data, 16) == 16 && alignment_of(w.data, 16) == 16 &&
                   (tensor_none(b) || alignment_of(b.data, 16) == 16);
    if (d->type == DT_F32 || !aligned || !packed(w) || w.dtype != d->type)
        return false;
    int64_t x_ld = x.n[0] > 1 ? x.ld : x.n[1] * x.n[2], y_ld = y.n[0] > 1 ? y.ld : y.n[1] * y.n[2];
    const int64_t key[GRAPH_KEY] = {d->type, y.n[0], y.n[1], x.n[2], y.n[2],
                                    w.n[1],  w.n[2], x_ld,   y_ld,   tensor_none(b) ? 0 : (int64_t)b.dtype + 1};
    void *pointers[] = {x.data, w.data, b.data, y.data};
    const double flops = 2 * (double)tensor_count(y) * (double)(w.n[1] * w.n[2] * w.n[3]);
    return graph_run(d, GRAPH_CONV, key, flops, describe, 4, pointers);
}

void cuda_conv2d(struct device *d, struct tensor y, struct tensor x, const struct conv *conv)
{
    if (!check_conv2d(&d->check, y, x, conv) || tensor_count(y) == 0)
        return;
    cuda_enter(d);
    if (!through_cudnn(d, y, x, conv->w, conv->b))
        launch_conv(d->stream, y, x, conv->w, conv->b);
    cuda_launched(d, "conv2d");
}
