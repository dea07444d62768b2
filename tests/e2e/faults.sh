#!/bin/sh
# Killed, stopped and hanging processes, told by faults.py.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/e2e/faults.py" # Debian's, which has python3-redis and python3-protobuf
