"""Processes killed, stopped and told to leave in the middle of a job: the job is done all the same, once, with the same
picture, and the attempt is charged to whom it is due."""
import calendar
import os
import re
import signal
import subprocess
import time

from private_fleet import BUILD, MODEL, SLOW, PrivateFleet, alive, children, job_pb2, until

STEPS = 60 if SLOW == 1 else 25
PROMPT, SECRET = "prompt-nobody-may-log", "secret-nobody-may-log"
STUCK = 2 if SLOW == 1 else 12  # seconds that a step may take
OK = job_pb2.STATE_SUCCEEDED


def configure(fleet, grace, lease=10):
    fleet.configure("[group g]\nranks = 2\nmodel = demo@1=" + MODEL,
                    "[deadline]\ndenoise = %ds\n[queue]\nlease = %ds\n[restart]\ngrace = %ds\nbackoff_min = 50ms\n"
                    "backoff_max = 100ms" % (STUCK, lease, grace))


def submit(fleet, id, sink="sink", **fields):
    job = fleet.job(id, prompt=PROMPT, **{"num_inference_steps": STEPS, **fields})
    job.output.url = "http://%s/{id}.png" % fleet.sinks[sink]
    job.output.headers.add(name="Authorization", value=SECRET)
    return fleet.submit(job)


def begin(fleet, id, **fields):
    """Submits a job and waits until it is in the middle of denoising."""
    entry = submit(fleet, id, **fields)
    fleet.wait_step(id, 5)
    return entry


def done(fleet, id, entry, app=0, infra=0, epoch=None, sink="sink"):
    """The job ends well, with the attempts charged as given, and the picture of a run without faults."""
    result = fleet.result(id, entry)
    record = fleet.record(id)
    assert result.state == OK, result
    charged = [int(record.get(name, 0)) for name in ("attempts_app", "attempts_infra")]
    assert charged == [app, infra], "%s: app and infra attempts %s, expected %s" % (id, charged, [app, infra])
    assert epoch in (None, int(record["epoch"])), record
    assert fleet.stored(id + ".png", sink) == fleet.stored("reference.png"), id + ": another picture"
    finals = [event for event in fleet.events(id) if event.state == OK]
    assert len(finals) == 1, "%s was committed %d times" % (id, len(finals))
    return result


def killed_rank(fleet, rank):
    id = "killed-%d" % rank
    pids = fleet.wait_ready()
    entry = begin(fleet, id)
    start = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    until("the job back in the queue", lambda: fleet.record(id).get("attempts_infra") == "1", 1)
    back = time.monotonic() - start
    done(fleet, id, entry, infra=1, epoch=2)
    assert "rank %d was killed by signal 9" % rank in fleet.group()["last_failure"]
    assert not set(pids) & set(fleet.wait_ready()), "half of the old group lives on"
    print("rank %d killed: the job was back after %.0f ms" % (rank, 1000 * back))


def poisoned(fleet):
    """The only group crashes twice over the same job: that is the job's fault."""
    entry = begin(fleet, "poisoned")
    for n, rank in (1, 1), (2, 0):
        pids = fleet.wait_ready()
        fleet.wait_step("poisoned", 5)
        os.kill(pids[rank], signal.SIGSEGV)
        until("crash %d seen" % n, lambda: fleet.record("poisoned").get("attempts_infra") == str(n))
    error = fleet.result("poisoned", entry).error
    assert error.code == "crashed" and "poison" in error.message and "signal 11" in error.message, error
    fleet.wait_ready()
    fleet.run("after-poison")


def stopped_rank(fleet, rank):
    id = "stopped-%d" % rank
    pids = fleet.wait_ready()
    entry = begin(fleet, id)
    start = time.monotonic()
    os.kill(pids[rank], signal.SIGSTOP)
    until("the group with a hung rank killed", lambda: not any(map(alive, pids)), STUCK + 1)
    found = time.monotonic() - start
    done(fleet, id, entry, infra=1, epoch=2)
    print("rank %d stopped: found after %.1f s" % (rank, found))


def log_time(line):
    stamp, ms = re.match(r"ts=(\S+)\.(\d+)Z", line).groups()
    return calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S")) + int(ms) / 1000


def cancelled(fleet):
    pids = fleet.wait_ready()
    entry = begin(fleet, "cancelled", num_inference_steps=1000)  # far from done when the word arrives
    subprocess.run([BUILD + "/ditfleet", "cancel", "cancelled", "--redis", fleet.url], check=True, stdout=subprocess.DEVNULL)
    result = fleet.result("cancelled", entry)
    assert result.state == job_pb2.STATE_CANCELLED and result.error.code == "cancelled", result
    line, = until("the worker told that it stopped", lambda: [
        line for line in fleet.lines("supervisor") if "job=cancelled " in line and "code=cancelled" in line])
    *steps, cancelled_at = [event.time_ms / 1000 for event in fleet.events("cancelled")]
    longest = max(b - a for a, b in zip(steps, steps[1:]))
    seen = log_time(line) - cancelled_at
    assert seen < 2 * longest + 0.2 * SLOW, "cancel was seen after %.3f s; a step takes %.3f s" % (seen, longest)
    fleet.run("after-cancel")
    assert fleet.pids() == pids
    print("cancelled: seen after %.0f ms, a step takes %.0f ms" % (1000 * seen, 1000 * longest))


def overlapping(fleet):
    """Upload and PNG of a job while the next is denoised; at most two leases."""
    ids = ["overlap-%d" % i for i in range(3)]
    entries = [submit(fleet, id, "slow") for id in ids]
    leases = set()

    def all_done():
        leases.add(fleet.server.zcard("dit:{default}:lease"))
        return all(fleet.record(id).get("state") == "SUCCEEDED" for id in ids)

    until("three jobs done", all_done)
    for id, entry in zip(ids, entries):
        done(fleet, id, entry, sink="slow")
    assert max(leases) == 2, leases
    for first, second in zip(ids, ids[1:]):
        upload = [e.time_ms for e in fleet.events(first) if e.state in (job_pb2.STATE_UPLOADING, OK)]
        steps = [e.time_ms for e in fleet.events(second) if e.stage == "denoise"]
        during = [at for at in steps if upload[0] <= at <= upload[-1]]
        assert len(during) > 2, "%s was not denoised while %s was uploaded" % (second, first)


def redis_killed(fleet):
    """In the middle of denoising, and in the middle of an upload whose commit then has to wait."""
    pids = fleet.wait_ready()
    for id, sink in (("redis-denoise", "sink"), ("redis-upload", "slow")):
        entry = begin(fleet, id, sink=sink)
        if sink == "slow":
            until("the upload", lambda: fleet.record(id)["state"] == "UPLOADING")
        fleet.stop("redis", signal.SIGKILL)
        time.sleep(1)
        fleet.redis()
        done(fleet, id, entry, sink=sink, epoch=1)
    assert fleet.pids() == pids and all(map(alive, pids)), "a worker died with Redis"


def redis_gone_past_the_lease(fleet):
    """A picture that is stored, and a commit that cannot be said while the lease lasts: that is no fault of the job."""
    assert fleet.stop("supervisor") == 0
    configure(fleet, grace=30, lease=2)
    fleet.supervisor()
    fleet.wait_ready()
    entry = submit(fleet, "late", "slow")
    until("the upload", lambda: fleet.record("late").get("state") == "UPLOADING")
    fleet.stop("redis", signal.SIGKILL)
    said = lambda: [line for line in fleet.lines("supervisor") if " job=late " in line]
    until("the commit given up", lambda: "event=job.not_settled" in "".join(said()))
    assert "event=job.failed" not in "".join(said()), said()
    fleet.redis()
    done(fleet, "late", entry, infra=1, epoch=2, sink="slow")
    assert fleet.stop("supervisor") == 0
    configure(fleet, grace=30)
    fleet.supervisor()


def flushed(fleet):
    pids = fleet.wait_ready()
    fleet.server.flushall()
    done(fleet, "flushed", submit(fleet, "flushed"))
    assert fleet.pids() == pids
    fleet.server.xgroup_destroy("dit:{default}:in:default", "admit")
    fleet.server.script_flush()
    fleet.run("regrouped")


def reloaded(fleet):
    """SIGHUP in the middle of a job: it is finished first, then the group starts with the new settings."""
    old = fleet.wait_ready()
    entry = begin(fleet, "reloaded")
    configure(fleet, grace=30, lease=11)
    fleet.processes["supervisor"].send_signal(signal.SIGHUP)
    done(fleet, "reloaded", entry, epoch=1)
    until("a group with the new settings", lambda: fleet.group()["state"] == "ready" and fleet.pids() != old)
    fleet.run("after-reload")
    with open(fleet.folder + "/ditfleet.conf", "a") as f:
        f.write("nonsense = 1\n")
    fleet.processes["supervisor"].send_signal(signal.SIGHUP)
    until("the faulty file refused", lambda: "nonsense" in "\n".join(fleet.lines("supervisor")))
    configure(fleet, grace=30, lease=11)


def signalled_leader(fleet):
    """SIGTERM from elsewhere than the supervisor, in the middle of an upload: that is finished first."""
    pids = fleet.wait_ready()
    entry = submit(fleet, "signalled", "slow")
    until("the upload", lambda: fleet.record("signalled").get("state") == "UPLOADING")
    os.kill(pids[0], signal.SIGTERM)
    done(fleet, "signalled", entry, epoch=1, sink="slow")
    until("a new group", lambda: fleet.group()["state"] == "ready" and fleet.pids() != pids)


def drained_in_time(fleet):
    entry = begin(fleet, "long-grace")
    assert fleet.stop("supervisor") == 0
    assert fleet.record("long-grace")["state"] == "SUCCEEDED"
    done(fleet, "long-grace", entry, epoch=1)


def drained_too_soon(fleet):
    """One job in the middle of an upload to a host that hangs, one in the middle of denoising: both are given back."""
    configure(fleet, grace=2)
    fleet.supervisor()
    pids = fleet.wait_ready()
    upload = submit(fleet, "hanging", "hanging", num_inference_steps=2)
    until("the upload that hangs", lambda: fleet.record("hanging").get("state") == "UPLOADING")
    entry = begin(fleet, "short-grace")
    assert fleet.stop("supervisor") == 0
    assert not any(map(alive, pids))
    for id in ("hanging", "short-grace"):
        record = fleet.record(id)
        assert record["state"] == "QUEUED" and "attempts_app" not in record and "attempts_infra" not in record, record
    subprocess.run([BUILD + "/ditfleet", "cancel", "hanging", "--redis", fleet.url], check=True, stdout=subprocess.DEVNULL)
    assert fleet.result("hanging", upload).state == job_pb2.STATE_CANCELLED
    configure(fleet, grace=30)
    fleet.supervisor()
    done(fleet, "short-grace", entry, epoch=2)


def supervisor_killed(fleet):
    pids = fleet.wait_ready()
    entry = begin(fleet, "orphaned")
    fleet.stop("supervisor", signal.SIGKILL)
    until("no worker alive", lambda: not any(map(alive, pids)), 1)
    fleet.supervisor()
    done(fleet, "orphaned", entry, infra=1, epoch=2)


def idle_stop(fleet):
    pids = fleet.wait_ready()
    fleet.tells_no(PROMPT, SECRET)
    start = time.monotonic()
    assert fleet.stop("supervisor") == 0
    took = time.monotonic() - start
    assert took < 2 * SLOW and not any(map(alive, pids)), "an idle fleet took %.1f s to stop" % took
    print("an idle fleet stopped after %.2f s" % took)


def generate_interrupted(fleet):
    """Ctrl-C, and kill -9 of the leader, leave no rank of `ditfleet generate` behind."""
    for signum in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([BUILD + "/ditfleet", "generate", "--model", MODEL, "--ranks", "2", "--num-inference-steps",
                                    "1000", "-o", fleet.folder + "/never.png"], start_new_session=True, stderr=subprocess.DEVNULL)
        rank, = until("the second rank", lambda: children(process.pid))
        time.sleep(0.5)
        (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
        assert process.wait(5 * SLOW) != 0
        until("the second rank gone", lambda: not alive(rank), 1)
    assert not os.path.exists(fleet.folder + "/never.png")


def main():
    with PrivateFleet() as fleet:
        fleet.redis()
        fleet.sink("sink")
        fleet.sink("slow", "--fail", "slow", "--delay", "1" if SLOW == 1 else "3")
        fleet.sink("hanging", "--fail", "hang")
        configure(fleet, grace=30)
        fleet.supervisor()
        fleet.wait_ready()
        reference = fleet.result("reference", submit(fleet, "reference"))
        assert reference.state == OK, reference
        # A sanitizer has nothing to find where processes are killed: there the phases are left out that end so.
        killing = ((killed_rank, 0), (stopped_rank, 1), (stopped_rank, 0), (supervisor_killed,), (poisoned,)) if SLOW == 1 else ()
        for phase, *more in ((killed_rank, 1), *killing, (cancelled,), (overlapping,), (redis_killed,),
                             (redis_gone_past_the_lease,), (flushed,),
                             (signalled_leader,), (reloaded,), (drained_in_time,), (drained_too_soon,), (idle_stop,),
                             (generate_interrupted,)):
            start = time.monotonic()
            phase(fleet, *more)
            print("%-24s %5.1f s" % (phase.__name__, time.monotonic() - start), flush=True)


main()
