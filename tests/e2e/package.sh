#!/usr/bin/env bash
# The units are sound and hardened; the Debian package installs, runs and goes without trace, in a root of its own.
set -euo pipefail
source "${DITFLEET_SOURCE:?}/ops/private-fleet.sh"
source "$DITFLEET_SOURCE/tests/expect.bash"
build=${DITFLEET_BUILD:?}
units=$DITFLEET_SOURCE/systemd
fleet_begin "$build"
printed=$fleet/out

# ---- units: as installed, but naming programs that are here
unit=$fleet/units/ditfleet-supervisor.service
mkdir -p "$unit.d"
sed "s#@bin@#$build#" "$units/ditfleet-supervisor.service.in" >"$unit"
cp "$units/ditfleet.slice" "$fleet/units"
judge() {
  systemd-analyze verify --man=no "$unit" >"$printed" 2>&1 && [[ ! -s $printed ]] || fail "verify: $(<"$printed")"
  systemd-analyze security --offline=yes --no-pager --threshold=25 "$unit" >"$printed" 2>&1 || fail "exposed: $(<"$printed")"
  tail -n 1 "$printed"
}
judge
sed "s#@bin@#$build#" "$units/gpu.conf.in" >"$unit.d/gpu.conf"
touch "$fleet/nvidia" && chmod +x "$fleet/nvidia" # stands for the driver's programs, which are not here
sed -i -E "s#/usr/bin/nvidia-(smi|modprobe)#$fleet/nvidia#" "$unit.d/gpu.conf"
judge

# ---- the package
root=$fleet/root
mkdir -p "$root/var/lib/dpkg/updates" "$root/var/lib/dpkg/info"
touch "$root/var/lib/dpkg/status"
(cd "$fleet" && cpack -G DEB --config "$build/CPackConfig.cmake" -B "$fleet") >"$printed" 2>&1 || fail "cpack: $(<"$printed")"
# What it depends on is on this machine; its scripts are told of the root in place of entering it.
in_root=(dpkg --root="$root" --force-depends --force-script-chrootless --log=/dev/null)
if ((EUID == 0)); then
  expect 0 "Setting up ditfleet" "${in_root[@]}" -i "$fleet"/ditfleet_*.deb
  grep -q '^ditfleet:' "$root/etc/passwd" || fail "no user"
  [[ $(stat -c %a "$root/etc/ditfleet/ditfleet.conf") == 640 ]] || fail "others can read the configuration"
else
  echo "left out: only root installs packages; this one is unpacked"
  dpkg-deb -x "$fleet"/ditfleet_*.deb "$root"
fi
grep -q '^ExecStart=/usr/bin/ditfleet-supervisor ' "$root/usr/lib/systemd/system/ditfleet-supervisor.service" ||
  fail "the unit names another program"
for page in man1/ditfleet.1 man1/ditfleet-submit.1 man5/ditfleet.conf.5; do
  [[ -s $root/usr/share/man/$page ]] || fail "no page $page"
done

# Its programs run and find each other.
expect 0 "good" "$root/usr/bin/ditfleet" config check "$root/etc/ditfleet/ditfleet.conf"
fleet_build=$root/usr/bin
fleet_redis
fleet_supervisor "[group a]
model = demo@1=$DITFLEET_SOURCE/ops/demo/model"
fleet_wait_ready 1
fleet_stop supervisor

((EUID == 0)) || exit 0
expect 0 "Purging" "${in_root[@]}" --purge ditfleet
left=$(find "$root" -name '*ditfleet*')
[[ -z $left ]] || fail "left behind: $left"
