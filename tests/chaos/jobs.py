"""The jobs of a chaos run, drawn from its seed; who submits, cancels and follows them."""
import hashlib
import heapq
import random
import subprocess
import threading
import time

import redis

from fleet import BUILD, PREFIX, TENANTS, job_pb2

FINAL = {"SUCCEEDED", "DEAD", "CANCELLED", "EXPIRED"}
# kind: (how often, the final states it may have)
KINDS = {
    "plain": (70, {"SUCCEEDED"}),
    "twice": (6, {"SUCCEEDED"}),  # submitted twice
    "attempt": (6, {"SUCCEEDED"}),  # each attempt has a URL of its own
    "delayed": (4, {"SUCCEEDED"}),
    "cancelled": (6, {"SUCCEEDED", "CANCELLED"}),
    "deadline": (5, {"SUCCEEDED", "EXPIRED"}),
    "forbidden": (1, {"DEAD"}),  # the upload host refuses it for good
    "conflict": (2, {"SUCCEEDED"}),  # its id is tried with other bytes, which are refused
}
COLOURS = ("red", "blue", "green", "yellow", "orange", "cyan")


def variants(count):
    """The pictures that jobs ask for; the same for every seed."""
    chance, found = random.Random(1), []
    for i in range(count):
        side = chance.choice((32, 48, 64))
        fields = dict(prompt="a %s circle" % chance.choice(COLOURS), width=side, height=chance.choice((32, 48, side)),
                      num_inference_steps=chance.choice((1, 2, 3)), seed=i, max_sequence_length=16, model="demo")
        if i % 5 == 3:
            fields.update(negative_prompt="", true_cfg_scale=2)
        if i % 7 == 5:
            fields.update(num_images=2)
        found.append(fields)
    return found


class Job:
    """One job, and what its submissions were told."""

    def __init__(self, id, tenant, kind, variant, fields, url, chance):
        self.id, self.tenant, self.kind, self.variant, self.url = id, tenant, kind, variant, url
        self.images = fields.get("num_images", 1)
        self.pb = job_pb2.Job(id=id, priority=chance.choice((0, 0, 1, 2)), **fields)
        self.pb.output.url = url
        self.entries, self.refused = [], []  # receipts: of its own bytes; of others under its id
        self.unsure = 0  # submissions whose answer was lost
        self.graded, self.resent, self.missing_since = False, 0, None
        self.wait = chance.uniform(0.2, 4)  # seconds: of a deadline, a delay, until it is cancelled

    def pack(self):
        now = int(time.time() * 1000 + self.wait * 1000)
        if self.kind == "deadline":
            self.pb.deadline_ms = now
        if self.kind == "delayed":
            self.pb.not_before_ms = now
        self.bytes = self.pb.SerializeToString()
        self.hash = hashlib.sha1(self.bytes).hexdigest()

    def key(self, kind="job"):
        return "%s%s:%s:%s" % (PREFIX, kind, self.tenant, self.id)

    def path(self, index, attempt):
        return self.url.split("/", 3)[3].replace("{id}", self.id).replace("{index}", str(index)).replace(
            "{attempt}", str(attempt))


def draw_jobs(seed, count, pictures, host, conflicts):
    chance, jobs = random.Random(seed), []
    kinds = [kind for kind in KINDS if conflicts or kind != "conflict"]
    for i in range(count):
        kind = chance.choices(kinds, [KINDS[k][0] for k in kinds])[0]
        variant, tenant = chance.randrange(len(pictures)), chance.choice(TENANTS)
        name = "{id}-{index}-{attempt}.png" if kind == "attempt" else "{id}-{index}.png"
        folder = "forbidden" if kind == "forbidden" else tenant
        jobs.append(Job("j%05d" % i, tenant, kind, variant, pictures[variant], "http://%s/%s/%s" % (host, folder, name), chance))
    return jobs


class Load:
    """Keeps a number of jobs under way until all have been final. Threads; what they trip over is in .broken."""

    def __init__(self, fleet, jobs, window, grade, seconds):
        """seconds: over which the jobs are spread at least, so that a quick machine has as many faults as a slow one."""
        self.fleet, self.jobs, self.window, self.grade = fleet, jobs, window, grade
        self.pace = seconds / len(jobs)
        self.taken, self.open, self.cancels = 0, {}, []
        self.lock = threading.Lock()
        self.submitted = self.cancels_tried = self.resubmitted = 0
        self.stopped, self.broken = False, []
        self.threads = [threading.Thread(target=self.guard, args=(work,), daemon=True)
                        for work in (self.produce, self.produce, self.follow, self.cancel)]

    def start(self):
        self.started = time.monotonic()
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.stopped = True
        for thread in self.threads:
            thread.join()

    def guard(self, work):
        try:
            work()
        except Exception as e:
            self.broken.append(e)

    def done(self):
        assert not self.broken, self.broken
        with self.lock:
            return self.submitted == len(self.jobs) and not self.open and not self.cancels

    def close(self):
        """No further jobs."""
        with self.lock:
            self.jobs = self.jobs[:self.taken]

    # ---- submitting

    def push(self, job, payload):
        """(receipt, whether a replica has it). A lost answer is a reason to try again: the id makes that safe."""
        while not self.stopped:
            try:
                with redis.Redis(unix_socket_path=self.fleet.socket(self.fleet.master), socket_timeout=3) as server:
                    pipe = server.pipeline(transaction=False)
                    pipe.xadd("%sin:%s" % (PREFIX, job.tenant), {"job": payload})
                    if self.grade:
                        pipe.execute_command("WAIT", 1, 500)
                    answer = pipe.execute()
                    return answer[0].decode(), self.grade and answer[1] >= 1
            except redis.RedisError:
                job.unsure += 1
                time.sleep(0.05)
        raise RuntimeError("stopped")

    def submit(self, job):
        job.pack()
        for _ in range(2 if job.kind == "twice" else 1):
            entry, graded = self.push(job, job.bytes)
            job.entries.append(entry)
            job.graded |= graded
        if job.kind == "cancelled":
            with self.lock:
                heapq.heappush(self.cancels, (time.monotonic() + job.wait / 4, job.id, job))

    def submit_other(self, job):
        """The same id with other bytes, once the record stands."""
        other = job_pb2.Job.FromString(job.bytes)
        other.seed += 1000
        job.refused.append(self.push(job, other.SerializeToString())[0])

    def produce(self):
        while not self.stopped:
            with self.lock:
                if self.taken == len(self.jobs):
                    return
                room = len(self.open) < self.window and time.monotonic() >= self.started + self.taken * self.pace
                if room:
                    job = self.jobs[self.taken]
                    self.open[job.id] = job
                    self.taken += 1
            if not room:
                time.sleep(0.02)
                continue
            self.submit(job)
            with self.lock:
                self.submitted += 1

    # ---- following

    def follow(self):
        while not self.stopped:
            time.sleep(0.1)
            with self.lock:
                jobs = [job for job in self.open.values() if job.entries]
            try:
                states = self.look(jobs)
            except redis.RedisError:
                continue
            for job, state in states:
                self.judge(job, state)

    def look(self, jobs):
        """The doors first: what is in no door after that has a record, or is lost."""
        with redis.Redis(unix_socket_path=self.fleet.socket(self.fleet.master), socket_timeout=3) as server:
            waiting = sum(server.xlen("%sin:%s" % (PREFIX, tenant)) for tenant in TENANTS)
            pipe = server.pipeline(transaction=False)
            for job in jobs:
                pipe.hget(job.key(), "state")
            return [(job, state.decode() if state else "waiting" if waiting else "missing")
                    for job, state in zip(jobs, pipe.execute())]

    def judge(self, job, state):
        if state != "missing":
            job.missing_since = None
        if state in FINAL:
            if job.kind == "conflict" and not job.refused:
                self.submit_other(job)
            with self.lock:
                self.open.pop(job.id, None)
        elif state == "missing":
            job.missing_since = job.missing_since or time.monotonic()
            if time.monotonic() > job.missing_since + 2:  # acknowledged, and gone with a master
                job.missing_since = None
                job.resent += 1
                job.entries.append(self.push(job, job.bytes)[0])

    def reopen(self):
        """Jobs that a failover took back from their final state are followed again; how many. None: not to be had now."""
        try:
            undone = [job for job, state in self.look(self.jobs) if state not in FINAL]
        except redis.RedisError:
            return None
        with self.lock:
            self.open.update((job.id, job) for job in undone)
        return len(undone)

    # ---- cancelling

    def cancel(self):
        while not self.stopped:
            with self.lock:
                due = self.cancels and self.cancels[0][0] <= time.monotonic() and heapq.heappop(self.cancels)[2]
            if not due:
                time.sleep(0.02)
                continue
            self.cancels_tried += 1  # in vain where the job is over, or Redis is away: then it succeeds
            subprocess.run([BUILD + "/ditfleet", "cancel", due.id, "--tenant", due.tenant, "--redis",
                            "unix://" + self.fleet.socket(self.fleet.master)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, timeout=60)
