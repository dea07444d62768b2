#!/usr/bin/env bash
# Types what README.md's tour types, into a fleet of its own, and compares what is printed; numbers may differ.
#   tour.sh            the test
#   tour.sh --record   prints the tour with what is printed here and now
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
tour=$(sed -n '/^### A tour/,/^### [^A]/p' "$DITFLEET_SOURCE/README.md" | sed -n '/^```console$/,/^```$/{//!p}')
[[ $(grep -c '^\$ ' <<<"$tour") -gt 18 ]] || { echo "FAILED: README.md has no tour" >&2 && exit 1; }

fleet_begin "${DITFLEET_BUILD:?}"
fleet_redis
fleet_supervisor "[group demo]
model = demo@1=$DITFLEET_SOURCE/ops/demo/model
[upload]
file_roots = $fleet/out"
mkdir -p "$fleet/out"
fleet_wait_ready 1
cd "$fleet"
ln -s "$DITFLEET_SOURCE/ops/demo/model" demo
export PATH=$fleet_build:$PATH DITFLEET_REDIS=$fleet_redis_url XDG_CACHE_HOME=$fleet/cache
printf '%s\n' "a red circle on a white background" "two pink hearts on a black background" >prompts.txt
while read -r line; do
  [[ $line == '$ '* ]] || continue
  printf '%s\n' "$line"
  bash -c "${line#\$ }" 2>&1 </dev/null | sed "s|$fleet|/srv|g" || true
done <<<"$tour" >printed
if [[ ${1-} == --record ]]; then
  cat printed
  exit
fi
# What differs from run to run and from machine to machine: fingerprints, ids and every number, and the columns they fill.
steady() { sed -E 's/[0-9a-f]{16,}/H/g; s/[0-9]+(\.[0-9]+)?/0/g; s/ +/ /g'; }
diff -u <(steady <<<"$tour") <(steady <printed) || { echo "FAILED: README.md's tour says something else" >&2 && exit 1; }
for command in $(ditfleet --help=words); do
  grep -q "ditfleet $command" printed || { echo "FAILED: the tour leaves out $command" >&2 && exit 1; }
done
