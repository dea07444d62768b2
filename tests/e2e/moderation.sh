#!/bin/sh
# Prompts judged at admission, by a deny list and by endpoints of every kind; the cases are in moderation.py.
exec /usr/bin/python3 "${DITFLEET_SOURCE:?}/tests/e2e/moderation.py" # Debian's, which has python3-redis and python3-protobuf
