#!/bin/bash
# The clients against a live server and a fleet with no model: success, failure, refusal, the same id twice.
set -eu
cd "$(dirname "$0")/../.."
build=${DITFLEET_BUILD:?}
. tests/private_redis.bash
python=/usr/bin/python3 # Debian's, which has python3-redis and python3-protobuf

protoc --proto_path=. --python_out="$private_folder" --ruby_out="$private_folder" proto/job.proto
export PYTHONPATH=$private_folder PYTHONDONTWRITEBYTECODE=1
url=unix://$private_socket
"$build/tests/fake_fleet" "$url" &
fleet=$!
trap 'kill -9 $fleet 2> /dev/null || :; private_stop' EXIT

fail() {
  echo "FAILED: $*" >&2
  cat "$private_folder/out" >&2
  exit 1
}
has() { grep -qF -- "$1" "$private_folder/out" || fail "not printed: $1"; } # has FIXED-TEXT: what ran last printed it

run() { # run STATUS FIXED-TEXT COMMAND...: leaves with the status and prints the text
  local want=$1 text=$2 got=0
  shift 2
  timeout 60 "$@" > "$private_folder/out" 2>&1 || got=$?
  [ "$got" = "$want" ] || fail "$*: exit status $got, expected $want"
  has "$text"
}

python() { # python STATUS FIXED-TEXT ARGUMENTS...
  run "${@:1:2}" "$python" proto/clients/python/ditfleet_client.py --redis "$url" --model shapes --timeout 30 \
    --url 'http://127.0.0.1:9/{id}.png' "${@:3}"
}

python 0 'state: STATE_SUCCEEDED' --id one --prompt 'a red circle' width=256 height=256 rng=RNG_CPU_BF16
python 0 'denoise 3/3' --id two --prompt 'a blue square' # its progress
python 0 'state: STATE_SUCCEEDED' --id one --prompt 'a red circle' width=256 height=256 rng=RNG_CPU_BF16 # again
python 1 'code: "conflict"' --id one --prompt 'a green square'
python 1 'message: "the host answered 403"' --id three --prompt fail
python 1 'width is 8; allowed: 16 to 16384' --id four width=8
python 1 'is not served by this fleet; known: shapes@1' --id five --model other

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
assert states[0] == job_pb2.STATE_LEASED and states[-1] == job_pb2.STATE_SUCCEEDED, states
entry = fleet.redis.xadd("dit:{default}:in:default", {"job": b"\xff\xff\xff"}).decode()
assert fleet.wait("none", entry, 30).error.code == "corrupt"
PYTHON

# The others have one command line, but for the shell's, which takes the text form.
clients=proto/clients
node() { run "${@:1:2}" node $clients/node/ditfleet_client.js "$private_socket" "${@:3}"; }
ruby() { run "${@:1:2}" ruby -I "$private_folder" $clients/ruby/ditfleet_client.rb "$url" "${@:3}"; }
php() { run "${@:1:2}" php $clients/php/ditfleet_client.php "$private_socket" "${@:3}"; }
perl() { run "${@:1:2}" perl $clients/perl/ditfleet_client.pl "$private_socket" "${@:3}"; }
shell() {
  local text="model: \"$3\" output { url: \"$4\" }" field
  for field in "${@:5}"; do
    [[ $field =~ ^([a-z_]+)=([0-9]+)$ ]] && text+=" ${BASH_REMATCH[1]}: ${BASH_REMATCH[2]}" ||
      text+=" ${field%%=*}: \"${field#*=}\""
  done
  run "${@:1:2}" $clients/shell/ditfleet_client.sh "$private_socket" "$text"
}
used() { # used ID: the job as the fleet understood it
  redis-cli -s "$private_socket" --raw HGET "dit:{default}:job:default:$1" result | head -c -1 |
    protoc --decode=ditfleet.v1.Result proto/job.proto > "$private_folder/out"
}

long=$(printf 'a très long prompt, %.0s' $(seq 40)) # its length takes two bytes, its letters more than one
target=http://127.0.0.1:9/{id}.png
for client in node ruby php perl shell; do
  id=$client-1
  $client 0 SUCCEEDED shapes "$target" id=$id "prompt=$long" width=256 height=320 seed=9223372036854775807
  has 'denoise 3/3'
  has "$target"
  used $id
  for field in 'width: 256' 'height: 320' 'seed: 9223372036854775807' "$(printf '%s' "$long" | sed 's/è/\\303\\250/g')"; do
    has "$field"
  done
  $client 0 SUCCEEDED shapes "$target" id=$id "prompt=$long" width=256 height=320 seed=9223372036854775807 # again
  $client 1 conflict shapes "$target" id=$id prompt=other
  $client 1 'the host answered 403' shapes "$target" id=$client-2 prompt=fail num_inference_steps=4
  $client 1 'width is 8; allowed: 16 to 16384' shapes "$target" id=$client-3 width=8
  echo "$client: as it should be"
done
for client in node ruby php perl; do # without an id one is drawn
  $client 0 SUCCEEDED shapes "$target" prompt=one
  $client 0 SUCCEEDED shapes "$target" prompt=another
done
echo "the clients get their results"
