"""manifests.py DIR FAMILIES SUPERVISOR MODEL: what the manifests in DIR rely on is so.

FAMILIES: a file with the names of the metrics that a supervisor serves; SUPERVISOR: its program; MODEL: a model's directory.
"""
import configparser
import glob
import os
import re
import subprocess
import sys
import tempfile

import yaml

folder, families, supervisor, model = sys.argv[1:]
families = set(open(families).read().split())
documents = [(os.path.basename(path), d) for path in sorted(glob.glob(folder + "/*.yaml"))
             for d in yaml.safe_load_all(open(path))]
found = {}
for name, d in documents:
    assert d["apiVersion"] and d["kind"] and d["metadata"]["name"], name
    found.setdefault(d["kind"], []).append((name, d))
assert {k: len(v) for k, v in found.items()} == {"Secret": 2, "Deployment": 2, "Service": 1, "ScaledObject": 2}, found.keys()


def conf_of(text):
    """The configuration, which the supervisor itself has taken."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as f:
        f.write(text.replace("/models/demo", model))
        f.flush()
        subprocess.run([supervisor, "--config", f.name, "--check"], check=True, stdout=subprocess.DEVNULL)
    conf = configparser.ConfigParser()
    conf.read_string(text)
    return conf


confs = {d["metadata"]["name"]: conf_of(d["stringData"]["ditfleet.conf"]) for _, d in found["Secret"]}
deployments = {d["metadata"]["name"]: d for _, d in found["Deployment"]}
for name, d in deployments.items():
    pod, conf = d["spec"]["template"], confs[name]
    container, = pod["spec"]["containers"]
    port = int(conf["metrics"]["listen"].rpartition(":")[2])
    assert conf["metrics"]["listen"].startswith("0.0.0.0:"), name  # the pod's address, not its loopback
    assert d["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"], name
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port), name
    assert container["ports"] == [{"name": "metrics", "containerPort": port}], name
    assert container["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}, name
    assert "livenessProbe" not in container, name
    assert container["command"][1:] == ["--config", "/etc/ditfleet/ditfleet.conf"], name
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}, name
    secret, = [v["secret"]["secretName"] for v in pod["spec"]["volumes"] if "secret" in v]
    assert secret == name, name

worker, conf = deployments["ditfleet-worker"], confs["ditfleet-worker"]
grace = float(conf["restart"]["grace"].removesuffix("s"))
assert worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= grace + 5  # RELEASE_SECONDS of the supervisor
assert "replicas" not in worker["spec"]  # KEDA's
assert confs["ditfleet-queue"].sections() == ["redis", "metrics"]  # a node without groups
assert deployments["ditfleet-queue"]["spec"]["replicas"] >= 1
pool = conf["group gpu"]["model"].partition("=")[0]
(_, service), = found["Service"]
assert service["spec"]["selector"] == deployments["ditfleet-queue"]["spec"]["template"]["metadata"]["labels"]

for name, d in found["ScaledObject"]:
    assert d["spec"]["scaleTargetRef"]["name"] == "ditfleet-worker" and d["spec"]["minReplicaCount"] == 0, name
    for trigger in d["spec"]["triggers"]:
        about = trigger["metadata"]
        assert all(isinstance(v, str) for v in about.values()), name  # KEDA takes text only
        text = about["query"] if trigger["type"] == "prometheus" else about["valueLocation"]
        names = set(re.findall(r"ditfleet_\w+", text))
        assert "ditfleet_backlog_gpu_seconds" in names and names <= families, (name, names - families)
        assert 'pool="%s"' % pool in text, name
        if trigger["type"] == "metrics-api":
            host, port = re.fullmatch(r"http://([^:]+):(\d+)/metrics", about["url"]).groups()
            assert host == service["metadata"]["name"] and int(port) == service["spec"]["ports"][0]["port"], name
    names = [t["name"] for t in d["spec"]["triggers"] if "name" in t]
    assert d["spec"]["advanced"].get("scalingModifiers", {"formula": ""})["formula"] == " + ".join(names), name
named = set(re.findall(r"ditfleet_\w+", open(folder + "/README.md").read()))
assert named <= families, named - families
print("manifests: ok")
