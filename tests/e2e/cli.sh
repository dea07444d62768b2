#!/usr/bin/env bash
# The command line against a queue with no workers: usage, exit codes, what it prints, waiting, Ctrl-C.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
unset DITFLEET_REDIS
fleet_begin "${DITFLEET_BUILD:?}"
ditfleet=$fleet_build/ditfleet
source "$DITFLEET_SOURCE/tests/expect.bash"
printed=$fleet/out

job=(--model demo --prompt "a secret cat" --output-url "http://127.0.0.1:9/{id}.png")

# ---- usage: nothing is running yet
expect 2 "usage: ditfleet COMMAND" "$ditfleet"
expect 0 "usage: ditfleet COMMAND" "$ditfleet" --help
expect 2 "unknown command frobnicate" "$ditfleet" frobnicate
expect 2 "unknown command sumbit; did you mean submit?" "$ditfleet" sumbit
[[ $(wc -l <"$fleet/out") == 1 ]] || fail "more than the hint: $(<"$fleet/out")"
expect 2 "unknown flag --promt; did you mean --prompt?" "$ditfleet" submit --promt x
expect 2 "unknown flag --wiat; did you mean --wait?" "$ditfleet" submit --wiat
expect 2 "unknown flag --num-inference-step; did you mean --num-inference-steps?" "$ditfleet" generate --num-inference-step=3
for command in generate submit jobs show cancel dead status backlog drain resume plan tune bench doctor config model tenant acl; do
  expect 0 "usage: ditfleet $command" "$ditfleet" $command --help
  expect 2 "unknown flag --nonsense" "$ditfleet" $command --nonsense
done
expect 0 "--output-url" "$ditfleet" submit --help
"$ditfleet" generate --help | grep -e --output-url -e --callback-url >/dev/null && fail "generate offers flags of delivery"
expect 2 "unknown flag --output-url" "$ditfleet" generate --output-url http://h/x
expect 2 "--device cpu has none" "$ditfleet" generate --model x --memory-budget 24GiB
expect 2 "written like 24GiB" "$ditfleet" generate --model x --device cuda --memory-budget 24GB
expect 2 "--prompt needs a value" "$ditfleet" submit --prompt
expect 2 "--wait takes no value" "$ditfleet" submit --wait=yes
expect 2 "unexpected argument stray" "$ditfleet" submit stray
expect 2 "width is 0; allowed: 16 to 16384" "$ditfleet" submit "${job[@]}" --width 0
expect 2 "num_inference_steps" "$ditfleet" submit "${job[@]}" --num_inference_steps 1e9
expect 2 "rng" "$ditfleet" submit "${job[@]}" --rng dice
expect 2 "--output-url URL or --output-file" "$ditfleet" submit --model demo
expect 2 "model is missing" "$ditfleet" submit --output-file /x/y
expect 2 "-o needs --wait" "$ditfleet" submit "${job[@]}" -o x.png
expect 2 "exactly one" "$ditfleet" submit "${job[@]}" --output.file=/x/y
expect 2 "needs {index}" "$ditfleet" submit "${job[@]}" --num-images 2
expect 2 "prompt" "$ditfleet" submit "${job[@]}" --prompt $'\xff'
expect 2 "missing argument: ID" "$ditfleet" show
expect 2 "too many arguments" "$ditfleet" show a b
expect 2 "missing argument: ID..." "$ditfleet" cancel
expect 2 "missing argument: add NAME | set NAME | list" "$ditfleet" tenant remove x
expect 2 "--weight takes a number from 0.001 to 1000" "$ditfleet" tenant add x --weight 0
expect 1 "missing.conf: cannot open" "$ditfleet" status --config "$fleet/missing.conf"
expect 3 "unix:$fleet/none.sock: No such file or directory; start it, or say by --redis" \
  "$ditfleet" submit "${job[@]}" --redis "unix://$fleet/none.sock"
[[ $(wc -l <"$fleet/out") == 1 ]] || fail "more than one line when Redis is down"

# ---- ranks of one machine, as many as the heads do not divide by, too
picture=(--model "$DITFLEET_SOURCE/ops/demo/model" --prompt "a ring" --width 48 --height 32 --num-inference-steps 1
  --max-sequence-length 16 -o "$fleet/ring.png")
expect 0 "cfg=1 ulysses=1 ring=3" "$ditfleet" generate "${picture[@]}" --ranks 3
expect 0 "cfg=1 ulysses=2 ring=2" "$ditfleet" generate "${picture[@]}" --ranks 4 --ring-degree 2
"$ditfleet" generate "${picture[@]}" --ranks 2 --seed 7 --quiet --json >"$printed"
check 'd["files"] == [d["files"][0]] and d["seed"] == 7 and d["plan"] == "cfg=1 ulysses=2 ring=1" and len(d["ranks"]) == 2'
printf 'what was there' >"$fleet/kept.png"
(trap '' XFSZ && ulimit -f 1 && expect 1 "kept.png: cannot be written (write kept.png: File too large)" "$ditfleet" generate \
  "${picture[@]}" -o "$fleet/kept.png") || exit 1
[[ $(<"$fleet/kept.png") == 'what was there' && -z $(compgen -G "$fleet/.*.tmp") ]] || fail "half a picture was left"
"$ditfleet" generate "${picture[@]}" --quiet -o /dev/stdout | cat >"$fleet/piped"
cmp -n 8 "$fleet/piped" "$fleet/ring.png" || fail "no picture through a pipe"
[[ -L /dev/stdout ]] || fail "/dev/stdout is a link no more"
expect 1 "on 6 ranks cfg=1 ulysses=2 ring=3 would do" "$ditfleet" generate "${picture[@]}" --ranks 6 --ring-degree 2

# ---- a queue node, which admits
fleet_redis
export DITFLEET_REDIS=$fleet_redis_url
expect 3 "no supervisor answers there" "$ditfleet" status
expect 0 "ACL SETUSER acme reset on" "$ditfleet" tenant add acme --weight 2.5
expect 0 '"name":"acme","weight":2.5' "$ditfleet" tenant list --json
expect 2 "not a name" "$ditfleet" tenant add "a b"
expect 1 "there is no tenant nobody" "$ditfleet" tenant set nobody --rate 1
expect 0 "acme                     weight 2.5    waiting 0, ready 0, 0.000 GPU-seconds of at most 12, rate 0.5, burst 60" \
  "$ditfleet" tenant set acme --rate 0.5 --burst 60 --max-queued 12
expect 0 '"rate":0.5,"burst":60.0,"max_queued":12.0' "$ditfleet" tenant list --json
fleet_supervisor $'[queue]\nmax_backlog = 1000\nmax_speed = 8'
redis-cli -s "$fleet/redis.sock" HSET 'dit:{default}:models' demo 1 demo@1 1 >/dev/null

expect 1 "has no job nope" "$ditfleet" show nope
expect 1 "has no job nope" "$ditfleet" cancel nope
expect 0 "id       first" "$ditfleet" submit "${job[@]}" --id first --output-headers "Authorization: hush"
expect 0 '"id":"second"' "$ditfleet" submit "${job[@]}" --id second --json --tenant acme
"$ditfleet" submit "${job[@]}" | grep -E '^id {7}[0-9a-f]{16}$' >/dev/null || fail "no id was made"
admitted() {
  "$ditfleet" show "$@" >/dev/null 2>&1
}
fleet_wait supervisor 10 admitted first
fleet_wait supervisor 10 admitted second --tenant acme
expect 1 "not as safe as asked for" "$ditfleet" submit "${job[@]}" --id unsafe --receipt 1 --receipt-timeout 0.05
expect 1 '"replicas":0,"confirmed":false' "$ditfleet" submit "${job[@]}" --id unsafe --receipt 1 --receipt-timeout 0.05 --json
fleet_wait supervisor 10 admitted unsafe
expect 0 "unsafe CANCELLED" "$ditfleet" cancel unsafe
expect 0 "state    QUEUED" "$ditfleet" show first
expect 0 "pool     demo@1" "$ditfleet" show first
expect 0 '"state":"QUEUED"' "$ditfleet" show first --json
grep -qE 'secret|hush' "$fleet/out" && fail "show tells a header or a prompt"
expect 1 "has no job second" "$ditfleet" show second
expect 0 "role" "$ditfleet" status --json --config "$fleet/ditfleet.conf"
python3 -c 'import json, sys
s = json.load(open(sys.argv[1]))
assert s["node"]["redis"]["up"] is True and s["node"]["groups"] == [], s
assert s["queue"]["jobs"]["queued"] == 3 and s["queue"]["models"][0]["name"] == "demo", s
assert {t["name"]: t["weight"] for t in s["queue"]["tenants"]} == {"acme": 2.5, "default": 1}, s' "$fleet/out"
expect 0 "model demo@1 (default)" "$ditfleet" status --config "$fleet/ditfleet.conf"

# ---- ends
expect 0 "first CANCELLED" "$ditfleet" cancel first
expect 0 '{"id":"first","state":"CANCELLED"}' "$ditfleet" cancel first --json
expect 1 "has no job nope" "$ditfleet" cancel nope first # and the other is taken back all the same
grep -q "first CANCELLED" "$fleet/out" || fail "one that fails kept the others"
expect 0 "state    CANCELLED" "$ditfleet" show first
expect 1 "is DEAD: not_found" "$ditfleet" submit "${job[@]}" --model unicorn --wait
entry=$(sed -n 's/^entry *//p' "$fleet/out")
expect 0 "state    DEAD" "$ditfleet" show "@$entry"
expect 0 "refused  default " "$ditfleet" dead list --code not_found
letter=$(cut -d ' ' -f 1 "$fleet/out")
expect 0 "$letter retried as " "$ditfleet" dead retry "$letter"
again=$(sed 's/.* as //' "$fleet/out")
fleet_wait supervisor 10 admitted "@$again" # and refused: there still is no unicorn
expect 1 "there is no dead letter $letter" "$ditfleet" dead drop "$letter"
expect 0 "\"entry\":\"$again\"" "$ditfleet" dead list --json
expect 0 '"done":true' "$ditfleet" dead drop all --tenant default --json
expect 0 "[]" "$ditfleet" dead list --json
expect 2 "names no dead letter" "$ditfleet" dead retry first
expect 2 "missing argument: list | retry" "$ditfleet" dead retry
expect 1 "is DEAD: conflict" "$ditfleet" submit "${job[@]}" --id first --seed 5 --wait
expect 1 "is DEAD: overloaded: tenant acme has 10.000 GPU-seconds of work waiting and running, its limit is 12.000" \
  "$ditfleet" submit "${job[@]}" --tenant acme --wait
expect 0 "weight 2.5" "$ditfleet" tenant set acme --max-queued 0
expect 1 "its limit is 1000.000, and this job would add 9142.857; ask for less" \
  "$ditfleet" submit "${job[@]}" --width 16384 --height 16384 --num-inference-steps 100 --wait
expect 1 "a job of 10.000 GPU-seconds takes at least 1.250 s (max_speed is 8)" \
  "$ditfleet" submit "${job[@]}" --deadline-ms "$(($(date +%s%3N) + 1000))" --wait
expect 1 "is EXPIRED" "$ditfleet" submit "${job[@]}" --deadline-ms 1 --wait

# Waiting goes on until the job ends, or Ctrl-C.
"$ditfleet" submit "${job[@]}" --id waits --wait --json >"$fleet/waits" 2>"$fleet/waits.err" &
waits=$!
fleet_wait supervisor 10 admitted waits
expect 0 "waits CANCELLED" "$ditfleet" cancel waits
rc=0
wait $waits || rc=$?
[[ $rc == 1 ]] && grep -q "is CANCELLED" "$fleet/waits.err" && grep -q '"state":"CANCELLED"' "$fleet/waits" ||
  fail "a cancelled job: exit status $rc, $(cat "$fleet/waits" "$fleet/waits.err")"
for signal in INT TERM; do
  "$ditfleet" submit "${job[@]}" --id "stops-$signal" --tenant acme --wait >"$fleet/stops" 2>"$fleet/stops.err" &
  waits=$!
  fleet_wait supervisor 10 admitted "stops-$signal" --tenant acme
  kill -$signal $waits
  rc=0
  wait $waits || rc=$?
  [[ $rc == 130 ]] && grep -q "goes on" "$fleet/stops.err" &&
    grep -q "cancel: ditfleet cancel stops-$signal --tenant acme" "$fleet/stops.err" ||
    fail "after SIG$signal: exit status $rc, $(<"$fleet/stops.err")"
  expect 0 "state    QUEUED" "$ditfleet" show "stops-$signal" --tenant acme
done

fleet_stop supervisor
! grep -E -A 30 'Sanitizer|runtime error:' "$fleet"/*.log || fail "a sanitizer spoke"
