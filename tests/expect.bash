# expect.bash: sourced by tests that run programs and look at what they print. They set
#   under_test   what all of them begin with, an array
#   printed      the file that takes what the last one printed
under_test=()

# Where a supervisor runs, its last lines are told, too.
fail() {
  echo "FAILED: $*" >&2
  [[ ! -e ${fleet-}/supervisor.log ]] || fleet_show_log supervisor
  exit 1
}

# expect STATUS TEXT arguments...: exit status, and a text that is printed
expect() {
  local want=$1 text=$2 got=0
  shift 2
  "${under_test[@]}" "$@" >"$printed" 2>&1 || got=$?
  [[ $got == "$want" ]] || fail "$*: exit status $got, expected $want: $(<"$printed")"
  grep -qF -- "$text" "$printed" || fail "$*: \"$text\" is not in: $(<"$printed")"
}

# free_port: a port of 127.0.0.1 that nobody has, and that the system gives to nobody who asks for any
free_port() {
  python3 -c '
import random, socket
while True:
    port = random.randint(10000, 19999)
    try:
        socket.socket().bind(("127.0.0.1", port))
    except OSError:
        continue
    print(port)
    break'
}

# check PYTHON: a condition on the object d that was printed last
check() {
  python3 -c "
import json, sys
d = json.load(open(sys.argv[1]))
assert $1, d" "$printed" || fail "$1"
}
