#!/usr/bin/env bash
# Scaling by ops/autoscaling's rule, simulated on queue.lua itself with a clock of the simulation's; see autoscaling.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/private_redis.bash
. tests/private_redis.bash
/usr/bin/python3 -B tests/e2e/autoscaling.py "${private_socket:?}" ops/autoscaling # Debian's, which has python3-redis
