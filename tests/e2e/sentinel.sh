#!/usr/bin/env bash
# A failover by a real Sentinel under a working fleet: the master is killed while one job runs and another waits. The
# fleet finds the new master by itself, and each job ends there once.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
unset DITFLEET_REDIS
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"
export XDG_CACHE_HOME=$fleet/cache
ditfleet=$fleet_build/ditfleet printed=$fleet/out

# ---- a master, its replica and who watches them: the program acts by its name
master=$(free_port) replica=$(free_port) sentinel=$(free_port)
program=$(fleet_has_redis)
for name in redis-server redis-sentinel; do ln -s "$program" "$fleet/$name"; done
answers() { redis-cli -p "$1" PING >/dev/null 2>&1; }
server() {
  local name=$1 port=$2
  shift 2
  mkdir "$fleet/$name"
  fleet_start "$name" "$fleet/redis-server" --port "$port" --bind 127.0.0.1 --dir "$fleet/$name" --save '' \
    --maxmemory-policy noeviction --repl-diskless-sync-delay 0 --appendonly yes "$@"
  fleet_wait "$name" 20 answers "$port"
}
server master "$master"
server replica "$replica" --replicaof 127.0.0.1 "$master"
printf '%s\n' "port $sentinel" "bind 127.0.0.1" "dir $fleet" "sentinel monitor jobs 127.0.0.1 $master 1" \
  "sentinel down-after-milliseconds jobs 500" "sentinel failover-timeout jobs 3000" >"$fleet/sentinel.conf"
fleet_start sentinel "$fleet/redis-sentinel" "$fleet/sentinel.conf"
fleet_wait sentinel 20 answers "$sentinel"
knows_replica() { redis-cli -p "$sentinel" SENTINEL replicas jobs | grep -q "$replica"; }
fleet_wait sentinel 20 knows_replica
fleet_redis_url=sentinel://127.0.0.1:1,127.0.0.1:$sentinel/jobs # the first of them is not there

# ---- one job runs, one waits. Instrumented, a step takes ten times as long: the job outlives the failover all the same.
steps=500
! grep -qE 'DITFLEET_SANITIZE:\w+=\w' "$DITFLEET_BUILD/CMakeCache.txt" || steps=80
fleet_sink
fleet_supervisor "[group demo]
model = demo@1=$DITFLEET_SOURCE/ops/demo/model"
fleet_wait_ready 1
picture=(--model demo --max-sequence-length 64 --output-url "$fleet_sink_url/{id}.png" --redis "$fleet_redis_url")
"$ditfleet" submit "${picture[@]}" --id runs --width 64 --height 64 --num-inference-steps $steps --wait >"$fleet/runs" 2>&1 &
client=$!
state_at() { redis-cli -p "$1" HGET "dit:{default}:job:default:$2" state; }
runs_there() { [[ $(state_at "$replica" runs) == RUNNING ]]; }
both_there() { [[ $(state_at "$replica" runs) == RUNNING && $(state_at "$replica" waits) == QUEUED ]]; }
fleet_wait supervisor 20 runs_there
expect 0 "of 1 replicas" "$ditfleet" submit "${picture[@]}" --id waits --width 64 --height 48 --num-inference-steps 2 --receipt 1
fleet_wait supervisor 20 both_there
kill -9 "${fleet_pids[master]}"
wait "${fleet_pids[master]}" 2>/dev/null || true

# ---- both end, on the other server
both_done() { [[ $(state_at "$replica" runs) == SUCCEEDED && $(state_at "$replica" waits) == SUCCEEDED ]]; }
fleet_wait supervisor 120 both_done
wait $client && grep -q "state    SUCCEEDED" "$fleet/runs" || fail "who waited lost sight of it: $(<"$fleet/runs")"
expect 0 "attempts 1 begun, 0 failed by its own error, 0 by the fleet's" "$ditfleet" show waits --redis "$fleet_redis_url"
[[ $(redis-cli -p "$replica" HGET 'dit:{default}:stats' SUCCEEDED) == 2 ]] || fail "not each job ended once"
for name in runs waits; do [[ -s $fleet/sink/$name.png ]] || fail "no picture of $name"; done
expect 0 "state    SUCCEEDED" "$ditfleet" submit "${picture[@]}" --id after --width 64 --height 48 \
  --num-inference-steps 2 --wait
expect 0 "queue at redis://127.0.0.1:$replica (jobs)" "$ditfleet" status --redis "$fleet_redis_url" \
  --config "$fleet/ditfleet.conf"

fleet_stop supervisor
! grep -E -A 30 'Sanitizer|runtime error:' "$fleet"/supervisor.log || fail "a sanitizer spoke"
