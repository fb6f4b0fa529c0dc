"""The page of `make page` in a real browser, in front of a real server: `make page-test`, with Debian's Chromium."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import CODES, draw_photo, encoded, uvicorn
from PIL import Image

from deployment import ai_platform
from deployment.answers import palette
from deployment.config import read_config
from deployment.photos import Preprocessor
from deployment.server.processes import free_ports, started
from deployment.server.torchserve import torchserve, workers_and_threads
from tests.vertex_stand_in import vertex_ai

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-page" / "bin" / "python"
CHROMIUM = shutil.which("chromium")
SAMPLE = ROOT / "sample" / "street_view_of_a_small_neighborhood.png"
SIZE = {"width": 1200, "height": 1005}
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM or not PYTHON.exists(), reason="needs chromium on the PATH, and `make page-test`"),
]


@contextlib.contextmanager
def serving_page(*arguments: str, folder: Path = ROOT, **environment: str):
    """The page that Python launches with `arguments`, on a free port; yields its URL once it answers."""
    (port,) = free_ports(1)
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
    env |= {"GRADIO_SERVER_PORT": str(port)} | environment
    with started([str(PYTHON), *arguments], env, cwd=folder) as process:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}", trust_env=False)
                break
            assert process.poll() is None and time.monotonic() < deadline, "the page did not come up"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url: str):
    """The page at `url` in a tab. It asks no other machine for anything, and has no error of its own."""
    tab = browser.new_page(viewport=SIZE)
    hosts, errors = set(), []
    tab.on("request", lambda request: hosts.add(httpx.URL(request.url).host))
    tab.on("pageerror", lambda error: errors.append(error))
    try:
        tab.goto(url)
        tab.get_by_text("Drop a photo").first.wait_for()
        yield tab
        assert hosts <= {"127.0.0.1", ""}, f"the page asks {hosts}"
        assert not errors
    finally:
        tab.close()


def upload(tab, name: str, data: bytes) -> None:
    tab.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def picture(tab, label: str) -> np.ndarray:
    """The pixels of the picture shown under `label`, uint8 (height, width, 3)."""
    image = tab.locator(".block", has=tab.get_by_text(label, exact=True)).locator("img").last
    image.wait_for()
    data = httpx.get(image.get_attribute("src"), trust_env=False).content
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def store(request) -> Path:
    """What `make demo` left, for a screenshot worth looking at; without it the store of the other tests."""
    demo = ROOT / "model_store"
    return demo if (demo / "fastunet.mar").exists() else request.getfixturevalue("model_store")


def test_a_photo_gets_its_mask(browser, store, tmp_path):
    with contextlib.ExitStack() as servers:
        route = servers.enter_context(torchserve(store, folder=tmp_path)) + "/predictions/fastunet"
        url = servers.enter_context(serving_page("-m", "space.page", route))
        form = {"files": {"data": SAMPLE.read_bytes()}, "data": {"size": "original"}}
        answer = httpx.post(route, **form, timeout=60, trust_env=False).json()
        mask = np.frombuffer(base64.b64decode(answer["base64_prediction"]), np.uint8).reshape(answer["shape"])
        with opened(browser, url) as tab:
            upload(tab, SAMPLE.name, SAMPLE.read_bytes())
            assert np.array_equal(picture(tab, "mask"), palette(read_config(store).classes)[mask])
            legend = tab.locator(".legend-item")
            assert legend.all_inner_texts() == list(answer["classes"])
            assert tab.get_by_text("answered in").inner_text().endswith(" ms")
            shares = tab.get_by_test_id("label-output-value").count() or tab.locator(".confidence-set").count()
            assert shares == min(len(answer["classes"]), 12)
            if store == ROOT / "model_store":
                tab.screenshot(path=ROOT / "sample" / "page.png")
            legend.first.hover()  # a name is shown alone
            tab.locator("img.mask.active").wait_for(timeout=5000)

            upload(tab, "cut.png", SAMPLE.read_bytes()[:5000])
            tab.get_by_text("the photo is damaged or cut short").wait_for()
            assert not legend.count(), "the last photo's mask is still there"


def test_no_server(browser):
    (port,) = free_ports(1)
    with serving_page("-m", "space.page", f"http://127.0.0.1:{port}") as url, opened(browser, url) as tab:
        tab.get_by_role("button", name="an example").or_(tab.locator(".gallery-item")).first.click()
        tab.get_by_text(f"No server answers at http://127.0.0.1:{port}").wait_for()


def test_it_opens_in_the_browser_and_ends_quietly(tmp_path):
    """$BROWSER is one that notes what it is to open."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{opened}"\n')
    browser.chmod(0o755)
    (port,) = free_ports(1)
    env = os.environ | {"GRADIO_SERVER_PORT": str(port), "BROWSER": str(browser)}
    command = [str(PYTHON), "-m", "space.page"]
    page = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (opened.exists() and opened.read_text()):
            assert page.poll() is None and time.monotonic() < deadline, "no page was opened"
            time.sleep(0.2)
        assert opened.read_text().startswith(f"http://127.0.0.1:{port}")
        page.send_signal(signal.SIGINT)
        said, _ = page.communicate(timeout=30)
        assert page.returncode in (0, 130) and "Traceback" not in said
    finally:
        page.kill()
        page.wait()


def test_the_form_names_the_colors_and_shows_shares_before_the_mask(browser, model_store, tmp_path):
    ports = dict(zip(("port", "metrics_port"), free_ports(2), strict=True))
    with uvicorn(model_store, tmp_path, **ports) as url:
        form = {"files": {"data": SAMPLE.read_bytes()}, "data": {"size": "original"}}  # what the page asks for first
        answer = httpx.post(f"{url}/predictions/fastunet", **form, timeout=60, trust_env=False).json()
        tab = browser.new_page()
        tab.goto(url)
        tab.locator("select[name=format] option").first.wait_for(state="attached")
        tab.locator("input[type=file]").set_input_files(SAMPLE)
        for format, names in ("overlay", CODES), ("json", answer["classes"]):
            tab.locator("select[name=format]").select_option(format)
            tab.get_by_role("button", name="Send").click()
            tab.locator("#answer img" if format == "overlay" else "#answer pre").wait_for()
            shown = tab.locator("#legend li")
            shares = [f" {100 * share:.1f} %" for share in answer["classes"].values()] if format == "json" else None
            expected = {name + share for name, share in zip(names, shares or [""] * len(names), strict=True)}
            assert set(shown.all_inner_texts()) == expected
            color = shown.first.evaluate("item => getComputedStyle(item, '::before').backgroundColor")
            first = next(i for i, name in enumerate(CODES) if name in names)
            assert color == "rgb({}, {}, {})".format(*palette(CODES)[first])
        text = tab.locator("#answer pre").inner_text()
        assert text.index('"classes"') < text.index('"base64_prediction"')
        tab.close()


# What the contract says for other tasks than segmentation, and what the page makes of it: its text and its bars.
OTHER_TASKS = {
    "classification": ({"label": "cat", "probabilities": {"cat": 0.9, "dog": 0.1}}, "cat", ["cat 90%", "dog 10%"]),
    "multi-label": (
        {"labels": ["car", "sign"], "probabilities": {"car": 0.8, "sign": 0.7, "bus": 0.2}},
        "car, sign",
        ["car 80%", "sign 70%", "bus 20%"],
    ),
    "no label": ({"labels": [], "probabilities": {"car": 0.25}}, "none of the labels", ["car 25%"]),
    "regression": ({"values": [12.5, -3]}, "12.5, -3", []),
}


@pytest.fixture(scope="module")
def contract_server():
    """A server that gives any answer of the contract; yields its URL and a list whose last item is what it answers."""
    answers = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(answers[-1]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with serving_page("-m", "space.page", f"http://127.0.0.1:{server.server_port}") as url:
            yield url, answers
        server.shutdown()


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_answers_of_other_tasks(browser, contract_server, task):
    url, answers = contract_server
    answer, heading, bars = OTHER_TASKS[task]
    answers.append(answer)
    with opened(browser, url) as tab:
        upload(tab, "photo.png", encoded(draw_photo(2)))
        tab.get_by_role("heading", name=heading, exact=True).wait_for()
        if bars:  # they come after the heading
            tab.locator(".confidence-set").nth(len(bars) - 1).wait_for()
        shown = [" ".join(text.split()) for text in tab.locator(".confidence-set").all_inner_texts()]
        assert shown == bars
        assert not tab.locator(".legend-item").count()


def test_points_are_drawn_where_they_are(browser, contract_server):
    url, answers = contract_server
    answers.append({"points": [[60, 200], [300, 20]]})
    photo = np.array(draw_photo(3))
    with opened(browser, url) as tab:
        upload(tab, "photo.png", encoded(Image.fromarray(photo)))
        changed = (picture(tab, "points") != photo).any(axis=2)
    ys, xs = np.nonzero(changed)
    near = [np.hypot(xs - x, ys - y) < 6 for x, y in answers[-1]["points"]]
    assert all(points.any() for points in near) and (near[0] | near[1]).all()


def test_a_mask_is_colored_by_its_names_whatever_order_the_classes_are_in(browser, contract_server):
    url, answers = contract_server
    names = ["Sky", "Road", "Tree", "Car", "Car"]
    mask = np.random.default_rng(0).choice(np.array([0, 1, 3, 4], np.uint8), (240, 320))
    answers.append(
        {
            "base64_prediction": base64.b64encode(mask.tobytes()).decode(),
            "shape": [240.0, 320.0],  # as the cloud's API has them
            "classes": {"Car": 0.5, "Road": 0.25, "Sky": 0.25},
            "names": names,
        }
    )
    with opened(browser, url) as tab:
        upload(tab, "photo.png", encoded(draw_photo(2)))
        assert np.array_equal(picture(tab, "mask"), palette(names)[mask])
        assert tab.locator(".legend-item").all_inner_texts() == ["Sky", "Road", "Car"]


def fastai_picture(store: Path, predict, photo: bytes) -> np.ndarray:
    """The mask of `learn.predict` at the photo's size, in colors."""
    config = read_config(store)
    mask = Preprocessor(config).to_image_size(predict(photo), Image.open(io.BytesIO(photo)).size)
    return palette(config.classes)[mask]


def test_an_endpoint_answers(browser, model_store, predict, photo):
    image = "us-central1-docker.pkg.dev/local-project/fastunet/serve:1"
    with vertex_ai({image: model_store}):
        ai_platform.connect()
        ai_platform.upload(image)
        ai_platform.deploy()
        with serving_page("-m", "space.page", "--endpoint", "fastunet") as url, opened(browser, url) as tab:
            upload(tab, "photo.png", photo)
            assert np.array_equal(picture(tab, "mask"), fastai_picture(model_store, predict, photo))
            upload(tab, "cut.png", photo[:2000])
            tab.get_by_text("the photo is damaged or cut short").wait_for()
        with serving_page("-m", "space.page", "--endpoint", "nobody") as url, opened(browser, url) as tab:
            upload(tab, "photo.png", photo)
            tab.get_by_text("The endpoint nobody does not answer").wait_for()


# The Space's packages come first, torch and torchvision from the environment of the tests; fastai must not be missed.
SPACE = """
import runpy, sys
sys.path.append(sys.argv[1])
sys.path.insert(0, "")
sys.modules["fastai"] = None
runpy.run_path("app.py", run_name="__main__")
"""


def test_the_space_answers_by_itself(browser, model_store, predict, photo, tmp_path, monkeypatch):
    for file in [*(ROOT / "space").iterdir(), model_store / "fastunet.mar", SAMPLE]:
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(workers_and_threads()[1]))  # as `predict` computes
    with serving_page("-c", SPACE, str(Path(np.__file__).parents[1]), folder=tmp_path) as url:
        with opened(browser, url) as tab:
            upload(tab, "photo.png", photo)
            assert np.array_equal(picture(tab, "mask"), fastai_picture(model_store, predict, photo))
            upload(tab, "cut.png", photo[:2000])
            tab.get_by_text("the photo is damaged or cut short").wait_for()
