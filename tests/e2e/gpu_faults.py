"""A group with device = cuda whose GPU fails: while it starts, in a job, for good or for once. The job comes back, charged
to the fleet; the process ends; it is started anew only where that may help. And `ditfleet generate --device cuda`."""
import os
import shutil
import signal
import subprocess

from private_fleet import BUILD, MODEL, PrivateFleet, job_pb2, until

OK, DEAD = job_pb2.STATE_SUCCEEDED, job_pb2.STATE_DEAD


def programs(fleet, name, module):
    """A folder with copies of the programs and this module beside them."""
    folder = "%s/%s" % (fleet.folder, name)
    os.mkdir(folder)
    for program in ("ditfleet", "ditfleet-worker"):
        shutil.copy("%s/%s" % (BUILD, program), folder)
    shutil.copy(module, folder + "/libditfleet_cuda.so")
    return folder


def configure(fleet, folder, grace=30, group="precision = fp32"):
    fleet.configure("[group g]\ndevice = cuda\ngpu = 3\n%s\nmodel = demo@1=%s\n" % (group, MODEL),
                    "[fleet]\nworker_program = %s/ditfleet-worker\n[restart]\nbackoff_min = 100ms\ngrace = %ds" %
                    (folder, grace))


def ask_failure(point, error):
    with open(os.environ["FAKE_CUDA"], "w") as f:
        f.write("%s %s\n" % (point, error))


def told(fleet, *words):
    """One line of the log has all of them."""
    until("in the log: %s" % (words,), lambda: any(all(w in line for w in words) for line in fleet.lines("supervisor")), 10)


def came_back(fleet, id, entry):
    """The job is done at its second attempt, and was not to blame for the first."""
    result = fleet.result(id, entry)
    assert result.state == OK, result
    record = fleet.record(id)
    assert (record["epoch"], record.get("attempts_infra"), record.get("attempts_app")) == ("2", "1", None), record


def generate(folder, *flags, **environment):
    """(exit status, lines it said)"""
    run = subprocess.run([folder + "/ditfleet", "generate", "--model", MODEL, "--width", "64", "--height", "64",
                          "--num-inference-steps", "2", "--max-sequence-length", "64", "--seed", "7", "--prompt", "a red circle",
                          "--quiet", *flags, "-o", folder + "/own.png"], env=dict(os.environ, **environment),
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return run.returncode, [line for line in run.stderr.splitlines() if not line.startswith("fake_cuda ")]


def serves(fleet, folder):
    fleet.wait_ready()
    told(fleet, "fake_cuda visible=3 gpu=0")
    told(fleet, "event=model.loaded", "device=cuda precision=fp32")
    fleet.run("plain")
    assert generate(folder, "--device", "cuda", "--precision", "fp32", "--exact") == (0, [])
    picture = fleet.stored("plain.png")
    assert open(folder + "/own.png", "rb").read() == picture, "not the picture that generate makes"
    assert b" exact" in picture, "the group is not exact"
    fleet.run("asked", precision=job_pb2.PRECISION_FP32)
    result = fleet.result("other", fleet.submit(fleet.job("other", precision=job_pb2.PRECISION_FP8)))
    assert result.state == DEAD and result.error.code == "unsupported", result
    assert "precision fp8: group g, which took the job, computes in fp32; leave precision at default" in result.error.message


def fails_in_a_job(fleet):
    pids = fleet.wait_ready()
    entry = fleet.submit(fleet.job("sticky", num_inference_steps=200))
    fleet.wait_step("sticky", 3)
    ask_failure("pace", "internal")
    came_back(fleet, "sticky", entry)
    told(fleet, "event=worker.failed", "code=internal", "pace failed on request")
    assert fleet.wait_ready() != pids and fleet.group()["restarts"] == 1, fleet.group()


def runs_out_of_memory(fleet):
    """Before any step: nothing on the device has failed, yet another process may have more luck."""
    pids = fleet.wait_ready()
    ask_failure("alloc", "no_memory")
    came_back(fleet, "large", fleet.submit(fleet.job("large", width=384, height=320)))
    told(fleet, "event=worker.failed", "code=no_memory", "alloc failed on request")
    assert fleet.wait_ready() != pids and fleet.group()["restarts"] == 2, fleet.group()


def is_taken_away_unharmed(fleet):
    """A cancelled job, and one given back while draining, are no failures of the GPU."""
    pids = fleet.wait_ready()
    entry = fleet.submit(fleet.job("cancelled", num_inference_steps=1000))
    fleet.wait_step("cancelled", 3)
    subprocess.run([BUILD + "/ditfleet", "cancel", "cancelled", "--redis", fleet.url], check=True, stdout=subprocess.DEVNULL)
    assert fleet.result("cancelled", entry).state == job_pb2.STATE_CANCELLED
    fleet.run("after")
    assert fleet.wait_ready() == pids
    entry = fleet.submit(fleet.job("drained", num_inference_steps=1000))
    fleet.wait_step("drained", 3)
    assert fleet.stop("supervisor") == 0
    record = fleet.record("drained")
    assert record["state"] == "QUEUED" and "attempts_app" not in record and "attempts_infra" not in record, record
    subprocess.run([BUILD + "/ditfleet", "cancel", "drained", "--redis", fleet.url], check=True, stdout=subprocess.DEVNULL)
    fleet.supervisor()
    fleet.wait_ready()


def restarts(fleet, error):
    """What becomes of a group whose GPU does not open, once."""
    before = fleet.group()["restarts"]
    ask_failure("open", error)
    os.kill(fleet.pids()[0], signal.SIGKILL)
    told(fleet, "event=worker.failed", "code=%s" % error, "gpu 3 of group g: open failed on request")
    until("an end", lambda: fleet.group()["state"] in ("ready", "failed"))
    return fleet.group()["state"], fleet.group()["restarts"] - before


def fails_to_start(fleet, folder):
    assert restarts(fleet, "unavailable") == ("ready", 2)
    assert restarts(fleet, "no_memory") == ("ready", 2)
    assert restarts(fleet, "unsupported") == ("failed", 1)
    assert "exited with status 125: gpu 3 of group g: open failed on request" in fleet.group()["last_failure"], fleet.group()
    # Read anew: bf16, which this module's CPU does not have.
    configure(fleet, folder, group="")
    fleet.processes["supervisor"].send_signal(signal.SIGHUP)
    told(fleet, "event=worker.failed", "code=unsupported", "gpu 3 of group g: ")
    until("failed", lambda: fleet.group()["state"] == "failed")


def generate_says_why(fleet, folder, broken):
    flags = ("--device", "cuda", "--precision", "fp32")
    assert generate(folder, *flags) == (0, [])
    for error, status in (("unsupported", 1), ("unavailable", 3)):
        ask_failure("open", error)
        assert generate(folder, *flags) == (status, ["ditfleet: open failed on request"]), error
    ask_failure("pace", "internal")
    assert generate(folder, *flags) == (1, ["ditfleet: denoising, step 1 of 2: pace failed on request"])
    status, lines = generate(broken, *flags)
    assert status == 1 and len(lines) == 1 and "cannot be loaded" in lines[0] and "ldd " in lines[0], lines
    status, lines = generate(BUILD, *flags, "-o", folder + "/never.png", CUDA_VISIBLE_DEVICES="")
    assert status == 1 and len(lines) == 1 and ("nvidia-smi" in lines[0] or "no CUDA backend" in lines[0]), lines


def main():
    with PrivateFleet() as fleet:
        os.environ["FAKE_CUDA"] = fleet.folder + "/request"
        folder = programs(fleet, "gpu", BUILD + "/tests/fake_cuda/libditfleet_cuda.so")
        broken = programs(fleet, "broken", MODEL + "/model_index.json")
        fleet.redis()
        fleet.sink("sink")
        configure(fleet, folder, grace=2, group="precision = fp32\nexact = yes")
        fleet.supervisor()
        serves(fleet, folder)
        fails_in_a_job(fleet)
        runs_out_of_memory(fleet)
        is_taken_away_unharmed(fleet)
        fails_to_start(fleet, folder)
        generate_says_why(fleet, folder, broken)
        print("a GPU that fails costs no job")


main()
