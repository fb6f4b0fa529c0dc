"""The builds of PyTorch that can be installed. `python tests/test_torch_builds.py` asks the indexes for the wheels."""

import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Of PyTorch's releases the builds that have wheels. Where this is from stands in torch-builds.txt.
WHEELS = {
    "2.14": {"cpu", "cu126", "cu130", "cu132", "pypi"},
    "2.15": {"cpu", "cu130", "cu132", "pypi"},
}
DRIVERS = {"12": "525", "13": "580"}  # by CUDA's major version


def builds() -> dict[str, tuple[str, str, str]]:
    """By build the versions of torch and torchvision, and the driver, as torch-builds.txt has them."""
    lines = [line.split() for line in (ROOT / "torch-builds.txt").read_text().splitlines()]
    return {name: tuple(rest) for name, *rest in lines if name != "#"}


@pytest.mark.parametrize("build", builds())
def test_there_are_wheels_of_what_is_installed(build):
    torch, _, driver = builds()[build]
    assert build in WHEELS[torch.rpartition(".")[0]]
    cuda = "13" if build == "pypi" else build[2:4]
    assert driver == ("none" if build == "cpu" else DRIVERS[cuda])


def test_the_other_files_say_the_same():
    for path in ("requirements.txt", "deployment/requirements.txt"):
        text = (ROOT / path).read_text()
        pinned = re.search(r'^torch==(\S+); python_version >= "3.11"', text, re.M)[1]
        vision = re.search(r"^torchvision==(\S+)", text, re.M)[1]
        for build, (torch, torchvision, _) in builds().items():
            assert torchvision == vision and (torch == pinned or build == "cu126")
    for path in ("README.md", "deployment/ai_platform/README.md", "Dockerfile", "cloudbuild.yaml", "Makefile"):
        named = set(re.findall(r"TORCH_BACKEND=(\w+)", (ROOT / path).read_text()))
        assert named <= {*builds()}, path


def write_wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A wheel without content, as PyTorch's index has it."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("script", ["Dockerfile", "install.sh"])
@pytest.mark.parametrize("build", ["cpu", "cu126"])
def test_the_version_of_a_build_takes_the_place_of_the_pins(script, build, tmp_path):
    """The very commands of the script, on an index with as many wheels as CUDA 12.6 has."""
    text = (ROOT / script).read_text()
    pins = re.search(r"grep -vE ('\S+') constraints.txt", text)[1]
    awk = re.search(r"awk -v build=\S+ ('.*') torch-builds.txt", text)[1]
    (tmp_path / "requirements.txt").write_text(
        "".join(line for line in (ROOT / "requirements.txt").open() if re.match("torch(vision)?=", line))
    )
    write_wheel(tmp_path, "torch", f"{builds()[build][0]}+{build}")
    write_wheel(tmp_path, "torchvision", f"{builds()[build][1]}+{build}", "Requires-Dist: torch>=2.14.0\n")
    shell = (
        f"grep -vE {pins} '{ROOT}/constraints.txt' > pins.txt;"
        f"awk -v build={build} {awk} '{ROOT}/torch-builds.txt' > torch.txt;"
        f"'{sys.executable}' -m uv pip compile --quiet --no-header --no-annotate --offline --no-index --find-links . "
        f"--python-version 3.11 --constraints pins.txt --overrides torch.txt requirements.txt"
    )
    run = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    torch, torchvision, _ = builds()[build]
    assert run.stdout.split() == [f"torch=={torch}+{build}", f"torchvision=={torchvision}+{build}"], run.stderr


def test_cloud_build_takes_no_other_build():
    assert "--build-arg=TORCH_FALLBACK=no" in (ROOT / "cloudbuild.yaml").read_text()
    assert re.search(r'\[ "\$TORCH_FALLBACK" = yes \] \|\| exit 1', (ROOT / "Dockerfile").read_text())


def main() -> None:
    """Print of each build whether its index has the wheels for Python 3.11 on Linux; exit with 1 where one has not."""
    missing = False
    for build, versions in builds().items():
        for package, version in zip(("torch", "torchvision"), versions, strict=False):
            if build == "pypi":
                url, name = f"https://pypi.org/simple/{package}/", f"{package}-{version}-cp311-cp311-manylinux"
            else:
                url, name = (
                    f"https://download.pytorch.org/whl/{build}/{package}/",
                    f"{package}-{version}%2B{build}-cp311",
                )
            try:
                with urllib.request.urlopen(url, timeout=30) as answer:
                    found = name in answer.read().decode()
            except OSError as error:
                sys.exit(f"{url}: {error}")
            missing = missing or not found
            print(f"{build} {package} {version}: {'there' if found else 'MISSING'}")
    sys.exit(missing)


if __name__ == "__main__":
    main()
