// product.c: matrix products through cuBLASLt. Each shape is described to it and gets its algorithm (tune.c) once.
//
// Row-major y = x w^T is column-major y^T = w x^T: w comes first.
#include "kernels/cuda/product.h"

#include <stdlib.h>
#include <string.h>

// Names of cuBLAS 12.9, in numbers so that older headers do, too; an older library refuses them.
enum { A_SCALE_MODE = 31, B_SCALE_MODE = 32, SCALE_OUTER_VEC_32F = 3 };

struct products *products_new(void)
{
    return calloc(1, sizeof(struct products));
}

void products_free(struct products *p)
{
    if (!p)
        return;
    algo_cache_close(p->cache);
    free(p->list);
    free(p);
}

static cudaDataType_t data_type(enum dtype type)
{
    return type == DT_BF16 ? CUDA_R_16BF : type == DT_F16 ? CUDA_R_16F : type == DT_E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_32F;
}

static int64_t size_of(enum dtype type)
{
    return (int64_t)dtype_size(type);
}

// GELU in f32 is left to our own kernel: the library's is an approximation good enough for halves.
int64_t cuda_epilogue(const struct product *p)
{
    bool bias = !tensor_none(p->bias), half = p->y_type != DT_F32;
    if (p->type == DT_E4M3 && !half) // there the library takes a bias for bf16
        return bias || p->act != ACT_NONE ? -1 : CUBLASLT_EPILOGUE_DEFAULT;
    if (bias && (p->bias.dtype != p->y_type || alignment_of(p->bias.data, 16) < 16))
        return -1;
    if (p->act == ACT_NONE)
        return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (p->act == ACT_GELU_TANH && half)
        return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    return -1;
}

static struct key key_of(const struct product *p, int64_t epilogue, bool fast)
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
                        .y_align = alignment_of(p->y, (p->y_ld | p->y_stride) * y_size),
                        .factors = p->x_scale != NULL,
                        .of = p->of,
                        .fast = fast};
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

// What only E4M3 has.
static bool describe_e4m3(struct shape *s)
{
    const int8_t fast = (int8_t)s->key.fast;
    const int32_t mode = SCALE_OUTER_VEC_32F;
    return cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast) == 0 &&
           (!s->key.factors || (cublasLtMatmulDescSetAttribute(&s->desc, (cublasLtMatmulDescAttributes_t)A_SCALE_MODE,
                                                               &mode, sizeof mode) == 0 &&
                                cublasLtMatmulDescSetAttribute(&s->desc, (cublasLtMatmulDescAttributes_t)B_SCALE_MODE,
                                                               &mode, sizeof mode) == 0));
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
           (type != DT_E4M3 || describe_e4m3(s)) &&
           lay_out(&s->w, type, k->w_rows ? k->n : k->k, k->w_rows ? k->k : k->n, k->w_ld, k->w_stride, k->batch) &&
           lay_out(&s->x, type, k->k, k->m, k->x_ld, k->x_stride, k->batch) &&
           lay_out(&s->y, (enum dtype)k->y_type, k->n, k->m, k->y_ld, k->y_stride, k->batch);
}

// Where the bias and the factors are: part of the description, though not of the shape.
static bool point_at(struct shape *s, const struct product *p)
{
    const void *bias = tensor_none(p->bias) ? NULL : p->bias.data;
    if ((s->key.epilogue == CUBLASLT_EPILOGUE_BIAS || s->key.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS) &&
        cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) != 0)
        return false;
    if (p->bias_stride && cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE,
                                                         &p->bias_stride, sizeof p->bias_stride) != 0)
        return false;
    return !s->key.factors || (cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                                              &p->w_scale, sizeof p->w_scale) == 0 &&
                               cublasLtMatmulDescSetAttribute(&s->desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
                                                              &p->x_scale, sizeof p->x_scale) == 0);
}

bool cuda_product_run(struct device *d, struct shape *s, const cublasLtMatmulAlgo_t *algo, const struct product *p)
{
    const float one = 1, zero = 0;
    void *space = cuda_scratch(d, SLOT_LIBRARY, LIBRARY_BYTES);
    if (!space)
        return true; // the device has failed already: not for want of an algorithm
    return point_at(s, p) && cublasLtMatmul(d->blas, &s->desc, &one, p->w, &s->w, p->x, &s->x, &zero, p->y, &s->y, p->y,
                                            &s->y, algo, space, LIBRARY_BYTES, d->stream) == CUBLAS_STATUS_SUCCESS;
}

// The shape's entry, made when it is new; NULL: the device has failed. It may move when the next one is made.
static struct shape *shape_of(struct device *d, const struct product *p, int64_t epilogue, bool fast)
{
    struct products *all = d->products;
    struct key key = key_of(p, epilogue, fast);
    key.exact = d->exact;
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
    if (describe(s) && point_at(s, p)) // the library looks at the addresses' alignment
        cuda_product_choose(d, s, p);
    all->count++;
    return s;
}

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

// A single row has no use for its stride, which may be anything; the library wants a sound one all the same.
static struct product sound(struct product p)
{
    if (p.m == 1) {
        p.x_ld = max64(p.x_ld, p.k);
        p.y_ld = max64(p.y_ld, p.n);
    }
    if ((p.w_rows ? p.k : p.n) == 1)
        p.w_ld = max64(p.w_ld, p.w_rows ? p.n : p.k);
    return p;
}

bool cuda_product_library(struct device *d, const struct product *given, int64_t epilogue, bool fast)
{
    struct product p = sound(*given);
    if (!d->exact)
        p.of = 0;
    struct shape *s = shape_of(d, &p, epilogue, fast);
    if (!s)
        return true;
    bool ran = s->usable && cuda_product_run(d, s, &s->algo, &p);
    if (!ran && s->from_disk && !cuda_capturing(d)) { // measured elsewhere, and no good here: chosen afresh, once
        cuda_product_choose(d, s, &p);
        ran = s->usable && cuda_product_run(d, s, &s->algo, &p);
    }
    if (s->usable && !ran)
        cudaGetLastError(); // a launch that was refused: no failure of the device
    s->usable = ran;
    return ran;
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

void cuda_epilogue_after(struct device *d, const struct product *p)
{
    struct tensor y = tensor_2d(p->y, p->y_type, p->m, p->n);
    y.ld = p->y_ld;
    if (!tensor_none(p->bias) || p->act != ACT_NONE)
        launch_points(d->stream,
                      &(struct points){.op = POINT_ACT, .act = p->act, .x = y, .row = p->bias, .row_n = p->n});
}

void cuda_product(struct device *d, const struct product *p)
{
    int64_t epilogue = cuda_epilogue(p);
    bool after = epilogue < 0; // bias and activation are another kernel's
    if (!cuda_product_library(d, p, after ? CUBLASLT_EPILOGUE_DEFAULT : epilogue, false)) {
        plain(d, p);
        after = true;
    }
    if (after)
        cuda_epilogue_after(d, p);
}
