// backend.h: finds a backend's table of operations by its name.
//
// The CUDA backend is a module of its own, libditfleet_cuda.so beside the program, loaded when it is first asked for:
// so a program that computes on the CPU maps none of CUDA's libraries, and runs where there are none.
#ifndef DITFLEET_BACKEND_H
#define DITFLEET_BACKEND_H

#include "kernels/kernels.h"

// "cpu", "cuda" or "dry". A loaded module stays for the life of the process. ERR_INVALID: no such name;
// ERR_NOT_FOUND: this build has no such module; ERR_UNSUPPORTED: it cannot be loaded, and why.
int backend_find(const char *name, const struct kernels **out, struct err *err);

#endif
