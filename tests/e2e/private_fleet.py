"""A whole fleet in a folder of its own, for tests that look closer than the command line does: raw bytes in, records,
events and logs out. Everything it starts dies with it."""
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

BUILD, SOURCE = os.environ["DITFLEET_BUILD"], os.environ["DITFLEET_SOURCE"]
MODEL = SOURCE + "/ops/demo/model"
os.environ["no_proxy"] = "127.0.0.1"
sys.dont_write_bytecode = True
generated = tempfile.mkdtemp(prefix="ditfleet-proto-")
try:
    subprocess.run(["protoc", "--proto_path=" + SOURCE, "--python_out=" + generated, SOURCE + "/proto/job.proto"], check=True)
    sys.path[:0] = [generated, SOURCE + "/proto/clients/python"]
    from ditfleet_client import Fleet as Client, job_pb2
finally:
    shutil.rmtree(generated)

# A sanitizer's build is so much slower; deadlines of the tests (not of the fleet) are stretched by it.
SLOW = 6 if re.search(r"DITFLEET_SANITIZE:\w+=\w", open(BUILD + "/CMakeCache.txt").read()) else 1
prctl = ctypes.CDLL(None).prctl


def die_with_parent():
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def until(what, condition, seconds=20):
    """The first true value of condition(); what: said when it never comes."""
    end = time.monotonic() + seconds * SLOW
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("in %g s not seen: %s" % (seconds * SLOW, what))
        time.sleep(0.01)


def process_stat(pid):
    """(state, parent), or None when it is gone."""
    try:
        state, parent = open("/proc/%s/stat" % pid).read().rpartition(")")[2].split()[:2]
        return state, int(parent)
    except OSError:
        return None


def alive(pid):
    stat = process_stat(pid)
    return stat is not None and stat[0] != "Z"


def children(pid):
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and (process_stat(name) or (0, 0))[1] == pid]


class PrivateFleet:
    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="ditfleet.", dir="/tmp")
        self.processes, self.names, self.sinks = {}, set(), {}
        self.url = "unix://%s/redis.sock" % self.folder
        self.client = Client(self.url)
        self.server = self.client.redis

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind and os.path.exists(self.log("supervisor")):
            print("the supervisor and its workers, at last:", *self.lines("supervisor")[-40:], sep="\n", file=sys.stderr)
        for name in reversed(list(self.processes)):
            self.stop(name, signal.SIGTERM if name == "supervisor" else signal.SIGKILL)
        reports = [line for name in self.names for line in self.lines(name) if re.search(r"Sanitizer|runtime error:", line)]
        shutil.rmtree(self.folder)
        assert kind or not reports, "a sanitizer reports: %s" % reports

    # ---- processes

    def log(self, name):
        return "%s/%s.log" % (self.folder, name)

    def lines(self, name):
        return open(self.log(name), errors="replace").read().splitlines()

    def start(self, name, *command):
        self.names.add(name)
        with open(self.log(name), "ab") as log:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                    start_new_session=True, preexec_fn=die_with_parent)
        return self.processes[name]

    def stop(self, name, signum=signal.SIGTERM, seconds=10):
        """Its exit status; killed after seconds."""
        process = self.processes.pop(name)
        process.send_signal(signum)
        try:
            return process.wait(seconds * SLOW)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "killed after %g s" % (seconds * SLOW)

    def redis(self):
        program = next(filter(None, map(shutil.which, ("redis-server", "redis-check-rdb", "redis-check-aof"))))
        if not os.path.exists(self.folder + "/redis-server"):
            os.symlink(program, self.folder + "/redis-server")
        # Every write is on disk before it is answered: what a killed server said, it knows when it is back.
        self.start("redis", self.folder + "/redis-server", "--port", "0", "--unixsocket", self.folder + "/redis.sock", "--dir",
                   self.folder, "--save", "", "--appendonly", "yes", "--appendfsync", "always")
        until("a Redis server that answers", self.redis_answers)

    def redis_answers(self):
        try:
            return self.server.ping()
        except Exception:
            return False

    def sink(self, name, *flags):
        """host:port of an upload host; what it stores is below the folder of its name."""
        folder, port = "%s/%s" % (self.folder, name), "%s/%s.port" % (self.folder, name)
        os.mkdir(folder)
        self.start(name, BUILD + "/ditfleet-sink", "--dir", folder, "--port-file", port, *flags)
        until("a sink's port", lambda: os.path.exists(port))
        self.sinks[name] = "127.0.0.1:" + open(port).read().strip()
        return self.sinks[name]

    def configure(self, groups, settings=""):
        with open(self.folder + "/ditfleet.conf", "w") as f:
            f.write("[redis]\nurl = %s\n[fleet]\nnode = n\nstate_dir = %s/state\n[upload]\nallow = %s\n%s\n%s\n" %
                    (self.url, self.folder, ", ".join(self.sinks.values()) or "127.0.0.1:1", settings, groups))

    def supervisor(self):
        self.start("supervisor", BUILD + "/ditfleet-supervisor", "--config", self.folder + "/ditfleet.conf")

    def status(self):
        p = subprocess.run([BUILD + "/ditfleet", "status", "--json", "--config", self.folder + "/ditfleet.conf"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return json.loads(p.stdout or "{}")

    def group(self, name="g"):
        groups = self.status().get("node", {}).get("groups", [])
        return next((g for g in groups if g["name"] == name), {"state": "absent", "ranks": [], "restarts": 0})

    def wait_ready(self, name="g"):
        before = self.group(name)["restarts"]

        def ready():
            group = self.group(name)
            assert group["state"] != "failed" and group["restarts"] < before + 3, "the workers do not start: %s" % group
            return group["state"] == "ready"

        until("group %s ready" % name, ready, 30)
        return self.pids(name)

    def pids(self, name="g"):
        return [rank["pid"] for rank in self.group(name)["ranks"]]

    # ---- jobs

    def job(self, id, **fields):
        job = job_pb2.Job(id=id, model="demo", prompt="a red circle", width=64, height=64, num_inference_steps=2,
                          max_sequence_length=64, seed=7)
        if "sink" in self.sinks:
            job.output.url = "http://%s/{id}.png" % self.sinks["sink"]
        for name, value in fields.items():
            setattr(job, name, value)
        return job

    def submit(self, job):
        return self.client.submit(job)

    def result(self, job_id, entry, seconds=60):
        return self.client.wait(job_id, entry, seconds * SLOW)

    def run(self, id, **fields):
        result = self.result(id, self.submit(self.job(id, **fields)))
        assert result.state == job_pb2.STATE_SUCCEEDED, result
        return result

    def record(self, id):
        found = self.server.hgetall("dit:{default}:job:default:" + id)
        return {k.decode(): v.decode() if k not in (b"payload", b"result") else v for k, v in found.items()}

    def events(self, id):
        return [job_pb2.Event.FromString(fields[b"event"])
                for _, fields in self.server.xrange("dit:{default}:ev:default:" + id)]

    def tells_no(self, *secrets):
        """No log, listing or event holds any of the secrets."""
        texts = {name: open(self.log(name), errors="replace").read() for name in ("supervisor", "redis", *self.sinks)}
        texts["status"] = json.dumps(self.status())
        for key in self.server.scan_iter("dit:{default}:ev:*"):
            texts[key] = repr(self.server.xrange(key))
        for name, text in texts.items():
            assert not [secret for secret in secrets if secret in text], "%s tells a secret" % name

    def wait_step(self, id, step):
        """Until the job has done so many steps."""
        until("step %d of %s" % (step, id), lambda: int(self.record(id).get("step", 0)) >= step)

    def stored(self, path, sink="sink"):
        return open("%s/%s/%s" % (self.folder, sink, path), "rb").read()
