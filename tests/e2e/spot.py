"""Spot notices from a stand-in for each cloud's metadata service, a URL and a file: no notice, no drain; a notice drains the
node, whose job in hand is finished first, whose others go to somebody else with no attempt charged, and which starts nothing
more. A service that hangs, redirects, never stops talking or talks nonsense is no notice."""
import http.server
import json
import os
import signal
import threading
import time

from private_fleet import BUILD, MODEL, SLOW, PrivateFleet, alive, job_pb2, until

EVENTS = [{"EventType": "Preempt", "Resources": ["other"]}, {"EventType": "Reboot", "Resources": ["me"]}]


class Metadata(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    notice, tokens, good, asked = set(), 0, None, {}

    def do_PUT(self):  # EC2's version 2: a token first
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert self.path == "/latest/api/token" and 1 <= int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        Metadata.tokens += 1
        Metadata.good = "token-%d" % self.tokens
        self.answer(200, self.good)

    def do_GET(self):
        assert "Content-Length" not in self.headers, "a GET with a body"
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        headers, path = self.headers, self.path
        if path == "/latest/meta-data/spot/instance-action":
            if headers["X-aws-ec2-metadata-token"] != self.good:
                return self.answer(401, "")
            if self.asked[path] == 1:
                Metadata.good = None  # the next time the token is too old
            there = "ec2" in self.notice
            return self.answer(200 if there else 404, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}' if there else "")
        if path == "/computeMetadata/v1/instance/preempted" and headers["Metadata-Flavor"] == "Google":
            return self.answer(200, "TRUE" if "gce" in self.notice else "FALSE")
        if path.startswith("/metadata/instance/compute/name?") and headers["Metadata"] == "true":
            return self.answer(200, "me")
        if path.startswith("/metadata/scheduledevents?") and headers["Metadata"] == "true":
            mine = [{"EventType": "Preempt", "Resources": ["other", "me"]}] if "azure" in self.notice else []
            return self.answer(200, json.dumps({"DocumentIncarnation": 1, "Events": EVENTS + mine}))
        if path == "/url?key=hush":
            return self.answer(200 if "url" in self.notice else 204, "")
        if path == "/hang":
            time.sleep(60)
        if path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/latest/api/anything")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if path.startswith("/endless"):
            self.send_response(200)
            self.send_header("Content-Length", str(10 << 30))
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b" " * 65536)
            except OSError:
                return
        self.answer(200 if path == "/latest/api/anything" else 500, "nonsense")

    def answer(self, status, text):
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def node(fleet, name, source):
    """A supervisor of its own, without groups, that looks there."""
    path = "%s/%s.conf" % (fleet.folder, name)
    with open(path, "w") as f:
        f.write("[redis]\nurl = %s\n[fleet]\nnode = %s\nstate_dir = %s/%s.state\n[node]\nspot_notice = %s\n" %
                (fleet.url, name, fleet.folder, name, source))
    fleet.start(name, BUILD + "/ditfleet-supervisor", "--config", path)


def says(fleet, name, event):
    return any("event=" + event in line for line in fleet.lines(name))


def main():
    with PrivateFleet() as fleet:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = "http://127.0.0.1:%d" % server.server_address[1]
        fleet.redis()
        fleet.sink("sink")
        nodes = {"gce": "gce@" + base, "azure": "azure@" + base, "url": base + "/url?key=hush", "file": fleet.folder + "/notice"}
        silent = {"hang": base + "/hang", "redirect": base + "/redirect", "endless": "gce@" + base + "/endless?",
                  "closed": "http://127.0.0.1:1/", "nonsense": "gce@" + base + "/nothing?", "lying": "azure@" + base + "/nothing"}
        for name, source in {**nodes, **silent}.items():
            node(fleet, name, source)
        fleet.configure("[group g]\nranks = 2\nmodel = demo@1=" + MODEL,
                        "[node]\nspot_notice = ec2@%s\n[restart]\ngrace = %ds" % (base, 20 * SLOW))
        fleet.supervisor()
        pids = fleet.wait_ready()
        until("every service asked", lambda: len(Metadata.asked) >= 8 and
              "/latest/meta-data/spot/instance-action" in Metadata.asked)
        jobs = [fleet.job("j-%d" % i, num_inference_steps=100) for i in range(8)]
        entries = [fleet.submit(job) for job in jobs]
        fleet.wait_step("j-0", 3)
        assert not any(says(fleet, name, "spot.notice") for name in (*nodes, *silent, "supervisor"))
        Metadata.notice |= {"ec2", "gce", "azure", "url"}
        open(fleet.folder + "/notice", "w").close()
        begun = time.monotonic()
        for name in *nodes, "supervisor":
            until("the notice of " + name, lambda: says(fleet, name, "spot.notice"), 7)
        seen = time.monotonic() - begun
        until("the group drained", lambda: fleet.group()["state"] == "stopped", 20)
        assert not any(map(alive, pids)) and fleet.status()["node"]["spot_notice"] is True
        assert Metadata.tokens == 2, "a token that was refused was not drawn anew"
        states = [fleet.record(job.id).get("state") for job in jobs]
        assert set(states) == {"SUCCEEDED", "QUEUED"}, states
        for job in jobs:
            record = fleet.record(job.id)
            assert "attempts_app" not in record and "attempts_infra" not in record, record
        time.sleep(1)  # nothing comes back by itself, not even by a reload
        fleet.processes["supervisor"].send_signal(signal.SIGHUP)
        until("the reload", lambda: says(fleet, "supervisor", "supervisor.reloaded"))
        assert fleet.group()["state"] == "stopped"
        for name in silent:
            assert says(fleet, name, "spot.unknown") and not says(fleet, name, "spot.notice"), fleet.lines(name)
        start = time.monotonic()
        for name in *nodes, *silent, "supervisor":
            assert fleet.stop(name) == 0, name
        assert time.monotonic() - start < 20 * SLOW
        fleet.tells_no("hush")
        print("all notices seen in %.1f s; jobs: %s" % (seen, " ".join(states)))


main()
