#!/usr/bin/env bash
# What the command line says of itself (help, pages, completion), and what it says of configurations and checkpoints.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
fleet_begin "${DITFLEET_BUILD:?}"
ditfleet=$fleet_build/ditfleet
under_test=("$ditfleet")
printed=$fleet/out

# ---- help and pages: every command has prose of its own, and roff that a strict reader takes
pages=0
page() { # page arguments...: that print one
  "$ditfleet" "$@" >"$fleet/page"
  mandoc -T lint -W warning <"$fleet/page" | grep -v 'missing date' >"$printed" || true
  [[ ! -s $printed ]] || fail "$*: $(<"$printed")"
  pages=$((pages + 1))
}
page --help=man
page config man
for command in $("$ditfleet" --help=words); do
  for part in DESCRIPTION EXAMPLES "EXIT STATUS" "usage: ditfleet $command"; do
    expect 0 "$part" "$command" --help
  done
  page "$command" --help=man
  grep -q "^\.TH DITFLEET-${command^^} 1" "$fleet/page" || fail "$command: no title"
done
((pages > 12)) || fail "only $pages pages"
page submit --help=man
grep -qF '.B \-\-num\-inference\-steps' "$fleet/page" || fail "the page shows no flags"

# ---- completion
source "$DITFLEET_SOURCE/ops/cli/completion.bash"
completes() { # completes EXPECTED words...: of which the last is completed
  local want=$1
  COMP_WORDS=("$ditfleet" "${@:2}") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _ditfleet
  [[ ${COMPREPLY[*]} == "$want" ]] || fail "${*:2}: completed to ${COMPREPLY[*]}"
}
completes "submit show status" s
completes "check example man --json --help" config ""
completes "--priority" submit --prio
completes "cpu-f16 cpu-f16-torch-2-12" submit --rng cpu-f1
completes "cuda" generate --device cu
completes "$DITFLEET_SOURCE/systemd" generate --model "$DITFLEET_SOURCE/syst"
completes "$DITFLEET_SOURCE/README.md" status --config "$DITFLEET_SOURCE/REA"
completes "" submit --prompt ""
completes "" nonsense --fl

# ---- configurations
"$ditfleet" config example >"$fleet/example.conf"
expect 0 "good: node" config check "$fleet/example.conf"
sed -i 's/^#lease = .*/lease = soon/; s/^#\[queue\]/[queue]/' "$fleet/example.conf"
expect 1 "[queue] lease" config check "$fleet/example.conf"
expect 1 "cannot open" config check "$fleet/none.conf"
printf '[fleet]\nnode = n\n[group a]\nmodel = demo@1=nowhere\n' >"$fleet/ditfleet.conf"
expect 1 "[group a] model" config check "$fleet/ditfleet.conf"
expect 2 "missing argument" config check
expect 2 "missing argument" config judge x

# ---- checkpoints
cp -r "$DITFLEET_SOURCE/ops/demo/model" "$fleet/model"
expect 0 "transformer: 18.5 MB, tensors: 140 BF16" model verify "$fleet/model"
expect 0 "there is no SHA256SUMS" model verify "$fleet/model"
(cd "$fleet/model" && find . -name '*.safetensors' -exec sha256sum {} + >"$fleet/sums" && mv "$fleet/sums" SHA256SUMS)
expect 0 '"sums":6' model verify "$fleet/model" --json
check 'len(d["hash"]) == 64 and [p["part"] for p in d["parts"]][2] == "transformer"'
check 'd["memory"][0]["device"] == "CPU" and d["memory"][0]["weights"] == sum(p["bytes"] for p in d["parts"])'
check '[m["precision"] for m in d["memory"]] == ["fp32", "fp32", "bf16", "fp16", "fp8", "int8"]'
check 'd["memory"][1]["weights"] > 1.9 * d["memory"][2]["weights"] and all(m["activations"] > 1e6 for m in d["memory"])'
echo 'not a sum' >>"$fleet/model/SHA256SUMS"
expect 1 "line 7 is not as sha256sum writes it" model verify "$fleet/model"
sed -i '$d' "$fleet/model/SHA256SUMS"
vae=$fleet/model/vae/diffusion_pytorch_model.safetensors
overwrite() { # overwrite BYTES: the last two of the VAE's file
  printf "$1" | dd of="$vae" bs=1 seek=$(($(stat -c %s "$vae") - 2)) conv=notrunc status=none
}
overwrite '\x01\x3c'
expect 1 "not what SHA256SUMS says" model verify "$fleet/model"
overwrite '\xc0\x7f'
expect 1 "holds infinities or NaNs" model verify "$fleet/model"
truncate -s -2 "$vae"
expect 1 "short or corrupt" model verify "$fleet/model"
rm "$vae"
expect 1 "neither diffusion_pytorch_model.safetensors nor" model verify "$fleet/model"
expect 2 "missing argument" model verify
fleet_redis
redis-cli -s "$fleet/redis.sock" HSET 'dit:{default}:models' demo 2 demo@1 1 demo@2 2 >/dev/null
expect 0 "demo@2 (default)" model list --redis "$fleet_redis_url"
expect 0 '"name":"demo","version":"1","default":false' model list --redis "$fleet_redis_url" --json
expect 3 "No such file" model list --redis "unix://$fleet/none.sock"
