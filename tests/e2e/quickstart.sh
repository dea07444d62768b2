#!/usr/bin/env bash
# The quickstart as a user meets it: a PNG as its last line, wrong flags, Ctrl-C; nothing left behind.
set -euo pipefail
cd "${DITFLEET_SOURCE:?}"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/tmp"
export TMPDIR=$dir/tmp # its processes and files are found by this name

fail() {
  echo "FAILED: $*" >&2
  cat "$dir/err" >&2
  exit 1
}

# Processes that run from, or were told of, a file below $dir/tmp.
strays() {
  local p
  for p in /proc/[0-9]*/cmdline; do
    tr '\0' ' ' 2>/dev/null <"$p" | grep -F "$dir/tmp/" || true
  done
}

clean() {
  local left
  left=$(strays)
  [[ -z $left ]] || fail "$1 left processes behind: $left"
  [[ -z $(ls -A "$dir/tmp") ]] || fail "$1 left files behind: $(ls -A "$dir/tmp")"
}

ops/quickstart --out "$dir/out" --prompt "a blue ring" --seed 3 >"$dir/all" 2>"$dir/err" </dev/null || fail "it failed"
png=$(tail -n 1 "$dir/all")
[[ $png == "$dir"/out/*.png && $(head -c 4 "$png") == $'\x89PNG' ]] || fail "the last line is no PNG: $png"
grep -q "denoise  1[0-9]/20" "$dir/err" || fail "no progress was shown"
clean "a good run"

rc=0
ops/quickstart --nonsense >"$dir/all" 2>"$dir/err" || rc=$?
[[ $rc == 2 ]] && grep -q "^usage:" "$dir/err" || fail "a wrong flag: exit status $rc"
rc=0
ops/quickstart --out "$dir/out" --seed -1 >"$dir/all" 2>"$dir/err" || rc=$?
[[ $rc == 2 ]] || fail "a wrong seed: exit status $rc"

# Ctrl-C while the picture is made; an asynchronous command would ignore the signal, so a shell with job control runs it.
set -m
ops/quickstart --out "$dir/interrupted" >"$dir/all" 2>"$dir/err" </dev/null &
pid=$!
set +m
for ((i = 0; i < 1200; i++)); do
  grep -q denoise "$dir/err" && break
  sleep 0.05
done
kill -INT -- "-$pid"
rc=0
wait "$pid" || rc=$?
[[ $rc == 130 ]] || fail "after Ctrl-C: exit status $rc"
[[ -z $(ls -A "$dir/interrupted") ]] || fail "after Ctrl-C there is a picture"
clean "Ctrl-C"
