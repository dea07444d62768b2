// recorder.h: keeps what passes through a generation and writes it as one safetensors file, named and shaped as the
// reference pipeline's recordings, so that the two can be compared tensor by tensor.
#ifndef DITFLEET_CLI_RECORDER_H
#define DITFLEET_CLI_RECORDER_H

#include "kernels/tensor.h"
#include "proto/err.h"

struct recorder;

struct recorder *recorder_new(void);
void recorder_free(struct recorder *r);
// Copies a contiguous tensor; a name that is there already is ignored (further images of the same job).
void recorder_put(void *recorder, const char *name, struct tensor t);
int recorder_write(const struct recorder *r, const char *path, struct err *err);

#endif
