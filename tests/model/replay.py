"""Repeats walks of job.pml on a Redis, through proto/queue.lua: what the model says is in Redis must be there.

So the model cannot say other things than the script does. Standard input: walks, each begun by a line "walk <seed>" and
then what `spin -T -B -n<seed> job.pml` prints: a line for each step, then one for each job and one for the doors.
usage: replay.py SOCKET QUEUE_LUA
"""

import sys

import redis

P = "dit:{walk}:"
NAMES = {"KEPT": "", "FAILED": "fail", "RELEASED": "release", "LOST": "lost"}
FAR = 10**12  # milliseconds: nothing falls due by itself
INDEXES = (f"{P}delayed", f"{P}lease")


class Walk:
    def __init__(self, server, script):
        self.r, self.run_script = server, script
        self.r.flushall()
        self.entries, self.late, self.copy, self.submitted = {}, set(), {}, 0
        for name, n in ("max_attempts", 2), ("max_attempts_infra", 3):  # MAX_APP, MAX_INFRA
            self.run("set", name, n)
        for name in "backoff_ms", "backoff_cap_ms", "check_ms", "turn_normal":
            self.run("set", name, FAR)
        self.run("doors")
        for worker in "w0", "w1":
            self.run("publish", "m", "1", worker)

    def run(self, *args):
        return self.run_script(keys=[P], args=args)

    # Time passes: the clock reaches a job's score.
    def reap(self, index, job):
        if self.r.zscore(P + index, f"default:{job}") is not None:
            self.r.zadd(P + index, {f"default:{job}": 0})
        self.run("reap", 0.999)

    # Deadlines that passed; a failover puts back the record, not the clock.
    def pass_deadlines(self):
        for job in self.late:
            if self.r.exists(f"{P}job:default:{job}"):
                self.r.hset(f"{P}job:default:{job}", "deadline_ms", 1)

    def fenced(self, op, job, epoch, nonce, *more):
        answer = self.run(op, "default", job, epoch, f"{int(nonce):032x}", *more)
        return answer[0] if isinstance(answer, list) else answer

    # ---- the steps of the model

    def submit(self, e):
        self.submitted += 1  # an id of our own: a failover takes no time here, and the clock would give it twice
        self.entries[e] = self.r.xadd(f"{P}in:default", {"job": f"job {int(e) // 2}"}, id=f"{self.submitted}-1")

    def deliver(self, e):
        self.r.execute_command("XCLAIM", f"{P}in:default", "admit", "node", 0, self.entries[e], "FORCE")

    def admit(self, e, delay, late):
        job = int(e) // 2
        priority = "high" if job == 0 else "normal"  # the model claims the lower number first
        self.run("admit", "default", self.entries[e], job, f"job {job}", 5, "m@1", priority, 1, late,
                 FAR * 100 if delay == "1" else 0, 0, "", "", "", "")

    def claim(self, worker, incarnation, nonce):
        jobs = self.run("claim", f"w{worker}", f"i{incarnation}", FAR, 1, f"{int(nonce):032x}", "m@1")[1:]
        return jobs[0][1] if jobs else "255"

    def beat(self, job, epoch, nonce, state):
        return self.fenced("beat", job, epoch, nonce, FAR, state, "stage", 1, 2, 0)

    def finish(self, job, epoch, nonce):
        return self.fenced("finish", job, epoch, nonce, "result")

    def fail(self, job, epoch, nonce, cause):
        blame = "infra" if cause == "INFRA" else "app"
        return self.fenced("fail", job, epoch, nonce, blame, "code", "text", int(cause != "APP_FINAL"), 0.999)

    def release(self, job, epoch, nonce):
        return self.fenced("release", job, epoch, nonce)

    def release_all(self, worker, incarnation, crash):
        self.run("release_all", f"w{worker}", f"i{incarnation}", "crashed" if crash == "1" else "code", "text", 0.999)

    def cancel(self, job):
        self.run("cancel", "default", job)

    def reap_lease(self, job):
        self.reap("lease", job)

    def reap_delayed(self, job):
        self.reap("delayed", job)

    def reap_live(self, job):
        self.reap("live", job)

    def misplace(self, job):
        for index in self.ready(job), *INDEXES:
            self.r.zrem(index, f"default:{job}")

    def late_(self, job):
        self.late.add(job)

    def copy_(self):
        self.copy = {key: self.r.dump(key) for key in self.r.keys()}

    def failover(self):
        self.r.flushall()
        for key, value in self.copy.items():
            self.r.restore(key, 0, value)

    # ---- what is in Redis, in the model's words

    def ready(self, job):
        return f"{P}ready:m@1:{'high' if job == '0' else 'normal'}:default"

    def look_at_job(self, job):
        name, get = f"default:{job}", self.r.hget
        r = self.r.hgetall(f"{P}job:{name}")
        left = {text: word for word, text in NAMES.items()}[r.get("left", "")]
        places = [self.r.zscore(index, name) is not None for index in (self.ready(job), *INDEXES)]
        places += [bool(r.get("worker")) and get(f"{P}held:{r['worker']}", name) is not None]
        places += [self.r.zscore(f"{P}live", name) is not None]
        counts = [r.get(field, "0") for field in ("epoch", "attempts_app", "attempts_infra")]
        died = str(int(r["died_at"][1:]) + 1) if "died_at" in r else "0"
        return ["job", r.get("state", "NONE"), left, *counts, *(str(int(place)) for place in places), died]

    def look_at_doors(self, n):
        there = {entry for entry, _ in self.r.xrange(f"{P}in:default")}
        pending = {p["message_id"] for p in self.r.xpending_range(f"{P}in:default", "admit", "-", "+", 100)}
        words = []
        for e in map(str, range(n)):
            entry = self.entries.get(e)
            words.append("ABSENT" if entry not in there else "PENDING" if entry in pending else "WAITING")
        return ["door", *words]


STEPS = {"late": "late_", "copy": "copy_"}
ANSWERS = {"OK": lambda a: a == "ok", "STALE": lambda a: a == "STALE", "PAST": lambda a: a not in ("ok", "STALE")}


def replay(lines, server, script):
    walk, answer, job, steps = Walk(server, script), None, 0, 0
    for line in lines:
        word, *rest = line.split()
        if word == "answer":
            ok = ANSWERS[rest[0]](answer) if rest[0] in ANSWERS else rest[0] == answer
            assert ok, f"the model's answer is {rest[0]}, the script's {answer}"
        elif word == "job":
            there = walk.look_at_job(str(job))
            assert there == [word, *rest], f"job {job}\n  model:  {line}\n  script: {' '.join(there)}"
            job += 1
        elif word == "door":
            there = walk.look_at_doors(len(rest))
            assert there == [word, *rest], f"the doors\n  model:  {line}\n  script: {' '.join(there)}"
        else:
            answer, job, steps = getattr(walk, STEPS.get(word, word))(*rest), 0, steps + 1
            walk.pass_deadlines()
    return steps


def main():
    server = redis.Redis(unix_socket_path=sys.argv[1], decode_responses=True)
    raw = redis.Redis(unix_socket_path=sys.argv[1])  # a dump is no text
    server.dump = raw.dump
    with open(sys.argv[2], encoding="utf-8") as f:
        script = server.register_script(f.read())
    walks = {}
    for line in map(str.strip, sys.stdin):
        if line.startswith("walk "):
            walks[line] = current = []
        elif line and line != "timeout":
            current.append(line)
    steps = 0
    for name, lines in walks.items():
        try:
            steps += replay(lines, server, script)
        except AssertionError as e:
            sys.exit(f"{name}: queue.lua and job.pml differ: {e}\n" + "\n".join(lines))
    print(f"replayed on queue.lua: {len(walks)} walks, {steps} steps")


main()
