#!/bin/sh
# Bad jobs, bad targets and bad models through the whole fleet; the cases are in bad_input.py.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/e2e/bad_input.py" # Debian's, which has python3-redis and python3-protobuf
