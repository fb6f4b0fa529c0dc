"""deployment/kuberay.yaml: agrees with the image and the pins, and fits KubeRay's schema and Kubernetes' types."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from test_kserve import ROOT, problem

SCHEMA = json.loads((Path(__file__).parent / "samples" / "kuberay.json").read_text())["RayJob"]
JOB = yaml.safe_load((ROOT / "deployment" / "kuberay.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]


def test_agrees_with_the_image_and_the_pins():
    assert f"ray[data]=={CLUSTER['rayVersion']}\n" in (ROOT / "deployment/requirements-bulk.txt").read_text()
    images = {container["image"] for group in GROUPS for container in group["template"]["spec"]["containers"]}
    assert len(images) == 1  # one Python and one Ray on all nodes
    [user] = {group["template"]["spec"]["securityContext"]["runAsUser"] for group in GROUPS}
    assert f"--uid {user} " in (ROOT / "Dockerfile").read_text()
    [workers] = CLUSTER["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]  # actors are counted at the start
    command = shlex.split(JOB["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "deployment.bulk"] and command[-2:] == ["--address", "auto"]


def test_fits_the_schema():
    jsonschema.validate(JOB, SCHEMA)
    text = yaml.safe_dump(JOB)
    for right, wrong in [
        ("ttlSecondsAfterFinished: 60", "ttlSeconds: 60"),
        ("num-cpus: '0'", "num-cpus: 0"),
        ("rayVersion: 2.60.0", "rayVersion: 2.6"),
        ("groupName: workers", "name: workers"),
        ("mode: token", "mode: tokens"),
    ]:
        assert right in text
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text.replace(right, wrong)), SCHEMA)


@pytest.mark.image  # with the image's tests, as it fetches a package
def test_pods_fit_kubernetes_types():
    for group in GROUPS:
        assert problem(group["template"], "V1PodTemplateSpec") == ""
    wrong = re.sub("serviceAccountName", "serviceAccountNames", json.dumps(GROUPS[0]["template"]))
    assert "has no field serviceAccountNames" in problem(json.loads(wrong), "V1PodTemplateSpec")
