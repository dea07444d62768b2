#!/usr/bin/env bash
# /metrics, /healthz and `ditfleet backlog`: before, during and after jobs, without Redis, under abuse, on a queue node.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
unset DITFLEET_REDIS
export no_proxy=127.0.0.1
fleet_begin "${DITFLEET_BUILD:?}"
export XDG_CACHE_HOME=$fleet/cache
model=$DITFLEET_SOURCE/ops/demo/model

# scrape: /metrics of $port to $fleet/scrape, which must be OpenMetrics to the letter
scrape() {
  curl -sSf --max-time 5 "http://127.0.0.1:$port/metrics" -o "$fleet/scrape" || return 1
  "$DITFLEET_BUILD/tests/test_metrics" --check <"$fleet/scrape" >"$fleet/families" || fail "not OpenMetrics: $(<"$fleet/scrape")"
}

# value SERIES: as of the last scrape; nothing where it has no such series
value() {
  awk -v series="$1" '{value = $NF; sub(/ [^ ]*$/, "")} $0 == series {print value}' "$fleet/scrape"
}

# becomes SERIES OPERATOR NUMBER: within some seconds
becomes() {
  local end=$((SECONDS + 90))
  until scrape && awk "BEGIN {exit !(\"$(value "$1")\" != \"\" && $(value "$1")+0 $2 $3)}"; do
    ((SECONDS < end)) || fail "$1 is $(value "$1"), not $2 $3"
    sleep 0.2
  done
}

# health STATUS TEXT: within some seconds
health() {
  local end=$((SECONDS + 20))
  until [[ $(curl -s --max-time 5 -o "$fleet/health" -w '%{http_code}' "http://127.0.0.1:$port/healthz") == "$1" ]] &&
    grep -qF -- "$2" "$fleet/health"; do
    ((SECONDS < end)) || fail "/healthz is not $1 \"$2\" but: $(cat "$fleet/health")"
    sleep 0.1
  done
}

# listening NAME: sets $port to what the supervisor of this name listens on
listening() {
  local end=$((SECONDS + 20))
  until port=$(grep -so 'event=metrics.ready .*port=[0-9]*' "$fleet/$1.log" | grep -o '[0-9]*$'); do
    ((SECONDS < end)) || fail "no metrics: $(cat "$fleet/$1.log")"
    sleep 0.05
  done
}

queued='{pool="demo@1",state="queued"}' working='{pool="demo@1",state="working"}'

# ---- before
fleet_redis
fleet_sink
fleet_supervisor "[metrics]
listen = 127.0.0.1:0
[group demo]
ranks = 2
model = demo@1=$model"
listening supervisor
fleet_wait_ready 1
health 200 ok
becomes "ditfleet_backlog_gpu_seconds$queued" == 0
becomes 'ditfleet_groups{state="ready"}' == 1
becomes 'ditfleet_ranks{group="demo",stage="idle"}' == 2
[[ $(value ditfleet_capacity_gpus) == 2 && $(value ditfleet_redis_up) == 1 ]] || fail "$(<"$fleet/scrape")"
awk "BEGIN {exit !($(value 'ditfleet_busy_seconds_total{group="demo"}') < 0.1)}" || fail "the warm-up counts as work"
curl -s -D - -o /dev/null -H 'X-Secret: hush' "http://127.0.0.1:$port/metrics" >"$fleet/head"
grep -q '^Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8' "$fleet/head" || fail "$(<"$fleet/head")"

# ---- during: one long job is in work, two wait
for i in 1 2 3; do
  fleet_cli submit --id "long$i" --model demo --prompt "a secret ring" --width 128 --height 128 --num-inference-steps 1000 \
    --max-sequence-length 16 --output-url "$fleet_sink_url/{id}.png" >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
done
becomes "ditfleet_jobs$working" ">=" 1
becomes "ditfleet_backlog_gpu_seconds$working" ">" 0
becomes 'ditfleet_ranks{group="demo",stage="denoise"}' == 2
[[ $(value "ditfleet_jobs$queued") -ge 1 ]] || fail "nothing waits: $(<"$fleet/scrape")"
becomes 'ditfleet_oldest_job_seconds{pool="demo@1"}' ">" 0
becomes ditfleet_utilisation ">" 0
becomes 'ditfleet_busy_seconds_total{group="demo"}' ">" 0
fleet_cli backlog >"$fleet/out"
grep -qE '^demo@1 gpu_seconds [0-9.]+ queued [12] queued_gpu_seconds [0-9.]+ working [12] ' "$fleet/out" &&
  grep -qE '^total gpu_seconds [0-9.]+ .* unadmitted 0$' "$fleet/out" || fail "$(<"$fleet/out")"
fleet_cli backlog --json | python3 -c 'import json, sys
b = json.load(sys.stdin)
p, = b["pools"]
assert p["pool"] == "demo@1" and p["queued"] + p["working"] == 3 and p["oldest_seconds"] > 0, b
assert abs(p["gpu_seconds"] - p["queued_gpu_seconds"] - p["working_gpu_seconds"]) < 1e-9, b
assert {k: v for k, v in p.items() if k != "pool"} == {k: v for k, v in b["total"].items() if k != "unadmitted"}, b'
grep -qE 'secret|hush|long1' "$fleet/scrape" "$fleet/head" && fail "a scrape tells of a job or a header"
for i in 1 2 3; do
  fleet_cli cancel "long$i" >/dev/null
done

# ---- requests that are none, and many at once
python3 - "$port" <<'END' || fail "abuse did harm"
import concurrent.futures, socket, sys, time, urllib.request
port = int(sys.argv[1])

def raw(data, wait=5):
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as s:
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            got = b""
            while chunk := s.recv(65536):
                got += chunk
            return got
        except TimeoutError:
            raise # every connection is ended, whatever was sent
        except OSError:
            return b"" # reset: what was sent was not read

def status(data):
    return raw(data).split(b"\r\n")[0].split(b" ")[1:2]

h = b" HTTP/1.1\r\nHost: x\r\n\r\n"
assert status(b"GET /" + h) == [b"404"] and status(b"GET /metrics/x" + h) == [b"404"] and status(b"POST /x" + h) == [b"404"]
for method in (b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"BREW"):
    assert status(method + b" /metrics" + h) == [b"405"], method
assert b"\r\nAllow: GET\r\n" in raw(b"DELETE /healthz" + h)
assert status(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100000) in ([b"405"], [])
assert status(b"GET /metrics?x=y" + h) == [b"200"]
for garbage in (b"", b"\0" * 5000, b"\xff\xfe" * 3000, b"GET", b"GET /metrics", b"GET  HTTP/9.9\r\n\r\n", b"\r\n" * 2000,
                b"GET /" + b"a" * 100000 + h, b"GET /metrics HTTP/1.1\r\n" + b"A: " + b"b" * 100000 + b"\r\n\r\n",
                b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                b"PUT /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\nzz\r\n"):
    assert b"ditfleet_jobs" not in raw(garbage), garbage[:40]

def get(_):
    with urllib.request.urlopen("http://127.0.0.1:%d/metrics" % port, timeout=30) as r:
        return r.read()

with concurrent.futures.ThreadPoolExecutor(200) as pool:
    for text in pool.map(get, range(600)):
        assert text.endswith(b"# EOF\n") and text.count(b"# EOF") == 1

# More connections than there are places, which send a byte now and then: none keeps its place for ever.
slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
end = time.monotonic() + 12
for s in slow:
    s.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
served = concurrent.futures.ThreadPoolExecutor(1).submit(get, 0)
while time.monotonic() < end and not served.done():
    for s in slow:
        try:
            s.sendall(b"a")
        except OSError:
            pass
    time.sleep(1)
assert served.result(timeout=10).endswith(b"# EOF\n")
END
fleet_cli status >"$fleet/out" || fail "after the abuse: $(<"$fleet/out")"

# ---- a port in use is one line, and the end
sed "s|^state_dir = .*|state_dir = $fleet/other|; s|^listen = .*|listen = 127.0.0.1:$port|" "$fleet/ditfleet.conf" >"$fleet/other.conf"
rc=0
"$fleet_build/ditfleet-supervisor" --config "$fleet/other.conf" >"$fleet/out" 2>&1 || rc=$?
[[ $rc == 1 && $(grep -c "^ditfleet-supervisor: \[metrics\] listen = 127.0.0.1:$port: Address already in use; choose" "$fleet/out") == 1 ]] ||
  fail "a port in use: exit status $rc, $(<"$fleet/out")"
grep -q rank.spawned "$fleet/out" && fail "workers were started before the port was seen to be in use"

# ---- after
fleet_cli submit --id short --model demo --wait --width 64 --height 48 --num-inference-steps 2 --max-sequence-length 16 \
  --output-url "$fleet_sink_url/{id}.png" >"$fleet/out" 2>&1 || fail "$(<"$fleet/out")"
becomes 'ditfleet_finished_jobs_total{outcome="succeeded"}' == 1
becomes 'ditfleet_finished_jobs_total{outcome="cancelled"}' == 3
becomes "ditfleet_backlog_gpu_seconds$queued" == 0
becomes "ditfleet_backlog_gpu_seconds$working" == 0
becomes 'ditfleet_oldest_job_seconds{pool="demo@1"}' == 0
becomes 'ditfleet_ranks{group="demo",stage="idle"}' == 2
awk '{split($2, gpus)} /^total/ && $3 == 0 {n++} END {exit n != 1}' <(fleet_cli backlog) || fail "$(fleet_cli backlog)"

# ---- a rank dies: a restart is counted, busy seconds are kept
busy=$(value 'ditfleet_busy_seconds_total{group="demo"}')
kill -9 "$(fleet_cli status --json | grep -o '"rank":1,"pid":[0-9]*' | grep -o '[0-9]*$')"
becomes 'ditfleet_group_restarts_total{group="demo"}' == 1
becomes 'ditfleet_groups{state="ready"}' == 1
becomes 'ditfleet_busy_seconds_total{group="demo"}' ">=" "$busy"

# ---- Redis goes and comes back
fleet_stop redis
health 503 "Redis does not answer: "
becomes ditfleet_redis_up == 0
becomes ditfleet_queue_age_seconds ">" 2
[[ $(value 'ditfleet_finished_jobs_total{outcome="succeeded"}') == 1 ]] || fail "what was known is forgotten: $(<"$fleet/scrape")"
rc=0
fleet_cli backlog >"$fleet/out" 2>&1 || rc=$?
[[ $rc == 3 ]] || fail "backlog without Redis: exit status $rc, $(<"$fleet/out")"
rm -f "$fleet/redis-server" "$fleet/redis.sock"
fleet_redis
health 200 ok
becomes ditfleet_redis_up == 1
becomes ditfleet_queue_age_seconds "<" 2

# ---- what the manifests ask for is there
if /usr/bin/python3 -c 'import yaml' 2>/dev/null; then
  /usr/bin/python3 "$DITFLEET_SOURCE/tests/e2e/manifests.py" "$DITFLEET_SOURCE/ops/autoscaling" "$fleet/families" \
    "$fleet_build/ditfleet-supervisor" "$model" || fail "the manifests of ops/autoscaling"
else
  echo "left out: the manifests of ops/autoscaling (no python3-yaml here)"
fi

# ---- a queue node: no groups, the same backlog
fleet_stop supervisor
fleet_cli submit --id waits --model demo --prompt x --output-url "$fleet_sink_url/{id}.png" >/dev/null
sed '/^\[group/,$d' "$fleet/ditfleet.conf" >"$fleet/queue.conf"
fleet_start queue "$fleet_build/ditfleet-supervisor" --config "$fleet/queue.conf"
listening queue
health 200 ok
becomes "ditfleet_jobs$queued" == 1
becomes "ditfleet_backlog_gpu_seconds$queued" ">" 0
[[ $(value ditfleet_capacity_gpus) == 0 && $(value 'ditfleet_groups{state="ready"}') == 0 ]] || fail "$(<"$fleet/scrape")"
grep -q 'ditfleet_ranks{' "$fleet/scrape" && fail "ranks of a queue node"
fleet_stop queue
! curl -s "http://127.0.0.1:$port/healthz" || fail "it listens after its end"

! grep -E -A 30 'Sanitizer|runtime error:' "$fleet"/*.log || fail "a sanitizer spoke"
echo "metrics: ok"
