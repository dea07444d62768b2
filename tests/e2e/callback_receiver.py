"""A receiver of callbacks, for callback.sh: callback_receiver.py PORT_FILE LOG SECRET...

Verifies every request as PROTOCOL.md has it and appends a line of JSON to LOG: path, id, verified, body, text. The path's
first word says what it answers: ok, fail (500), gone (410), hang, redirect, later (503 with Retry-After: 2), flaky (500 twice,
then 200), hold (no answer the first time, then 200), big (200 with an endless body).
"""
import base64, hashlib, hmac, http.server, json, os, sys, threading, time

port_file, log, secrets = sys.argv[1], sys.argv[2], sys.argv[3:]
lock, seen = threading.Lock(), {}


def verified(headers, body):
    content = b"%s.%s.%s" % (headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body)
    if abs(time.time() - int(headers["webhook-timestamp"])) > 300:
        return []
    given = [s.removeprefix("v1,") for s in headers["webhook-signature"].split()]
    keys = [base64.b64decode(s.removeprefix("whsec_")) for s in secrets]
    return [any(hmac.compare_digest(base64.b64encode(hmac.digest(k, content, hashlib.sha256)).decode(), g) for g in given)
            for k in keys]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        what = self.path.split("/")[1].split("?")[0]
        line = {"path": self.path, "id": self.headers["webhook-id"], "verified": verified(self.headers, body),
                "type": self.headers["Content-Type"], "body": json.loads(body), "text": body.decode(), "time": time.time()}
        with lock:
            n = seen[self.path] = seen.get(self.path, 0) + 1
            with open(log, "a") as f:
                f.write(json.dumps(line) + "\n")
        if what == "hang" or (what == "hold" and n == 1):
            time.sleep(3600)
        status = {"fail": 500, "gone": 410, "redirect": 302}.get(what, 200)
        if what == "later" and n == 1:
            status = 503
        if what == "flaky" and n <= 2:
            status = 500
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
        if status == 503:
            self.send_header("Retry-After", "2")
        self.send_header("Content-Length", str(1 << 40 if what == "big" else 0))
        self.end_headers()
        try:
            while what == "big":
                self.wfile.write(b"x" * 65536)
        except OSError:
            self.close_connection = True

    def do_GET(self):  # a redirect was followed
        with open(log, "a") as f:
            f.write(json.dumps({"path": self.path, "followed": True}) + "\n")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # a caller that hung up
        pass


server = Server(("127.0.0.1", 0), Handler)
with open(port_file + ".new", "w") as f:
    f.write(str(server.server_address[1]))
os.rename(port_file + ".new", port_file)
server.serve_forever()
