#!/bin/bash
# A ditfleet client of redis-cli and protoc: enqueues a job, watches it, prints its outcome.
#
#   ditfleet_client.sh SOCKET 'id: "cat-1" model: "shapes" prompt: "a cat" output { url: "https://..." }'
#
# SOCKET is Redis' Unix socket, the job protobuf's text form of a Job. proto/PROTOCOL.md is the contract. The record under
# the id counts only if it is ours; see "How to submit a job" there.
set -euo pipefail
(($# == 2)) || { echo "usage: ditfleet_client.sh SOCKET JOB" >&2 && exit 2; }
socket=$1 text=$2 P='dit:{default}:'
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

redis() { redis-cli -s "$socket" --raw "$@"; }
protobuf() { protoc --proto_path="$source" --"$1"=ditfleet.v1."$2" proto/job.proto; }
value() { sed -nE "s/^ *$1: \"?([^\"]*)\"?$/\1/p" | head -n 1; } # of a field in text form

protobuf encode Job <<<"$text" >"$work/job"
id=$(protobuf decode Job <"$work/job" | value id)
entry=$(redis -x XADD "${P}in:default" '*' job <"$work/job")

# Is the record under the id ours, and whose result tells the outcome?
look() {
  ours=false outcome=$id
  if [[ $(redis HGET "${P}job:default:$id" entry) == "$entry" ]]; then
    ours=true
  elif [[ -n $(redis HGET "${P}job:default:@$entry" same_as) ]]; then
    ours=true
  else
    outcome=@$entry
  fi
}

# The next event; false when there is none. What redis-cli prints ends with a line end that is none of the event's.
last=0-0
event() { # event [BLOCK MS]
  redis XREAD COUNT 1 "$@" STREAMS "${P}ev:default:$id" "$last" >"$work/news"
  (($(wc -l <"$work/news") > 1)) || return 1
  last=$(sed -n 2p "$work/news")
  tail -n +4 "$work/news" | head -c -1 | protobuf decode Event >"$work/event"
  echo "$(value state <"$work/event") $(value stage <"$work/event")" \
    "$(value step <"$work/event")/$(value steps <"$work/event")" >&2
}

# Waits for a second at most, so that the record is read again even if no event comes.
until look && [[ $(redis HEXISTS "${P}job:default:$outcome" result) == 1 ]]; do
  if $ours; then event BLOCK 1000 || :; else sleep 0.1; fi
done
while $ours && event; do :; done
redis HGET "${P}job:default:$outcome" result | head -c -1 | protobuf decode Result
[[ $(redis HGET "${P}job:default:$outcome" state) == SUCCEEDED ]]
