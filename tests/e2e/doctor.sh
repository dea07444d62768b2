#!/usr/bin/env bash
# ditfleet doctor: with no GPU, with those of a made-up NVML (tests/fake_nvml.c) and a made-up CUDA backend, and with a
# configuration, its Redis, its directories and its models.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
unset CUDA_VISIBLE_DEVICES
fleet_begin "${DITFLEET_BUILD:?}"
# Copies of the programs, which find no CUDA backend but what lies beside them: no GPU of this host is ever opened.
mkdir "$fleet/cpu" "$fleet/cuda"
cp "$fleet_build/ditfleet" "$fleet_build/ditfleet-worker" "$fleet/cpu"
cp "$fleet_build/ditfleet" "$fleet_build/tests/fake_cuda/libditfleet_cuda.so" "$fleet/cuda"
ditfleet=$fleet/cpu/ditfleet

# expect STATUS LINE flags...: exit status, and an extended regular expression that one line matches
expect() {
  local want=$1 line=$2 got=0
  shift 2
  "$ditfleet" doctor "$@" >"$fleet/out" 2>&1 || got=$?
  [[ $got == "$want" ]] || fail "doctor $* (${FAKE_NVML-no NVML}): exit status $got, expected $want: $(<"$fleet/out")"
  also "$line"
}

also() {
  grep -qE -- "$1" "$fleet/out" || fail "(${FAKE_NVML-no NVML}): \"$1\" is not in: $(<"$fleet/out")"
}

never() {
  ! grep -qE -- "$1" "$fleet/out" || fail "(${FAKE_NVML-no NVML}): \"$1\" is in: $(<"$fleet/out")"
}

# machine WORDS STATUS LINE flags...: the same on a made-up machine
machine() {
  local -x FAKE_NVML=$1 LD_LIBRARY_PATH=$fleet_build/tests/fake_nvml${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  shift
  expect "$@"
}

# ---- usage
expect 0 "^usage: ditfleet doctor" --help
expect 2 "unknown flag --nonsense" --nonsense
expect 2 "unexpected argument" now
expect 2 "config needs a value" --config

# ---- no GPU: a CPU fleet is a fleet. (A machine with GPUs says other things of itself.)
if [[ ! -e /dev/nvidiactl && ! -e /dev/dxg ]] && ! grep -qs 0x10de /sys/bus/pci/devices/*/vendor; then
  ditfleet=$fleet_build/ditfleet # whatever it was built with
  expect 0 "^ok    driver +no NVIDIA GPU .*: a CPU fleet needs neither"
  also "^(ok  |warn)  cpu "
  also "^[0-9]+ checks: 0 failed, [0-9]+ warnings?$"
  never "^[a-zA-Z]+ +(gpu|backend|topology)"
  ditfleet=$fleet/cpu/ditfleet
fi

# ---- GPUs
machine "" 0 "^ok    driver +580.95.05, runs CUDA up to 13.0, 2 GPUs$"
also "^ok    gpu0 +NVIDIA H100 80GB HBM3, 80.0 GiB .*compute capability 9.0"
also "^ok    gpu1 pcie .*idle GPUs lower the generation"
also "^ok    topology +pairs of GPUs with NVLink: 1 of 1 "
also "^ +gpu0 +X +NV18"
also "^ok    p2p +peer-to-peer works"
never "^FAIL"
machine "throttled" 1 "^FAIL  gpu0 clocks .*because of heat: 92 C, 345 MHz of 1980.*90 s by heat.*; fix: check fans"
machine "brake" 1 "^FAIL  gpu0 clocks .*power brake is on.*; fix: check the power supplies"
machine "hot" 0 "^warn  gpu0 clocks .*lowered the clocks because of heat.*; fix: check fans"
machine "power_cap" 0 "^ok    gpu0 clocks .*at its power limit"
machine "ecc" 1 "^FAIL  gpu0 ecc +3 uncorrectable errors .*; fix: .*gpu-reset -i 0 "
machine "pending" 1 "^FAIL  gpu0 ecc .*row remapping pending.*; fix: .*gpu-reset"
machine "retired" 1 "^FAIL  gpu0 ecc .*page retirement pending"
machine "remap_failed" 1 "^FAIL  gpu0 ecc .*; fix: .*RMA"
machine "recovery" 1 "^FAIL  gpu0 recovery .*asks for its peer-to-peer traffic to stop, then for a reset; fix: .*gpu-reset -i 0,"
machine "prohibited" 1 "^FAIL  gpu0 compute mode .*-c DEFAULT"
machine "old_gpu" 1 "^FAIL  gpu0 +Tesla V100.*7.0, but 8.0 is the oldest supported.*; fix: use an A100"
machine "lost" 1 "^FAIL  gpu0 +the GPU is lost: it has fallen off the bus .*; fix: .*reboot"
also "^ok    gpu1 clocks"
machine "reset" 1 "^FAIL  gpu0 .*needs a reset"
machine "mig,no_persistence,low_power,gpus=1" 0 "^warn  gpu0 MIG .*-i 0 -mig 0"
also "^ok    driver .*, 1 GPU$"
grep -qi microsoft /proc/version || also "^warn  gpu0 persistence .*nvidia-persistenced"
also "^warn  gpu0 power .*limit 350 W, which is below its default; fix: .*-i 0 -pl 700"
never "topology|p2p"
machine "x4" 0 "^warn  gpu0 pcie .*width x4 of x16; fix: reseat"
machine "gen1" 0 "^warn  gpu0 pcie +generation 1 of 5"
machine "busy" 0 "^warn  gpu0 programs +other programs use this GPU: python3 \(4242\) 20.0 GiB; fix"
never "ditfleet-worker"
machine "links_down" 0 "^warn  gpu0 nvlink +12 of 18 NVLinks are up"
machine "pcie,no_p2p" 0 "^warn  p2p +no peer-to-peer in 1 of 1 pairs.*not supported here; fix"
machine "gpus=4" 0 "^ +gpu2 +SYS +SYS +X +NV18"
machine "quiet" 0 "^ok    gpu0 "
also "^ok    p2p +the driver does not say"
machine "gpus=40" 0 "^warn  driver .*40 GPUs, of which the first 32 are checked"

# ---- a driver in trouble
machine "mismatch" 1 "^FAIL  driver .*another version.*; fix: .*reboot"
machine "no_permission" 1 "^FAIL  driver .*no permission"
machine "hang=1" 1 "^FAIL  driver +NVML did not finish within 10 s; it was asked about GPU 1; fix:"
also "^ok    gpu0 clocks"
machine "crash" 1 "^FAIL  driver +NVML died: Aborted; it was starting; fix:"

# ---- for machines
machine "ecc" 1 '^\{"good":false' --json
python3 - "$fleet/out" <<'CHECK' || fail "the JSON"
import json, sys
d = json.load(open(sys.argv[1]))
assert d["failures"] == 1 and d["driver"] == "580.95.05" and d["topology"] == [["X", "NV18"], ["NV18", "X"]], d
(bad,) = [c for c in d["checks"] if c["verdict"] == "FAIL"]
assert bad["check"] == "gpu0 ecc" and "3 uncorrectable" in bad["found"] and "reset" in bad["fix"], bad
assert d["gpus"][0]["ecc_uncorrected"] == 3 and "rows_pending" in d["gpus"][1] and len(d["gpus"]) == 2, d
CHECK

# ---- the CUDA backend: absent, or the made-up one beside a copy of the program, or a file that is none
machine "" 0 "^warn  backend +this build has no CUDA backend: the GPUs stay idle"
ditfleet=$fleet/cuda/ditfleet
machine "" 0 "^ok    gpu0 opens "
also "^ok    gpu1 opens "
also "^fake_cuda visible=1 gpu=0" # as a worker opens it
CUDA_VISIBLE_DEVICES=7 machine "" 0 "^ok    visible gpu0 opens "
also "^ok    visible +CUDA_VISIBLE_DEVICES=7: "
also "^fake_cuda visible=7 gpu=0"
never "gpu1 opens"
CUDA_VISIBLE_DEVICES='' machine "" 0 "^ok    backend "
never "opens"
echo "open unavailable" >"$fleet/request"
FAKE_CUDA=$fleet/request machine "" 1 "^FAIL  gpu0 opens +open failed on request; fix:"
also "^ok    gpu1 opens "
echo nonsense >"$fleet/cuda/libditfleet_cuda.so"
machine "" 1 "^FAIL  backend +the CUDA backend cannot be loaded"
never "opens"
# The one that was built, on a driver that is too old for it: it opens nothing.
if [[ -e $fleet_build/libditfleet_cuda.so ]]; then
  ditfleet=$fleet_build/ditfleet
  machine "driver=470.57.02" 1 "^FAIL  backend +CUDA .*needs driver .*; the driver is 470.57.02; fix: update the driver"
  also "^(ok  |FAIL)  libraries +cuBLASLt "
  never "opens"
fi
ditfleet=$fleet/cpu/ditfleet

# ---- a configuration
model=$DITFLEET_SOURCE/ops/demo/model
state=$fleet/state
# conf TAIL: the configuration of the next checks
conf() {
  printf '[redis]\nurl = unix://%s/redis.sock\n[fleet]\nnode = n\nstate_dir = %s\n%s\n' "$fleet" "$state" "$1" \
    >"$fleet/f.conf"
}
# configured STATUS LINE: expect, with that configuration, on a made-up machine: this host's GPUs may have troubles
configured() {
  machine "gpus=1" "$1" "$2" --config "$fleet/f.conf"
}
group="[group a]
ranks = 1
threads = 1
model = demo@1=$model"
conf "$group"
machine "gpus=1" 1 "^FAIL  config .*missing.conf.*; fix: name the file" --config "$fleet/missing.conf"
configured 1 "^FAIL  redis .*redis.sock.*; fix: start it"
also "^ok    config .*node n, 1 group$"
also "^ok    state_dir .*/state: can be created, "
also "^ok    model +demo@1: .*MiB of weights"
also "^ok    threads +the groups compute with 1 thread on "
fleet_redis
configured 0 "^ok    redis +version [0-9.]+ answers at unix:"
also "^ok    redis durability +append-only file, appendfsync everysec"
also "^ok    redis memory"
redis() {
  redis-cli -s "$fleet/redis.sock" "$@" >/dev/null
}
redis CONFIG SET maxmemory-policy allkeys-lru
configured 1 "^FAIL  redis policy +maxmemory-policy is allkeys-lru.*; fix: CONFIG SET maxmemory-policy noeviction"
redis CONFIG SET maxmemory-policy noeviction
redis CONFIG SET appendonly no
configured 0 "^warn  redis durability .*; fix: CONFIG SET appendonly yes"
redis CONFIG SET maxmemory 1mb
configured 0 "^warn  redis memory "
redis CONFIG SET maxmemory 0
redis REPLICAOF 127.0.0.1 1
configured 1 "^FAIL  redis role +this is a replica"
redis REPLICAOF NO ONE
redis CONFIG SET requirepass hush
configured 1 "^FAIL  redis .*; fix: check the user and password"
never hush
redis --no-auth-warning -a hush CONFIG SET requirepass ""
# Nothing was changed.
[[ ! -e $fleet/state && $(redis-cli -s "$fleet/redis.sock" DBSIZE) == 0 ]] || fail "doctor left something behind"

mkdir "$fleet/broken"
conf "${group/$model/$fleet/broken}"
configured 1 "^FAIL  model +demo@1: .*model_index.json"
conf "${group/$model/$fleet/nowhere}"
configured 1 "^FAIL  config .*no directory there"
conf "${group/threads/threds}"
configured 1 "^FAIL  config .*threds.*; fix: ditfleet-supervisor --help"
conf "${group/threads = 1/threads = 1000}"
configured 0 "^warn  threads +the groups compute with 1000 threads"
conf "[upload]
file_roots = $fleet, $fleet/absent, $fleet/f.conf
$group"
configured 1 "^ok    file_root +$fleet: writable, "
also "^FAIL  file_root .*/absent: No such file or directory; fix: mkdir"
also "^FAIL  file_root .*/f.conf: Not a directory; fix: mkdir"
state=$fleet/absent/state
conf "$group"
configured 1 "^FAIL  state_dir .*/absent/state: No such file or directory; fix: mkdir -p"
# Root may write everywhere: it looks as somebody else, where it may.
drop=
((EUID)) || drop="setpriv --reuid 65534 --regid 65534 --clear-groups"
if $drop true 2>/dev/null; then
  chmod 755 "$fleet"
  mkdir -m 555 "$fleet/shut"
  mkdir -m 000 "$fleet/hidden"
  printf '#!/bin/sh\nexec %s "%s/cpu/ditfleet" "$@"\n' "$drop" "$fleet" >"$fleet/somebody"
  chmod 755 "$fleet/somebody"
  state=$fleet/shut/state
  conf "[upload]
file_roots = $fleet/shut, $fleet/hidden/root
$group"
  ditfleet=$fleet/somebody
  configured 1 "^warn  state_dir .*/shut/state does not exist, and user [0-9]+ may not create it; fix: create it"
  also "^FAIL  file_root .*/shut: user [0-9]+ may not write there; fix: chown"
  also "^FAIL  file_root .*/hidden/root: Permission denied; fix: run doctor as"
  ditfleet=$fleet/cpu/ditfleet
  chmod 700 "$fleet" "$fleet/hidden"
fi
state=$fleet/state
conf "${group/ranks = 1/device = cuda
gpu = 5}"
configured 1 "^FAIL  group +a needs GPU 5, but there is 1, numbered from 0"
group=${group/threads = 1/threads = 0}
conf "${group/ranks = 1/device = cuda}"
configured 1 "^FAIL  group +a needs a GPU: no CUDA backend"
also "^ok    threads +the groups compute with 1 thread on " # a GPU's needs no more
echo "doctor: all passed"
