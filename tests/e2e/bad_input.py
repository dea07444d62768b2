"""Bad input through the whole fleet: each case ends in the state and with the error code given, its error holds the words
given, the log says the same, no worker crashes or restarts, nothing is lost, and a good job still makes its picture."""
import os
import random
import re
import shutil
import subprocess

from google.protobuf import text_format
from private_fleet import BUILD, MODEL, PrivateFleet, alive, job_pb2, until

PROMPT, SECRET = "prompt-nobody-may-log", "secret-nobody-may-log"
OK, DEAD, EXPIRED = job_pb2.STATE_SUCCEEDED, job_pb2.STATE_DEAD, job_pb2.STATE_EXPIRED


def url(where):
    return 'output: <url: "%s">' % where


def file(path):
    return 'output: <file: "%s">' % path


def header(name, value):
    return 'output: <url: "http://SINK/{id}.png" headers: <name: "%s" value: "%s">>' % (name, value)


# The job's fields in protobuf's text form, replacing those of a good job; or the bytes that follow (a list: replace)
# those of a good job. Then what must come of it. SINK and the like are hosts that main() starts.
CASES = [
    # sizes and numbers
    ("width: 100", DEAD, "invalid", "width 100: this model takes multiples of 16 from 16 to 2048"),
    ("height: 0", OK, "", ""),  # zero is absent
    ("height: 8", DEAD, "invalid", "height is 8; allowed: 16 to 16384"),
    ("width: 16400", DEAD, "invalid", "width is 16400; allowed: 16 to 16384"),
    ("height: 4294967295", DEAD, "invalid", "height is 4.29497e+09; allowed: 16 to 16384"),
    ("width: 2064", DEAD, "invalid", "width 2064: this model takes multiples of 16 from 16 to 2048"),
    ("width: 2048 height: 2048", DEAD, "invalid", "width x height is 4194304 pixels; this model takes at most 1048576"),
    ("num_inference_steps: 5000", DEAD, "invalid", "num_inference_steps is 5000; allowed: 1 to 1000"),
    ("max_sequence_length: 5000", DEAD, "invalid", "max_sequence_length is 5000; allowed: 1 to 4096"),
    ("max_sequence_length: 1000", DEAD, "invalid", "max_sequence_length 1000: this model takes 1 to 512"),
    ("guidance_scale: nan", DEAD, "invalid", "guidance_scale is nan; allowed: 0 to 100"),
    ("guidance_scale: inf", DEAD, "invalid", "guidance_scale is inf; allowed: 0 to 100"),
    ("guidance_scale: -0.5", DEAD, "invalid", "guidance_scale is -0.5; allowed: 0 to 100"),
    (b"\x55\x00\x00\xc0\x7f", DEAD, "invalid", "guidance_scale is nan"),
    (b"\x55\x00\x00\x80\xff", DEAD, "invalid", "guidance_scale is -inf"),
    ('true_cfg_scale: nan negative_prompt: ""', DEAD, "invalid", "true_cfg_scale is nan"),
    ("shift: 0", DEAD, "invalid", "shift is 0; allowed: 0.01 to 100"),
    ("num_images: 65", DEAD, "invalid", "num_images is 65; allowed: 1 to 64"),
    ('num_images: 4 output: <url: "http://SINK/x.png">', DEAD, "invalid", "output.url needs {index}, since num_images is 4"),
    # text
    (b"\x1a\x03\xff\xfe\x41", DEAD, "invalid", "prompt is not UTF-8 at byte 0"),
    (b"\x1a\x03a\x00b", DEAD, "invalid", "prompt contains a zero byte"),
    ('prompt: "%s"' % ("x" * (1 << 20)), DEAD, "invalid", "prompt has 1048576 bytes; allowed: at most 32768"),
    ('prompt: "" num_inference_steps: 1', OK, "", ""),
    # bytes
    ([b""], DEAD, "corrupt", "no bytes"),
    ([b"\xff\xff\xff\xff"], DEAD, "corrupt", "not a serialised Job"),
    ([random.Random(1).randbytes(3000)], DEAD, "", ""),
    ([random.Random(2).randbytes(100000)], DEAD, "", ""),
    (b"\x1a\x7fhalf a prompt", DEAD, "corrupt", "the bytes end inside prompt"),
    (b"\xc0\x3e\x01", DEAD, "unsupported", "field number 1000"),
    (b"\x38\x40\x38\x40", DEAD, "invalid", "width occurs twice"),
    (b"\x3a\x01\x40", DEAD, "corrupt", "width has wire type 2; allowed: 0"),
    # names
    ('id: ""', DEAD, "invalid", "id is missing"),
    ('id: "a/b"', DEAD, "invalid", "id"),
    ('id: "../../etc"', DEAD, "invalid", "A-Z a-z 0-9"),
    ('model: ""', DEAD, "invalid", "model is missing"),
    ('model: "dome"', DEAD, "not_found", "model dome is not served by this fleet; known: demo@1"),
    ('model: "demo@2"', DEAD, "not_found", "model demo@2 is not served by this fleet; known: demo@1"),
    ('model: "de mo"', DEAD, "invalid", "model is not name or name@version"),
    # enums and what the device cannot do
    ("precision: PRECISION_FP8", DEAD, "unsupported", "precision fp8: on cpu there is fp32"),
    ("precision: PRECISION_FP32 num_inference_steps: 1", OK, "", ""),
    (b"\x98\x01\x63", DEAD, "invalid", "precision is the number 99; allowed: default, fp32, bf16, fp16, fp8, int8"),
    (b"\x70\x09", DEAD, "invalid", "rng is the number 9; allowed: cpu-f32"),
    (b"\xb0\x01\x07", DEAD, "invalid", "priority is the number 7; allowed: normal, high, low"),
    ('scheduler: "EulerDiscreteScheduler"', DEAD, "unsupported", "allowed: FlowMatchEulerDiscreteScheduler"),
    # where the picture goes
    ("output: <>", DEAD, "invalid", "output has none of url and file; allowed: exactly one"),
    ('output: <url: "http://SINK/x" file: "FILES/x">', DEAD, "invalid", "output has both of url and file"),
    (file("FILES/{id}.png"), OK, "", ""),
    (file("/etc/ditfleet.png"), DEAD, "refused", "file path /etc/ditfleet.png is not below a file root"),
    (file("FILES/../x.png"), DEAD, "invalid", "output.file has a '..' component"),
    (file("FILES-not/x.png"), DEAD, "refused", "is not below a file root"),
    (file("FILES/link/x.png"), DEAD, "refused", "link"),
    (file("FILES/blocked/x.png"), DEAD, "", "blocked"),
    (url("http://127.0.0.1:1/x.png"), DEAD, "refused", "address 127.0.0.1 is loopback, private or reserved"),
    (url("http://localhost:1/x.png"), DEAD, "refused", "is loopback, private or reserved"),
    (url("http://0x7f000001:1/x.png"), DEAD, "refused", "address 127.0.0.1 is loopback"),
    (url("http://169.254.169.254/latest/meta-data"), DEAD, "refused", "address 169.254.169.254 is loopback, private"),
    (url("http://[::1]/x.png"), DEAD, "refused", "address [::1] is loopback"),
    (url("ftp://host/x.png"), DEAD, "invalid", "output.url does not start with http:// or https://"),
    (url("http://user:pass@host/x.png"), DEAD, "refused", "user and password are not allowed"),
    (url("http://SINK/{nonsense}.png"), DEAD, "invalid", "output.url has a brace that is no placeholder"),
    (header("X-A", "b\\r\\nX-Evil: 1"), DEAD, "invalid", "output.headers.value has a control character at byte 1"),
    (header("X-A\\r\\nX-Evil", "1"), DEAD, "invalid", "output.headers.name is not an HTTP token"),
    (header("Host", "elsewhere"), DEAD, "invalid", "output header Host is set by the worker"),
    # hosts
    (url("http://REFUSING/x.png"), DEAD, "unavailable", "PUT http://REFUSING/x.png"),
    (url("http://CLOSED/x.png"), DEAD, "unavailable", "Connection refused"),
    (url("http://HANGING/x.png"), DEAD, "timeout", "no byte moved for 0.5 s"),
    (url("http://FAILING/x.png?token=" + SECRET), DEAD, "unavailable", "PUT http://FAILING/x.png: answered 500"),
    (url("http://FORBIDDING/x.png"), DEAD, "upload", "PUT http://FORBIDDING/x.png: answered 403"),
    (url("http://MENDING/{id}.png"), OK, "", ""),  # 500 twice, then fine
    # time
    ("deadline_ms: 1", EXPIRED, "expired", "the deadline passed"),
]


def good_job(fleet, number):
    job = fleet.job("case-%d" % number, prompt=PROMPT, max_attempts=1)
    job.output.headers.add(name="Authorization", value=SECRET)
    return job


def payload(job, hosts, wrong):
    if isinstance(wrong, list):
        return wrong[0]
    if isinstance(wrong, bytes):
        for name in ("prompt", "width", "guidance_scale"):
            job.ClearField(name)  # else "occurs twice" hides what is meant
        return job.SerializeToString() + wrong
    for name, value in hosts.items():
        wrong = wrong.replace(name, value)
    for name in re.findall(r"\b(\w+):", wrong):
        if name in job.DESCRIPTOR.fields_by_name:
            job.ClearField(name)
    changed = text_format.Parse(wrong, job_pb2.Job())
    if changed.output.url:
        job.output.headers.add(name="Authorization", value=SECRET)
    job.MergeFrom(changed)
    return job.SerializeToString()


def check(fleet, hosts, case, job_id, entry):
    wrong, state, code, words = case
    for name, value in hosts.items():
        words = words.replace(name, value)
    what = "%.80r" % (wrong,)
    result = fleet.result(job_id, entry)
    assert result.state == state, "%s: %s" % (what, result)
    if state == OK:
        return
    assert result.error.code == code or not code, "%s: expected %s: %s" % (what, code, result)
    assert words in result.error.message, "%s: expected %s: %s" % (what, words, result)
    if state == EXPIRED:
        return  # no program of ours acted on it
    # The log line of the same refusal or failure.
    until("%s in the log" % what, lambda: [line for line in fleet.lines("supervisor")
                                           if ("entry=" + entry in line or "job=%s " % job_id in line) and
                                           "code=%s error=" % result.error.code in line and
                                           result.error.message[:60] in line], 5)


def run_cases(fleet, hosts):
    sent = []
    for number, case in enumerate(CASES):
        job = good_job(fleet, number)
        sent.append((case, job.id, fleet.server.xadd("dit:{default}:in:default",
                                                     {"job": payload(job, hosts, case[0])}).decode()))
    no_job = fleet.server.xadd("dit:{default}:in:default", {"jbo": b"x"}).decode()
    for case, job_id, entry in sent:
        check(fleet, hosts, case, job_id, entry)
    result = fleet.result("none", no_job)
    assert result.error.code == "corrupt" and "no field named job" in result.error.message, result


def same_id(fleet):
    """The same id with another payload is refused, and the original is untouched; with the same payload it is the same."""
    job = fleet.job("twice")
    first = fleet.submit(job)
    again = fleet.submit(job)
    other = fleet.submit(fleet.job("twice", prompt="another"))
    refusal = fleet.result("twice", other)
    assert refusal.state == DEAD and refusal.error.code == "conflict", refusal
    results = [fleet.result("twice", entry) for entry in (first, again)]
    assert results[0] == results[1] and results[0].state == OK and results[0].used.prompt == job.prompt, results


def nothing_lost(fleet):
    stats = fleet.status()["queue"]["jobs"]
    for state in ("waiting", "queued", "delayed", "leased", "running", "uploading", "retry_wait"):
        assert stats[state] == 0, stats
    assert fleet.server.zcard("dit:{default}:live") == 0 and fleet.server.zcard("dit:{default}:lease") == 0


# ---- models that cannot be loaded


def copy_model(fleet, name):
    folder = "%s/%s" % (fleet.folder, name)
    shutil.copytree(MODEL, folder, copy_function=os.symlink)
    return folder


def replace(folder, path, change):
    text = open("%s/%s" % (MODEL, path), "rb").read()
    os.unlink("%s/%s" % (folder, path))
    with open("%s/%s" % (folder, path), "wb") as f:
        f.write(change(text))


def bad_models(fleet):
    """Group name -> words of the reason in status. Models that cannot be loaded, and one for a device that is not there."""
    weights = "vae/diffusion_pytorch_model.safetensors"
    replace(copy_model(fleet, "short"), weights, lambda b: b[:-1000])
    replace(copy_model(fleet, "corrupt"), weights, lambda b: b"\xff" * 8 + b[8:])
    replace(copy_model(fleet, "wide"), "transformer/config.json",
            lambda b: b.replace(b'"joint_attention_dim": ', b'"joint_attention_dim": 1'))
    replace(copy_model(fleet, "garbled"), "vae/config.json", lambda b: b[:40])
    os.unlink(copy_model(fleet, "lacking") + "/text_encoder/model.safetensors")
    return {"missing": ["missing"], "short": [weights], "corrupt": [weights], "wide": ["context_embedder.weight has shape"],
            "garbled": ["vae/config.json"], "lacking": ["text_encoder"],
            # a good model for a GPU that no host has, by a backend that may not have been built
            "gpu": ["gpu 63 of group gpu"] if os.path.exists(BUILD + "/libditfleet_cuda.so") else ["no CUDA backend"]}


def bad_group(fleet, name):
    if name == "gpu":
        return "[group gpu]\ndevice = cuda\ngpu = 63\nmodel = demo@bad=%s\n" % MODEL
    return "[group %s]\nmodel = demo@bad=%s/%s\n" % (name, fleet.folder, name)


def check_bad_models(fleet, reasons):
    for name, words in reasons.items():
        group = until("group %s failed" % name, lambda: fleet.group(name)["state"] == "failed" and fleet.group(name), 30)
        assert "status 125" in group["last_failure"] and group["restarts"] == 0, group
        for word in words:
            assert word in group["last_failure"], group
        spawned = [line for line in fleet.lines("supervisor") if "event=rank.spawned group=%s " % name in line]
        assert len(spawned) == len(group["ranks"]), "a restart storm: %s" % spawned
    text = subprocess.run([BUILD + "/ditfleet", "status", "--config", fleet.folder + "/ditfleet.conf"],
                          stdout=subprocess.PIPE, text=True).stdout
    assert "last failure: rank 0 exited with status 125" in text, text


def main():
    with PrivateFleet() as fleet:
        fleet.redis()
        hosts = {"SINK": fleet.sink("sink"), "REFUSING": fleet.sink("refusing", "--fail", "refuse"),
                 "HANGING": fleet.sink("hanging", "--fail", "hang"), "FAILING": fleet.sink("failing", "--fail", "500"),
                 "FORBIDDING": fleet.sink("forbidding", "--fail", "403"),
                 "MENDING": fleet.sink("mending", "--fail", "500", "--fail-count", "2"), "CLOSED": fleet.sink("closed"),
                 "FILES": fleet.folder + "/files"}
        fleet.stop("closed")
        os.makedirs(hosts["FILES"])
        os.symlink("/tmp", hosts["FILES"] + "/link")
        open(hosts["FILES"] + "/blocked", "w").close()
        reasons = bad_models(fleet)
        bad_groups = "".join(bad_group(fleet, name) for name in reasons)
        fleet.configure("[group g]\nranks = 2\nmodel = demo@1=%s\n%s" % (MODEL, bad_groups),
                        "file_roots = %s\nretries = 2\ntimeout = 500ms" % hosts["FILES"])
        fleet.supervisor()
        pids = fleet.wait_ready()
        check_bad_models(fleet, reasons)
        picture = fleet.run("before") and fleet.stored("before.png")
        run_cases(fleet, hosts)
        same_id(fleet)
        fleet.run("after")
        assert fleet.stored("after.png") == picture, "the picture changed"
        nothing_lost(fleet)
        fleet.tells_no(PROMPT, SECRET)
        assert fleet.pids() == pids and all(map(alive, pids)) and fleet.group()["restarts"] == 0, "a worker was restarted"
        assert fleet.stop("supervisor") == 0, "the supervisor did not drain"
        left = [line for line in fleet.lines("supervisor") if "event=rank.exited group=g " in line]
        assert len(left) == 2 and all("status=0 " in line for line in left), left
        print("%d bad inputs and %d bad models: each told, nothing lost" % (len(CASES), len(reasons)))


main()
