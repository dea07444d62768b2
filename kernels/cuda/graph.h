// graph.h: operations through cuDNN's graph interface: a graph is described once for each shape, and the plan that
// cuDNN makes of it is kept for the device's life.
#ifndef DITFLEET_CUDA_GRAPH_H
#define DITFLEET_CUDA_GRAPH_H

#include "kernels/cuda/device.h"

enum graph_kind { GRAPH_ATTENTION, GRAPH_CONV };
// A tensor of a graph: memory given to each run, a number in host memory given to each run, one that never leaves the
// engine, or none at all (its place among the given ones stays empty).
enum graph_role { GRAPH_GIVEN, GRAPH_NUMBER, GRAPH_VIRTUAL, GRAPH_UNUSED };

#define GRAPH_KEY 10 // numbers that tell one shape from another

struct graph;

// A tensor of 4 dimensions, strides in elements; returns its number in the graph.
int graph_tensor(struct graph *g, enum dtype type, enum graph_role role, const int64_t *dims, const int64_t *strides);
// y = x op b
void graph_point(struct graph *g, cudnnPointwiseMode_t mode, int x, int b, int y);
// o = softmax(scale q k^T) v over (batch, heads, rows, dim); lse (batch, heads, rows, 1) F32, or -1: none
void graph_attention(struct graph *g, int q, int k, int v, int o, int scale, int lse);
// y = x correlated with w, stride 1, no zero rows, pad zero columns at either side
void graph_conv(struct graph *g, int x, int w, int y, int64_t pad);

// Runs the plan of this kind and key, describing and planning it when it is new. flops: worth measuring engines or not.
// pointers: of the given tensors and numbers, in the order of their making. False: no engine does this, and nothing was
// done; or the device has failed.
bool graph_run(struct device *d, enum graph_kind kind, const int64_t *key, double flops,
               void (*describe)(struct graph *g, const int64_t *key), int count, void **pointers);
void graphs_keep(struct plans *p); // what was measured, on disk
void graphs_free(struct plans *p);

#endif
