#!/usr/bin/env bash
# Callbacks, end to end: signed, once where all goes well, at least once with the same id where not, within their budget,
# never to the fleet's own addresses; jobs do not wait for them.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
unset DITFLEET_REDIS
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"
export XDG_CACHE_HOME=$fleet/cache
model=$DITFLEET_SOURCE/ops/demo/model
secret=whsec_$(head -c 32 /dev/urandom | base64 -w 0) old_secret=whsec_$(head -c 24 /dev/urandom | base64 -w 0)
new_secret=whsec_$(head -c 64 /dev/urandom | base64 -w 0)

fail() {
  echo "FAILED: $*" >&2
  [[ ! -e $fleet/received ]] || cut -c 1-300 "$fleet/received" >&2
  [[ ! -e $fleet/supervisor.log ]] || fleet_show_log supervisor
  exit 1
}

# submit ID TENANT CALLBACK_URL [flags]: enqueues a small job
submit() {
  local id=$1 tenant=$2 url=$3
  shift 3
  fleet_cli submit --id "$id" --tenant "$tenant" --model demo --prompt "a hush-hush ring" --width 64 --height 48 \
    --num-inference-steps 1 --max-sequence-length 16 --output-url "$fleet_sink_url/{id}.png?token=hush" \
    --callback-url "$url" "$@" >"$fleet/out" 2>&1 || fail "$id: $(<"$fleet/out")"
}

# ask EXPRESSION: of the list `got` of what was received, each a dict
ask() {
  python3 -c 'import json, sys
got = [json.loads(line) for line in open(sys.argv[1])]
of = lambda path: [g for g in got if g["path"].split("?")[0] == path]
sys.exit(not eval(sys.argv[2]))' "$fleet/received" "$1"
}

# until SECONDS command...
until_true() {
  local end=$((SECONDS + $1)) what=${*:2}
  until "${@:2}"; do
    ((SECONDS < end)) || fail "not in $1 s: $what"
    sleep 0.1
  done
}

redis() {
  redis-cli -s "$fleet/redis.sock" "$@"
}

outbox_is() {
  [[ $(redis XLEN 'dit:{default}:outbox') == "$1" ]]
}

# dead ID CODE TEXT: there is a dead letter of its callback, and the job's state is untouched
dead() {
  local end=$((SECONDS + 20)) letters
  until letters=$(redis XRANGE 'dit:{default}:dlq' - + | tr '\n' ' ' | sed 's/[0-9]\{13\}-[0-9]/\n/g' | grep " id $1 ") &&
    grep -q " callback " <<<"$letters"; do
    ((SECONDS < end)) || fail "no dead letter of $1: $(redis XRANGE 'dit:{default}:dlq' - +)"
    sleep 0.1
  done
  grep -qF " code $2 " <<<"$letters" && grep -qF "$3" <<<"$letters" || fail "the dead letter of $1: $letters"
  ! grep -q "hush" <<<"$letters" || fail "a secret in a dead letter: $letters"
  is "$1" SUCCEEDED
}

is() {
  fleet_cli show "$1" >"$fleet/out" 2>&1 && grep -q "^state    $2" "$fleet/out" || fail "$1 is not $2: $(<"$fleet/out")"
}

final() {
  fleet_cli show "$1" >"$fleet/out" 2>&1 && grep -qE '^state    (SUCCEEDED|DEAD|CANCELLED)' "$fleet/out"
}

# config CALLBACK_LINES: the supervisor's
tail_of_config() {
  printf '%s\n[group demo]\nranks = 1\nthreads = 1\nmodel = demo@1=%s\n' "$1" "$model"
}

fleet_redis
fleet_sink
: >"$fleet/received"
fleet_start receiver env -C "$DITFLEET_SOURCE" python3 tests/e2e/callback_receiver.py "$fleet/receiver.port" "$fleet/received" \
  "$secret" "$old_secret" "$new_secret"
fleet_wait receiver 20 test -s "$fleet/receiver.port"
receiver=127.0.0.1:$(<"$fleet/receiver.port")
url=http://$receiver

# ---- no secret: refused at admission, which says what to set
fleet_supervisor "$(tail_of_config "")"
fleet_wait_ready 1
submit off default "$url/ok/off"
until_true 20 final off
grep -qF '[callback] secret_file' "$fleet/out" || fail "$(<"$fleet/out")"
outbox_is 0 || fail "a refused job has a callback"

# ---- a secret file that others may read: said so, and the running configuration is kept
printf '# of today, and of yesterday\n%s\n\n%s\n' "$secret" "$old_secret" >"$fleet/secrets"
chmod 644 "$fleet/secrets"
callback="[callback]
secret_file = $fleet/secrets
allow = $receiver
attempts = 3
backoff_min = 100ms
backoff_max = 3s
timeout = 2s"
cp "$fleet/ditfleet.conf" "$fleet/before.conf"
sed "/^\[group/,\$d" "$fleet/before.conf" >"$fleet/ditfleet.conf"
tail_of_config "$callback" >>"$fleet/ditfleet.conf"
rc=0
"$fleet_build/ditfleet-supervisor" --config "$fleet/ditfleet.conf" --check >"$fleet/out" 2>&1 || rc=$?
[[ $rc == 1 ]] && grep -q "has mode 644" "$fleet/out" || fail "a secret that all may read: $rc $(<"$fleet/out")"
kill -HUP "${fleet_pids[supervisor]}"
until_true 10 grep -q 'event=supervisor.reload .*has mode 644' "$fleet/supervisor.log"
chmod 600 "$fleet/secrets"
kill -HUP "${fleet_pids[supervisor]}" # turns callbacks on; the workers start again, for they admit
until_true 10 grep -q 'event=callback.ready secrets=2' "$fleet/supervisor.log"
restarted() {
  [[ $(grep -c 'group=demo from=starting to=ready' "$fleet/supervisor.log") -ge 2 ]]
}
until_true 60 restarted
fleet_wait_ready 1

# ---- the good case: once, signed with both secrets, with the outcome and no more
submit good default "$url/ok/good?key=hush"
until_true 20 ask 'of("/ok/good")'
until_true 10 outbox_is 0
python3 - "$fleet/received" "$fleet/sink/good.png" "$fleet_sink_url" <<'END' || fail "the body"
import hashlib, json, re, sys
g, = [json.loads(line) for line in open(sys.argv[1])]
png = open(sys.argv[2], "rb").read()
assert g["path"] == "/ok/good?key=hush" and g["verified"] == [True, True, False], g
assert g["type"] == "application/json" and re.fullmatch("msg_[0-9a-f]{40}", g["id"]), g
b = g["body"]
assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", b.pop("timestamp")), g
assert b == {"type": "job.succeeded", "data": {"id": "good", "tenant": "default", "state": "SUCCEEDED", "error": None, "attempt": 1,
             "images": [{"location": sys.argv[3] + "/good.png", "bytes": len(png),
                         "sha256": hashlib.sha256(png).hexdigest(), "index": 0}]}}, b
assert "hush" not in g["text"]
END

# ---- other ends are told, too
submit wrong default "$url/ok/wrong" --width 56
submit stopped default "$url/ok/stopped" --num-inference-steps 1000
fleet_cli cancel stopped >/dev/null 2>&1 || { sleep 1 && fleet_cli cancel stopped >/dev/null; }
until_true 20 ask 'of("/ok/wrong") and of("/ok/stopped")'
ask '[g["body"]["type"] for g in of("/ok/wrong") + of("/ok/stopped")] == ["job.dead", "job.cancelled"]' || fail "types"
ask 'of("/ok/wrong")[0]["body"]["data"]["error"]["code"] == "invalid"' || fail "the error"
ask 'of("/ok/stopped")[0]["body"]["data"]["error"]["code"] == "cancelled"' || fail "the error"

# ---- retries: the same id and body each time, a budget, Retry-After, 410, redirects, an endless answer
for what in flaky fail gone later redirect big; do
  submit "$what" default "$url/$what/$what?key=hush"
done
dead gone upload "answered 410"
dead fail unavailable "answered 500"
dead redirect unavailable "answered 302; redirects are not followed"
until_true 20 outbox_is 0
for what in flaky:3 fail:3 gone:1 later:2 redirect:3 big:1; do
  name=${what%:*}
  ask "len(of('/$name/$name')) == ${what#*:}" || fail "$name was not called ${what#*:} times"
  ask "len({(g['id'], g['text']) for g in of('/$name/$name')}) == 1 and all(g['verified'][0] for g in of('/$name/$name'))" ||
    fail "$name: tries differ"
done
ask 'of("/later/later")[1]["time"] - of("/later/later")[0]["time"] >= 2' || fail "Retry-After was not heard"
ask 'not any(g.get("followed") for g in got)' || fail "a redirect was followed"

# ---- addresses that the policy keeps shut
submit inside default "http://127.0.0.1:1/x?key=hush"
submit metadata default "http://169.254.169.254/latest/?key=hush"
submit named default "http://localhost:$(<"$fleet/receiver.port")/ok/named?key=hush"
for id in inside metadata named; do
  dead "$id" refused "loopback, private or reserved"
done
ask 'not of("/ok/named")' || fail "a name led to a private address"

# ---- a receiver that hangs slows neither jobs nor others' callbacks
fleet_cli tenant add other >/dev/null
start=$SECONDS
for i in {1..24}; do
  submit "hang$i" default "$url/hang/$i"
done
until_true 60 ask 'of("/hang/1")'
submit quick other "$url/ok/quick"
until_true 60 final hang24
until_true 30 ask 'of("/ok/quick")'
ask 'sum(len(of("/hang/%d" % i)) for i in range(1, 25)) < 72' || fail "the hanging ones were over before: nothing is shown"
redis DEL 'dit:{default}:outbox'{,_ring,_due:default,_due:other,_tries,_hold} >/dev/null # enough of them
echo "24 hanging receivers: $((SECONDS - start)) s"

# ---- the supervisor is killed in the middle of a callback: the next one makes it, with the same id
submit held default "$url/hold/held"
until_true 30 ask 'of("/hold/held")'
kill -KILL "${fleet_pids[supervisor]}"
wait "${fleet_pids[supervisor]}" 2>/dev/null || true
outbox_is 1 || fail "the callback is gone with its supervisor"
fleet_start supervisor "$fleet_build/ditfleet-supervisor" --config "$fleet/ditfleet.conf"
until_true 20 ask 'len(of("/hold/held")) == 2'
until_true 10 outbox_is 0
ask 'len({(g["id"], g["text"]) for g in of("/hold/held")}) == 1' || fail "the ids differ"
fleet_wait_ready 1

# ---- a supervisor that ends well gives back what it has in hand, at no cost
submit drained default "$url/hold/drained"
until_true 30 ask 'of("/hold/drained")'
fleet_stop supervisor
[[ $(redis HVALS 'dit:{default}:outbox_tries') == 0 ]] || fail "a try is charged: $(redis HGETALL 'dit:{default}:outbox_tries')"
fleet_start supervisor "$fleet_build/ditfleet-supervisor" --config "$fleet/ditfleet.conf"
until_true 5 ask 'len(of("/hold/drained")) == 2'
fleet_wait_ready 1

# ---- Redis goes in the middle, and comes back without its scripts
submit restart default "$url/hold/restart"
until_true 30 ask 'of("/hold/restart")'
fleet_stop redis
sleep 3 # the try ends while nobody can be told
rm -f "$fleet/redis-server" "$fleet/redis.sock"
fleet_redis
until_true 30 ask 'len(of("/hold/restart")) >= 2'
until_true 10 outbox_is 0
ask 'len({g["id"] for g in of("/hold/restart")}) == 1' || fail "the ids differ"
submit after default "$url/ok/after"
until_true 30 ask 'of("/ok/after")'

# ---- the secret changes
printf '%s\n' "$new_secret" >"$fleet/secrets"
kill -HUP "${fleet_pids[supervisor]}"
until_true 10 grep -q 'event=callback.ready secrets=1 reloaded=true' "$fleet/supervisor.log"
submit rotated default "$url/ok/rotated"
until_true 30 ask 'of("/ok/rotated")'
ask 'of("/ok/rotated")[0]["verified"] == [False, False, True]' || fail "the old secret is in use"

until_true 10 outbox_is 0
for what in good wrong stopped quick after rotated; do
  ask "len(of('/ok/$what')) == 1" || fail "$what was called more than once"
done
[[ $(redis EXISTS 'dit:{default}:outbox'{_ring,_due:default,_due:other,_tries,_hold}) == 0 ]] || fail "something is left in the outbox"
! grep -hE "hush|whsec_" "$fleet"/*.log || fail "a secret is in a log"
fleet_stop supervisor
! grep -E -A 30 'Sanitizer|runtime error:' "$fleet"/*.log || fail "a sanitizer spoke"
echo "callback: ok"
