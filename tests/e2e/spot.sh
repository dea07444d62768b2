#!/bin/sh
# The cloud takes the machine back: every kind of notice, and services that give none; the cases are in spot.py.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/e2e/spot.py" # Debian's, which has python3-redis and python3-protobuf
