"""deployment/kserve.yaml: agrees with the image, and fits KServe's published schema."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICE = yaml.safe_load((ROOT / "deployment" / "kserve.yaml").read_text())
PREDICTOR = SERVICE["spec"]["predictor"]
KSERVE = "kserve==0.21.0"  # cannot live in this environment: it wants older protobuf and pandas

# Walks a resource along the types that KServe's and Kubernetes' own generated models declare.
CHECK = """
import json, re, sys
import kserve, kubernetes.client

def check(value, kind, path):
    if items := re.fullmatch(r"[lL]ist\\[(.+)\\]", kind):
        for i, item in enumerate(value):
            check(item, items[1], f"{path}[{i}]")
    elif values := re.fullmatch(r"[dD]ict[\\[(]\\w+, (.+)[\\])]", kind):
        for key, item in value.items():
            check(item, values[1], f"{path}.{key}")
    elif kind in ("str", "int", "float", "bool"):
        if type(value).__name__ != kind:
            sys.exit(f"{path}: {value!r} is no {kind}")
    elif kind != "object":
        model = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
        fields = {name: field for field, name in model.attribute_map.items()}
        for name, item in value.items():
            if name not in fields:
                sys.exit(f"{path}: {kind} has no field {name}")
            check(item, model.openapi_types[fields[name]], f"{path}.{name}")
        model(**{fields[name]: item for name, item in value.items()})  # raises for a required field that is missing

check(json.load(sys.stdin), sys.argv[1], "")
"""


def test_agrees_with_the_image():
    [container] = PREDICTOR["containers"]
    port = int(re.search(r"AIP_HTTP_PORT=(\d+)", DOCKERFILE)[1])
    assert container["ports"][0]["containerPort"] == port == int(container["env"][0]["value"])
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"] and SERVICE["metadata"]["name"] == "fastunet"
    ping = {"path": "/ping", "port": port}
    assert all(container[f"{kind}Probe"]["httpGet"] == ping for kind in ("startup", "readiness", "liveness"))
    assert f"--uid {PREDICTOR['securityContext']['runAsUser']} " in DOCKERFILE
    assert 1 <= PREDICTOR["minReplicas"] <= PREDICTOR["maxReplicas"]


def problem(resource: dict, kind: str) -> str:
    """What does not fit the type `kind` in `resource`; empty where all does."""
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    python = [*uv, "run", "--quiet", "--no-project", "--isolated", "--with", KSERVE, "python", "-c", CHECK, kind]
    return subprocess.run(python, input=json.dumps(resource), capture_output=True, text=True).stderr.strip()


@pytest.mark.image  # with the image's tests, as it fetches a package
def test_fits_the_published_schema():
    def found(predictor: dict) -> str:
        return problem(SERVICE | {"spec": {"predictor": PREDICTOR | predictor}}, "V1beta1InferenceService")

    assert found({}) == ""
    assert "has no field minReplica" in found({"minReplica": 1})
    assert "'4' is no int" in found({"maxReplicas": "4"})
