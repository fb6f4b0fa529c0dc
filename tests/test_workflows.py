"""Files for GitHub and Cloud Build: linted, pinned, in agreement with the repository. None of it is run here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import deployment

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
USES = [
    pytest.param(line, id=f"{path.stem}: {line[:30]}")
    for path in WORKFLOWS
    for line in re.findall(r"^ *-? *uses: (?!\./)(.*)$", path.read_text(encoding="utf-8"), re.M)
]
SCHEMAS = {  # of SchemaStore, as check-jsonschema brings them
    "github-workflows": WORKFLOWS,
    "dependabot": [GITHUB / "dependabot.yml"],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "github-issue-forms": sorted({*(GITHUB / "ISSUE_TEMPLATE").glob("*.yml")} - {GITHUB / "ISSUE_TEMPLATE/config.yml"}),
    "cloudbuild": [ROOT / "cloudbuild.yaml"],
}
newer = pytest.mark.skipif(sys.version_info < (3, 11), reason="these linters need Python 3.11")


@newer
def test_zizmor_finds_nothing():
    command = [Path(sys.executable).parent / "zizmor", "--offline", "--no-progress", "--min-severity=low", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@newer
@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_have_the_form_that_their_reader_wants(schema):
    from check_jsonschema import main  # in this process: it takes seconds to import
    from click.testing import CliRunner

    done = CliRunner().invoke(main, ["--builtin-schema", f"vendor.{schema}", *map(str, SCHEMAS[schema])])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("line", USES)
def test_actions_are_pinned_by_commit_with_their_version(line):
    assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)


def test_an_action_has_one_version_everywhere():
    pins = {tuple(param.values[0].split("@")) for param in USES}
    assert len({name for name, _ in pins}) == len(pins) and len(USES) > 15


def test_dependabot_looks_at_each_file_of_requirements_and_waits():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text(encoding="utf-8"))["updates"]
    assert all(update["cooldown"]["default-days"] >= 7 for update in updates)
    [pip] = [update for update in updates if update["package-ecosystem"] == "pip"]
    listed = subprocess.run(["git", "ls-files", "*requirements*.txt"], cwd=ROOT, capture_output=True, text=True)
    places = {"/" if "/" not in file else f"/{file.split('/')[0]}" for file in listed.stdout.split()}
    assert places == {*pip["directories"]}


def test_the_release_is_of_one_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.M)
    assert sections[0] == ("Unreleased", "") and all(date for _, date in sections[1:])
    released = [version for version, _ in sections[1:]]
    assert re.fullmatch(r"\d+\.\d+\.\d+", deployment.__version__)
    assert not released or released[0] == deployment.__version__
    kinds = set(re.findall(r"^### (.*)$", changelog, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_notes_of_a_release_are_its_section(tmp_path):
    """The very command of the workflow."""
    script = (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    [command] = re.findall(r"(awk -v version=.*) CHANGELOG\.md > notes\.md", script)
    (tmp_path / "c.md").write_text(
        "## [Unreleased]\n\nnew\n\n## [1.0.0] - 2026-12-01\n\n### Added\n\n- all\n\n## [0.9.0] - x\nold\n"
    )
    done = subprocess.run(
        ["sh", "-c", f"{command} c.md"], cwd=tmp_path, capture_output=True, text=True, env={"VERSION": "1.0.0"}
    )
    assert done.stdout.split() == ["###", "Added", "-", "all"]


def test_cloud_build_signs_where_the_image_comes_from():
    build = yaml.safe_load((ROOT / "cloudbuild.yaml").read_text(encoding="utf-8"))
    assert build["options"]["requestedVerifyOption"] == "VERIFIED" and build["images"]
