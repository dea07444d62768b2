#!/bin/sh
# One group on two nodes, each in a network of its own; the cases are in nodes.py.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/e2e/nodes.py" # Debian's, which has python3-redis and python3-protobuf
