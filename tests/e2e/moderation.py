"""Prompts judged at admission: by a deny list that changes, and by an endpoint that answers, hangs, lies, redirects, never
stops talking or is not there. What is denied is DEAD with code moderated and no word of the prompt; what nobody answered
for waits, is refused or comes in, as configured; nobody waits for another tenant's job; nothing is lost."""
import http.server
import json
import os
import signal
import subprocess
import threading
import time

from private_fleet import BUILD, MODEL, SLOW, SOURCE, PrivateFleet, job_pb2, until

SECRET = "nobody-may-log-this"
P = "dit:{default}:"


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Does what the prompt's first word says."""
    protocol_version = "HTTP/1.1"
    asked, sent = {}, 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)
        what = question["prompt"].split()[0] if self.path == "/judge?key=hush" else "ok"
        times = self.asked[question["id"]] = self.asked.get(question["id"], 0) + 1
        if what == "hang":
            time.sleep(60)
        if what == "endless":
            return self.talk()
        answers = {"ok": '{"allow": true}', "deny": '{"allow": false, "reason": "weapons"}', "bare": '{"allow": false}',
                   "echo": json.dumps({"allow": False, "reason": "it says: " + question["prompt"]}),
                   "control": '{"allow": false, "reason": "a\\nlevel=error \\"b\\u00e9"}',
                   "garbage": "<html>yes</html>", "string": '{"allow": "true"}', "list": "[true]",
                   "twice": '{"allow": false, "allow": true}', "long": '{"allow": true}' + " " * 5000,
                   "flaky": '{"allow": true}', "ask": json.dumps({"allow": False, "reason": str(sorted(question))})}
        status = {"redirect": 302, "500": 500, "flaky": 500 if times == 1 else 200}.get(what, 200)
        text = answers.get(what, "").encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/everything-is-fine")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def talk(self):
        self.send_response(200)
        self.send_header("Content-Length", str(10 << 30))
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" " * 65536)
                Endpoint.sent += 65536
        except OSError:
            pass

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


def serve(port=0):
    server = Server(("127.0.0.1", port), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def configure(fleet, port, on_error="wait", groups="", url="http://127.0.0.1:%d/judge?key=hush", more=""):
    fleet.configure(groups, "[moderation]\ndeny_file = %s/deny\nurl = %s\nallow = 127.0.0.1:%d\ntimeout = %dms\n"
                    "on_error = %s\n%s" % (fleet.folder, url % port if "%d" in url else url, port, 1000 * SLOW, on_error, more))


def reload(fleet):
    seen = len(fleet.lines("supervisor"))
    fleet.processes["supervisor"].send_signal(signal.SIGHUP)
    until("the reload", lambda: any("event=supervisor.reloaded" in line for line in fleet.lines("supervisor")[seen:]))


def submit(fleet, id, prompt, tenant="default", **fields):
    job = fleet.job(id, prompt=prompt + " " + SECRET, **fields)
    job.output.url = "http://127.0.0.1:1/{id}.png"
    entry = fleet.server.xadd(P + "in:" + tenant, {"job": job.SerializeToString()}).decode()
    return entry, tenant, id


def look(fleet, job):
    entry, tenant, id = job
    for name in "@" + entry, id:
        found = fleet.server.hgetall(P + "job:%s:%s" % (tenant, name))
        if found:
            return found[b"state"].decode(), found.get(b"error_code", b"").decode(), found.get(b"error", b"").decode()
    return "IN", "", ""


def comes_in(fleet, job, seconds=10):
    until("%s admitted" % job[2], lambda: look(fleet, job)[0] == "QUEUED", seconds)


def is_denied(fleet, job, words, seconds=10):
    until("%s refused" % job[2], lambda: look(fleet, job)[0] == "DEAD", seconds)
    _, code, text = look(fleet, job)
    assert code == "moderated" and words in text and SECRET not in text, (job, code, text)


def judged(fleet):
    """One verdict after the other, from the list and from the endpoint."""
    for i, (prompt, words) in enumerate([("deny", "policy: weapons"), ("bare", "policy"), ("echo", "repeats the prompt"),
                                         ("control", "policy: a?level=error ?b??"),
                                         ("ok FORBIDDEN  \u00a0 fruit", "line 3 of its deny list"),
                                         ("ok \uff46\uff4f\uff52\uff42\uff49\uff44\uff44\uff45\uff4e fr\u200bu\u00adit", "line 3"),
                                         ("ok a caf\u00e9 bomb", "line 4"), ("ok a cafe\u0301 BOMB", "line 4"),
                                         ("ok " + "\u0301" * 15000 + "forbidden fruit", "line 3"),
                                         ("ok " + "x" * 100, "line 5 of its deny list takes too long")]):
        is_denied(fleet, submit(fleet, "denied-%d" % i, prompt), words)
    comes_in(fleet, submit(fleet, "fine", "ok forbidden fr uit, a cafe without bombs"))
    comes_in(fleet, submit(fleet, "negative", "ok", negative_prompt="forbidden fruit"))  # there it belongs
    is_denied(fleet, submit(fleet, "second", "ok", prompt_2="forbidden fruit"), "line 3")
    fields = "['id', 'model', 'negative_prompt', 'prompt', 'prompt_2', 'tenant']"
    is_denied(fleet, submit(fleet, "asked", "ask", negative_prompt="x", prompt_2="y"), fields)


def changed(fleet):
    """The list is read again; one that is wrong changes nothing, and neither does one that is gone."""
    lines = lambda: "\n".join(fleet.lines("supervisor"))
    write_list(fleet, "# new\nplums\n")
    until("the new list", lambda: "moderation.deny_file path=" in poke(fleet, lines))
    is_denied(fleet, submit(fleet, "plums", "ok plums"), "line 2")
    comes_in(fleet, submit(fleet, "fruit", "ok forbidden fruit"))
    write_list(fleet, "plums\n/(unclosed/\n")
    until("the wrong list refused", lambda: "deny:2: no PCRE2 pattern: missing closing parenthesis" in poke(fleet, lines))
    is_denied(fleet, submit(fleet, "still", "ok plums"), "line 2")
    os.unlink(fleet.folder + "/deny")
    is_denied(fleet, submit(fleet, "gone", "ok plums"), "line 2")
    write_list(fleet)


def poke(fleet, lines):
    """The file is looked at when there is something to admit."""
    poke.n = getattr(poke, "n", 0) + 1
    submit(fleet, "poke-%d" % poke.n, "ok")
    time.sleep(0.1)
    return lines()


def write_list(fleet, text="# fruit\n\nforbidden   Fruit\n/caf\u00e9\\s(bomb|grenade)\\b/\n/(x+x+)+[yz]/\n"):
    with open(fleet.folder + "/deny.new", "w") as f:
        f.write(text)
    os.rename(fleet.folder + "/deny.new", fleet.folder + "/deny")


HOSTILE = ["endless", "redirect", "garbage", "500", "string", "list", "twice", "long"]


def unanswered(fleet, port, endpoint):
    """What gets no answer waits in the door, and no other tenant with it; later it is refused or let in."""
    flood = [submit(fleet, "flood-%d" % i, "hang", "flood") for i in range(24)]
    hostile = [submit(fleet, "hostile-" + word, word, "hostile") for word in HOSTILE]
    flaky = submit(fleet, "flaky", "flaky", "hostile")
    time.sleep(0.3)
    slowest = 0
    for i in range(10):
        begun = time.monotonic()
        comes_in(fleet, submit(fleet, "meanwhile-%d" % i, "ok", "other"))
        slowest = max(slowest, time.monotonic() - begun)
    assert slowest < 3 * SLOW, "while another tenant's jobs hang, one was admitted after %.2f s" % slowest
    comes_in(fleet, flaky)
    until("every hostile answer", lambda: all(endpoint.asked.get("hostile-" + word) for word in HOSTILE))
    time.sleep(0.3)
    assert all(look(fleet, job)[0] == "IN" for job in flood + hostile), "what nobody answered for is no more in its door"
    assert fleet.server.xlen(P + "in:flood") == 24 and fleet.server.xlen(P + "in:hostile") == len(HOSTILE)
    assert endpoint.sent < 64 << 20, "%d bytes of an answer were read" % endpoint.sent
    configure(fleet, port, "refuse")
    reload(fleet)
    for job in hostile:
        is_denied(fleet, job, "on_error = refuse")
    configure(fleet, port, "allow")
    reload(fleet)
    for job in flood:
        until("%s no more in its door" % job[2], lambda: look(fleet, job)[0] != "IN", 30)
        assert look(fleet, job)[0] == "QUEUED" or "no answer in time" in look(fleet, job)[2], look(fleet, job)
    return slowest


def away(fleet, server, port):
    """Nobody listens, and the admitter is killed: the jobs come in when both are back."""
    configure(fleet, port)
    reload(fleet)
    server.shutdown()
    server.server_close()
    jobs = [submit(fleet, "away-%d" % i, "ok") for i in range(3)]
    until("the failure told", lambda: [line for line in fleet.lines("supervisor") if "event=moderation.failing" in line and
                                       "Connection refused" in line])
    assert all(look(fleet, job)[0] == "IN" for job in jobs)
    fleet.stop("supervisor", signal.SIGKILL)
    server = serve(port)
    fleet.supervisor()
    for job in jobs:
        comes_in(fleet, job, 20)
    return server


def refused_configurations(fleet, port):
    """Where the endpoint may be is judged as targets of uploads are; a list that would refuse everything is no list."""
    def check(words):
        done = subprocess.run([BUILD + "/ditfleet-supervisor", "--config", fleet.folder + "/ditfleet.conf", "--check"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 1 and words in done.stdout and "hush" not in done.stdout, done

    configure(fleet, port, url="http://169.254.169.254/?key=hush")
    check("169.254.169.254 is loopback, private or reserved")
    configure(fleet, port, url="ftp://127.0.0.1/?key=hush")
    check("http://..., https://..., or nothing")
    configure(fleet, port)
    write_list(fleet, "/x*/\n")
    check("deny:1: meets an empty prompt")
    write_list(fleet)
    configure(fleet, port, url="http://localhost:%d/?key=hush")  # its name is not on the list: known at connect
    reload(fleet)
    waiting = submit(fleet, "by-name", "ok")
    until("the address refused", lambda: [line for line in fleet.lines("supervisor") if "event=moderation.failing" in line and
                                          "its address" in line and "loopback" in line])
    assert look(fleet, waiting)[0] == "IN"


def by_worker(fleet, port):
    """The same at the door of a worker, to the picture."""
    configure(fleet, port, groups="[group g]\nranks = 1\nthreads = 1\nmodel = demo@1=" + MODEL)
    fleet.supervisor()
    fleet.wait_ready()
    denied = submit(fleet, "worker-denied", "deny")
    fleet.run("worker-fine", prompt="ok a red circle")
    is_denied(fleet, denied, "weapons")


def main():
    with PrivateFleet() as fleet:
        server = serve()
        port = server.server_address[1]
        fleet.redis()
        write_list(fleet)
        configure(fleet, port)
        fleet.supervisor()
        script = open(SOURCE + "/proto/queue.lua").read()
        call = lambda *args: fleet.server.eval(script, 1, P, *args)
        until("the door", lambda: fleet.server.exists(P + "in:default"))
        call("publish", "demo", "1")
        for tenant in "other", "hostile", "flood":
            subprocess.run([BUILD + "/ditfleet", "tenant", "add", tenant, "--redis", fleet.url], check=True,
                           stdout=subprocess.DEVNULL)
        judged(fleet)
        changed(fleet)
        slowest = unanswered(fleet, port, Endpoint)
        server = away(fleet, server, port)
        refused_configurations(fleet, port)
        assert fleet.stop("supervisor") == 0
        fleet.sink("sink")
        by_worker(fleet, port)
        fleet.tells_no(SECRET, "hush")
        print("24 jobs of one tenant hang: another tenant's came in after %.0f ms at most" % (1000 * slowest))


main()
