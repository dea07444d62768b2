#!/bin/sh
# GPU groups with no GPU: a module that computes on the CPU and fails on request (tests/fake_cuda.c); told by gpu_faults.py.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/e2e/gpu_faults.py" # Debian's, which has python3-redis and python3-protobuf
