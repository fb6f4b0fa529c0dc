"""Every gcloud line that a reader may copy has a command and options that gcloud's own reference knows."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from google.api_core import exceptions
from google.rpc import error_details_pb2

from deployment.ai_platform.advice import remedy
from deployment.ai_platform.client import PROBE_PERIOD, PROBE_TIMEOUT, STARTUP_PROBE

ROOT = Path(__file__).parent.parent
REFERENCE = json.loads((ROOT / "tests" / "samples" / "gcloud.json").read_text())
NOTEBOOK = ROOT / "notebook" / "04_AI_Platform.ipynb"
PLACES = {
    "README": (ROOT / "deployment/ai_platform/README.md").read_text(),
    "notebook 04": "\n".join("".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]),
}


def gcloud_lines(text: str) -> list[str]:
    """The gcloud commands in the code blocks of `text`, continued lines joined; those inside other commands, too."""
    blocks = re.findall(r"^```shell\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inner = [command for line in lines for command in re.findall(r"\$\((gcloud (?:[^()']|'[^']*')*)\)", line)]
    return [line for line in lines if line.startswith("gcloud ")] + inner


def parsed(line: str) -> tuple[str, dict[str, str]]:
    """The command and the options of a gcloud line.

    Raises:
        ValueError: gcloud's reference has no such command, or the command no such option.
    """
    words = shlex.split(line, comments=True)[1:]
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    command = next((c for n in range(len(names), 0, -1) if (c := " ".join(names[:n])) in REFERENCE["commands"]), None)
    if command is None:
        raise ValueError(f"there is no command in {line}")
    options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    known = {*REFERENCE["commands"][command], *REFERENCE["everywhere"]}
    if unknown := set(options) - known:
        raise ValueError(f"{command} has no {', '.join(unknown)}")
    return command, options


LINES = [
    pytest.param(line, id=f"{place}: {line[:60]}") for place, text in PLACES.items() for line in gcloud_lines(text)
]


@pytest.mark.parametrize("line", LINES)
def test_gcloud_knows_the_command_and_its_options(line):
    command, options = parsed(line)
    if command == "ai endpoints deploy-model":  # without it the split stays unset, and predictions get 400
        assert "0" in dict(share.split("=") for share in options["--traffic-split"].split(","))


def test_the_first_upload_has_the_probe_of_the_client():
    text = PLACES["notebook 04"]
    [probe] = re.findall(r"^PROBE='(.*)'$", text, re.M)
    assert probe == STARTUP_PROBE[-1].replace(" 2>/dev/null", "")
    first = next(line for line in gcloud_lines(text) if line.startswith("gcloud ai models upload"))
    _, options = parsed(first)
    assert options["--container-startup-probe-exec"] == "sh,-c,$PROBE"
    assert options["--container-startup-probe-period-seconds"] == str(PROBE_PERIOD)
    assert options["--container-startup-probe-timeout-seconds"] == str(PROBE_TIMEOUT)


@pytest.mark.parametrize("command", ["upload", "deploy", "predict", "batch", "traffic", "list", "delete"])
def test_advice_is_gclouds_too(command):
    info = [error_details_pb2.ErrorInfo(reason=f"{of}_DISABLED") for of in ("SERVICE", "BILLING")]
    info.append(error_details_pb2.ErrorInfo(reason="USER_PROJECT_DENIED"))
    errors = [exceptions.PermissionDenied("no", error_info=one) for one in (None, *info)]
    errors += [kind("no") for kind in (exceptions.Unauthenticated, exceptions.NotFound, exceptions.FailedPrecondition)]
    advice = [
        remedy(error, command, "mine", image="us-central1-docker.pkg.dev/mine/fastunet/serve:1") for error in errors
    ]
    advice += [remedy(exceptions.ResourceExhausted("no"), command, "mine", accelerator=a) for a in ("none", "H100")]
    lines = re.findall(r"gcloud .*?(?=\n|, and|\)| names QUOTA| \(|$)", "\n".join(advice))
    assert len(lines) >= 5
    for line in lines:
        parsed(line)


def test_wrong_lines_are_found():
    for line in ("gcloud ai endpoints deploy ID", "gcloud ai endpoints create --dedicated", "gcloud run"):
        with pytest.raises(ValueError):
            parsed(line)
    assert len(LINES) > 30


def test_the_build_shows_its_log_and_the_image_brings_no_driver_of_its_own():
    """Without an account of one's own CLOUD_LOGGING_ONLY hides the log; cuda-compat first in the path broke images."""
    assert "CLOUD_LOGGING_ONLY" not in (ROOT / "cloudbuild.yaml").read_text(encoding="utf-8")
    assert "compat" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")
