#include "kernels/cuda/loader.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 8, BUFFERS = 2, WAITING = 64 };
static const int64_t PIECE_BYTES = 8 << 20;

struct piece {
    struct tensor dst, src; // (rows, n), at most PIECE_BYTES of src
    int64_t second;         // as loader_put has it
};

struct buffer {
    void *host;       // pinned
    void *stage;      // where a piece waits on the device for its conversion; NULL until one has to
    cudaEvent_t sent; // the buffer is free again
};

struct courier {
    struct loader *loader;
    pthread_t thread;
    cudaStream_t stream;
    struct buffer buffers[BUFFERS];
};

struct loader {
    int gpu, count; // couriers at work
    struct courier couriers[MAX_THREADS];
    pthread_mutex_t lock;
    pthread_cond_t change;
    struct piece ring[WAITING]; // pieces [taken, put)
    uint64_t put, taken, sent;
    bool ending;
    cudaError_t failure; // the first one
    bool busy;           // of the caller's thread: something was put since the last wait
};

// ---- a courier

static bool take(struct loader *l, struct piece *out)
{
    pthread_mutex_lock(&l->lock);
    while (l->taken == l->put && !l->ending)
        pthread_cond_wait(&l->change, &l->lock);
    const bool some = l->taken < l->put;
    if (some)
        *out = l->ring[l->taken++ % WAITING];
    pthread_cond_broadcast(&l->change);
    pthread_mutex_unlock(&l->lock);
    return some;
}

static void gather(char *to, struct tensor src)
{
    const size_t row = (size_t)src.n[1] * dtype_size(src.dtype), stride = (size_t)src.ld * dtype_size(src.dtype);
    if (row == stride || src.n[0] == 1) {
        memcpy(to, src.data, (size_t)src.n[0] * row);
        return;
    }
    for (int64_t i = 0; i < src.n[0]; i++)
        memcpy(to + (size_t)i * row, (const char *)src.data + (size_t)i * stride, row);
}

static cudaError_t send(struct courier *c, struct buffer *b, const struct piece *p)
{
    const bool same = p->dst.dtype == p->src.dtype;
    cudaError_t e = cudaEventSynchronize(b->sent);
    if (e == cudaSuccess && !same && !b->stage)
        e = cudaMalloc(&b->stage, (size_t)PIECE_BYTES);
    if (e != cudaSuccess)
        return e;
    struct tensor stage = tensor_2d(b->stage, p->src.dtype, p->src.n[0], p->src.n[1]);
    gather(b->host, p->src);
    e = cudaMemcpyAsync(same ? p->dst.data : b->stage, b->host, tensor_bytes(stage), cudaMemcpyHostToDevice, c->stream);
    if (e == cudaSuccess && !same) {
        if (dtype_quantised(p->dst.dtype))
            launch_quantise(c->stream, p->dst, stage);
        else
            launch_convert(c->stream, p->dst, stage);
        if (p->second)
            launch_quantise_again(c->stream, (char *)p->dst.data + p->second, p->dst, stage);
        e = cudaGetLastError();
    }
    return e == cudaSuccess ? cudaEventRecord(b->sent, c->stream) : e;
}

static void *work(void *arg)
{
    struct courier *c = arg;
    struct loader *l = c->loader;
    struct piece p;
    cudaError_t e = cudaSetDevice(l->gpu);
    for (int i = 0; take(l, &p); i = (i + 1) % BUFFERS) {
        if (e == cudaSuccess) // after a failure pieces are only counted
            e = send(c, &c->buffers[i], &p);
        pthread_mutex_lock(&l->lock);
        l->sent++;
        if (l->failure == cudaSuccess)
            l->failure = e;
        pthread_cond_broadcast(&l->change);
        pthread_mutex_unlock(&l->lock);
    }
    return NULL;
}

// ---- all of them

static cudaError_t equip(struct courier *c)
{
    cudaError_t e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    for (int i = 0; e == cudaSuccess && i < BUFFERS; i++) {
        struct buffer *b = &c->buffers[i];
        e = cudaHostAlloc(&b->host, (size_t)PIECE_BYTES, cudaHostAllocDefault);
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&b->sent, cudaEventDisableTiming);
    }
    return e;
}

static void unequip(struct courier *c)
{
    for (int i = 0; i < BUFFERS; i++) {
        cudaFreeHost(c->buffers[i].host);
        cudaFree(c->buffers[i].stage);
        if (c->buffers[i].sent)
            cudaEventDestroy(c->buffers[i].sent);
    }
    if (c->stream)
        cudaStreamDestroy(c->stream);
}

void loader_free(struct loader *l)
{
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    l->ending = true;
    pthread_cond_broadcast(&l->change);
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->count; i++) {
        pthread_join(l->couriers[i].thread, NULL);
        cudaStreamSynchronize(l->couriers[i].stream);
    }
    for (int i = 0; i < MAX_THREADS; i++)
        unequip(&l->couriers[i]);
    pthread_cond_destroy(&l->change);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

static int threads_here(void)
{
    cpu_set_t set;
    const int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return cpus < MAX_THREADS ? cpus : MAX_THREADS;
}

// As many couriers as can be had, one at least; NULL and *err.
static struct loader *start(struct device *d, struct err *err)
{
    struct loader *l = calloc(1, sizeof *l);
    if (!l) {
        err_set(err, ERR_NO_MEMORY, "no memory for loading weights");
        return NULL;
    }
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->change, NULL);
    l->gpu = d->gpu;
    for (int n = threads_here(); l->count < n; l->count++) {
        struct courier *c = &l->couriers[l->count];
        c->loader = l;
        if (!cuda_ok(d, equip(c), "loading weights") || pthread_create(&c->thread, NULL, work, c) != 0)
            break;
    }
    if (check_report(&d->check, err) == 0 && l->count > 0)
        return l;
    if (l->count == 0 && d->check.failure.code == 0)
        err_set(err, ERR_NO_MEMORY, "loading weights: no thread can be started");
    loader_free(l);
    return NULL;
}

static void put(struct loader *l, struct tensor dst, struct tensor src, int64_t second)
{
    pthread_mutex_lock(&l->lock);
    while (l->put - l->taken == WAITING)
        pthread_cond_wait(&l->change, &l->lock);
    l->ring[l->put++ % WAITING] = (struct piece){dst, src, second};
    pthread_cond_broadcast(&l->change);
    pthread_mutex_unlock(&l->lock);
}

// As one row where rows need not stay whole, so that pieces are of one size whatever the shape.
static struct tensor flat(struct tensor t)
{
    return tensor_2d(t.data, t.dtype, 1, tensor_count(t));
}

static void put_row(struct loader *l, struct tensor dst, struct tensor src)
{
    const int64_t some = PIECE_BYTES / (int64_t)dtype_size(src.dtype);
    for (int64_t i = 0; i < src.n[1]; i += some) {
        const int64_t n = min64(some, src.n[1] - i);
        put(l, tensor_cols(dst, i, n), tensor_cols(src, i, n), 0);
    }
}

int loader_put(struct device *d, struct tensor dst, struct tensor src, int64_t second, struct err *err)
{
    if (tensor_count(src) == 0)
        return 0;
    const int64_t rows = rows_of(src), row = tensor_count(src) / rows;
    const int64_t some = PIECE_BYTES / (row * (int64_t)dtype_size(src.dtype));
    const bool whole = src.dims == 1 || src.ld == row;
    if (!d->loader && !(d->loader = start(d, err)))
        return (int)err->code;
    d->loader->busy = true;
    if (dtype_quantised(dst.dtype) && some == 0)
        return err_set(err, ERR_UNSUPPORTED, "a weight with rows of %lld numbers cannot be %s", (long long)row,
                       dtype_name(dst.dtype));
    if (whole && !dtype_quantised(dst.dtype))
        put_row(d->loader, flat(dst), flat(src));
    else if (some == 0)
        for (int64_t i = 0; i < rows; i++)
            put_row(d->loader, matrix_rows(dst, row, i, 1), matrix_rows(src, row, i, 1));
    else
        for (int64_t i = 0; i < rows; i += some) {
            const int64_t n = min64(some, rows - i);
            put(d->loader, matrix_rows(dst, row, i, n), matrix_rows(src, row, i, n), second);
        }
    return 0;
}

void loader_wait(struct device *d)
{
    struct loader *l = d->loader;
    if (!l || !l->busy)
        return;
    l->busy = false;
    pthread_mutex_lock(&l->lock);
    while (l->sent < l->put)
        pthread_cond_wait(&l->change, &l->lock);
    cudaError_t e = l->failure;
    l->failure = cudaSuccess;
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->count; i++) {
        const cudaError_t arrived = cudaStreamSynchronize(l->couriers[i].stream);
        e = e == cudaSuccess ? arrived : e;
    }
    cuda_ok(d, e, "loading weights");
}
