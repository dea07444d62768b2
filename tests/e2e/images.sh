#!/usr/bin/env bash
# A group with a data_degree makes several images side by side, and a job whose images cannot be dealt so all the same.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"

model=$DITFLEET_SOURCE/ops/demo/model
fleet_redis
fleet_sink
fleet_supervisor "[group images]
ranks = 2
data_degree = 2
model = demo@1=$model"
fleet_wait_ready 1

# made IMAGES PLAN: a job of so many, by this plan
made() {
  local job=(--prompt "a red circle" --width 64 --height 64 --num-inference-steps 4 --max-sequence-length 24)
  fleet_cli submit --model demo --id "of-$1" --output-url "$fleet_sink_url/{id}-{index}.png" --num-images "$1" --seed 3 \
    "${job[@]}" --wait >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
  grep -q "^plan     $2$" "$fleet/out" || fail "$1 images, not $2: $(<"$fleet/out")"
  for ((i = 0; i < $1; i++)); do
    [[ -s $fleet/sink/of-$1-$i.png ]] || fail "there is no picture $i of $1"
  done
}

made 2 "cfg=1 ulysses=1 ring=1 data=2"
made 4 "cfg=1 ulysses=1 ring=1 data=2"
made 1 "cfg=1 ulysses=2 ring=1"
made 3 "cfg=1 ulysses=2 ring=1"
echo "images: all passed"
