// record.c: runs of operations launched as one (CUDA graphs), and the time of each operation (events between them).
#include "kernels/cuda/device.h"

#include <stdio.h>
#include <stdlib.h>

// ---- recordings

struct recording {
    cudaGraphExec_t graph;
    uint64_t memory; // the device's count of moved scratch blocks when it was made: its addresses hold while this does
    struct link_round *round; // what it says to other ranks; NULL: nothing
};

bool cuda_record(struct device *d)
{
    cuda_enter(d);
    if (d->check.failure.code || d->profile)
        return false;
    d->recording_memory = d->scratch_moves;
    if (d->link)
        cuda_link_record(d->link);
    return cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
}

struct recording *cuda_recorded(struct device *d)
{
    cudaGraph_t graph = NULL;
    struct recording *r = NULL;
    cudaError_t e = cudaStreamEndCapture(d->stream, &graph);
    // What failed in between failed to be recorded; nothing ran.
    const bool sound =
        e == cudaSuccess && graph && d->check.failure.code == 0 && d->recording_memory == d->scratch_moves;
    struct link_round *round = d->link ? cuda_link_recorded(d->link) : NULL;
    d->check.failure = (struct err){.code = ERR_NONE};
    if (sound && (r = calloc(1, sizeof *r)) != NULL) {
        *r = (struct recording){.memory = d->scratch_moves, .round = round};
        if (cudaGraphInstantiate(&r->graph, graph, 0) != cudaSuccess) {
            free(r);
            r = NULL;
        }
    }
    if (!r)
        free(round);
    if (graph)
        cudaGraphDestroy(graph);
    cudaGetLastError();
    return r;
}

bool cuda_replay(struct device *d, struct recording *r)
{
    if (d->check.failure.code || r->memory != d->scratch_moves)
        return false;
    cuda_enter(d);
    cuda_ok(d, cudaGraphLaunch(r->graph, d->stream), "a recorded run");
    if (r->round)
        cuda_link_replay(d->link, r->round);
    return true;
}

void cuda_forget(struct device *d, struct recording *r)
{
    if (!r)
        return;
    cuda_enter(d);
    cudaStreamSynchronize(d->stream); // a launch may still go on
    cudaGraphExecDestroy(r->graph);
    free(r->round);
    free(r);
}

// ---- profiles

enum { NAME = 48 };

struct moment {
    cudaEvent_t at;
    char op[NAME];
};

struct profile {
    struct moment *list;
    size_t count, room;
};

void cuda_profile_mark(struct device *d, const char *op)
{
    struct profile *p = d->profile;
    if (p->count == p->room) {
        const size_t room = p->room ? 2 * p->room : 1024;
        struct moment *list = realloc(p->list, room * sizeof *list);
        if (!list)
            return; // its time goes to the next operation
        p->list = list;
        p->room = room;
    }
    struct moment *m = &p->list[p->count];
    if (cudaEventCreate(&m->at) != cudaSuccess)
        return;
    snprintf(m->op, sizeof m->op, "%s", op);
    p->count++;
    cudaEventRecord(m->at, d->stream);
}

void cuda_profile_start(struct device *d)
{
    cuda_enter(d);
    if (!d->profile && (d->profile = calloc(1, sizeof *d->profile)) != NULL)
        cuda_profile_mark(d, "");
}

void cuda_profile_end(struct device *d, void (*each)(void *arg, const char *op, double ms), void *arg)
{
    struct profile *p = d->profile;
    if (!p)
        return;
    cuda_enter(d);
    d->profile = NULL;
    cudaStreamSynchronize(d->stream);
    for (size_t i = 1; i < p->count; i++) {
        float ms = 0;
        if (each && cudaEventElapsedTime(&ms, p->list[i - 1].at, p->list[i].at) == cudaSuccess)
            each(arg, p->list[i].op, (double)ms);
    }
    for (size_t i = 0; i < p->count; i++)
        cudaEventDestroy(p->list[i].at);
    free(p->list);
    free(p);
}
