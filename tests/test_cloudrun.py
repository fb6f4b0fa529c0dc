"""deployment/cloudrun.yaml: agrees with the image, and fits Cloud Run's own description of its API."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deployment.serve import cloud_port

ROOT = Path(__file__).parents[1]
SERVICE = yaml.safe_load((ROOT / "deployment" / "cloudrun.yaml").read_text())
SPEC = SERVICE["spec"]["template"]["spec"]
CLIENT = "google-api-python-client==2.187.0"  # its wheel holds the API's description, for use without a network

CHECK = """
import json, sys
from pathlib import Path
import googleapiclient

documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
schemas = json.loads((documents / "run.v1.json").read_text())["schemas"]
python = {"string": str, "integer": int, "boolean": bool}

def check(value, schema, path):
    if "$ref" in schema:
        schema = schemas[schema["$ref"]]
    kind = schema.get("type")
    if kind == "array":
        for i, item in enumerate(value):
            check(item, schema["items"], f"{path}[{i}]")
    elif "properties" in schema:
        for name, item in value.items():
            if name not in schema["properties"]:
                sys.exit(f"{path}: {schema['id']} has no field {name}")
            check(item, schema["properties"][name], f"{path}.{name}")
    elif "additionalProperties" in schema:
        for name, item in value.items():
            check(item, schema["additionalProperties"], f"{path}.{name}")
    elif kind in python and type(value) is not python[kind]:
        sys.exit(f"{path}: {value!r} is no {kind}")

check(json.load(sys.stdin), {"$ref": "Service"}, "")
"""


def test_agrees_with_the_image():
    [container] = SPEC["containers"]
    [port] = [port["containerPort"] for port in container["ports"]]
    assert port == int(re.search(r"AIP_HTTP_PORT=(\d+)", (ROOT / "Dockerfile").read_text())[1])
    assert (
        container["startupProbe"]["httpGet"] == container["livenessProbe"]["httpGet"] == {"path": "/ping", "port": port}
    )


def test_the_port_of_cloud_run_goes_first(monkeypatch):
    for name in ("K_SERVICE", "PORT", "AIP_HTTP_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cloud_port() is None
    monkeypatch.setenv("PORT", "9000")
    assert cloud_port() is None  # a shell's own PORT must not open the server to the outside
    monkeypatch.setenv("AIP_HTTP_PORT", "8080")
    assert cloud_port() == "8080"
    monkeypatch.setenv("K_SERVICE", "fastunet")
    assert cloud_port() == "9000"


@pytest.mark.image  # with the image's tests, as it fetches a package
def test_fits_the_published_schema():
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    python = [*uv, "run", "--quiet", "--no-project", "--isolated", "--with", CLIENT, "python", "-c", CHECK]

    def problem(service: dict) -> str:
        return subprocess.run(python, input=json.dumps(service), capture_output=True, text=True).stderr.strip()

    def changed(**spec) -> dict:
        return SERVICE | {"spec": {"template": {"spec": SPEC | spec}}}

    assert problem(SERVICE) == ""
    assert "RevisionSpec has no field timeout" in problem(changed(timeout=1))
    assert "'8' is no integer" in problem(changed(containerConcurrency="8"))
