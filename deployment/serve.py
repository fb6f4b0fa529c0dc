"""Start a server for the archive in a model store, in the foreground: TorchServe, or Starlette on uvicorn.

Requests in flight are answered before it stops. The port opens once an answer can be given. TorchServe itself listens
on another one, seconds before a worker is ready: our own is that of the light front before it.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import socket
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote

from .archive import check_digest, fetch, find_archive, runtime_of
from .server.front import open_front
from .server.processes import free_ports, own_folder, own_route, reserve_port
from .server.torchserve import DIRECT, command, ignored_variables, is_ready, run, served_name

SERVERS = ("torchserve", "uvicorn")
SAMPLE = "sample/street_view_of_a_small_neighborhood.png"  # of this repository


def cloud_port() -> str | None:
    """The port that Cloud Run (PORT) or AI Platform (AIP_HTTP_PORT) asks for; None elsewhere.

    Many set PORT for other ends, and the port is open to the outside: hence Cloud Run's other sign, K_SERVICE.
    """
    return os.environ.get("PORT" if "K_SERVICE" in os.environ else "AIP_HTTP_PORT")


def port_number(value: str) -> int:
    """`value` as the number of a TCP port; raises argparse.ArgumentTypeError where it is none."""
    if value.isdecimal() and 1 <= int(value) <= 65535:
        return int(value)
    raise argparse.ArgumentTypeError(f"{value} is no port: give 1 to 65535")


def parse_args() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m deployment.serve",
        description="Serve an archive, in the foreground, on loopback.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    in_cloud = cloud_port()  # in a container of theirs: reachable from outside
    parser.add_argument(
        "--server",
        choices=SERVERS,
        default=os.environ.get("SERVER") or ("torchserve" if importlib.util.find_spec("ts") else "uvicorn"),
        help="TorchServe, or Starlette on uvicorn",
    )
    parser.add_argument("--model-store", default="model_store", help="folder of the archive")
    parser.add_argument("--name", default=os.environ.get("MODEL_NAME"), help="of the model (default: the archive's)")
    parser.add_argument("--host", default="0.0.0.0" if in_cloud else "127.0.0.1", help="address of the predictions")
    parser.add_argument("--port", type=port_number, default=in_cloud or 8080, help="port of the predictions")
    parser.add_argument("--management-port", type=port_number, default=8081, help="TorchServe's, on loopback")
    parser.add_argument("--metrics-port", type=port_number, default=8082, help="port of the metrics for Prometheus")
    parser.add_argument("--metrics-host", default="127.0.0.1", help="address of the metrics, which need no token")
    parser.add_argument("--auth", action="store_true", help="ask for a token; they are written to key_file.json")
    parser.add_argument("--require-gpu", action="store_true", help="do not serve on the CPU (REQUIRE_GPU=1)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="start nothing: exit with 0 if the server on this machine has a worker that is ready, else with 1",
    )
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, and for a SERVER that is none: argparse does not look."""
    if options.server not in SERVERS:
        raise ValueError(f"SERVER={options.server}: choose {' or '.join(SERVERS)}")
    ports = [options.port, options.metrics_port]
    if options.server == "torchserve":
        ports.append(options.management_port)
    for port in ports:
        if ports.count(port) > 1:
            names = "--port, --metrics-port and, for TorchServe, --management-port"
            raise ValueError(f"port {port} is asked for twice: give {names} different numbers")


def announce(url: str, key_file: Path | None) -> Callable[[], None]:
    """Print what starts, and where the tokens for it are; return what prints how to call it, once it is ready."""
    print(f"starting {url}")
    if key_file:
        print(f"tokens: {key_file}")
    sys.stdout.flush()
    photo = SAMPLE if Path(SAMPLE).is_file() else "PHOTO.png"
    token = ' -H "Authorization: Bearer TOKEN"' if key_file else ""
    where = f"  (TOKEN: the key of `inference` in {key_file})" if key_file else ""
    return partial(print, f"ready: curl -T {photo}{token} {url}{where}", flush=True)


def is_healthy(port: int) -> bool:
    """Whether the server on loopback's `port` says that it can answer: on uvicorn it says so only when it can."""
    try:
        with DIRECT.open(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def is_open(host: str, port: int) -> bool:
    """Whether somebody listens on this machine's `port` at `host`."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def can_answer(options: argparse.Namespace, folder: Path) -> bool:
    """What --check asks: whether the server that was started with the same options in `folder` can answer."""
    if options.server == "uvicorn":
        return is_healthy(options.port)
    if not is_open(options.host, options.port):
        return False
    name = options.name or served_name(options.management_port, folder)
    return is_ready(options.management_port, folder, name)


def check_gpu(archive: Path) -> None:
    """Raises RuntimeError where `archive` would be served on the CPU."""
    if runtime_of(archive) != "eager":
        raise RuntimeError(f"REQUIRE_GPU=1, but {archive.name} is made for OpenVINO, which computes on the CPU")
    from .runtime.pytorch import choose_device

    choose_device(0)


def serve_on_uvicorn(archive: Path, name: str, options: argparse.Namespace, key_file: Path | None) -> int:
    """Serve until a signal comes; returns the exit status."""
    from .server.app import serve_archive

    public = reserve_port(options.host, options.port)
    reserve_port(options.metrics_host, options.metrics_port).close()
    ready = announce(f"http://{options.host}:{options.port}/predictions/{quote(name)}", key_file)
    serve_archive(archive, name, public, (options.metrics_host, options.metrics_port), key_file, ready)
    return 0


def serve_on_torchserve(name: str, options: argparse.Namespace, folder: Path, key_file: Path | None) -> int:
    """Serve until TorchServe ends or a signal comes; returns the exit status."""
    path = f"/predictions/{quote(name)}"
    public, port = reserve_port(options.host, options.port), free_ports(1)[0]
    own_paths = {own_route("AIP_PREDICT_ROUTE"): path, own_route("AIP_HEALTH_ROUTE"): "/ping"}
    routes = {named: known for named, known in own_paths.items() if named and named != known}
    argv, env = command(
        options.model_store,
        port=port,
        management_port=options.management_port,
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
        auth=options.auth,
        name=name,
    )
    if ignored := ignored_variables():
        print(f"ignored in the environment: {', '.join(ignored)}", file=sys.stderr)
    say_ready = announce(f"http://{options.host}:{options.port}{path}", key_file)

    def on_ready() -> None:
        open_front(public, port, routes)
        say_ready()

    return run(argv, env, options.management_port, folder, name, on_ready)


def main() -> None:
    """The command."""
    options = parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot write ends no server
    try:
        check_options(options)
        folder = own_folder()
        if options.check:
            sys.exit(0 if can_answer(options, folder) else 1)
        if uri := os.environ.get("AIP_STORAGE_URI"):
            options.model_store = fetch(uri)
        archive, name = find_archive(options.model_store, options.name)
        check_digest(archive)
        if name != archive.stem:
            print(f"there is no {name}.mar: {archive.name}, the only archive, is served by that name")
        if options.require_gpu:
            os.environ["REQUIRE_GPU"] = "1"
        if os.environ.get("REQUIRE_GPU") == "1":
            check_gpu(archive)
        key_file = folder / "key_file.json" if options.auth else None
        if options.server == "uvicorn":
            status = serve_on_uvicorn(archive, name, options, key_file)
        else:
            status = serve_on_torchserve(name, options, folder, key_file)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)


if __name__ == "__main__":
    main()
