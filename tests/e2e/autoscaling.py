"""autoscaling.py SOCKET MANIFESTS: a fleet that KEDA scales, simulated: bursts of small and of large jobs, workers that take a
while to start, scale-in that hits busy workers. Jobs live in a real Redis, moved by proto/queue.lua with the simulation's clock
in place of the server's; threshold, bounds, intervals and windows are those of keda-prometheus.yaml and worker.yaml.

Shown: scaling on the backlog in GPU-seconds holds the waiting time that the threshold promises, and no job is lost or charged
when workers go; scaling on the number of jobs either misses it or pays for much more. The same seed gives the same figures.
"""
import heapq
import math
import random
import sys

import redis
import yaml

socket, folder = sys.argv[1:]
P, POOL = "dit:{scale}:", "demo@1"
FAR = 10**12
KINDS = {"small": 5, "large": 60, "huge": 300}  # GPU-seconds
START_S, SYNC_S = 60, 15  # a worker's, until it claims; the autoscaler's period
HOURS, SEEDS = 2, (1, 2, 3)


def manifest(name, kind):
    return next(d["spec"] for d in yaml.safe_load_all(open("%s/%s" % (folder, name))) if d["kind"] == kind)


keda = manifest("keda-prometheus.yaml", "ScaledObject")
trigger, = keda["triggers"]
assert "ditfleet_backlog_gpu_seconds" in trigger["metadata"]["query"] and "queued|working" in trigger["metadata"]["query"]
THRESHOLD = float(trigger["metadata"]["threshold"])
WINDOW_S = keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"]
MOST, LEAST = keda["maxReplicaCount"], keda["minReplicaCount"]
GRACE_S = next(float(line.partition("=")[2].strip(" s\n")) for d in yaml.safe_load_all(open(folder + "/worker.yaml"))
               if d["kind"] == "Secret" for line in d["stringData"]["ditfleet.conf"].splitlines() if "grace" in line)
# What a burst that the fleet can take at all has to wait at most: until it is seen, until workers have come, and then for its turn.
TARGET_S = keda["pollingInterval"] + SYNC_S + START_S + THRESHOLD


def trace(seed):
    """(second, kind): bursts of one kind or the other, none above what MOST workers do in THRESHOLD seconds, and a trickle."""
    chance, jobs, at = random.Random(seed), [], 0
    while (at := at + chance.uniform(400, 900)) < HOURS * 3600:
        kind = chance.choice(["small", "large"])
        n = int(chance.uniform(0.3, 0.9) * MOST * THRESHOLD / KINDS[kind])
        jobs += [(at + chance.uniform(0, 20), kind) for _ in range(n)]
    jobs += [(chance.uniform(0, HOURS * 3600), "small") for _ in range(30 * HOURS)]
    jobs += [(chance.uniform(0, HOURS * 3600), "huge") for _ in range(4 * HOURS)]
    return sorted(jobs)


class Queue:
    def __init__(self):
        text = open("proto/queue.lua").read()
        assert text.count("call('TIME')") == 1, "time must come from now() alone"
        self.r = redis.Redis(unix_socket_path=socket, decode_responses=True)
        self.script = self.r.register_script(text.replace("call('TIME')", "call('HMGET', P .. 'clock', 's', 'us')"))
        self.r.flushall()
        self.at(0)
        self.run("doors")
        self.run("publish", *POOL.split("@"))
        self.nonces = 0

    def run(self, *args):
        return self.script(keys=[P], args=args)

    def at(self, second):
        us = int((1.7e9 + second) * 1e6)
        self.r.hset(P + "clock", mapping={"s": us // 10**6, "us": us % 10**6})

    def add(self, id, gpu_s):
        entry = self.r.xadd(P + "in:default", {"job": id})
        self.r.xreadgroup("admit", "node", {P + "in:default": ">"})
        done, = self.run("admit", "default", entry, id, id, len(id), POOL, "normal", int(1000 * gpu_s), 0, 0, 0, "", "", "", "")
        assert done == "admitted", done

    def claim(self, worker):
        self.nonces += 1
        jobs = self.run("claim", worker, "1", FAR, 1, "%032x" % self.nonces, POOL)[1:]
        return jobs[0][:4] if jobs else None  # the fence

    def backlog(self):
        """(GPU-seconds, jobs), queued and working."""
        pools = self.run("pools")
        _, queued, _, working, queued_ms, _, working_ms, _ = pools[:8]
        return (int(queued_ms) + int(working_ms)) / 1000, int(queued) + int(working)


class Scaler:
    """KEDA and the autoscaler below it: KEDA between none and one, the autoscaler (autoscaling/v2, its defaults) above."""

    def __init__(self, per_worker, of):
        self.per_worker, self.of, self.seen, self.active_at = per_worker, of, [], -math.inf

    def wanted(self, now, replicas, backlog):
        value = backlog[self.of]
        if value > 0:
            self.active_at = now
        if value > 0 and replicas == 0:
            return 1
        if now - self.active_at >= keda["cooldownPeriod"]:
            return LEAST
        desired = replicas
        if replicas and abs(value / (self.per_worker * replicas) - 1) > 0.1:
            desired = max(1, math.ceil(value / self.per_worker))
        self.seen = [(t, d) for t, d in self.seen if now - t < WINDOW_S] + [(now, desired)]
        if desired < replicas:
            desired = min(replicas, max(d for _, d in self.seen))
        return min(desired, MOST, replicas + max(4, replicas))


class Fleet:
    def __init__(self, scaler):
        self.queue, self.scaler, self.chance = Queue(), scaler, random.Random(7)
        self.events, self.workers, self.n, self.arrived, self.waits = [], {}, 0, {}, {}
        self.busy_drained = self.released = 0
        self.worker_s = 0.0

    def later(self, at, what, *args):
        self.n += 1
        heapq.heappush(self.events, (at, self.n, what, args))

    def run(self, jobs):
        for i, (at, kind) in enumerate(jobs):
            self.later(at, self.arrive, "%s-%d" % (kind, i), KINDS[kind])
        self.later(0, self.scale)
        while self.events:
            self.now, _, what, args = heapq.heappop(self.events)
            self.queue.at(self.now)
            what(*args)
        self.nothing_lost(jobs)
        return self

    def arrive(self, id, gpu_s):
        self.queue.add(id, gpu_s)
        self.arrived[id] = self.now
        for name, w in self.workers.items():
            if w["state"] == "idle" and self.take(name):
                return

    def take(self, name):
        w, fence = self.workers[name], self.queue.claim(name)
        w["state"], w["fence"] = "busy" if fence else "idle", fence
        if fence:
            id = fence[1]
            self.waits.setdefault(id, self.now - self.arrived[id])
            w["ends"] = self.now + KINDS[id.partition("-")[0]] * self.chance.uniform(0.9, 1.1)
            self.later(w["ends"], self.done, name, fence)
        return bool(fence)

    def done(self, name, fence):
        w = self.workers.get(name)
        if not w or w["fence"] != fence:
            return  # given back meanwhile
        assert self.queue.run("finish", *fence, "result") == "ok"
        self.leave(name) if w["draining"] else self.take(name)

    def begin(self, name):
        if name in self.workers:
            self.workers[name]["state"] = "idle"
            self.take(name)

    def leave(self, name):
        w = self.workers.pop(name)
        self.worker_s += self.now - w["since"]

    def drain(self, name):
        """SIGTERM: what ends within the grace time is finished, the rest is given back."""
        w = self.workers[name]
        w["draining"] = True
        if w["state"] != "busy":
            return self.leave(name)
        self.busy_drained += 1
        if w["ends"] > self.now + GRACE_S - 2:
            self.later(self.now + GRACE_S - 2, self.give_back, name)

    def give_back(self, name):
        assert self.queue.run("release", *self.workers[name]["fence"]) == "ok"
        self.released += 1
        self.leave(name)
        for other, w in self.workers.items():
            if w["state"] == "idle" and self.take(other):
                return

    def scale(self):
        replicas = [name for name, w in self.workers.items() if not w["draining"]]
        backlog = self.queue.backlog()
        wanted = self.scaler.wanted(self.now, len(replicas), backlog)
        for _ in range(wanted - len(replicas)):
            name = "w%d" % self.n
            self.workers[name] = {"state": "starting", "draining": False, "fence": None, "since": self.now}
            self.later(self.now + START_S, self.begin, name)
        for name in self.chance.sample(replicas, max(0, len(replicas) - wanted)):
            self.drain(name)
        if self.now < HOURS * 3600 or backlog[1] or self.workers:
            self.later(self.now + SYNC_S, self.scale)

    def nothing_lost(self, jobs):
        r = self.queue.r
        assert len(self.arrived) == len(jobs)
        for id in self.arrived:
            state, app, infra = r.hmget(P + "job:default:" + id, "state", "attempts_app", "attempts_infra")
            assert (state, app, infra) == ("SUCCEEDED", None, None), (id, state, app, infra)
        assert int(r.hget(P + "stats", "SUCCEEDED")) == len(jobs) and r.zcard(P + "live") == 0 and r.zcard(P + "lease") == 0


def simulate(what, traces, per_worker, of):
    """The same rule on each trace; no job may be lost. (longest wait, worker-seconds, busy workers drained, jobs given back)"""
    fleets = [Fleet(Scaler(per_worker, of)).run(jobs) for jobs in traces]
    waits = sorted(wait for fleet in fleets for wait in fleet.waits.values())
    total = [sum(getattr(fleet, name) for fleet in fleets) for name in ("worker_s", "busy_drained", "released")]
    print("%-22s waiting: median %3.0f s, 95 %% %3.0f s, longest %3.0f s (target %.0f s); %5.2f worker-hours" % (
        what, waits[len(waits) // 2], waits[int(0.95 * len(waits))], waits[-1], TARGET_S, total[0] / 3600))
    return waits[-1], *total


def main():
    traces = [trace(seed) for seed in SEEDS]
    kinds = [kind for jobs in traces for _, kind in jobs]
    mean = sum(KINDS[kind] for kind in kinds) / len(kinds)
    print("%d jobs in %d times %d hours: %s" % (len(kinds), len(SEEDS), HOURS, ", ".join(
        "%d %s of %d GPU-seconds" % (kinds.count(kind), kind, s) for kind, s in KINDS.items())))
    longest, worker_s, drained, released = simulate("backlog in GPU-seconds", traces, THRESHOLD, 0)
    print("scale-in met %d busy workers: %d jobs given back, none lost, none charged" % (drained, released))
    assert longest <= TARGET_S
    assert drained > 0 and released > 0, "no scale-in met a worker that was far from done"
    by_mean, *_ = simulate("jobs, %.0f a worker" % (THRESHOLD / mean), traces, THRESHOLD / mean, 1)
    assert by_mean > TARGET_S, "jobs have too equal sizes to show anything"
    _, for_large, *_ = simulate("jobs, %.0f a worker" % (THRESHOLD / KINDS["large"]), traces, THRESHOLD / KINDS["large"], 1)
    assert for_large > worker_s


main()
