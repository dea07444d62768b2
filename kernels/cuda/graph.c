// graph.c: see graph.h. Descriptors are made through one sticky status, so a description reads as a list of operations.
//
// Engines differ in the last bits, so a shape's engine must not depend on the moment: large shapes are measured once on
// a machine and what was fastest is kept on disk, small ones get the first engine that the library suggests.
#include "kernels/cuda/graph.h"
#include "kernels/algo_cache.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_DESCRIPTORS = 64, MAX_OPERATIONS = 16, MAX_GIVEN = 8, CANDIDATES = 8, TIMED = 4, TIMED_RUNS = 3 };
static const int64_t MAX_WORKSPACE = (int64_t)1 << 30;
static const double TIMED_FLOPS = 2e9; // smaller ones gain less than the timing costs

typedef cudnnBackendDescriptor_t desc;

struct graph {
    cudnnHandle_t handle;
    cudnnStatus_t status; // the first failure: this graph cannot be described
    desc all[MAX_DESCRIPTORS];
    int count;
    desc ops[MAX_OPERATIONS];
    int n_ops;
    bool used[MAX_GIVEN];
    int given;
};

// As the cache knows it.
struct engine_key {
    int64_t kind, key[GRAPH_KEY], mode; // mode: of the heuristic that suggested the engine
};
enum { KEY_NUMBERS = sizeof(struct engine_key) / sizeof(int64_t) };
_Static_assert((int)KEY_NUMBERS <= (int)ALGO_KEY_MAX, "a key fits the cache");

struct plan {
    enum graph_kind kind;
    int64_t key[GRAPH_KEY];
    double flops;
    struct graph graph; // what the plan was made of lives as long as it
    desc plan;          // NULL: no engine
    int64_t workspace;
    struct plan *next;
};

struct plans {
    struct plan *first;
    struct algo_cache *cache; // NULL until the first large shape
};

// ---- descriptors

static desc make(struct graph *g, cudnnBackendDescriptorType_t type)
{
    desc made = NULL;
    if (g->status == CUDNN_STATUS_SUCCESS && g->count == MAX_DESCRIPTORS)
        g->status = CUDNN_STATUS_INTERNAL_ERROR;
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendCreateDescriptor(type, &made);
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->all[g->count++] = made;
    return made;
}

static void set(struct graph *g, desc to, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                int64_t count, const void *value)
{
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendSetAttribute(to, name, type, count, value);
}

static void finish(struct graph *g, desc made)
{
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->status = cudnnBackendFinalize(made);
}

static void add_operation(struct graph *g, desc op)
{
    finish(g, op);
    if (g->status == CUDNN_STATUS_SUCCESS && g->n_ops == MAX_OPERATIONS)
        g->status = CUDNN_STATUS_INTERNAL_ERROR;
    if (g->status == CUDNN_STATUS_SUCCESS)
        g->ops[g->n_ops++] = op;
}

static cudnnDataType_t data_type(enum dtype type)
{
    return type == DT_BF16 ? CUDNN_DATA_BFLOAT16 : type == DT_F16 ? CUDNN_DATA_HALF : CUDNN_DATA_FLOAT;
}

int graph_tensor(struct graph *g, enum dtype type, enum graph_role role, const int64_t *dims, const int64_t *strides)
{
    cudnnDataType_t as = data_type(type);
    int64_t alignment = 16, uid = MAX_GIVEN + 1 + g->count;
    bool yes = true;
    if (role != GRAPH_VIRTUAL) {
        if (g->given < MAX_GIVEN)
            g->used[g->given] = role != GRAPH_UNUSED;
        uid = ++g->given;
    }
    if (role == GRAPH_UNUSED)
        return -1;
    desc t = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    set(g, t, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &as);
    set(g, t, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims);
    set(g, t, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides);
    set(g, t, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid);
    set(g, t, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (role == GRAPH_VIRTUAL)
        set(g, t, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
    if (role == GRAPH_NUMBER)
        set(g, t, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
    finish(g, t);
    return g->count - 1;
}

static void operand(struct graph *g, desc op, cudnnBackendAttributeName_t name, int tensor)
{
    if (g->status == CUDNN_STATUS_SUCCESS && tensor >= 0)
        set(g, op, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &g->all[tensor]);
}

void graph_point(struct graph *g, cudnnPointwiseMode_t mode, int x, int b, int y)
{
    cudnnDataType_t type = CUDNN_DATA_FLOAT;
    desc p = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    set(g, p, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set(g, p, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &type);
    finish(g, p);
    desc op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    set(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &p);
    operand(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    operand(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    operand(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    add_operation(g, op);
}

void graph_attention(struct graph *g, int q, int k, int v, int o, int scale, int lse)
{
    desc op = make(g, CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR);
    operand(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, q);
    operand(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, k);
    operand(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, v);
    operand(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, o);
    operand(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, scale);
    operand(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_STATSDESC, lse);
    add_operation(g, op);
}

void graph_conv(struct graph *g, int x, int w, int y, int64_t pad)
{
    cudnnDataType_t type = CUDNN_DATA_FLOAT;
    cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
    const int64_t dims = 2, ones[] = {1, 1}, pads[] = {0, pad};
    const float one = 1, zero = 0;
    desc p = make(g, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
    set(g, p, CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    set(g, p, CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode);
    set(g, p, CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, CUDNN_TYPE_INT64, 1, &dims);
    set(g, p, CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, ones);
    set(g, p, CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, ones);
    set(g, p, CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, pads);
    set(g, p, CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, pads);
    finish(g, p);
    desc op = make(g, CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR);
    set(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &p);
    operand(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x);
    operand(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, w);
    operand(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y);
    set(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_TYPE_FLOAT, 1, &one);
    set(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, CUDNN_TYPE_FLOAT, 1, &zero);
    add_operation(g, op);
}

// ---- plans

// Whether the configuration's engine gives the same bits each time.
static bool deterministic(desc config)
{
    cudnnBackendNumericalNote_t notes[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
    desc engine = NULL;
    int64_t found = 0;
    bool fine = false;
    if (cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine) != CUDNN_STATUS_SUCCESS)
        return false;
    if (cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &found,
                                 &engine) == CUDNN_STATUS_SUCCESS &&
        cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                 CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &found, notes) == CUDNN_STATUS_SUCCESS) {
        fine = true;
        for (int64_t i = 0; i < found && i < CUDNN_NUMERICAL_NOTE_TYPE_COUNT; i++)
            fine &= notes[i] != CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC;
    }
    cudnnBackendDestroyDescriptor(engine);
    return fine;
}

static desc plan_of(cudnnHandle_t handle, desc config, int64_t *workspace)
{
    desc plan = NULL;
    int64_t found;
    if (cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan) != CUDNN_STATUS_SUCCESS)
        return NULL;
    if (cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle) ==
            CUDNN_STATUS_SUCCESS &&
        cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
                                 &config) == CUDNN_STATUS_SUCCESS &&
        cudnnBackendFinalize(plan) == CUDNN_STATUS_SUCCESS &&
        cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &found,
                                 workspace) == CUDNN_STATUS_SUCCESS &&
        *workspace <= MAX_WORKSPACE)
        return plan;
    cudnnBackendDestroyDescriptor(plan);
    return NULL;
}

static cudnnStatus_t execute(struct device *d, const struct graph *g, desc plan, int64_t workspace, int count,
                             void **pointers)
{
    int64_t uids[MAX_GIVEN], n = 0;
    void *given[MAX_GIVEN], *space = workspace ? cuda_scratch(d, SLOT_LIBRARY, (size_t)workspace) : NULL;
    desc pack = NULL;
    if (workspace && !space)
        return CUDNN_STATUS_ALLOC_FAILED;
    for (int i = 0; i < count; i++)
        if (g->used[i]) {
            uids[n] = i + 1;
            given[n++] = pointers[i];
        }
    cudnnStatus_t s = cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
    if (s != CUDNN_STATUS_SUCCESS)
        return s;
    if ((s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, uids)) == 0 &&
        (s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, given)) ==
            0 &&
        (s = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &space)) == 0 &&
        (s = cudnnBackendFinalize(pack)) == 0)
        s = cudnnBackendExecute(d->dnn, plan, pack);
    cudnnBackendDestroyDescriptor(pack);
    return s;
}

// Milliseconds of a run, at best; negative when it does not work.
static float timed(struct device *d, const struct graph *g, desc plan, int64_t workspace, int count, void **pointers)
{
    cudaEvent_t event[2];
    float best = -1;
    if (cudaEventCreate(&event[0]) != cudaSuccess)
        return -1;
    if (cudaEventCreate(&event[1]) == cudaSuccess) {
        for (int i = 0; i <= TIMED_RUNS; i++) { // the first one warms up
            float ms = -1;
            cudaEventRecord(event[0], d->stream);
            if (execute(d, g, plan, workspace, count, pointers) != CUDNN_STATUS_SUCCESS)
                break;
            cudaEventRecord(event[1], d->stream);
            if (!cuda_ok(d, cudaEventSynchronize(event[1]), "timing") ||
                !cuda_ok(d, cudaEventElapsedTime(&ms, event[0], event[1]), "timing"))
                break;
            if (i > 0 && (best < 0 || ms < best))
                best = ms;
        }
        cudaEventDestroy(event[1]);
    }
    cudaEventDestroy(event[0]);
    return best;
}

static struct algo_cache *cache_of(struct device *d)
{
    if (!d->plans->cache)
        d->plans->cache = cuda_cache(d, "cudnn", cudnnGetVersion(), KEY_NUMBERS);
    return d->plans->cache;
}

static struct engine_key key_of(const struct plan *p, cudnnBackendHeurMode_t mode)
{
    struct engine_key key = {.kind = p->kind, .mode = mode};
    memcpy(key.key, p->key, sizeof key.key);
    return key;
}

// The number of the configuration that was fastest; -1: not known.
static int64_t remembered(struct device *d, const struct engine_key *key)
{
    uint64_t words[ALGO_WORDS];
    return cache_of(d) && algo_cache_find(cache_of(d), (const int64_t *)key, words) ? (int64_t)words[0] : -1;
}

static void remember(struct device *d, const struct engine_key *key, int64_t number)
{
    const uint64_t words[ALGO_WORDS] = {(uint64_t)number};
    if (cache_of(d))
        algo_cache_put(cache_of(d), (const int64_t *)key, words);
}

static bool take(struct device *d, struct plan *p, desc config)
{
    p->plan = deterministic(config) ? plan_of(d->dnn, config, &p->workspace) : NULL;
    return p->plan != NULL;
}

// The number of the fastest of the first few configurations that become plans; -1: none does.
static int64_t race(struct device *d, struct plan *p, const desc *configs, int64_t found, int count, void **pointers)
{
    int64_t winner = -1;
    float best = -1;
    for (int64_t i = 0, tried = 0; i < found && tried < TIMED; i++) {
        int64_t workspace = 0;
        desc plan = deterministic(configs[i]) ? plan_of(d->dnn, configs[i], &workspace) : NULL;
        if (!plan)
            continue;
        tried++;
        const float ms = timed(d, &p->graph, plan, workspace, count, pointers);
        if (ms >= 0 && (best < 0 || ms < best * 0.98F)) {
            best = ms;
            winner = i;
        }
        cudnnBackendDestroyDescriptor(plan);
    }
    return winner;
}

// Nothing is measured while a recording goes on.
static void choose(struct device *d, struct plan *p, cudnnBackendHeurMode_t mode, const desc *configs, int64_t found,
                   int count, void **pointers)
{
    const struct engine_key key = key_of(p, mode);
    const bool large = !d->exact && p->flops >= TIMED_FLOPS; // exact: engines of other shapes would be measured apart
    int64_t number = large ? remembered(d, &key) : -1;
    if (number >= 0 && number < found && take(d, p, configs[number]))
        return;
    number = large && !cuda_capturing(d) ? race(d, p, configs, found, count, pointers) : -1;
    if (number >= 0 && take(d, p, configs[number])) {
        remember(d, &key, number);
        return;
    }
    for (int64_t i = 0; i < found && !take(d, p, configs[i]); i++)
        ;
}

static void plan_with(struct device *d, struct plan *p, desc operations, cudnnBackendHeurMode_t mode, int count,
                      void **pointers)
{
    struct graph *g = &p->graph;
    desc heuristic = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), configs[CANDIDATES];
    int64_t found = 0;
    set(g, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &operations);
    set(g, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    finish(g, heuristic);
    for (int i = 0; i < CANDIDATES; i++)
        configs[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    if (g->status == CUDNN_STATUS_SUCCESS &&
        cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, CANDIDATES,
                                 &found, configs) == CUDNN_STATUS_SUCCESS)
        choose(d, p, mode, configs, min64(found, CANDIDATES), count, pointers);
}

static void plan_graph(struct device *d, struct plan *p, int count, void **pointers)
{
    struct graph *g = &p->graph;
    desc operations = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    set(g, operations, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->n_ops, g->ops);
    set(g, operations, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &g->handle);
    finish(g, operations);
    plan_with(d, p, operations, CUDNN_HEUR_MODE_A, count, pointers);
    if (p->plan || g->status != CUDNN_STATUS_SUCCESS)
        return;
    plan_with(d, p, operations, CUDNN_HEUR_MODE_FALLBACK, count, pointers);
}

static struct plan *find(struct device *d, enum graph_kind kind, const int64_t *key, double flops,
                         void (*describe)(struct graph *g, const int64_t *key), int count, void **pointers)
{
    struct plan *p;
    if (!d->plans && !(d->plans = calloc(1, sizeof *d->plans)))
        return NULL;
    for (p = d->plans->first; p; p = p->next)
        if (p->kind == kind && memcmp(p->key, key, sizeof p->key) == 0)
            return p;
    p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->kind = kind;
    p->flops = flops;
    memcpy(p->key, key, sizeof p->key);
    p->graph.handle = d->dnn;
    p->next = d->plans->first;
    d->plans->first = p;
    describe(&p->graph, key);
    if (p->graph.given == count)
        plan_graph(d, p, count, pointers);
    return p;
}

bool graph_run(struct device *d, enum graph_kind kind, const int64_t *key, double flops,
               void (*describe)(struct graph *g, const int64_t *key), int count, void **pointers)
{
    struct plan *p = find(d, kind, key, flops, describe, count, pointers);
    if (!p || !p->plan || d->check.failure.code)
        return false;
    if (execute(d, &p->graph, p->plan, p->workspace, count, pointers) == CUDNN_STATUS_SUCCESS)
        return true;
    cudnnBackendDestroyDescriptor(p->plan);
    p->plan = NULL;
    return false;
}

void graphs_keep(struct plans *all)
{
    if (all && all->cache)
        algo_cache_save(all->cache);
}

void graphs_free(struct plans *all)
{
    if (all)
        algo_cache_close(all->cache);
    for (struct plan *p = all ? all->first : NULL, *next; p; p = next) {
        next = p->next;
        if (p->plan)
            cudnnBackendDestroyDescriptor(p->plan);
        for (int i = p->graph.count - 1; i >= 0; i--)
            cudnnBackendDestroyDescriptor(p->graph.all[i]);
        free(p);
    }
    free(all);
}
