"""A rank is killed at any moment, under every way to share a picture: the others end within two seconds, say why, and
leave no process behind. Their memory has no name, so it goes with them; /dev/shm is looked at all the same.

KILLED_RANK_SEED and KILLED_RANK_TIMES choose other moments, and more of them."""
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time

PLANS = [["--ranks", "4"], ["--ranks", "3"], ["--ranks", "6"],  # ulysses; ring; both
         ["--ranks", "4", "--negative-prompt", "", "--true-cfg-scale", "2"],
         ["--ranks", "3", "--pipefusion-degree", "3"],
         ["--ranks", "4", "--pipefusion-degree", "2", "--num-pipeline-patch", "4"]]
JOB = ["--prompt", "a red circle", "--width", "256", "--height", "256", "--num-inference-steps", "1000", "--quiet"]
LIMIT_S = 2.0


def children(pid):
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ranks_of(process, count):
    """The ranks' processes, once all are there: the program itself is rank 0."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        found = [process.pid, *children(process.pid)]
        if len(found) == count:
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError(f"{count} ranks were not started")


def kill_one(build, model, plan, moment, pick, folder):
    before = set(os.listdir("/dev/shm"))
    command = [f"{build}/ditfleet", "generate", "--model", model, *JOB, "-o", f"{folder}/x.png", *plan]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    ranks = ranks_of(process, int(plan[1]))
    time.sleep(moment)
    assert process.poll() is None, process.communicate()[1]
    victim = int(pick * len(ranks))
    start = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{plan}: rank {victim}, killed after {moment:.2f} s: the others go on") from None
    while time.monotonic() < start + LIMIT_S and any(alive(p) for p in ranks):
        time.sleep(0.001)
    took = time.monotonic() - start
    where = f"{plan}: rank {victim}, killed after {moment:.2f} s"
    if victim > 0:
        assert process.returncode == 3 and "a rank process died" in errors, f"{where}: {process.returncode} {errors}"
    assert not [p for p in ranks if alive(p)], f"{where}: a rank lives on"
    assert set(os.listdir("/dev/shm")) <= before, f"{where}: {os.listdir('/dev/shm')}"
    return took


def main():
    build, source = os.environ["DITFLEET_BUILD"], os.environ["DITFLEET_SOURCE"]
    chance = random.Random(int(os.environ.get("KILLED_RANK_SEED", "1")))
    times = int(os.environ.get("KILLED_RANK_TIMES", "12"))
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(times):
            plan = PLANS[i % len(PLANS)]
            took.append(kill_one(build, f"{source}/ops/demo/model", plan, chance.uniform(0, 0.8), chance.random(),
                                 folder))
    print(f"killed_rank: {times} groups ended, the slowest after {max(took):.3f} s")


main()
