// product.c: matrix products through cuBLASLt, and the linear layer.
//
// Row-major y = x w^T is column-major y^T = w x^T: w comes first. For each shape the library's candidates are asked for
// once; large products are timed on their own operands, and the fastest is kept for the device's life.
#include "kernels/cuda/device.h"

#include <stdlib.h>
#include <string.h>

enum { CANDIDATES = 8, LIBRARY_BYTES = 64 << 20, TIMED_RUNS = 3 };
static const double TIMED_FLOPS = 2e9; // smaller products gain less than the timing costs

// What an algorithm depends on. Compared as bytes: no padding (all members are 8 bytes wide).
struct key {
    int64_t m, n, k, batch, type, y_type, w_rows, x_ld, w_ld, y_ld, x_stride, w_stride, y_stride, epilogue;
    int64_t x_align, w_align, y_align;
};

struct shape {
    struct key key;
    bool usable; // the library has an algorithm
    cublasLtMatmulAlgo_t algo;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t w, x, y;
};

struct products {
    size_t count, room;
    struct shape *list;
};

struct products *products_new(void)
{
    return calloc(1, sizeof(struct products));
}

void products_free(struct products *p)
{
    if (!p)
        return;
    free(p->list);
    free(p);
}

static cudaDataType_t data_type(enum dtype type)
{
    return type == DT_BF16 ? CUDA_R_16BF : type == DT_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static int64_t size_of(enum dtype type)
{
    return (int64_t)dtype_size(type);
}

// The epilogue that does act(. + bias), or -1 for one that another kernel must do. GELU in f32 is left to our own
// kernel: the library's is an approximation good enough for halves.
static int64_t epilogue_of(const struct product *p)
{
    bool bias = !tensor_none(p->bias), half = p->y_type != DT_F32;
    if (bias && (p->bias.dtype != p->y_type || alignment_of(p->bias.data, 16) < 16))
        return -1;
    if (p->act == ACT_NONE)
        return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (p->act == ACT_GELU_TANH && half)
        return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    return -1;
}

static struct key key_of(const struct product *p, int64_t epilogue)
{
    int64_t size = size_of(p->type), y_size = size_of(p->y_type);
    return (struct key){.m = p->m,
                        .n = p->n,
                        .k = p->k,
                        .batch = p->batch,
                        .type = p->type,
                        .y_type = p->y_type,
                        .w_rows = p->w_rows,
                        .x_ld = p->x_ld,
                        .w_ld = p->w_ld,
                        .y_ld = p->y_ld,
                        .x_stride = p->x_stride,
                        .w_stride = p->w_stride,
                        .y_stride = p->y_stride,
                        .epilogue = epilogue,
                        .x_align = alignment_of(p->x, (p->x_ld | p->x_stride) * size),
                        .w_align = alignment_of(p->w, (p->w_ld | p->w_stride) * size),
                        .y_align = alignment_of(p->y, (p->y_ld | p->y_stride) * y_size)};
}

// A column-major (rows, columns) matrix of the batch.
static bool lay_out(cublasLtMatrixLayout_t l, enum dtype type, int64_t rows, int64_t columns, int64_t ld,
                    int64_t stride, int64_t batch)
{
    int32_t count = (int32_t)batch;
    return cublasLtMatrixLayoutInit(l, data_type(type), (uint64_t)rows, (uint64_t)columns, ld) == 0 &&
           cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count) == 0 &&
           cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride) ==
               0;
}

static bool describe(struct shape *s)
{
    const struct key *k = &s->key;
    cublasOperation_t w = k->w_rows ? CUBLAS_OP_N : CUBLAS_OP_T, x = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)k->epilogue;
    enum dtype type = (enum dtype)k->type;
    // COMPUTE_32F keeps f32 operands whole: TF32 would have to be asked for by name.
    return cublasLtMatmulDescInit(&s->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == 0 &&
           cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_TRANSA, &w, sizeof w) == 0 &&
           cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_TRANSB, &x, sizeof x) == 0 &&
           cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == 0 &&
           lay_out(&s->w, type, k->w_rows ? k->n : k->k, k->w_rows ? k->k : k->n, k->w_ld, k->w_stride, k->batch) &&
           lay_out(&s->x, type, k->k, k->m, k->x_ld, k->x_stride, k->batch) &&
           lay_out(&s->y, (enum dtype)k->y_type, k->n, k->m, k->y_ld, k->y_stride, k->batch);
}

static int heuristics(struct device *d, struct shape *s, cublasLtMatmulHeuristicResult_t *out)
{
    cublasLtMatmulPreferenceOpaque_t want;
    uint64_t bytes = LIBRARY_BYTES;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; // parts of a sum in f32, never in the halves of y
    uint32_t w = (uint32_t)s->key.w_align, x = (uint32_t)s->key.x_align, y = (uint32_t)s->key.y_align;
    int found = 0;
    bool ok =
        cublasLtMatmulPreferenceInit(&want) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes) ==
            0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction,
                                             sizeof reduction) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w, sizeof w) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x, sizeof x) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &y, sizeof y) == 0 &&
        cublasLtMatmulPreferenceSetAttribute(&want, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &y, sizeof y) == 0;
    if (!ok || cublasLtMatmulAlgoGetHeuristic(d->blas, &s->desc, &s->w, &s->x, &s->y, &s->y, &want, CANDIDATES, out,
                                              &found) != CUBLAS_STATUS_SUCCESS)
        return 0;
    return found;
}

static bool run(struct device *d, struct shape *s, const cublasLtMatmulAlgo_t *algo, const struct product *p)
{
    const float one = 1, zero = 0;
    void *space = cuda_scratch(d, SLOT_LIBRARY, LIBRARY_BYTES);
    const void *bias = tensor_none(p->bias) ? NULL : p->bias.data;
    if (!space)
        return true; // the device has failed already: not for want of an algorithm
    if (s->key.epilogue == CUBLASLT_EPILOGUE_BIAS || s->key.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS)
        cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    return cublasLtMatmul(d->blas, &s->desc, &one, p->w, &s->w, p->x, &s->x, &zero, p->y, &s->y, p->y, &s->y, algo,
                          space, LIBRARY_BYTES, d->stream) == CUBLAS_STATUS_SUCCESS;
}

// Milliseconds of a run, at best; negative when it does not work.
static float timed(struct device *d, struct shape *s, const cublasLtMatmulAlgo_t *algo, const struct product *p,
                   cudaEvent_t *event)
{
    float best = -1;
    for (int i = 0; i <= TIMED_RUNS; i++) { // the first one warms up
        float ms = -1;
        cudaEventRecord(event[0], d->stream);
        if (!run(d, s, algo, p))
            return -1;
        cudaEventRecord(event[1], d->stream);
        if (!cuda_ok(d, cudaEventSynchronize(event[1]), "linear") ||
            !cuda_ok(d, cudaEventElapsedTime(&ms, event[0], event[1]), "linear"))
            return -1;
        if (i > 0 && (best < 0 || ms < best))
            best = ms;
    }
    return best;
}

static int fastest(struct device *d, struct shape *s, const struct product *p,
                   const cublasLtMatmulHeuristicResult_t *list, int found)
{
    cudaEvent_t event[2];
    int best = 0;
    float best_ms = -1;
    if (cudaEventCreate(&event[0]) != cudaSuccess)
        return 0;
    if (cudaEventCreate(&event[1]) == cudaSuccess) {
        for (int i = 0; i < found; i++) {
            float ms = timed(d, s, &list[i].algo, p, event);
            // A later candidate must be better by more than timing's noise, so that choices do not wander.
            if (ms >= 0 && (best_ms < 0 || ms < best_ms * 0.98F)) {
                best = i;
                best_ms = ms;
            }
        }
        cudaEventDestroy(event[1]);
    }
    cudaEventDestroy(event[0]);
    return best;
}

static void choose(struct device *d, struct shape *s, const struct product *p)
{
    cublasLtMatmulHeuristicResult_t list[CANDIDATES];
    int found = describe(s) ? heuristics(d, s, list) : 0, best = 0;
    double flops = 2.0 * (double)p->m * (double)p->n * (double)p->k * (double)p->batch;
    if (found > 1 && flops >= TIMED_FLOPS && p->type != DT_F32 && !cuda_capturing(d))
        best = fastest(d, s, p, list, found);
    s->usable = found > 0;
    if (found > 0)
        s->algo = list[best].algo;
}

// The shape's entry, made when it is new; NULL: the device has failed. It may move when the next one is made.
static struct shape *shape_of(struct device *d, const struct product *p, int64_t epilogue)
{
    struct products *all = d->products;
    struct key key = key_of(p, epilogue);
    for (size_t i = 0; i < all->count; i++)
        if (memcmp(&all->list[i].key, &key, sizeof key) == 0)
            return &all->list[i];
    if (all->count == all->room) {
        size_t room = all->room ? 2 * all->room : 64;
        struct shape *list = realloc(all->list, room * sizeof *list);
        if (!list) {
            check_fail(&d->check, ERR_NO_MEMORY, "no memory for the shapes of %zu products", room);
            return NULL;
        }
        all->list = list;
        all->room = room;
    }
    struct shape *s = &all->list[all->count];
    memset(s, 0, sizeof *s);
    s->key = key;
    choose(d, s, p);
    all->count++;
    return s;
}

static void plain(struct device *d, const struct product *p)
{
    launch_product(d->stream, &(struct plain_product){.m = p->m,
                                                      .n = p->n,
                                                      .k = p->k,
                                                      .batch = p->batch,
                                                      .x = p->x,
                                                      .w = p->w,
                                                      .y = p->y,
                                                      .x_type = p->type,
                                                      .w_type = p->type,
                                                      .y_type = p->y_type,
                                                      .x_ld = p->x_ld,
                                                      .y_ld = p->y_ld,
                                                      .w_k = p->w_rows ? p->w_ld : 1,
                                                      .w_n = p->w_rows ? 1 : p->w_ld,
                                                      .x_stride = p->x_stride,
                                                      .w_stride = p->w_stride,
                                                      .y_stride = p->y_stride});
}

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

void cuda_product(struct device *d, const struct product *given)
{
    struct product sound = *given, *p = &sound;
    // A single row has no use for its stride, which may be anything; the library wants a sound one all the same.
    if (p->m == 1) {
        p->x_ld = max64(p->x_ld, p->k);
        p->y_ld = max64(p->y_ld, p->n);
    }
    if ((p->w_rows ? p->k : p->n) == 1)
        p->w_ld = max64(p->w_ld, p->w_rows ? p->n : p->k);
    int64_t epilogue = epilogue_of(p);
    bool after = epilogue < 0; // bias and activation are another kernel's
    struct shape *s = shape_of(d, p, after ? CUBLASLT_EPILOGUE_DEFAULT : epilogue);
    if (!s)
        return;
    if (!s->usable || !run(d, s, &s->algo, p)) {
        s->usable = false;
        plain(d, p);
        after = true;
    }
    if (after && (!tensor_none(p->bias) || p->act != ACT_NONE)) {
        struct tensor y = tensor_2d(p->y, p->y_type, p->m, p->n);
        y.ld = p->y_ld;
        launch_points(d->stream,
                      &(struct points){.op = POINT_ACT, .act = p->act, .x = y, .row = p->bias, .row_n = p->n});
    }
}

// A part's weight in the activation type: itself, or a converted copy in scratch memory.
static struct tensor operand(struct device *d, struct tensor w)
{
    if (w.dtype == d->type)
        return w;
    struct tensor t = tensor_2d(NULL, d->type, w.n[0], w.n[1]);
    t.data = cuda_scratch(d, SLOT_OPERAND, tensor_bytes(t));
    if (t.data)
        launch_convert(d->stream, t, w);
    return t;
}

void cuda_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    if (!check_linear(&d->check, y, x, w) || tensor_count(y) == 0)
        return;
    cuda_enter(d);
    for (int64_t i = 0, column = 0; i < w->parts; column += w->w[i++].n[0]) {
        struct tensor weight = operand(d, w->w[i]), part = tensor_cols(y, column, w->w[i].n[0]);
        if (!weight.data)
            return;
        if (part.n[1] > 0)
            cuda_product(d, &(struct product){.m = y.n[0],
                                              .n = part.n[1],
                                              .k = w->k,
                                              .batch = 1,
                                              .x = x.data,
                                              .w = weight.data,
                                              .y = part.data,
                                              .type = d->type,
                                              .y_type = d->type,
                                              .x_ld = x.ld,
                                              .w_ld = weight.ld,
                                              .y_ld = y.ld,
                                              .bias = w->b[i],
                                              .act = act});
    }
    cuda_launched(d, "linear");
}
