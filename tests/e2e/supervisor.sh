#!/bin/sh
# The supervisor as an operator meets it: --help, --check, what it says when it cannot start, and life as PID 1.
set -eu
build=${DITFLEET_BUILD:?}
supervisor=$build/ditfleet-supervisor
dir=$(mktemp -d)
pid=
trap 'test -z "$pid" || kill -9 "$pid" 2>/dev/null || :; rm -rf "$dir"' EXIT INT TERM

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# refused STATUS TEXT ARGUMENTS...: leaves with the status and says the text
refused() {
    want=$1 text=$2 got=0
    shift 2
    "$supervisor" "$@" >"$dir/out" 2>&1 || got=$?
    test "$got" = "$want" || fail "$*: exit status $got, expected $want: $(cat "$dir/out")"
    grep -qF -- "$text" "$dir/out" || fail "$*: \"$text\" is not in: $(cat "$dir/out")"
}

# children PID: "pid state" of each child, from /proc alone
children() {
    for stat in /proc/[0-9]*/stat; do
        read -r child name state parent rest <"$stat" 2>/dev/null || continue
        test "$parent" = "$1" && echo "$child $state"
    done
    :
}

mkdir "$dir/model"
cat >"$dir/good.conf" <<END
[redis]
url = unix:///nonexistent/redis.sock
[fleet]
node = n1
state_dir = $dir/state
worker_program = $build/tests/fake_worker
[group g]
ranks = 2
model = flux@1=model
END
sed 's|flux@1=model|flux@1=nowhere|' "$dir/good.conf" >"$dir/nomodel.conf"
sed 's|fake_worker|no_such_worker|' "$dir/good.conf" >"$dir/noworker.conf"
sed 's|ranks = 2|ranks = 2000|' "$dir/good.conf" >"$dir/bounds.conf"
sed "s|$dir/state|$dir/no/such/state|" "$dir/good.conf" >"$dir/nostate.conf"

refused 0 "usage: ditfleet-supervisor" --help
refused 0 "#backoff_min = 1s" --help
refused 0 "good: node n1, 1 groups" --config "$dir/good.conf" --check
refused 2 "usage:" --check
refused 2 "unrecognized option" --nonsense
refused 1 "$dir/missing.conf: cannot open" --config "$dir/missing.conf"
refused 1 "[group g] model: $dir/nowhere: no directory there" --config "$dir/nomodel.conf" --check
refused 1 "no_such_worker: no worker program" --config "$dir/noworker.conf" --check
refused 1 "no_such_worker: no worker program" --config "$dir/noworker.conf"
refused 1 "bounds.conf:8: [group g] ranks = \"2000\" is not allowed; allowed: a whole number from 1 to 64" \
    --config "$dir/bounds.conf"
refused 1 "cannot make the state directory" --config "$dir/nostate.conf"
"$supervisor" --help | sed '1,/^The configuration/d' >"$dir/doc.conf"
refused 0 "good: node" --config "$dir/doc.conf" --check

# As PID 1 of a container it reaps orphans that are not its own, and SIGTERM still drains. Where the kernel forbids making a
# PID namespace this part has nothing to run in.
if unshare --user --map-root-user --pid --fork --mount-proc true 2>/dev/null; then
    cat >"$dir/worker" <<END
#!/bin/sh
(sleep 0.2 &) # its parent leaves first: PID 1 inherits it
exec $build/tests/fake_worker "\$@"
END
    chmod +x "$dir/worker"
    sed "s|^worker_program.*|worker_program = $dir/worker|" "$dir/good.conf" >"$dir/pid1.conf"
    unshare --user --map-root-user --pid --fork --mount-proc --kill-child "$supervisor" --config "$dir/pid1.conf" \
        2>"$dir/log" &
    pid=$!
    for i in $(seq 100); do
        grep -q "event=supervisor.ready" "$dir/log" && break
        sleep 0.05
    done
    grep -q "event=supervisor.ready.* ready=1" "$dir/log" || fail "as PID 1: $(cat "$dir/log")"
    sleep 0.5
    inner=$(children "$pid")
    inner=${inner%% *}
    test "$(children "$inner" | wc -l)" = 2 || fail "as PID 1 it has not its 2 workers alone: $(children "$inner")"
    kill -TERM "$inner"
    sleep 0.3
    kill -TERM "$inner" # no Redis: do not wait for it
    wait "$pid" || fail "as PID 1 it left with status $?: $(cat "$dir/log")"
    pid=
    grep -q "from=draining to=stopped" "$dir/log" || fail "it did not drain: $(cat "$dir/log")"
else
    echo "SKIPPED: life as PID 1 (no PID namespaces here)"
fi
echo "supervisor: ok"
