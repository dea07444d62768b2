"""The script of faults, drawn from a seed: what is done to the fleet, when, and for how long. Each fault mends itself."""
import collections
import contextlib
import heapq
import os
import random
import signal
import time

import redis

from fleet import LEASE_S, NODES, STAGE_S, alive

GROUPS = [node for node, ranks in NODES.items() if ranks]
SINK = (500, 503, 429, "hang", "reset", "mute", "slow", "full")


class Script:
    """play() between two calls of the caller's loop; heal() mends all that is broken."""

    def __init__(self, fleet, seed, gap):
        self.fleet, self.chance, self.gap = fleet, random.Random(seed + 1), gap
        self.start = self.next = time.monotonic()
        self.due, self.serial, self.busy = [], 0, set()  # what mends, (when, number, function); what is broken now
        self.counts, self.story, self.sink_free = collections.Counter(), [], 0
        replicated = [(self.kill_master, 5), (self.kill_replica, 2)] if fleet.replica else [(self.kill_redis, 5)]
        self.faults = [(self.kill_leader, 10), (self.kill_rank, 6), (self.kill_supervisor, 5), (self.drain_node, 3),
                       (self.stop_rank, 6), (self.stop_supervisor, 3), (self.stop_redis, 4), (self.cut_node, 6),
                       (self.slow_link, 5), (self.reset_link, 5), (self.fail_sink, 14), (self.flush_scripts, 1), *replicated]

    # ---- the clock

    def play(self):
        now = time.monotonic()
        while self.due and self.due[0][0] <= now:
            heapq.heappop(self.due)[2]()
        self.look_after()
        if now >= self.next:
            self.next = now + self.chance.expovariate(1 / self.gap)
            fault = self.chance.choices([f for f, _ in self.faults], [weight for _, weight in self.faults])[0]
            fault()

    def heal(self):
        while self.due:
            heapq.heappop(self.due)[2]()
            time.sleep(0.01)
        self.look_after()

    def after(self, seconds, mend):
        self.serial += 1
        heapq.heappush(self.due, (time.monotonic() + seconds, self.serial, mend))

    def tell(self, kind, text):
        self.counts[kind] += 1
        self.story.append("%8.3f %s: %s" % (time.monotonic() - self.start, kind, text))

    def takes(self, *things):
        """Whether none of them is broken already; then they are."""
        if self.busy & set(things):
            return False
        self.busy |= set(things)
        return True

    def look_after(self):
        """Supervisors end only when they are told to: any other end is a bug."""
        for node in NODES:
            process = self.fleet.processes["node-" + node]
            if process.poll() is not None and "node " + node not in self.busy:
                raise AssertionError("the supervisor of node %s ended by itself, status %s" % (node, process.returncode))

    # ---- processes

    def signal_rank(self, kind, leader, signum):
        node = self.chance.choice(GROUPS if leader else [n for n in GROUPS if NODES[n] > 1])
        rank = 0 if leader else self.chance.randrange(1, NODES[node])
        pid = self.fleet.ranks(node).get(rank)
        if pid is None:
            return None
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            return None
        self.tell(kind, "node %s rank %d pid %d" % (node, rank, pid))
        return pid

    def kill_leader(self):
        self.signal_rank("kill -9 of leaders", True, signal.SIGKILL)

    def kill_rank(self):
        self.signal_rank("kill -9 of other ranks", False, signal.SIGKILL)

    def stop_rank(self):
        """Shorter or longer than its stage's deadline, than a lease, than both."""
        seconds = self.chance.uniform(0.1, 2.5 * max(LEASE_S, STAGE_S))
        pid = self.signal_rank("SIGSTOP of ranks", self.chance.random() < 0.6, signal.SIGSTOP)
        if pid:
            self.after(seconds, lambda: alive(pid) and os.kill(pid, signal.SIGCONT))

    def end_node(self, kind, signum):
        """Its supervisor ends, and is started again some time later."""
        node = self.chance.choice(list(NODES))
        down = self.chance.uniform(0.05, 1.5)
        if self.takes("node " + node):
            process = self.fleet.processes["node-" + node]
            process.send_signal(signum)
            self.tell(kind, "node %s pid %d, down for %.2f s" % (node, process.pid, down))
            self.after(down, lambda: self.start_node(node, process))

    def start_node(self, node, process):
        if process.poll() is None:  # still draining
            return self.after(0.05, lambda: self.start_node(node, process))
        self.fleet.start_node(node)
        self.busy.discard("node " + node)

    def kill_supervisor(self):
        self.end_node("kill -9 of supervisors", signal.SIGKILL)

    def drain_node(self):
        self.end_node("SIGTERM of supervisors", signal.SIGTERM)

    def stop_supervisor(self):
        node, seconds = self.chance.choice(list(NODES)), self.chance.uniform(0.2, 2 * LEASE_S)
        if self.takes("node " + node):
            process = self.fleet.processes["node-" + node]
            process.send_signal(signal.SIGSTOP)
            self.tell("SIGSTOP of supervisors", "node %s for %.2f s" % (node, seconds))
            self.after(seconds, lambda: (process.send_signal(signal.SIGCONT), self.busy.discard("node " + node)))

    # ---- Redis

    def stop_redis(self):
        name, seconds = self.fleet.master, self.chance.uniform(0.1, 1.3 * LEASE_S)
        if self.takes("redis"):
            process = self.fleet.processes[name]
            process.send_signal(signal.SIGSTOP)
            self.tell("SIGSTOP of redis-server", "for %.2f s" % seconds)
            self.after(seconds, lambda: (process.send_signal(signal.SIGCONT), self.busy.discard("redis")))

    def kill_redis(self):
        """And started again from its append-only file."""
        down = self.chance.choice((0.05, 0.5, 1.5, 1.5 * LEASE_S))
        if self.takes("redis"):
            self.fleet.stop(self.fleet.master, signal.SIGKILL)
            self.tell("kill -9 of redis-server", "down for %.2f s" % down)
            self.after(down, self.start_redis)

    def start_redis(self):
        self.fleet.start_master()
        self.busy.discard("redis")

    def kill_master(self):
        """For good, and its replica takes over, which may not have heard of the last writes."""
        lag = self.chance.choice((0, 0.1, 0.3, 1))
        if not self.busy & {"redis", "replica"} and self.fleet.replica_follows() and self.takes("redis", "replica"):
            self.fleet.wire.set("replica", stalled=lag > 0)
            self.tell("kill -9 of redis masters", "its replica %.1f s behind takes over" % lag)
            self.after(lag, self.fail_over)

    def fail_over(self):
        self.fleet.stop(self.fleet.master, signal.SIGKILL)
        self.fleet.fail_over()
        self.busy -= {"redis", "replica"}

    def kill_replica(self):
        if self.takes("replica"):
            self.fleet.stop(self.fleet.replica, signal.SIGKILL)
            self.tell("kill -9 of redis replicas", self.fleet.replica)
            self.after(0.3, lambda: (self.fleet.start_replica(), self.busy.discard("replica")))

    def flush_scripts(self):
        with contextlib.suppress(redis.RedisError):  # it may be loading its file
            if "redis" not in self.busy:
                self.fleet.server.script_flush()
                self.tell("SCRIPT FLUSH", "")

    # ---- network

    def cut_node(self):
        """All that node says is lost; its connections stay, and time out or go on."""
        node, seconds = self.chance.choice(list(NODES)), self.chance.choice((0.3, 1, 1.5 * LEASE_S, 2.5 * LEASE_S))
        if self.takes("link " + node):
            self.fleet.net.cut(node, True)
            self.tell("cuts of a node's network", "node %s for %.2f s" % (node, seconds))
            self.after(seconds, lambda: (self.fleet.net.cut(node, False), self.busy.discard("link " + node)))

    def slow_link(self):
        node, delay = self.chance.choice(list(NODES)), self.chance.choice((0.005, 0.05, 0.3))
        if self.takes("link " + node):
            seconds = self.chance.uniform(0.5, 4)
            self.fleet.wire.set(node, delay=delay)
            self.tell("delays of a node's network", "node %s by %.0f ms for %.2f s" % (node, 1000 * delay, seconds))
            self.after(seconds, lambda: (self.fleet.wire.set(node, delay=0), self.busy.discard("link " + node)))

    def reset_link(self):
        node = self.chance.choice(list(NODES))
        self.fleet.wire.reset(node)
        self.tell("resets of a node's connections", "node " + node)

    # ---- the upload host

    def fail_sink(self):
        """For less than a job's tries take: the job's own budget pays for its host, and an outage beyond it is the job's end."""
        fault, seconds = self.chance.choice(SINK), self.chance.uniform(0.2, 2.5)
        if time.monotonic() > self.sink_free and self.takes("sink"):
            self.fleet.wire.set("sink", fault=fault)
            self.tell("upload host: %s" % fault, "for %.2f s" % seconds)
            self.sink_free = time.monotonic() + 2 * seconds
            self.after(seconds, lambda: (self.fleet.wire.set("sink", fault=None), self.busy.discard("sink")))
