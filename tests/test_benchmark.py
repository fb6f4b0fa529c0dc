"""The benchmark's own parts: the load generator against a server that is known, the checks, the form of the results."""

import base64
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import SMALL

from benchmark import contenders, gpu, load, peers, precisions, run, scaling, steps
from deployment.config import Config, read_config
from deployment.export import write_config
from deployment.export.convert import convert
from deployment.model import DynamicUnetDIY
from deployment.runtime import cores
from deployment.server.processes import free_ports

KEYS = {"rps", "p50_ms", "p95_ms", "p99_ms", "refused", "errors", "wrong_masks"}


@pytest.fixture
def server():
    """A server that answers after 20 ms with what was posted; `fail` and `garble` are called with each body.

    To a GET it answers with metrics.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        connections = set()
        fail = garble = staticmethod(lambda body: False)

        def do_GET(self):
            metrics = b'ts_inference_requests_total{model_name="fastunet"} 3.0\ninference_seconds_sum{} 0.25\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(metrics)))
            self.end_headers()
            self.wfile.write(metrics)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Handler.connections.add(self.client_address)
            time.sleep(0.02)
            self.send_response(500 if Handler.fail(body) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[::-1] if Handler.garble(body) else body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handler, httpd.url = Handler, f"http://127.0.0.1:{httpd.server_port}/predict"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


PHOTOS = [b"photo 0", b"photo 1", b"photo 2"]


def same(i: int, body: bytes) -> bool:
    return body == PHOTOS[i]


def test_clients_wait_for_their_answer_on_one_connection_each(server):
    result = load.run(server.url, PHOTOS, 4, 1.0, same, warm_up=0.2)
    assert set(result) == KEYS and result["errors"] == result["wrong_masks"] == 0
    assert 20 <= result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"]
    # closed loop: four clients that each wait for an answer of p50 cannot do more than this
    assert 0.4 * 4 / result["p50_ms"] * 1000 < result["rps"] < 1.2 * 4 / 0.020
    assert len(server.handler.connections) == 4


def test_errors_and_wrong_masks_are_counted(server):
    server.handler.fail = staticmethod(lambda body: body == PHOTOS[1])
    server.handler.garble = staticmethod(lambda body: body == PHOTOS[2])
    result = load.run(server.url, PHOTOS, 3, 0.6, same, warm_up=0)
    good = result["rps"] * 0.6
    assert result["errors"] == pytest.approx(good / 2, abs=5) and result["errors"] > 0
    assert result["wrong_masks"] == pytest.approx(good / 2, abs=5) and result["wrong_masks"] > 0


def test_a_client_that_is_told_to_come_again_waits_as_long_as_it_is_told():
    seen = []

    class Busy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(time.monotonic())
            self.send_response(503 if len(seen) == 1 else 200)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    result = load.run(f"http://127.0.0.1:{httpd.server_port}/", PHOTOS, 1, 1.2, lambda *_: True, warm_up=0, rounds=1)
    httpd.shutdown()
    assert result["refused"] == 1 and result["errors"] == 0 and result["rps"] > 0
    assert seen[1] - seen[0] >= 1


@pytest.mark.parametrize("best", sorted({1, cores()}))
def test_the_faster_number_of_workers_is_chosen(monkeypatch, best):
    @contextlib.contextmanager
    def contender(name, folder, workers):
        yield workers

    monkeypatch.setattr(contenders, "contender", contender)
    monkeypatch.setattr(contenders, "first_answer", lambda *_: b"")
    monkeypatch.setattr(load, "run", lambda workers, *_: {"rps": 2.0 if workers == best else 1.0})
    assert run.choose_workers("ray", [b""], same) == best


def test_a_server_that_is_gone_gives_errors_not_an_exception():
    result = load.run(f"http://127.0.0.1:{free_ports(1)[0]}/", PHOTOS, 2, 0.3, same, warm_up=0)
    assert result["rps"] == 0 and result["errors"] > 0


def test_slow_answers_are_waited_for(server):
    server.handler.garble = staticmethod(lambda body: time.sleep(0.4))
    result = load.run(server.url, PHOTOS, 2, 0.1, same, warm_up=0, rounds=1)
    assert result["rps"] > 0 and result["p50_ms"] >= 400


def test_no_proxy_stands_between_client_and_server(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen keeps the proxies of its first call
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.url)
    assert contenders.first_answer(server.url, PHOTOS[0], timeout=2) == PHOTOS[0]
    counted = steps.totals(server.server_port)
    assert counted["requests"] == 3 and counted["inference"] == 250
    assert load.run(server.url, PHOTOS, 1, 0.2, same, warm_up=0)["errors"] == 0


def test_the_generator_is_no_bottleneck():
    """A U-Net on two cores answers well under 100 requests/s; the generator does many times that."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), load.Echo)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    result = load.run(f"http://127.0.0.1:{httpd.server_port}/", [bytes(40000)], 8, 1, lambda i, body: True, warm_up=0.2)
    httpd.shutdown()
    assert result["rps"] > 500


def answer(mask: np.ndarray) -> bytes:
    return json.dumps({"base64_prediction": base64.b64encode(mask.tobytes()).decode()}).encode()


def test_every_pixel_is_checked_against_the_runtimes_own_mask():
    fastai = np.zeros((100, 200), np.uint8)
    int8 = fastai.copy()
    int8[:2] = 1
    masks = {"fastai": [fastai], run.FASTEST: [int8]}
    near = fastai.copy()
    near[0, 0] = 1
    assert run.Check("eager", masks)(0, answer(fastai)) and not run.Check("eager", masks)(0, answer(near))
    assert run.Check("openvino-fp32", masks)(0, answer(near)) and not run.Check("openvino-fp32", masks)(0, answer(int8))
    check = run.Check("ray", masks)
    assert check(0, answer(int8)) and not check(0, answer(fastai))
    check(0, answer(int8))
    assert check.agreement[0] == pytest.approx(0.98)
    for broken in (b"", b"{}", b'{"base64_prediction": "AAA="}', b"[1]"):
        assert not check(0, broken)


def test_results_have_the_promised_form(tmp_path, monkeypatch, server):
    rows = [load.run(server.url, PHOTOS, 2, 0.2, same, warm_up=0) for _ in range(3)]
    extra = {"cpu_cores": 1.5, "memory_mb": 700, "start_up_s": 3.2, "agreement": 1.0}
    served = run.median([row | extra for row in rows])
    alone = run.median([{**rows[0], "streams": 2}])
    loads = {"1": served, "8": served, run.BIG: served}
    results = dict.fromkeys(("baseline", "eager"), loads) | {"limit": {"1": alone, "8": alone}}
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    run.save("two cores", results)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == {"machine": "two cores", "rows": results} and [path.name for path in tmp_path.iterdir()] == [
        "results.json"
    ]
    for row in (row for clients in results.values() for row in clients.values()):
        assert set(row) >= KEYS and row["errors"] == 0 and row["rps"] > 0
    text = run.table(results)
    assert text.count("\n") == 1 + 8 and "| eager | 8 |" in text
    assert "| 12 MP photos, 8 clients |" in run.summary(results)
    run.plot(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_figures_of_results_json():
    results = json.loads(run.RESULTS.read_text())
    assert f"{results['machine']}:\n\n{run.summary(results['rows'])}" in run.README.read_text()
    assert (run.RESULTS.with_suffix(".png")).is_file()


def test_steps_are_read_from_the_servers_metrics(monkeypatch, model_store, photo):
    monkeypatch.setattr(steps, "BUILD", model_store.parent)
    row = steps.measure(model_store.name, 2, [photo], 0.5)
    parts = [row[step] for step in steps.STEPS]
    assert all(part > 0 for part in parts), row
    assert sum(parts) + row["rest"] == pytest.approx(row["ms of a request"])
    assert 1 <= row["photos in a batch"] <= 2 and row["inference"] > row["postprocess"]


def test_medians_add_up_errors():
    rows = [dict.fromkeys(KEYS, 0) | {"rps": rps, "errors": 1} for rps in (10, 30, 20)]
    assert run.median(rows) == dict.fromkeys(KEYS, 0) | {"rps": 20, "errors": 3, "runs": 3, "rps_spread": 20}


def test_a_server_ends_with_its_children(tmp_path):
    port = free_ports(1)[0]
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys, http.server\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), http.server.BaseHTTPRequestHandler).serve_forever()\n"
    )
    others = psutil.Process().children(recursive=True)  # the servers of other tests
    with contenders.server([sys.executable, str(script)], port):
        family = [process for process in psutil.Process().children(recursive=True) if process not in others]
        assert len(family) >= 2
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_server_that_fails_says_why():
    argv = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"):
        with contenders.server(argv, free_ports(1)[0]):
            pass


def test_without_an_exported_model_one_line_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"")
    options = ["--contenders", "eager", "--model-store", tmp_path, "--photos", tmp_path, "--calibrate", tmp_path]
    monkeypatch.setattr(sys, "argv", ["run", *map(str, options)])
    with pytest.raises(SystemExit, match="run `make demo` first") as end:
        run.main()
    assert "\n" not in str(end.value)


def test_a_model_store_of_another_version_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "fastunet.pth").touch()
    (tmp_path / "model-config.yaml").write_text("handler: {arch: resnet18, n_classes: 2, img_size: [8, 8], codes: []}")
    monkeypatch.setattr(sys, "argv", ["run", "--contenders", "eager", "--model-store", str(tmp_path)])
    with pytest.raises(SystemExit, match="unknown setting codes.*run `make demo` again") as end:
        run.main()
    assert "\n" not in str(end.value)


def test_only_jpegs_of_a_folder_are_sent(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("b.JPG", "a.jpeg", "c.png"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    assert run.photos(tmp_path) == [b"a.jpeg", b"b.JPG"]
    with pytest.raises(FileNotFoundError, match="no JPEG photos in"):
        run.photos(tmp_path / "labels")


def test_contenders_are_prepared_once(model_store, tmp_path):
    names, scenes, build = ["baseline", "eager", "openvino-fp32"], tmp_path / "scenes", tmp_path / "build"
    scenes.mkdir()
    for seed in range(5):
        run.draw(seed, (64, 96)).save(scenes / f"{seed}.png")
    contenders.prepare(names, model_store, build, scenes)
    archives = {name: build / name / "fastunet.mar" for name in names}
    assert {path.name for path in build.iterdir()} == {*names}
    for name, file in (("baseline", "baseline.json"), ("eager", "fastunet.pth"), ("openvino-fp32", "fastunet.xml")):
        assert file in zipfile.ZipFile(archives[name]).namelist()
    assert read_config(build / "openvino-fp32").accuracy["agreement"] > 0.9999
    assert read_config(build / "eager") == dataclasses.replace(read_config(model_store), precision="fp32")

    made = {name: path.stat().st_mtime_ns for name, path in archives.items()}
    contenders.prepare(names, model_store, build, scenes)
    assert made == {name: path.stat().st_mtime_ns for name, path in archives.items()}
    os.utime(archives["eager"], (0, 0))
    contenders.prepare(names, model_store, build, scenes)
    assert [name for name, path in archives.items() if path.stat().st_mtime_ns != made[name]] == ["eager"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a small model for OpenVINO and its configuration."""
    folder = tmp_path_factory.mktemp("converted")
    config = Config("squeezenet1_1", 3, (32, 32), resize={"size": (32, 32)}, classes=["a", "b", "c"])
    torch.manual_seed(0)
    torch.save(DynamicUnetDIY("squeezenet1_1", 3, (32, 32)).state_dict(), folder / "fastunet.pth")
    write_config(convert(config, folder), folder)
    return folder


def test_precisions_are_measured_on_photos_that_did_not_calibrate(small_store, camvid_folder, monkeypatch):
    monkeypatch.setattr(precisions, "milliseconds", lambda *_: 1.0)
    lines = [line.strip("| ").split(" | ") for line in precisions.rows(SMALL, small_store, camvid_folder)]
    head, fp32, *others = lines[0], *lines[2:]
    assert head[0] == "resnet18, 5 photos to calibrate" and "3 validation" in head[2] and "2 of training" in head[4]
    assert fp32 == ["fp32", "1.0", "100.00%", "0.00", "100.00%", "0.00"]
    agreement = {row[0]: float(row[2].rstrip("%")) for row in others}
    assert len(agreement) == 7 and all(30 < share <= 100 for share in agreement.values())
    assert agreement["int8, every layer"] < 100


def test_the_limit_is_measured_in_process(converted):
    results = {}
    for name in contenders.ALONE:
        command = [sys.executable, "-m", "benchmark.limit", name, str(converted), "--seconds=0.2"]
        finished = subprocess.run(command, check=True, cwd=contenders.ROOT, capture_output=True, text=True)
        result = results[name] = json.loads(finished.stdout)
        assert set(result) == {"1", "8"} and all(set(row) >= KEYS for row in result.values())
        assert all(row["rps"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"] for row in result.values())
    assert results["limit"]["8"]["rps"] >= results["limit"]["1"]["rps"]


def test_peers_answer_with_the_handlers_own_mask(converted):
    image = run.photos(None, 1)[0]
    handler = peers.load(str(converted))
    jobs = [peers.read(handler, body) for body in (image, b"no photo", image)]
    peers.infer(handler, jobs)
    good, bad, other = map(handler.postprocess, jobs)
    assert (good.status, bad.status) == (200, 400) and other == good
    answered = json.loads(good.body)
    assert answered["shape"] == [32, 32]
    names = ["openvino-fp32"]
    masks = run.references(converted, names, [image])
    assert run.Check(names[0], masks)(0, json.dumps(answered).encode())


def test_replicas_leave_headroom():
    assert [scaling.replicas(load, 50) for load in (1, 30, 31, 1000)] == [1, 1, 2, 34]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    gpu.main([])
    assert capsys.readouterr().out == "no GPU here: nothing measured\n"


@pytest.mark.bench
def test_ours_beats_the_baseline_with_the_same_masks(tmp_path):
    """The real thing, on the model in model_store/: some minutes."""
    command = [sys.executable, "-m", "benchmark.run", "--contenders", "baseline,eager,openvino-int8,limit"]
    subprocess.run([*command, "--clients", "1,8", "--repeat", "1"], check=True, cwd=contenders.ROOT, env=os.environ)
    results = json.loads(Path(run.RESULTS).read_text())["rows"]
    for name in ("baseline", "eager", "openvino-int8"):
        for row in results[name].values():
            assert row["errors"] == row["wrong_masks"] == 0
    assert results["openvino-int8"]["8"]["rps"] > results["eager"]["8"]["rps"] > results["baseline"]["8"]["rps"]
