#!/usr/bin/env bash
# shellcheck disable=SC2086 # flags are several words
# spin searches tests/model/job.pml, the model of a job's life, through every order of its steps: nothing may be wrong,
# and each planted defect must be found. Random walks of it are repeated on Redis through queue.lua, so that the two
# agree. One of two lanes takes the long searches, the other all else: within a minute and 1.4 GB on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$PWD/tests/model/job.pml
command -v spin >/dev/null || { echo "spin is not installed: ops/install-deps --tests" >&2; exit 1; }
# shellcheck source=tests/private_redis.bash
. tests/private_redis.bash
work=${private_folder:?}

# search NAME SPIN-FLAGS COMPILER-FLAGS PAN-FLAGS: leaves what the verifier says in $work/NAME/out
search() {
  local dir=$work/$1
  mkdir "$dir"
  (cd "$dir" && spin -a $2 "$model" >spin.out && "${CC:-cc}" -w -DNOFAIR -DMEMLIM=1400 $3 -o pan pan.c &&
    ./pan -m10000 $4 >out) || { cat "$dir"/spin.out "$dir"/out; return 1; }
}

figures() {
  awk -v what="$2" '/depth reached/ {depth = int($6)} / states, stored/ {states = $1}
    /total actual/ {mb = $1} /elapsed time/ {s = $4}
    END {printf "%s: %s states, depth %s, %.0f MB, %s s\n", what, states, depth, mb, s}' "$work/$1/out"
}

# holds NAME WHAT flags...: the search must be complete and find nothing
holds() {
  search "$1" "$3" "$4" "$5" || { echo "FAILED: $2"; return 1; }
  if ! grep -q 'errors: 0$' "$work/$1/out" || grep -qE 'not completed|too small|out of memory' "$work/$1/out"; then
    echo "FAILED: $2"
    cat "$work/$1/out"
    (cd "$work/$1" && spin -t -T -B $3 "$model" | grep -vE '^ *(job|door)') || true # the way there
    return 1
  fi
  figures "$1" "$2"
}

# finds BUG: a short search must find it
finds() {
  if search "$1" "-DEVENTS=2 -D$1" "-O0 -DSAFETY" -w20 && grep -q '^pan:1: assertion violated' "$work/$1/out"; then
    found=$((found + 1))
  else
    echo "FAILED: the planted $1 was not found"
    return 1
  fi
}

long_searches() {
  holds two_workers "2 workers, 1 job, 3 events, crashes among them" "-DEVENTS=3 -DCRASHES -DMAX_INFRA=3" "-O1 -DSAFETY" -w24
  holds three_workers "3 workers, 1 job, 3 events" "-DEVENTS=3 -DWORKERS=3 -DADMITTERS=1" "-O1 -DSAFETY" -w23
  holds two_jobs "2 workers, 2 jobs, 2 events" "-DEVENTS=2 -DJOBS=2 -DADMITTERS=1" "-O1 -DSAFETY" -w22
}

# walk N FLAGS
walk() {
  echo "walk $1"
  spin -T -B -n"$1" -DWALK -DCRASHES -DMAX_INFRA=3 -DJOBS=2 $2 "$model"
}

walks() {
  local i
  {
    for i in $(seq 80); do walk "$i" "-DEVENTS=$((i % 8 + 3))" || return; done
    for i in $(seq 81 100); do walk "$i" "-DEVENTS=4 -DONLY_CRASHES" || return; done
  } >"$work/walks"
  grep -qE '^ *job DEAD LOST [0-9]+ [0-9]+ 2( [0-9]+){5} [1-9]' "$work/walks" || { echo "FAILED: no walk comes to poison"; return 1; }
  /usr/bin/python3 -B tests/model/replay.py "$private_socket" proto/queue.lua <"$work/walks"
}

# Without a cycle every run ends, and where it ends the searches above have looked.
cycles() {
  holds cycles "no run goes on for ever: 2 workers, 1 job, 3 events" "-DEVENTS=3 -DADMITTERS=1" "-O1 -DNP" "-l -w22"
}

long_searches >"$work/long" 2>&1 &
long=$!
found=0 status=0
bugs=$(grep -oE 'def BUG_[A-Z_]+' "$model" | cut -d ' ' -f 2 | sort -u)
walks || status=1
cycles || status=1
for bug in $bugs; do finds "$bug" || status=1; done
wait "$long" || status=1
cat "$work/long"
echo "$found planted defects found"
exit $((status || found < 10))
