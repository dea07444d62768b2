#!/usr/bin/env bash
# Peak memory of `ditfleet generate`: at most the weights, 1.25 times the largest live set that the dry run predicts, and
# 64 MB; by the figures it prints, which the kernel's own account (getrusage) gives.
set -euo pipefail
build=${DITFLEET_BUILD:?} source=${DITFLEET_SOURCE:?}
if grep -q '^DITFLEET_SANITIZE:[A-Z]*=.' "$build/CMakeCache.txt"; then
  echo "left out: a sanitizer's own memory is not the program's"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

failed=0
for side in 256 384; do
  for ranks in 1 2; do
    "$build/ditfleet" generate --model "$source/ops/demo/model" --prompt "a red circle" --seed 1 --width $side \
      --height $side --num-inference-steps 2 --ranks $ranks -o "$work/out.png" >"$work/out" 2>"$work/figures"
    read -r weights activations peak < <(
      sed -nE 's/.*weights ([0-9.]+) MB, activations ([0-9.]+) MB, peak ([0-9.]+) MB.*/\1 \2 \3/p' "$work/figures")
    awk -v w="$weights" -v a="$activations" -v p="$peak" -v what="$side x $side, $ranks ranks" 'BEGIN {
      allowed = w + 1.25 * a + 64
      printf "%s: peak %.1f MB; weights %.1f, predicted %.1f: allowed %.1f\n", what, p, w, a, allowed
      exit !(w > 0 && a > 0 && p > a && p <= allowed) }' || failed=1
  done
done
exit $failed
