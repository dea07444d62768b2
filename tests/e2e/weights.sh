#!/usr/bin/env bash
# Sharded weights from the command line to the fleet: the latents are those of all weights on every rank, a group makes
# the picture that generate makes, and plan has them where nothing else fits.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"
under_test=("$fleet_build/ditfleet")
printed=$fleet/out

model=$DITFLEET_SOURCE/ops/demo/model
job=(--prompt "a red circle" --seed 3 --width 96 --height 80 --num-inference-steps 3 --max-sequence-length 24)
for weights in replicated sharded; do
  expect 0 "$fleet/$weights.png" generate --model "$model" "${job[@]}" --ranks 2 --weights $weights \
    --save-latents "$fleet/$weights.safetensors" -o "$fleet/$weights.png"
done
grep -q "^cfg=1 ulysses=2 ring=1 weights=sharded: " "$fleet/out" || fail "not sharded: $(<"$fleet/out")"
cmp "$fleet/replicated.safetensors" "$fleet/sharded.safetensors" || fail "other latents"

expect 1 "one rank has nobody to share them with" generate --model "$model" "${job[@]}" --weights sharded
expect 1 "weights sharded with pipefusion_degree 2" generate --model "$model" "${job[@]}" --ranks 2 --weights sharded \
  --pipefusion-degree 2
expect 2 "weights half: they may be replicated or sharded" generate --model "$model" "${job[@]}" --weights half

# ---- a plan for GPUs, by a module that has none
mkdir "$fleet/cuda"
cp "$fleet_build/ditfleet" "$fleet_build/tests/fake_cuda/libditfleet_cuda.so" "$fleet/cuda"
under_test=("$fleet/cuda/ditfleet")
flux=(plan --architecture flux.1-dev --device cuda --ranks 2 --json)
expect 0 '"replicated"' "${flux[@]}"
check "all(p['weights'] == 'replicated' and p['memory_bytes'] > 24e9 for p in d['plans'])"
expect 0 '"sharded"' "${flux[@]}" --memory-budget 20GiB
check "d['plans'] and all(p['weights'] == 'sharded' and p['memory_bytes'] < 16e9 for p in d['plans'])"
expect 0 '"by stage"' "${flux[@]}" --memory-budget 20GiB --pipefusion-degree 2
check "all(p['memory_bytes'] < 16e9 for p in d['plans'])"
expect 1 "no plan fits: the one that takes least needs 1" "${flux[@]}" --memory-budget 12GiB
expect 1 "no plan fits: the one that takes least needs 2" "${flux[@]}" --memory-budget 20GiB --weights replicated

# ---- a group
fleet_redis
fleet_sink
fleet_supervisor "[group parts]
ranks = 2
weights = sharded
model = demo@1=$model"
fleet_wait_ready 1
fleet_cli submit --id one --model demo --output-url "$fleet_sink_url/{id}.png" "${job[@]}" --wait >"$fleet/out" 2>&1 ||
  fail "$(<"$fleet/out")"
grep -q "^plan     cfg=1 ulysses=2 ring=1 weights=sharded$" "$fleet/out" || fail "not sharded: $(<"$fleet/out")"
cmp "$fleet/sharded.png" "$fleet/sink/one.png" || fail "not the picture that generate makes"
echo "weights: all passed"
