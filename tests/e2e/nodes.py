"""A group that spans two nodes: two supervisors, each in a network namespace of its own with a wire between them, form it
over Redis. Ranks, supervisors and the wire fail at bad moments; configurations and checkpoints differ. Jobs are done once,
with the picture of a group on one node. Where namespaces may not be made, the nodes are two loopback addresses and the
wire is not cut."""
import json
import os
import shutil
import signal
import subprocess
import time

from private_fleet import BUILD, MODEL, SLOW, PrivateFleet, alive, job_pb2, until

OK = job_pb2.STATE_SUCCEEDED
STEPS = 40 if SLOW == 1 else 25


class Wire:
    """The namespaces; two loopback addresses where there may be none."""

    def __init__(self):
        self.names = ["ditfleet-%s-%d" % (node, os.getpid()) for node in "ab"]
        self.real = self.ip("netns", "add", self.names[0], check=False)
        self.addresses = {"a": "127.0.0.1", "b": "127.0.0.2"}
        if not self.real:
            return
        self.addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}
        self.ip("netns", "add", self.names[1])
        self.ip("-n", self.names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", self.names[1])
        for name, address in zip(self.names, self.addresses.values()):
            self.ip("-n", name, "addr", "add", address + "/24", "dev", "wire")
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "link", "set", "wire", "up")

    @staticmethod
    def ip(*words, check=True):
        if not shutil.which("ip"):
            return False
        return subprocess.run(["ip", *words], check=check, stderr=subprocess.DEVNULL).returncode == 0

    def within(self, node):
        return ["ip", "netns", "exec", self.names["ab".index(node)]] if self.real else []

    def cut(self):
        """Packets go to a machine that is not there; neither end is told."""
        for name, other in zip(self.names, reversed(self.addresses.values())):
            self.ip("-n", name, "neigh", "replace", other, "lladdr", "02:00:00:00:00:01", "dev", "wire", "nud", "permanent")

    def mend(self):
        for name, other in zip(self.names, reversed(self.addresses.values())):
            self.ip("-n", name, "neigh", "del", other, "dev", "wire")

    def close(self):
        for name in self.names if self.real else []:
            self.ip("netns", "del", name, check=False)


class Nodes(PrivateFleet):
    def __init__(self, wire):
        super().__init__()
        self.wire = wire

    def write(self, node, group="", model=MODEL, settings=""):
        with open("%s/%s.conf" % (self.folder, node), "w") as f:
            f.write("[redis]\nurl = %s\n[fleet]\nnode = %s\naddress = %s\nstate_dir = %s/state-%s\n[upload]\nallow = %s\n"
                    "[restart]\nbackoff_min = 50ms\nbackoff_max = 100ms\ngrace = %ds\n%s\n[group wide]\n"
                    "nodes = a:1, b:1\nmodel = demo@1=%s\n%s\n" %
                    (self.url, node, self.wire.addresses[node], self.folder, node, ", ".join(self.sinks.values()),
                     10 * SLOW, settings, model, group))

    def begin(self, node):
        self.start(node, *self.wire.within(node), BUILD + "/ditfleet-supervisor", "--config",
                   "%s/%s.conf" % (self.folder, node))

    def ask(self, node, command="status", *words):
        p = subprocess.run([BUILD + "/ditfleet", command, *words, "--json", "--config", "%s/%s.conf" % (self.folder, node)],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return json.loads(p.stdout or "{}")

    def wide(self, node):
        groups = self.ask(node).get("node", {}).get("groups", [])
        return next((g for g in groups if g["name"] == "wide"), {"state": "absent", "ranks": [], "waits_for": ""})

    def wait_state(self, node, state, seconds=20):
        return until("%s %s" % (node, state), lambda: (g := self.wide(node))["state"] == state and g, seconds)

    def wait_both(self):
        """The ranks' processes, by node."""
        both = [self.wait_state(node, "ready", 30) for node in "ab"]
        assert both[0]["incarnation"] == both[1]["incarnation"], both
        assert [g["ranks"][0]["rank"] for g in both] == [0, 1], both
        return dict(zip("ab", (g["ranks"][0]["pid"] for g in both)))

    def in_the_middle(self, id):
        entry = self.submit(self.job(id, num_inference_steps=STEPS))
        self.wait_step(id, 3)
        return entry

    def done(self, id, entry, infra):
        result = self.result(id, entry)
        assert result.state == OK, result
        record = self.record(id)
        assert int(record.get("attempts_infra", 0)) == infra and not int(record.get("attempts_app", 0)), record
        assert self.stored(id + ".png") == self.stored("reference.png"), id + ": another picture"
        assert len([event for event in self.events(id) if event.state == OK]) == 1

    def ends(self, pids, since, limit, what):
        until("%s: no rank lives" % what, lambda: not any(map(alive, pids.values())), limit)
        print("%s: the group ended after %.0f ms" % (what, 1000 * (time.monotonic() - since)))


def one_picture(fleet):
    """The group's, which is the one of a group on one node."""
    fleet.wait_both()
    fleet.run("reference", num_inference_steps=STEPS)
    subprocess.run([BUILD + "/ditfleet", "generate", "--model", MODEL, "--prompt", "a red circle", "--width", "64", "--height",
                    "64", "--num-inference-steps", str(STEPS), "--max-sequence-length", "64", "--seed", "7", "--ranks", "2",
                    "--quiet", "-o", fleet.folder + "/one.png"], check=True, stdout=subprocess.DEVNULL)
    assert fleet.stored("reference.png") == open(fleet.folder + "/one.png", "rb").read(), "another picture than one node's"


def killed_ranks(fleet):
    """On either node, in a job and between jobs: both nodes' ranks end, at once, and come back."""
    for node in "ab":
        pids = fleet.wait_both()
        entry = fleet.in_the_middle("killed-" + node)
        since = time.monotonic()
        os.kill(pids[node], signal.SIGKILL)
        fleet.ends(pids, since, 2, "rank of %s killed in a job" % node)
        fleet.done("killed-" + node, entry, infra=1)
        assert set(pids.values()).isdisjoint(fleet.wait_both().values())
    pids = fleet.wait_both()
    since = time.monotonic()
    os.kill(pids["b"], signal.SIGKILL)
    fleet.ends(pids, since, 2, "rank of b killed between jobs")
    fleet.wait_both()


def killed_supervisor(fleet, node):
    pids = fleet.wait_both()
    entry = fleet.in_the_middle("orphaned-" + node)
    since = time.monotonic()
    fleet.stop(node, signal.SIGKILL)
    fleet.ends(pids, since, 2, "supervisor of %s killed" % node)
    other = "b" if node == "a" else "a"
    until("the other waits", lambda: ("node " + node) in fleet.wide(other)["waits_for"])
    fleet.begin(node)
    fleet.done("orphaned-" + node, entry, infra=1)


def drained(fleet, node):
    """One node drains: both finish the job in hand; the other waits, and nothing counts as a failure."""
    other = "b" if node == "a" else "a"
    fleet.wait_both()
    restarts = [fleet.wide(n)["restarts"] for n in "ab"]
    entry = fleet.in_the_middle("drained-" + node)
    fleet.ask(node, "drain")
    fleet.done("drained-" + node, entry, infra=0)
    fleet.wait_state(node, "stopped")
    until("the other waits", lambda: fleet.wide(other)["waits_for"] == "node %s has no ranks ready: stopped" % node)
    assert [fleet.wide(n)["restarts"] for n in "ab"] == restarts, "a drain counts as a failure"
    fleet.ask(node, "resume")
    fleet.wait_both()
    fleet.run("after-drain-" + node)


def silent(fleet):
    """A supervisor that hangs: its node is lost after 10 s, though its rank answers."""
    pids = fleet.wait_both()
    os.kill(fleet.processes["b"].pid, signal.SIGSTOP)
    until("a gives b up", lambda: "node b has said nothing" in fleet.wide("a").get("last_failure", ""), 14 / SLOW + 6)
    fleet.ends(pids, time.monotonic(), 2, "supervisor of b stopped")
    os.kill(fleet.processes["b"].pid, signal.SIGCONT)
    fleet.wait_both()
    fleet.run("after-silence")


def cut_wire(fleet):
    """No packet goes through, and nobody is told: either side finds out, and the job is done once when the wire is back."""
    pids = fleet.wait_both()
    entry = fleet.in_the_middle("cut")
    since = time.monotonic()
    fleet.wire.cut()
    fleet.ends(pids, since, 8, "wire cut")
    time.sleep(1)
    fleet.wire.mend()
    fleet.done("cut", entry, infra=1)


def other_terms(fleet):
    """Configurations that do not fit are told on both nodes, and nothing runs until they do."""
    fleet.wait_both()
    fleet.write("b", "ring_degree = 2\nulysses_degree = 1")
    fleet.processes["b"].send_signal(signal.SIGHUP)
    for node, word in ("a", "has group.ulysses_degree=1 where this node has group.ulysses_degree=0"), ("b", "=0 where this"):
        until("%s says why it waits" % node, lambda: word in fleet.wide(node)["waits_for"])
    assert not any(rank["pid"] for node in "ab" for rank in fleet.wide(node)["ranks"])
    fleet.write("a", "ring_degree = 2\nulysses_degree = 1")
    fleet.processes["a"].send_signal(signal.SIGHUP)
    fleet.wait_both()
    fleet.run("by-ring")
    for node in "ab":
        fleet.write(node)
        fleet.processes[node].send_signal(signal.SIGHUP)


def other_model(fleet):
    """The same name, other weights: refused before a picture is made."""
    fleet.wait_both()
    copy = fleet.folder + "/model"
    shutil.copytree(MODEL, copy)
    with open(copy + "/vae/diffusion_pytorch_model.safetensors", "r+b") as f:
        f.seek(8 + int.from_bytes(f.read(8), "little"))  # the first tensor
        f.write(bytes(64))
    fleet.write("b", model=copy)
    fleet.processes["b"].send_signal(signal.SIGHUP)
    for node in "ab":
        failed = fleet.wait_state(node, "failed", 30)
        assert "demo@1 is another model to rank" in failed["last_failure"], failed
    fleet.write("b")
    fleet.processes["b"].send_signal(signal.SIGHUP)
    fleet.ask("a", "resume")
    fleet.wait_both()


def redis_away(fleet):
    """A group needs Redis to form and to get jobs, not to stay."""
    pids = fleet.wait_both()
    fleet.stop("redis", signal.SIGKILL)
    time.sleep(4)
    fleet.redis()
    fleet.run("after-redis")
    assert fleet.wait_both() == pids, "the group fell with Redis"


def main():
    wire = Wire()
    try:
        with Nodes(wire) as fleet:
            fleet.redis()
            folder = fleet.folder + "/sink"
            os.mkdir(folder)
            fleet.start("sink", *wire.within("a"), BUILD + "/ditfleet-sink", "--dir", folder, "--port-file", folder + ".port")
            until("a sink's port", lambda: os.path.exists(folder + ".port"))
            fleet.sinks["sink"] = "127.0.0.1:" + open(folder + ".port").read().strip()
            for node in "ab":
                fleet.write(node)
                fleet.begin(node)
            one_picture(fleet)
            killed_ranks(fleet)
            for node in "ab":
                killed_supervisor(fleet, node)
                drained(fleet, node)
            redis_away(fleet)
            other_terms(fleet)
            other_model(fleet)
            silent(fleet)
            if wire.real:
                cut_wire(fleet)
            for node in "ab":
                assert fleet.stop(node) == 0
            assert not [p for p in os.listdir("/dev/shm") if "ditfleet" in p]
    finally:
        wire.close()
    print("nodes: all cases hold%s" % ("" if wire.real else "; no namespaces may be made here: the wire was not cut"))


main()
