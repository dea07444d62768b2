#!/usr/bin/env bash
# A fleet whose programs each come to Redis as a user of their own, made by the lines that `ditfleet acl` prints: each can
# do its work, and nothing else.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
unset DITFLEET_REDIS
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"
export XDG_CACHE_HOME=$fleet/cache
ditfleet=$fleet_build/ditfleet printed=$fleet/out
fleet_redis
admin() { redis-cli -s "$fleet/redis.sock" "$@"; }
port=$(free_port)
admin CONFIG SET port "$port" >/dev/null
as() { echo "redis://$1:pw@127.0.0.1:$port"; }

# make LINE...: the user that a line makes, with the password that all have here
make() {
  local answer
  answer=$(sed "s/>PASSWORD/>pw/" <<<"$1" | admin)
  [[ $answer == OK ]] || fail "$1: $answer"
}
# may_not USER command...: refused by access control, not for what it asks
may_not() {
  local user=$1
  shift
  redis-cli -u "$(as "$user")" --no-auth-warning "$@" >"$fleet/out" 2>&1 || true
  # (the second is what 7.0 says within scripts)
  grep -qE 'NOPERM|The user executing the script can.t' "$fleet/out" ||
    fail "$user may $*: $(<"$fleet/out")"
}

for kind in worker scaler operator; do
  make "$("$ditfleet" acl $kind --redis "$fleet_redis_url")"
done
expect 2 "there is no user king; allowed: producer, worker" "$ditfleet" acl king --redis "$fleet_redis_url"
expect 2 "not a name" "$ditfleet" acl worker --user "a b" --redis "$fleet_redis_url"

# ---- the fleet is the worker
fleet_sink
fleet_redis_url=$(as worker)
fleet_supervisor "[group demo]
model = demo@1=$DITFLEET_SOURCE/ops/demo/model"
fleet_wait_ready 1

# ---- the operator makes the producer, who submits
operator=(--redis "$(as operator)") acme=(--redis "$(as acme)" --tenant acme)
expect 0 "ACL SETUSER acme reset on" "$ditfleet" tenant add acme "${operator[@]}"
[[ $(<"$fleet/out") == "$("$ditfleet" acl producer --tenant acme "${operator[@]}")" ]] || fail "two lines for a producer"
make "$(<"$fleet/out")"
picture=(--model demo --width 64 --height 48 --num-inference-steps 2 --max-sequence-length 64
  --output-url "$fleet_sink_url/{id}.png")
expect 0 "state    SUCCEEDED" "$ditfleet" submit "${acme[@]}" "${picture[@]}" --id mine --wait
expect 0 "state    SUCCEEDED" "$ditfleet" show mine "${acme[@]}"
expect 1 "NOPERM" "$ditfleet" submit --redis "$(as acme)" "${picture[@]}"
expect 1 "NOPERM" "$ditfleet" show mine --redis "$(as acme)"
expect 1 "NOPERM" "$ditfleet" cancel mine "${acme[@]}"
expect 1 "NOPERM" "$ditfleet" backlog --redis "$(as acme)"
P='dit:{default}:'
may_not acme XADD "${P}in:default" '*' job x
may_not acme XRANGE "${P}in:acme" - +
may_not acme DEL "${P}in:acme"
may_not acme HGETALL "${P}job:default:mine"
may_not acme HSET "${P}job:acme:mine" state DEAD
may_not acme XREAD STREAMS "${P}dlq" 0
may_not acme EVAL "return 1" 0
may_not acme KEYS '*'

# ---- the operator has the command line
expect 0 "state    SUCCEEDED" "$ditfleet" submit "${operator[@]}" "${picture[@]}" --id ours --wait
expect 0 "state    SUCCEEDED" "$ditfleet" show mine "${operator[@]}" --tenant acme
expect 0 "model demo@1 (default)" "$ditfleet" status "${operator[@]}" --config "$fleet/ditfleet.conf"
expect 0 "mine                     SUCCEEDED" "$ditfleet" jobs "${operator[@]}" --tenant acme
expect 0 "rate 3" "$ditfleet" tenant set acme --rate 3 --burst 60 "${operator[@]}"
expect 0 "total gpu_seconds" "$ditfleet" backlog "${operator[@]}"
expect 1 "is DEAD: not_found" "$ditfleet" submit "${operator[@]}" "${picture[@]}" --model unicorn --wait
expect 0 "not_found" "$ditfleet" dead list "${operator[@]}"
expect 0 '"done":true' "$ditfleet" dead drop all --json "${operator[@]}"
may_not operator XREADGROUP GROUP admit me STREAMS "${P}in:default" '>'
may_not operator FLUSHALL
may_not operator CONFIG SET maxmemory 1
may_not operator ACL LIST
may_not operator SET other x

# ---- the scaler reads the figures
expect 0 "total gpu_seconds 0.000" "$ditfleet" backlog --redis "$(as scaler)"
expect 1 "NOPERM" "$ditfleet" show mine --redis "$(as scaler)" --tenant acme
expect 1 "NOPERM" "$ditfleet" submit "${picture[@]}" --redis "$(as scaler)"
expect 1 "NOPERM" "$ditfleet" jobs --redis "$(as scaler)"
expect 1 "NOPERM" "$ditfleet" cancel mine --redis "$(as scaler)"
may_not scaler HGETALL "${P}job:acme:mine"
may_not scaler HGET "${P}job:acme:mine" payload
may_not scaler XREAD STREAMS "${P}in:acme" 0
may_not scaler XRANGE "${P}dlq" - +
may_not scaler HSET "${P}stats" queued 1
may_not scaler EVAL "return redis.call('HGET', KEYS[1], 'x')" 1 "${P}stats"
may_not scaler EVAL_RO "return redis.call('HSET', KEYS[1], 'x', 1)" 1 "${P}stats"
may_not scaler EVAL_RO "return redis.call('HGET', ARGV[1], 'payload')" 0 "${P}job:acme:mine"

# ---- the worker does all that, but only to this queue
may_not worker SET other x
may_not worker EVAL "return redis.call('SET', 'other', 'x')" 0
may_not worker HGETALL 'dit:{other}:stats'
may_not worker FLUSHALL
may_not worker CONFIG GET requirepass
may_not worker ACL SETUSER worker allkeys
may_not worker KEYS '*'
may_not worker SHUTDOWN

fleet_stop supervisor
! grep -E -A 30 'Sanitizer|runtime error:|NOPERM|The user executing' "$fleet"/supervisor.log || fail "a sanitizer spoke, or a right was missing"
