#!/usr/bin/env bash
# A group whose ranks are stages: its picture is the one that generate makes by the same plan, it is cancelled between
# two steps, and the group goes on to the next job.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"

model=$DITFLEET_SOURCE/ops/demo/model
job=(--prompt "a red circle" --seed 3 --width 96 --height 80 --num-inference-steps 6 --max-sequence-length 24)
fleet_redis
fleet_sink
fleet_supervisor "[group stages]
ranks = 4
pipefusion_degree = 2
pipefusion_blocks = 4, 2
num_pipeline_patch = 3
warmup_steps = 2
model = demo@1=$model"
fleet_wait_ready 1
url=(--model demo --output-url "$fleet_sink_url/{id}.png")

fleet_cli submit --id one "${url[@]}" "${job[@]}" --wait >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
plan="cfg=1 ulysses=2 ring=1 pipe=2 patches=3 warmup=2 blocks=4,2"
grep -q "^plan     $plan$" "$fleet/out" || fail "not $plan: $(<"$fleet/out")"
grep -qE "^rank 3 +computed" "$fleet/out" || fail "no times of rank 3: $(<"$fleet/out")"
"$fleet_build/ditfleet" generate --model "$model" "${job[@]}" --ranks 4 --pipefusion-degree 2 --num-pipeline-patch 3 \
  --pipefusion-blocks 4,2 --warmup-steps 2 --quiet -o "$fleet/own.png" >"$fleet/out"
cmp "$fleet/own.png" "$fleet/sink/one.png" || fail "not the picture that generate makes"

fleet_cli submit --id endless "${url[@]}" "${job[@]}" --num-inference-steps 1000 >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
denoising() {
  fleet_cli show endless 2>/dev/null | grep "^stage    denoise" >/dev/null
}
fleet_wait supervisor 60 denoising
fleet_cli cancel endless >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
cancelled() {
  fleet_cli show endless 2>/dev/null | grep "^state    CANCELLED" >/dev/null
}
fleet_wait supervisor 20 cancelled
fleet_cli submit --id after "${url[@]}" "${job[@]}" --wait >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
cmp "$fleet/sink/one.png" "$fleet/sink/after.png" || fail "another picture after a job was cancelled"
fleet_cli status --json | grep '"restarts":[1-9]' >/dev/null && fail "a rank was started again"
echo "pipefusion: all passed"
