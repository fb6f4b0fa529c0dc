"""Serving without torch: the environment of `deployment/requirements-openvino.txt`, made anew, and what runs in it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
from conftest import ROOT, draw_photo, encoded

from deployment.archive import make_archive
from deployment.export import write_config
from deployment.handler import Handler
from deployment.server.processes import free_ports
from tests.test_server import answers, wait_for


def archived(store: tuple, folder: Path) -> Path:
    """`folder` with an archive of the model in `store`, a configuration and its folder."""
    config, source = store
    shutil.copytree(source, folder, dirs_exist_ok=True)
    write_config(config, folder)
    make_archive(folder)
    return folder


def serve(python: Path, model_store: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [python, "-m", "deployment.serve", f"--model-store={model_store}", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "SERVER"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env | environment, cwd=model_store, stderr=subprocess.PIPE, text=True)


def test_it_is_small_and_holds_no_torch(light_python):
    site = next((light_python.parent.parent / "lib").glob("python3*/site-packages"))
    packages = {path.name.split("-")[0] for path in site.glob("*.dist-info")}
    assert "openvino" in packages and not packages & {"torch", "torchvision", "torchserve", "fastai"}
    files = {path.stat().st_ino: path.stat().st_size for path in site.rglob("*") if path.suffix != ".pyc"}
    assert sum(files.values()) < 350e6


def test_it_serves_what_openvino_computes(light_python, int8, tmp_path):
    store = archived(int8, tmp_path)
    handler = Handler()
    handler.load(store)
    photo = encoded(draw_photo(3))
    expected = json.loads(handler.postprocess(infer(handler, photo)).body)
    port, metrics = free_ports(2)
    # It has no other server than uvicorn. With a cache OpenVINO changes the process's locale.
    cache = {"OPENVINO_CACHE_DIR": str(tmp_path / "cache")}
    process = serve(light_python, store, f"--port={port}", f"--metrics-port={metrics}", **cache)
    try:
        wait_for(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/ping"))
        answer = httpx.post(f"http://127.0.0.1:{port}/predictions/fastunet", content=photo)
        assert answer.json() == expected
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in log, log
    assert [*(tmp_path / "cache").glob("*.blob")]


def infer(handler: Handler, photo: bytes):
    job = handler.preprocess({"body": photo})
    handler.inference(job.items)
    return job


def test_an_archive_for_pytorch_gets_one_line(light_python, small_store, tmp_path):
    shutil.copytree(small_store, tmp_path, dirs_exist_ok=True)
    make_archive(tmp_path)
    port, metrics = free_ports(2)
    process = serve(light_python, tmp_path, f"--port={port}", f"--metrics-port={metrics}")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert log.strip() == "error: this runtime needs `torch`: pip install torch (No module named 'torch')"
