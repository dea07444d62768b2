#!/bin/sh
# Some seconds of faults of every kind, told by tests/chaos/run.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/chaos/run" --short # Debian's, which has python3-redis and python3-protobuf
