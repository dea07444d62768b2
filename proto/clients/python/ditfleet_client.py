#!/usr/bin/env python3
"""A ditfleet client: enqueue a job, watch it, get its result. Needs redis and protobuf (python3-redis, python3-protobuf).

    protoc --proto_path=SOURCE --python_out=DIR proto/job.proto     # once; put DIR on PYTHONPATH
    python ditfleet_client.py --redis unix:///run/redis.sock --model shapes --prompt "a red circle" \\
        --url "http://127.0.0.1:8000/{id}.png" width=256 height=256 num_inference_steps=20

As a module:

    fleet = Fleet("redis://localhost")
    job = job_pb2.Job(id="cat-1", model="shapes", prompt="a cat")
    job.output.url = "https://..."
    result = fleet.wait(job.id, fleet.submit(job), on_event=print)

proto/PROTOCOL.md is the contract. The record under the id counts only if it is ours; see "How to submit a job" there.
"""
import argparse
import sys
import time
import uuid

import redis
from google.protobuf import text_format
from proto import job_pb2


class Fleet:
    def __init__(self, url, queue="default", tenant="default"):
        if url.startswith("unix://"):
            self.redis = redis.Redis(unix_socket_path=url[len("unix://"):])
        else:
            self.redis = redis.Redis.from_url(url)
        self.prefix, self.tenant = "dit:{%s}:" % queue, tenant

    def _key(self, kind, name):
        return "%s%s:%s:%s" % (self.prefix, kind, self.tenant, name)

    def submit(self, job):
        """Enqueues a job_pb2.Job and returns the receipt by which its outcome is found."""
        return self.redis.xadd(self.prefix + "in:" + self.tenant, {"job": job.SerializeToString()}).decode()

    def _look(self, job_id, entry):
        """(is the record under the id ours, the Result's bytes or None)"""
        owner, result = self.redis.hmget(self._key("job", job_id), "entry", "result")
        if owner is not None and owner.decode() == entry:
            return True, result
        same_as, refusal = self.redis.hmget(self._key("job", "@" + entry), "same_as", "result")
        return (True, result) if same_as else (False, refusal)

    def wait(self, job_id, entry, timeout=None, on_event=None):
        """Returns the Result; raises TimeoutError. on_event hears of each job_pb2.Event."""
        events, receipt = self._key("ev", job_id), self._key("ev", "@" + entry)
        end, last, known = time.monotonic() + (timeout or float("inf")), b"0-0", False
        while True:
            ours, found = self._look(job_id, entry)
            if found is None and time.monotonic() > end:
                raise TimeoutError("job %s is not final yet" % job_id)
            # Blocks for a second at most, so that the record is read again even if no event comes.
            streams = {events: last} if ours else {receipt: "0-0"} if known else {events: "0-0", receipt: "0-0"}
            news = self.redis.xread(streams, count=100, block=None if found else 1000)
            known = known or bool(news)  # the record is there by now; if it is not ours, only the receipt can tell more
            for _, entries in news if ours else []:
                for last, fields in entries:
                    if on_event:
                        on_event(job_pb2.Event.FromString(fields[b"event"]))
            if found is not None:
                return job_pb2.Result.FromString(found)


def show(event):
    name = job_pb2.State.Name(event.state)[len("STATE_"):].lower()
    print("%-12s %s %d/%d" % (name, event.stage, event.step, event.steps), file=sys.stderr)


def main():
    p = argparse.ArgumentParser(description="enqueue one job and await its result")
    p.add_argument("--redis", default="redis://localhost")
    p.add_argument("--queue", default="default")
    p.add_argument("--tenant", default="default")
    p.add_argument("--id", default=None, help="idempotency key; drawn if absent")
    p.add_argument("--model", required=True)
    p.add_argument("--prompt", default="")
    p.add_argument("--url", required=True, help="where the picture is PUT; may hold {id}, {attempt}, {index}")
    p.add_argument("--timeout", type=float, default=None, help="seconds")
    p.add_argument("field", nargs="*", help="further fields of the job in protobuf's text form: width=256 rng=RNG_CUDA")
    a = p.parse_args()
    job = job_pb2.Job(id=a.id or str(uuid.uuid4()), model=a.model, prompt=a.prompt)
    job.output.url = a.url
    for field in a.field:
        text_format.Merge(field.replace("=", ": ", 1), job)
    fleet = Fleet(a.redis, a.queue, a.tenant)
    result = fleet.wait(job.id, fleet.submit(job), a.timeout, show)
    print(text_format.MessageToString(result), end="")
    return 0 if result.state == job_pb2.STATE_SUCCEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
