#!/bin/bash
# Replays the transcript of proto/PROTOCOL.md against a private Redis and compares what it prints with what the page says.
set -eu
cd "$(dirname "$0")/../.."
. tests/private_redis.bash

section=$(sed -n '/^## A transcript/,$p' proto/PROTOCOL.md)
# Stream ids differ from run to run.
steady() { sed -E 's/[0-9]{13}-[0-9]+/1700000000000-0/g'; }
printf '%s\n' "$section" | awk '/^```sh$/ {on = 1; next} /^```/ {on = 0} on' > "$private_folder/typed.sh"
printf '%s\n' "$section" | awk '/^```text$/ {on = 1; next} /^```/ {on = 0} on' > "$private_folder/expected"
[ "$(wc -l < "$private_folder/typed.sh")" -gt 20 ] || { echo "PROTOCOL.md has no transcript" >&2; exit 1; }
SOCKET=$private_socket bash -eu "$private_folder/typed.sh" > "$private_folder/raw" 2>&1 || {
  cat "$private_folder/raw"
  exit 1
}
steady < "$private_folder/raw" > "$private_folder/printed"
diff -u "$private_folder/expected" "$private_folder/printed"
echo "the transcript of PROTOCOL.md does what it says"
