"""A receiver of callbacks, for callback.sh, run in the source folder: callback_receiver.py PORT_FILE LOG SECRET...

Verifies every request by PROTOCOL.md's own lines and appends a line of JSON to LOG: path, id, verified, body, text. The path's
first word says what it answers: ok, fail (500), gone (410), hang, redirect, later (503 with Retry-After: 2), flaky (500 twice,
then 200), hold (no answer the first time, then 200), big (200 with an endless body).
"""
import http.server, json, os, re, sys, threading, time

port_file, log, secrets = sys.argv[1], sys.argv[2], sys.argv[3:]
lock, seen = threading.Lock(), {}


# The document's own lines verify; a receiver may copy them.
exec(re.search(r"^```python\n(import base64.*?)^```$", open("proto/PROTOCOL.md").read(), re.M | re.S)[1])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        what = self.path.split("/")[1].split("?")[0]
        line = {"path": self.path, "id": self.headers["webhook-id"], "verified": [verify(s, self.headers, body) for s in secrets],
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
