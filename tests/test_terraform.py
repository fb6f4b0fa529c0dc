"""The Terraform files against the schema of Google's provider, and the workflow's steps against the client.

`terraform validate` needs the provider itself, which is not at hand everywhere: its schema is recorded in samples/.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deployment.ai_platform.__main__ import parse_args

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deployment" / "terraform"
SCHEMA = json.loads((ROOT / "tests" / "samples" / "terraform.json").read_text())["resources"]
TEXT = "".join(path.read_text() for path in sorted(FOLDER.glob("*.tf")))
META = {"for_each", "depends_on", "lifecycle", "count", "provider"}


def resources(text: str) -> dict[str, dict]:
    """The resources in `text`, in the form of `terraform fmt`: arguments by name, blocks as dictionaries of theirs."""
    text = re.sub(r"<<-EOT\n.*?^\s*EOT$", '""', text, flags=re.M | re.S)
    found, stack = {}, [{}]
    for line in text.splitlines():
        line = re.sub(r"\s+#.*$", "", line).strip()
        if opened := re.fullmatch(r'(\w+)((?: "[^"]+")*) \{', line):
            names = re.findall(r'"([^"]+)"', opened[2])
            block: dict = {}
            if opened[1] == "resource":
                found[".".join(names)] = block
            stack[-1][names[-1] if opened[1] == "dynamic" else opened[1]] = block
            stack.append(block)
        elif argument := re.match(r'"?([\w.]+)"?\s+= (.*)', line):
            stack[-1][argument[1]] = argument[2]
            if argument[2].endswith(("{", "[", "([")):
                stack.append({})  # a map or a list, whose keys are the reader's
        elif line and set(line) <= set("}])"):
            stack.pop()
    return found


def check(name: str, given: dict, schema: dict) -> None:
    """Raises AssertionError for an argument that the schema does not have, or a required one that is missing."""
    given = given["content"] if "content" in given else given
    names = set(given) - META
    assert names <= set(schema), f"{name} has no {names - set(schema)}"
    for argument, known in schema.items():
        block = isinstance(known, dict)
        required = known.get("", False) if block else known
        assert argument in given or not required or argument == "", f"{name} lacks {argument}"
        if block and isinstance(given.get(argument), dict):
            check(f"{name}.{argument}", given[argument], known)


@pytest.mark.parametrize("name", resources(TEXT))
def test_resources_are_as_the_provider_has_them(name):
    check(name, resources(TEXT)[name], SCHEMA[name.split(".")[0]]["arguments"])


def test_what_is_referred_to_exists():
    made = resources(TEXT)
    for kind, name, attribute in re.findall(r"\b(google_\w+)\.(\w+)\.(\w+)", TEXT):
        assert f"{kind}.{name}" in made and attribute in SCHEMA[kind]["attributes"], f"{kind}.{name}.{attribute}"
    variables = set(re.findall(r'^variable "(\w+)"', TEXT, re.M))
    assert set(re.findall(r"\bvar\.(\w+)", TEXT)) == variables
    assert len(made) == TEXT.count('\nresource "') >= 20


def test_a_wrong_argument_is_found():
    wrong = resources('resource "google_vertex_ai_endpoint" "x" {\n  name = "1"\n  location = "a"\n  dns = true\n}\n')
    with pytest.raises(AssertionError, match="has no {'dns'}"):
        check("x", wrong["google_vertex_ai_endpoint.x"], SCHEMA["google_vertex_ai_endpoint"]["arguments"])
    with pytest.raises(AssertionError, match="lacks display_name"):
        check("x", {"name": "1", "location": "a"}, SCHEMA["google_vertex_ai_endpoint"]["arguments"])


@pytest.mark.skipif(not shutil.which("terraform"), reason="Terraform is not installed")
def test_terraform_reads_the_files():
    done = subprocess.run(["terraform", "fmt", "-check", "-diff", FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_uses_the_client_as_it_is():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "cloud.yml").read_text())
    assert workflow[True] == "workflow_dispatch"  # YAML reads `on` as true; nothing deploys by itself
    [job] = workflow["jobs"].values()
    assert job["permissions"] == {"contents": "read", "id-token": "write", "attestations": "write"}
    scripts = "\n".join(step.get("run", "") for step in job["steps"]).replace("\\\n", " ")
    commands = re.findall(r"python -m deployment\.ai_platform (.*?)(?: \||\)$|$)", scripts, re.M)
    assert [c.split()[0] for c in commands] == ["list", "upload", "deploy", "predict", "traffic", "traffic"]
    for command in commands:
        plain = command.replace("$WHERE", "--project=p").replace('"', "")
        parse_args(re.sub(r"\$\(.*|\$\{\{.*?\}\}|\$\w+", "1", plain).split())
