# Sourced by tests that run programs: a Redis server of their own in a temporary folder, gone when the script ends.
# Sets private_folder, private_socket. The server is the binary that redis-tools ships, which acts by its name.
private_folder=$(mktemp -d /tmp/ditfleet-test-XXXXXX)
private_socket=$private_folder/redis.sock
private_binary=$(command -v redis-server || command -v redis-check-rdb || command -v redis-check-aof) || {
  echo "no Redis server found; install redis-tools" >&2
  exit 1
}
ln -s "$private_binary" "$private_folder/redis-server"
"$private_folder/redis-server" --port 0 --unixsocket "$private_socket" --save "" --dir "$private_folder" \
  > "$private_folder/redis.log" 2>&1 &
private_pid=$!
private_stop() {
  kill -9 "$private_pid" 2> /dev/null || true
  wait "$private_pid" 2> /dev/null || true
  rm -rf "$private_folder"
}
trap private_stop EXIT
for _ in $(seq 100); do
  [ -S "$private_socket" ] && break
  sleep 0.05
done
