"""What must be true once the faults are over: of every job, of its pictures, of the queue. And damage that the checks must see."""
import collections
import hashlib
import re
import struct
import zlib

from fleet import PREFIX, job_pb2
from jobs import FINAL, KINDS

FIELDS = ("state", "entry", "hash", "result", "error_code", "error", "attempts_app", "attempts_infra", "epoch", "updated_ms")


class Seen:
    """A job as Redis has it."""

    def __init__(self, values, events, refusals):
        self.fields = {k: v.decode(errors="replace") if k != "result" else v
                       for k, v in zip(FIELDS, values) if v is not None}
        self.state = self.fields.get("state")
        self.events = [job_pb2.Event.FromString(fields[b"event"]) for _, fields in events]
        self.result = job_pb2.Result.FromString(self.fields.get("result", b""))
        self.refusals = [r.decode() if r else None for r in refusals]

    def number(self, field):
        return int(self.fields.get(field, 0))

    def finals(self):
        return [name for name in (job_pb2.State.Name(e.state)[len("STATE_"):] for e in self.events) if name in FINAL]


def look(fleet, jobs):
    """[(job, Seen)]"""
    found = []
    for i in range(0, len(jobs), 200):
        pipe = fleet.server.pipeline(transaction=False)
        some = jobs[i:i + 200]
        for job in some:
            pipe.hmget(job.key(), *FIELDS)
            pipe.xrange(job.key("ev"))
            for entry in job.refused:
                pipe.hget("%sjob:%s:@%s" % (PREFIX, job.tenant, entry), "error_code")
        answers = iter(pipe.execute())
        found += [(job, Seen(next(answers), next(answers), [next(answers) for _ in job.refused])) for job in some]
    return found


class Pictures:
    """Every PUT that the upload host was sent, and what it holds now."""

    def __init__(self, fleet):
        self.folder, self.puts = fleet.pictures, collections.defaultdict(list)
        for line in open(fleet.puts):
            path, status, sha = line.split()
            self.puts[path].append((int(status), sha))

    def stored(self, path):
        """Of every body that was stored there."""
        return [sha for status, sha in self.puts[path] if status in (0, 201)]

    def holds(self, path):
        try:
            return hashlib.sha256(open("%s/%s" % (self.folder, path), "rb").read()).hexdigest()
        except OSError:
            return None


class Judge:
    """references: {(variant, plan, index): SHA-256}, of a run without faults."""

    def __init__(self, references, pictures, loses_writes):
        self.references, self.pictures, self.loses_writes = references, pictures, loses_writes
        self.of_variant = collections.defaultdict(set)
        for (variant, _, index), sha in references.items():
            self.of_variant[variant, index].add(sha)
        self.other_plan = 0  # pictures that a late holder of another plan put over the committed one

    def problems(self, job, seen):
        """What is wrong with the job, in words; [] when nothing is."""
        if seen.state is None:
            return ["lost: there is no record"]
        wrong = []
        if seen.state not in FINAL:
            wrong.append("not final: %s" % seen.state)
        elif seen.state not in KINDS[job.kind][1]:
            wrong.append("%s, of kind %s: %s %s" % (seen.state, job.kind, seen.fields.get("error_code"), seen.fields.get("error")))
        if job.kind == "forbidden" and seen.fields.get("error_code") != "upload":
            wrong.append("dead of %s instead of upload" % seen.fields.get("error_code"))
        if seen.finals() != [seen.state]:
            wrong.append("its events end in %s, its record in %s" % (seen.finals(), seen.state))
        if seen.fields.get("hash") != job.hash:
            wrong.append("the record is of other bytes")
        if not job.unsure and seen.fields.get("entry") not in job.entries:
            wrong.append("entry %s is none of its receipts %s" % (seen.fields.get("entry"), job.entries))
        if job.resent and not self.loses_writes:
            wrong.append("lost after it was acknowledged, and sent again")
        if job.resent and job.graded:
            wrong.append("lost although its receipt said that the replica has it")
        if any(code != "conflict" for code in seen.refusals):
            wrong.append("its id with other bytes was not refused: %s" % seen.refusals)
        if job.kind == "delayed" and any(e.attempt and e.time_ms < job.pb.not_before_ms for e in seen.events):
            wrong.append("begun before its time")
        return wrong + (self.wrong_pictures(job, seen) if seen.state == "SUCCEEDED" else [])

    def wrong_pictures(self, job, seen):
        result, wrong = seen.result, []
        if result.id != job.id or result.state != job_pb2.STATE_SUCCEEDED or len(result.images) != job.images:
            return ["its result is another's: %s" % result.id]
        if result.attempt != seen.number("epoch"):
            wrong.append("committed by attempt %d of %d" % (result.attempt, seen.number("epoch")))
        for image in result.images:
            path = job.path(image.index, result.attempt)
            if not image.location.endswith("/" + path):
                wrong.append("picture at %s instead of %s" % (image.location, path))
            if image.sha256 != self.references.get((job.variant, result.plan, image.index)):
                wrong.append("the committed picture is not that of a run without faults")
            if image.sha256 not in self.pictures.stored(path):
                wrong.append("the committed picture was never stored")
            held, right = self.pictures.holds(path), self.of_variant[job.variant, image.index]
            if held not in right:
                wrong.append("the upload host has another picture")
            elif held != image.sha256:
                self.other_plan += 1
                if job.kind == "attempt":
                    wrong.append("a picture at the URL of another attempt")
            if not set(self.pictures.stored(path)) <= right:
                wrong.append("another picture was stored meanwhile")
        return wrong


def queue_problems(fleet, seen, before):
    """The queue is empty and has counted right; before: its counters before these jobs."""
    wrong, server = [], fleet.server
    for index in ("live", "lease", "delayed"):
        if server.zcard(PREFIX + index):
            wrong.append("%s holds %s" % (index, server.zrange(PREFIX + index, 0, 2)))
    for pattern in ("ready:*", "held:*"):
        wrong += ["%s is left" % key.decode() for key in server.scan_iter(PREFIX + pattern, 1000)]
    stats = {name: n - before.get(name, 0) for name, n in fleet.counts().items()}
    wrong += ["stats say %d jobs %s" % (n, name) for name, n in stats.items() if name not in FINAL | {"refused", "retries"} and n]
    states = collections.Counter(s.state for _, s in seen)
    wrong += ["stats count %d %s, there are %d" % (stats.get(name, 0), name, states[name]) for name in FINAL
              if stats.get(name, 0) != states[name]]
    return wrong


def commit_problems(fleet, jobs, loses_writes):
    """By the workers' own words, which Redis has no part in. A failover takes commits back, and then they are made again."""
    told = collections.Counter(re.search(r"tenant=(\S+) job=(\S+)", line).groups()
                               for line in fleet.log_lines(r"event=job\.succeeded "))
    return [] if loses_writes else ["job %s was committed %d times" % (job.id, told[job.tenant, job.id])
                                    for job in jobs if told[job.tenant, job.id] > 1]


# ---- pictures of different plans

def pixels(png):
    """Samples of a PNG of eight bits a channel, as rows that lie one after the other."""
    at, packed = 8, b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at:at + 8])
        data = png[at + 8:at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", data[:10])
            assert (depth, colour) == (8, 2), "not a picture of the fleet"
        packed += data if kind == b"IDAT" else b""
        at += length + 12
    raw, stride, rows = zlib.decompress(packed), 3 * width, [bytes(3 * width)]
    for y in range(height):
        method, row, above = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1:(y + 1) * (stride + 1)]), rows[-1]
        for x in range(stride):
            a, b, c = row[x - 3] if x > 2 else 0, above[x], above[x - 3] if x > 2 else 0
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            row[x] = (row[x] + (0, a, b, (a + b) // 2, paeth)[method]) & 255
        rows.append(bytes(row))
    return b"".join(rows[1:])


def furthest(one, other):
    return max(abs(a - b) for a, b in zip(pixels(one), pixels(other), strict=True))


# ---- damage

def lose(fleet, job, seen):
    fleet.server.delete(job.key())


def leave_waiting(fleet, job, seen):
    fleet.server.hset(job.key(), "state", "RETRY_WAIT")


def commit_twice(fleet, job, seen):
    fleet.server.xadd(job.key("ev"), {"event": seen.events[-1].SerializeToString()})


def blame(fleet, job, seen):
    fleet.server.hset(job.key(), mapping={"state": "DEAD", "error_code": "timeout"})


def spoil_picture(fleet, job, seen):
    with open("%s/%s" % (fleet.pictures, job.path(0, seen.result.attempt)), "r+b") as f:
        f.seek(-20, 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))


def commit_other_picture(fleet, job, seen):
    seen.result.images[0].sha256 = "0" * 64
    fleet.server.hset(job.key(), "result", seen.result.SerializeToString())


def take_other_job(fleet, job, seen):
    fleet.server.hset(job.key(), "hash", "0" * 40)


DAMAGE = (lose, leave_waiting, commit_twice, blame, spoil_picture, commit_other_picture, take_other_job)


def stray_seen(fleet, found, before):
    fleet.server.zadd(PREFIX + "live", {"default:nobody": 1e15})
    seen = queue_problems(fleet, found, before)
    fleet.server.zrem(PREFIX + "live", "default:nobody")
    return seen and not queue_problems(fleet, found, before)


def unseen_damage(fleet, judge, found, before):
    """Each kind of damage done to a job of its own: the names of those that the checks do not see."""
    victims = [(job, seen) for job, seen in found if job.kind == "plain" and not judge.problems(job, seen)]
    assert len(victims) >= len(DAMAGE), "too few jobs to damage"
    unseen = [] if stray_seen(fleet, found, before) else ["a stray member of an index"]
    for damage, (job, seen) in zip(DAMAGE, victims):
        damage(fleet, job, seen)
        if not judge.problems(*look(fleet, [job])[0]):
            unseen.append(damage.__name__)
    return unseen
