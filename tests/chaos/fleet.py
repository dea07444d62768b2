"""A fleet of three nodes (a group of one rank, a group of two, a node without groups), each in a network of its own where the
machine allows that, on one Redis, or on one with a replica. Whatever is killed is started again, as systemd would."""
import os
import re
import shutil
import subprocess
import sys

import redis

sys.path.append(os.path.dirname(os.path.abspath(__file__)) + "/../e2e")
from private_fleet import BUILD, MODEL, PrivateFleet, alive, children, job_pb2, until  # noqa: E402,F401
from wire import Wire  # noqa: E402

NODES = {"a": 1, "b": 2, "q": 0}  # ranks of the node's group; 0: it has none
TENANTS = ("default", "beta")
LEASE_S, STAGE_S, PREFIX = 3, 2, "dit:{default}:"
# What redis-py 4.3 (Debian 12's) says of a broken connection asks for both, which one by a Unix socket lacks.
redis.connection.UnixDomainSocketConnection.host = redis.connection.UnixDomainSocketConnection.port = "unix"

SETTINGS = """[redis]
url = redis://%(host)s:%(port)d
[fleet]
node = %(node)s
state_dir = %(folder)s/%(node)s
[queue]
lease = 3s
[upload]
allow = %(host)s:%(sink)d
timeout = 2s
retries = 8
[deadline]
text = 2s
denoise = 2s
decode = 2s
png = 2s
upload = 10s
[restart]
backoff_min = 50ms
backoff_max = 500ms
grace = 5s
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True)


class Networks:
    """A network namespace for each node, joined to ours by a link that can go down. Ours is no machine's: see ./run."""
    host = "10.77.0.1"

    def __init__(self, start):
        ip("link", "set", "dev", "lo", "up")
        ip("address", "replace", self.host, "dev", "lo")
        self.pids = {name: self.join(name, i, start) for i, name in enumerate(NODES, 1)}

    def join(self, name, i, start):
        pid = start("net-" + name, "unshare", "--net", "sleep", "infinity").pid
        until("a network of its own", lambda: os.readlink("/proc/%d/ns/net" % pid) != os.readlink("/proc/self/ns/net"))
        inside = lambda *words: subprocess.run([*self.enter(pid), "ip", *words], check=True)
        ip("link", "add", "name", name, "type", "veth", "peer", "name", "out", "netns", str(pid))
        ip("address", "add", "10.77.%d.1/30" % i, "dev", name)
        ip("link", "set", "dev", name, "up")
        inside("address", "add", "10.77.%d.2/30" % i, "dev", "out")
        inside("link", "set", "lo", "up")
        inside("link", "set", "out", "up")
        inside("route", "add", "default", "via", "10.77.%d.1" % i)
        return pid

    @staticmethod
    def enter(pid):
        return ["nsenter", "--net=/proc/%d/ns/net" % pid, "--"]

    def command(self, node):
        return self.enter(self.pids[node])

    def cut(self, node, cut):
        ip("link", "set", "dev", node, "down" if cut else "up")

    def end(self):
        """Now: with their namespaces they would go some time later, and the next run needs their names."""
        for node in NODES:
            ip("link", "delete", "dev", node)


class OneNetwork:
    """Where namespaces are not allowed: a node's link to Redis can be cut all the same."""
    host = "127.0.0.1"

    def __init__(self, wire):
        self.wire = wire

    def command(self, node):
        return []

    def cut(self, node, cut):
        self.wire().set(node, stalled=cut)

    def end(self):
        pass


class ChaosFleet(PrivateFleet):
    def __init__(self, fsync, apart, sink_bytes):
        super().__init__()
        self.fsync, self.replica, self.servers, self.begun = fsync, None, 0, {}
        self.program = self.folder + "/redis-server"
        os.symlink(next(filter(None, map(shutil.which, ("redis-server", "redis-check-rdb", "redis-check-aof")))), self.program)
        self.master = self.new_server()
        self.connect()
        self.pictures, self.puts = self.folder + "/pictures", self.folder + "/puts"
        self.fills = self.mount(sink_bytes) if apart else False
        for folder in ("forbidden", *TENANTS):
            os.makedirs("%s/%s" % (self.pictures, folder), exist_ok=True)
        links = {name: self.socket(self.master) for name in (*NODES, "replica")}
        self.wire = Wire(links, self.pictures, self.puts, self.fills)
        self.net = Networks(self.start) if apart else OneNetwork(lambda: self.wire)
        self.sinks["sink"] = "%s:%d" % (self.net.host, self.wire.ports["sink"])
        self.method = "%s; the sink's disk is %s" % (
            "a network namespace for each node and a proxy" if apart else "a proxy alone (no namespaces here)",
            "a small tmpfs" if self.fills else "told to be full (no mounts here)")

    def __exit__(self, *why):
        self.wire.child.kill()
        self.net.end()
        if self.fills:
            subprocess.run(["umount", "--lazy", self.pictures], check=True)
        if why[0]:
            print("the nodes, at last:", *self.log_lines(".")[-60:], sep="\n")
        super().__exit__(*why)

    def mount(self, size):
        os.mkdir(self.pictures)
        return subprocess.run(["mount", "-t", "tmpfs", "-o", "size=%d" % size, "chaos", self.pictures],
                              stderr=subprocess.DEVNULL).returncode == 0

    # ---- Redis

    def socket(self, server):
        return "%s/%s/redis.sock" % (self.folder, server)

    def connect(self):
        self.server = self.client.redis = redis.Redis(unix_socket_path=self.socket(self.master), socket_timeout=5)

    def counts(self):
        """The queue's counters of jobs."""
        return {k.decode(): int(v) for k, v in self.server.hgetall(PREFIX + "stats").items() if b":" not in k}

    def new_server(self):
        self.servers += 1
        name = "redis-%d" % self.servers
        os.mkdir("%s/%s" % (self.folder, name))
        return name

    def start_server(self, name, *flags):
        return self.start(name, self.program, "--port", "0", "--unixsocket", self.socket(name), "--dir",
                          "%s/%s" % (self.folder, name), "--save", "", "--appendonly", "yes", "--appendfsync", self.fsync,
                          "--repl-diskless-sync-delay", "0", *flags)

    def start_master(self):
        self.start_server(self.master)

    def start_replica(self):
        self.replica = self.replica or self.new_server()
        self.start_server(self.replica, "--replicaof", "127.0.0.1", str(self.wire.ports["replica"]))

    def replica_follows(self):
        try:
            info = redis.Redis(unix_socket_path=self.socket(self.replica), socket_timeout=1).info("replication")
            return info["role"] == "slave" and info["master_link_status"] == "up"
        except redis.RedisError:
            return False

    def fail_over(self):
        """The master is dead: what its replica has is what there is. A new replica begins."""
        self.wire.reset("replica")
        old, self.master, self.replica = self.master, self.replica, None
        shutil.rmtree("%s/%s" % (self.folder, old))
        until("a promoted replica", self.promote)
        self.connect()
        for link in (*NODES, "replica"):
            self.wire.set(link, target=self.socket(self.master), **({"stalled": False} if link == "replica" else {}))
            self.wire.reset(link)
        self.start_replica()

    def promote(self):
        try:
            return redis.Redis(unix_socket_path=self.socket(self.master), socket_timeout=5).replicaof("NO", "ONE")
        except redis.RedisError:
            return False

    # ---- nodes

    def configure_node(self, node):
        values = {"host": self.net.host, "port": self.wire.ports[node], "node": node, "folder": self.folder,
                  "sink": self.wire.ports["sink"]}
        group = "[group g]\nranks = %d\nthreads = 1\nmodel = demo@1=%s\n" % (NODES[node], MODEL) if NODES[node] else ""
        with open("%s/%s.conf" % (self.folder, node), "w") as f:
            f.write(SETTINGS % values + group)

    def start_node(self, node):
        self.configure_node(node)
        self.begun[node] = os.path.getsize(self.log("node-" + node)) if node in self.begun else 0
        self.start("node-" + node, *self.net.command(node), BUILD + "/ditfleet-supervisor", "--config",
                   "%s/%s.conf" % (self.folder, node))

    def ranks(self, node):
        """{rank: pid} of the group that runs now; a rank may be missing."""
        supervisor, found = self.processes.get("node-" + node), {}
        for pid in children(supervisor.pid) if supervisor else ():
            try:
                line = open("/proc/%d/cmdline" % pid, "rb").read().split(b"\0")
            except OSError:
                continue
            if b"--rank" in line:
                found[int(line[line.index(b"--rank") + 1])] = pid
        return found

    def ready(self, node):
        with open(self.log("node-" + node)) as f:
            f.seek(self.begun[node])
            states = [line for line in f if "event=group.state " in line]
        return bool(states) and " to=ready " in states[-1]

    def wait_ready(self):
        for node in self.begun:
            if NODES[node] and self.processes.get("node-" + node):
                until("the group of node %s ready" % node, lambda: self.ready(node), 60)

    def log_lines(self, pattern):
        """Of all nodes, in the order of time."""
        return sorted(line for node in self.begun for line in self.lines("node-" + node) if re.search(pattern, line))
