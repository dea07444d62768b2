#!/usr/bin/env bash
# The whole fleet: Redis, an upload host, the supervisor, two CPU ranks; or, told "cuda", one GPU. A picture is the one
# that `generate` makes, byte for byte; bad jobs end in an error that says why; a killed worker costs no job.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
unset DITFLEET_REDIS
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"
export XDG_CACHE_HOME=$fleet/cache
case ${1:-cpu} in
  cpu)
    group="ranks = 2" own=(--ranks 2) plan="cfg=1 ulysses=2 ring=1" guided_plan="cfg=2 ulysses=1 ring=1"
    last_rank=1 long=(--width 64 --height 64 --num-inference-steps 300)
    ;;
  cuda)
    group="device = cuda" own=(--device cuda) plan="cfg=1 ulysses=1 ring=1" guided_plan=$plan
    last_rank=0 long=(--width 512 --height 512 --num-inference-steps 1000)
    fleet_has_redis >/dev/null || { echo "skipped: no Redis server here" && exit 77; }
    fleet_has_gpu || { echo "skipped: no GPU here: $(<"$fleet/gpu.log")" && exit 77; }
    ;;
  *) echo "usage: fleet.sh [cpu|cuda]" >&2 && exit 2 ;;
esac
model=$DITFLEET_SOURCE/ops/demo/model
small=(--width 64 --height 48 --num-inference-steps 2 --max-sequence-length 64 --seed 11)

# submit NAME STATUS TEXT flags...: waits; the exit status, and a text that it prints
submit() {
  local id=$1 want=$2 text=$3 got=0
  shift 3
  fleet_cli submit --id "$id" --model demo --wait "${small[@]}" "$@" >"$fleet/out" 2>&1 || got=$?
  [[ $got == "$want" ]] || fail "$id: exit status $got, expected $want: $(<"$fleet/out")"
  grep -qF -- "$text" "$fleet/out" || fail "$id: \"$text\" is not in: $(<"$fleet/out")"
}

# same NAME flags...: generate makes the very bytes of $fleet/NAME.png
same() {
  local id=$1
  shift
  "$fleet_build/ditfleet" generate --model "$model" "${own[@]}" --quiet "${small[@]}" "$@" -o "$fleet/own.png" >/dev/null
  cmp "$fleet/own.png" "$fleet/$id.png" || fail "$id: not the picture that generate makes"
}

# A second upload host, which fails.
fleet_redis
mkdir "$fleet/files" "$fleet/bad-sink"
fleet_start bad-sink "$fleet_build/ditfleet-sink" --dir "$fleet/bad-sink" --port-file "$fleet/bad.port" --fail 403
fleet_wait bad-sink 20 test -s "$fleet/bad.port"
bad_sink=127.0.0.1:$(<"$fleet/bad.port")
fleet_sink --fail 503 --fail-count 2 --count-file "$fleet/counts"
fleet_supervisor "[upload]
allow = $bad_sink
file_roots = $fleet/files
[group demo]
$group
model = demo@1=$model"
fleet_wait_ready 1

# ---- pictures
url=(--output-url "$fleet_sink_url/{id}.png")
submit plain 0 "state    SUCCEEDED" "${url[@]}" --prompt "a red circle" -o "$fleet/plain.png"
grep -q "^plan     $plan$" "$fleet/out" || fail "not the plan of these ranks: $(<"$fleet/out")"
grep -q "^3 plain.png$" "$fleet/counts" || fail "the upload was not tried three times: $(<"$fleet/counts")"
grep -qE "^rank $last_rank +computed ([0-9]*\.0*[1-9][0-9]*|[1-9][0-9]*\.0+), exchanged [0-9.]+, waited [0-9.]+ s$" "$fleet/out" ||
  fail "no times of rank $last_rank: $(<"$fleet/out")"
cmp "$fleet/plain.png" "$fleet/sink/plain.png" || fail "the saved picture is not the uploaded one"
same plain --prompt "a red circle"
if script -qec true /dev/null >/dev/null 2>&1; then # a build chroot may have no terminals to give
  script -qec "'$fleet_build/ditfleet' submit --redis '$fleet_redis_url' --model demo \
    --output-url '$fleet_sink_url/{id}' --wait --width 64 --height 48 --num-inference-steps 4 --max-sequence-length 64" \
    /dev/null >"$fleet/out" </dev/null
  grep -qE 'denoise  \[#+ *\] [1-4]/4' "$fleet/out" || fail "no bar on a terminal: $(<"$fleet/out")"
fi
submit guided 0 "$guided_plan" --output-file "$fleet/files/{id}.png" --prompt "a red circle" \
  --negative-prompt "" --true-cfg-scale 2.5 -o "$fleet/guided.png"
same guided --prompt "a red circle" --negative-prompt "" --true-cfg-scale 2.5
submit pair 0 "saved    $fleet/pair-1.png" --output-url "$fleet_sink_url/{id}-{index}.png" --num-images 2 \
  -o "$fleet/pair.png"
"$fleet_build/ditfleet" generate --model "$model" "${own[@]}" --quiet "${small[@]}" --num-images 2 -o "$fleet/own.png" >"$fleet/out"
cmp "$fleet/own-0.png" "$fleet/pair-0.png" && cmp "$fleet/own-1.png" "$fleet/pair-1.png" || fail "the pair differs"
submit plain 0 "state    SUCCEEDED" "${url[@]}" --prompt "a red circle" # the same job again: its old result
submit cut 0 "warning" "${url[@]}" --prompt "$(printf 'red %.0s' {1..400})"

# ---- bad jobs: each ends, each says why
submit width 1 "is DEAD: invalid: width" "${url[@]}" --width 56
submit model 1 "is DEAD: not_found" "${url[@]}" --model demo@2
submit length 1 "max_sequence_length" "${url[@]}" --max-sequence-length 4000
submit private 1 "is DEAD: refused" --output-url "http://127.0.0.1:1/x.png"
submit forbidden 1 "is DEAD: upload" --output-url "http://$bad_sink/x.png"
submit outside 1 "is DEAD: refused" --output-file "$fleet/elsewhere.png"
submit plain 1 "is DEAD: conflict" "${url[@]}" --prompt "another"
if command -v redis-cli >/dev/null; then
  redis-cli -s "$fleet/redis.sock" XADD 'dit:{default}:in:default' '*' job rubbish >/dev/null
fi
if [[ ${1:-cpu} == cuda ]]; then
  submit other 1 "group demo, which took the job, computes in bf16" "${url[@]}" --precision fp16
fi
submit after 0 "state    SUCCEEDED" "${url[@]}"
fleet_cli status --json | grep '"dead_letter":[1-9]' >/dev/null || fail "the rubbish is in no dead-letter stream"
grep -qE "a red circle|rubbish" "$fleet/supervisor.log" && fail "a prompt is in the log"

# ---- jobs in a line: how long the device had nothing to do between them
for i in 1 2 3; do
  fleet_cli submit --id "line$i" --model demo "${small[@]}" "${url[@]}" >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
done
in_line() {
  grep -q "job.succeeded.* job=line3 " "$fleet/supervisor.log"
}
fleet_wait supervisor 60 in_line
grep -oE 'job=line[23] .*idle_ms=[0-9.]+' "$fleet/supervisor.log" | sed 's/.*=//' |
  awk '$1 <= 0 || $1 >= 1000 {exit 1} {n++} END {exit n != 2}' || fail "idle: $(grep idle_ms "$fleet/supervisor.log")"

# ---- a rank dies in the middle: the job comes back and is done
fleet_cli submit --id survivor --model demo --wait "${long[@]}" --max-sequence-length 16 "${url[@]}" >"$fleet/survivor" 2>&1 &
waiting=$!
denoising() {
  fleet_cli show survivor 2>/dev/null | grep "^stage    denoise" >/dev/null
}
fleet_wait supervisor 60 denoising
pid=$(fleet_cli status --json | grep -o "\"rank\":$last_rank,\"pid\":[0-9]*" | grep -o '[0-9]*$')
kill -9 "$pid"
wait $waiting || fail "a job was lost with a worker: $(<"$fleet/survivor")"
fleet_cli show survivor | grep "0 failed by its own error, 1 by the fleet's" >/dev/null || fail "$(fleet_cli show survivor)"

# ---- nothing is left behind
fleet_wait_ready 1
pids=$(fleet_cli status --json | grep -o '"pid":[0-9]*' | grep -o '[0-9]*$')
fleet_stop supervisor
for pid in $pids; do
  ! kill -0 "$pid" 2>/dev/null || fail "process $pid outlives its supervisor"
done

# In a sanitized build, whatever a worker was told of.
! grep -E -A 30 'Sanitizer|runtime error:' "$fleet"/*.log || fail "a sanitizer spoke"
