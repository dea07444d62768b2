#!/bin/bash
# The Python client against a live server and a fleet with no model: success, failure, refusal, the same id twice.
set -eu
cd "$(dirname "$0")/../.."
build=${DITFLEET_BUILD:?}
. tests/private_redis.bash
python=/usr/bin/python3 # Debian's, which has python3-redis and python3-protobuf

protoc --proto_path=. --python_out="$private_folder" proto/job.proto
export PYTHONPATH=$private_folder PYTHONDONTWRITEBYTECODE=1
url=unix://$private_socket
"$build/tests/fake_fleet" "$url" &
fleet=$!
trap 'kill -9 $fleet 2> /dev/null || :; private_stop' EXIT

client() { # client STATUS FIXED-TEXT ARGUMENTS...: leaves with the status and prints the text
  want=$1 text=$2 got=0
  shift 2
  timeout 60 "$python" proto/clients/python/ditfleet_client.py --redis "$url" --model shapes --timeout 30 \
    --url 'http://127.0.0.1:9/{id}.png' "$@" > "$private_folder/out" 2>&1 || got=$?
  if [ "$got" != "$want" ] || ! grep -qF -- "$text" "$private_folder/out"; then
    echo "FAILED: client $*: exit status $got, expected $want and: $text" >&2
    cat "$private_folder/out" >&2
    exit 1
  fi
}

client 0 'state: STATE_SUCCEEDED' --id one --prompt 'a red circle' width=256 height=256 rng=RNG_CPU_BF16
client 0 'denoise 3/3' --id two --prompt 'a blue square' # its progress
client 0 'state: STATE_SUCCEEDED' --id one --prompt 'a red circle' width=256 height=256 rng=RNG_CPU_BF16 # again
client 1 'code: "conflict"' --id one --prompt 'a green square'
client 1 'message: "the host answered 403"' --id three --prompt fail
client 1 'width is 8; allowed: 16 to 16384' --id four width=8
client 1 'is not served by this fleet; known: shapes@1' --id five --model other

# As a module, and with bytes that are no job: the outcome is found by the receipt.
"$python" - "$url" <<'PYTHON'
import sys
sys.path.insert(0, "proto/clients/python")
from ditfleet_client import Fleet, job_pb2

fleet = Fleet(sys.argv[1])
states = []
job = job_pb2.Job(id="module-1", model="shapes", prompt="x")
job.output.url = "http://127.0.0.1:9/x.png"
result = fleet.wait(job.id, fleet.submit(job), 30, lambda event: states.append(event.state))
assert result.state == job_pb2.STATE_SUCCEEDED and result.used.prompt == "x", result
assert states[0] == job_pb2.STATE_QUEUED and states[-1] == job_pb2.STATE_SUCCEEDED, states
entry = fleet.redis.xadd("dit:{default}:in:default", {"job": b"\xff\xff\xff"}).decode()
assert fleet.wait("none", entry, 30).error.code == "corrupt"
PYTHON
echo "the Python client gets its results"
