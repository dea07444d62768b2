# Sourced by ops/quickstart and the end-to-end tests: a whole fleet in a folder of its own, gone without trace at the end.
#
#   fleet_begin BUILD                  makes the folder $fleet and a trap that ends everything; BUILD has the programs
#   fleet_redis                        a Redis server at $fleet_redis_url, on a Unix socket, on no port
#   fleet_sink [flags]                 an upload host at $fleet_sink_url, on loopback, that keeps files in $fleet/sink
#   fleet_start NAME program args...   anything else; its output is $fleet/NAME.log, its process id ${fleet_pids[NAME]}
#   fleet_supervisor CONFIG_TAIL       the supervisor, with the groups of CONFIG_TAIL
#   fleet_wait_ready GROUPS            until so many groups are ready
#   fleet_has_redis                    whether there is a Redis server to start
#   fleet_has_gpu                      whether a picture can be made on a GPU; else $fleet/gpu.log says why not
#   fleet_end                          stops everything in the reverse order of its start; also on every exit
#
# Everything runs in a session of its own, so that Ctrl-C reaches only the script, which then ends the rest in order;
# and dies with the script when that is killed.

declare -gA fleet_pids=()
declare -ga fleet_order=()

fleet_begin() {
  fleet_build=$1
  fleet=$(mktemp -d "${TMPDIR:-/tmp}/ditfleet.XXXXXX")
  if ((${#fleet} > 70)); then # a socket's path has room for 107 bytes
    rmdir "$fleet"
    fleet=$(mktemp -d /tmp/ditfleet.XXXXXX)
  fi
  trap fleet_end EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}

fleet_die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# What NAME said last, for a failure that the caller has told.
fleet_show_log() {
  printf '%s, its last lines:\n' "$1" >&2
  tail -n 15 "$fleet/$1.log" >&2
  if grep -qs 'No space left' "$fleet/$1.log"; then
    printf 'The disk is full.\n' >&2
  fi
}

fleet_start() {
  local name=$1
  shift
  setsid setpriv --pdeathsig KILL "$@" >"$fleet/$name.log" 2>&1 </dev/null &
  fleet_pids[$name]=$!
  fleet_order+=("$name")
}

fleet_running() {
  kill -0 "${fleet_pids[$1]:-0}" 2>/dev/null
}

# Waits until the command given succeeds; NAME must stay alive meanwhile.
fleet_wait() {
  local name=$1 seconds=$2 end
  shift 2
  end=$((SECONDS + seconds))
  until "$@"; do
    if ! fleet_running "$name" || ((SECONDS >= end)); then
      fleet_show_log "$name"
      fleet_die "$name did not start"
    fi
    sleep 0.05
  done
}

# The program that redis-tools ships acts by its name.
fleet_has_redis() {
  command -v redis-server || command -v redis-check-rdb || command -v redis-check-aof
}

# A small picture says more than any list of devices: driver, libraries, architecture and memory are all in order.
fleet_has_gpu() {
  local demo
  demo=$(cd "$(dirname "${BASH_SOURCE[0]}")/demo/model" && pwd)
  "$fleet_build/ditfleet" generate --device cuda --model "$demo" --width 64 --height 64 --num-inference-steps 1 \
    --max-sequence-length 16 --quiet -o "$fleet/gpu.png" >"$fleet/gpu.log" 2>&1
}

fleet_redis() {
  local program
  program=$(fleet_has_redis) ||
    fleet_die "there is no Redis server here; ops/install-deps installs it"
  ln -s "$program" "$fleet/redis-server"
  fleet_redis_url=unix://$fleet/redis.sock
  fleet_start redis "$fleet/redis-server" --port 0 --unixsocket "$fleet/redis.sock" --unixsocketperm 600 \
    --dir "$fleet" --save '' --appendonly yes --maxmemory-policy noeviction --daemonize no
  fleet_wait redis 20 test -S "$fleet/redis.sock"
}

fleet_sink() {
  mkdir -p "$fleet/sink"
  rm -f "$fleet/sink.port"
  fleet_start sink "$fleet_build/ditfleet-sink" --dir "$fleet/sink" --port-file "$fleet/sink.port" "$@"
  fleet_wait sink 20 test -s "$fleet/sink.port"
  fleet_sink_address=127.0.0.1:$(<"$fleet/sink.port")
  fleet_sink_url=http://$fleet_sink_address
}

fleet_supervisor() {
  {
    printf '[redis]\nurl = %s\n[fleet]\nnode = private\nstate_dir = %s\n' "$fleet_redis_url" "$fleet/state"
    printf '[upload]\nallow = %s\n[restart]\ngrace = 3s\n%s\n' "${fleet_sink_address:-127.0.0.1:9}" "$1"
  } >"$fleet/ditfleet.conf"
  fleet_start supervisor "$fleet_build/ditfleet-supervisor" --config "$fleet/ditfleet.conf"
}

# ditfleet, told where this fleet is.
fleet_cli() {
  local command=$1
  shift
  "$fleet_build/ditfleet" "$command" --redis "$fleet_redis_url" --config "$fleet/ditfleet.conf" "$@"
}

fleet_groups_ready() {
  local status
  status=$(fleet_cli status --json 2>/dev/null || true)
  [[ ! $status =~ \"state\":\"failed\"|\"restarts\":[2-9] ]] || return 2 # it will not come right by waiting
  [[ $(grep -o '"state":"ready"' <<<"$status" | wc -l) -ge $1 ]]
}

fleet_wait_ready() {
  local groups=$1 end=$((SECONDS + 120)) rc=1
  while ((rc)); do
    rc=0
    fleet_groups_ready "$groups" || rc=$?
    if ((rc == 2)) || ! fleet_running supervisor || ((SECONDS >= end)); then
      fleet_show_log supervisor
      fleet_die "the workers did not become ready"
    fi
    ((rc == 0)) || sleep 0.1
  done
}

# TERM, after 3 s once more (which a supervisor takes as "at once"), after 3 s more KILL.
fleet_stop() {
  local pid=${fleet_pids[$1]} i
  for ((i = 0; i < 120; i++)); do
    kill -0 "$pid" 2>/dev/null || break
    ((i % 60)) || kill -TERM "$pid" 2>/dev/null || true
    sleep 0.05
  done
  kill -KILL "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  unset "fleet_pids[$1]"
}

fleet_end() {
  local i name
  trap '' INT TERM HUP # the end is not interrupted
  trap - EXIT
  for ((i = ${#fleet_order[@]} - 1; i >= 0; i--)); do
    name=${fleet_order[i]}
    [[ -z ${fleet_pids[$name]:-} ]] || fleet_stop "$name"
  done
  fleet_order=()
  rm -rf "$fleet"
}
