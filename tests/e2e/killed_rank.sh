#!/usr/bin/env bash
set -euo pipefail
exec python3 "${DITFLEET_SOURCE:?}/tests/e2e/killed_rank.py"
