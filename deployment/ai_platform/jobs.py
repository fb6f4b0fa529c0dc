"""Batch prediction: many photos by a job, from and to Cloud Storage."""

import base64
import contextlib
import io
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .client import ACCELERATORS, check_gpu
from .progress import limited, progress

if TYPE_CHECKING:
    from google.cloud import aiplatform, storage

# What the container takes in one request. The service makes requests of `batch_size` lines, whatever their sizes.
MAX_INSTANCES = 64  # protocol.MAX_INSTANCES
MAX_BYTES = 20_000_000  # server/config.properties, less 5 % for JSON that is written otherwise than here
TOO_LARGE = f"larger than the container takes ({MAX_BYTES / 1e6:g} MB as base64)"
MAX_PIXELS = 50_000_000  # photos.Preprocessor
HEADER = 64 * 1024  # bytes of an image in Cloud Storage that are read for its pixels
LOOKED_AT = 100  # images of a bucket whose headers are read, the largest files first
# All states that end a job. The SDK's own wait knows neither of the last two, and would wait on.
FAILED = {"JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_PAUSED", "JOB_STATE_EXPIRED"}
ENDED = FAILED | {"JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED"}
WAIT = 15  # seconds between two looks at a job


@dataclass
class Inputs:
    """What a job reads: `gs://` files, and the bytes and the pixels of each photo in them, as far as they are known."""

    uris: list[str]
    sizes: list[tuple[int, int]]
    format: str = "jsonl"  # or file-list: the files list images in Cloud Storage, which the service itself reads


@limited(24 * 3600)
def batch(
    source: Sequence[Path | str],
    destination: str,
    name: str = "fastunet",
    version: str | None = None,
    *,
    accelerator: str = "none",
    machine: str | None = None,
    replicas: int = 1,
    batch_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    service_account: str | None = None,
    kms_key: str | None = None,
    labels: dict[str, str] | None = None,
    **parameters: str,
) -> str:
    """Runs a batch prediction job; returns the `gs://` folder below `destination` that holds its results.

    It needs no endpoint. Its rows come in no order, errors among them: `named` tells whose they are, `error_in` why.

    Args:
        source: image files, sent to `destination` as lines first, and `gs://….jsonl` files of lines, `{"b64": …}`
            each; or `gs://` folders of images, which the service reads where they are.
        version, replicas: version or alias (by default `default`); machines, from start to end: jobs do not autoscale.
        batch_size: photos in one request, by default as many as the container takes by their bytes and pixels; a
            model that sees more than 880 × 880 pixels takes fewer small ones.
        max_pixels: what the container takes in one request, where the model's configuration says another number.
        service_account, kms_key: who the container is (by default nobody with rights), key for what the job keeps.
        parameters: the server's `format`, `size` and `top`.

    Raises:
        ValueError: there is no photo, one is too large, the version needs a GPU, or `source` mixes both kinds.
        FileNotFoundError: there is no such file, here or in Cloud Storage.
        RuntimeError: the job failed, expired or was cancelled.
    """
    from google.cloud import aiplatform

    model = aiplatform.Model(name, version=version)
    gpu, carrier = ACCELERATORS[accelerator]
    check_gpu(model, gpu)
    inputs = gather(source, destination, None if batch_size else max_pixels)
    job = aiplatform.BatchPredictionJob.submit(
        job_display_name=name,
        model_name=model.versioned_resource_name,
        gcs_source=inputs.uris,
        instances_format=inputs.format,
        gcs_destination_prefix=destination,
        model_parameters=parameters or None,
        batch_size=batch_size or lines_per_request(inputs.sizes, max_pixels),
        service_account=service_account,
        encryption_spec_key_name=kms_key,
        labels=labels,
        create_request_timeout=60,
        starting_replica_count=replicas,
        max_replica_count=replicas,
        machine_type=machine or carrier,
        accelerator_type=gpu,
        accelerator_count=1 if gpu else None,
    )
    return wait_for(job, model.version_id)


def gather(source: Sequence[Path | str], destination: str, max_pixels: int | None) -> Inputs:
    """What a job has to read for `source`; image files, or the list of images in a bucket, are sent first.

    What lies in Cloud Storage is read for its size, unless `max_pixels`, of one request, is None.
    """
    name = f"input-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"  # jobs may begin in the same second
    client, stem = storage_client(), f"{destination.rstrip('/')}/{name}"
    remote = [str(s) for s in source if str(s).startswith("gs://")]
    folders = [uri for uri in remote if not uri.endswith(".jsonl")]
    if folders and len(folders) < len(source):
        raise ValueError("a job reads either gs:// folders of images, or files and gs:// files of lines: make two jobs")
    if folders:
        return send_list(objects(folders, client, destination), f"{stem}.txt", client, max_pixels)
    files = [Path(s) for s in source if str(s) not in remote]
    check_sizes(files)
    sizes = [size for uri in remote for size in measure(uri, client)] if max_pixels else []
    if files:
        sizes += send(files, f"{stem}.jsonl", client)
        remote.append(f"{stem}.jsonl")
    return Inputs(remote, sizes)


def objects(folders: Sequence[str], client: "storage.Client", destination: str = "") -> "list[storage.Blob]":
    """The objects in `gs://` folders and below, but for what jobs have written to `destination`.

    Raises:
        FileNotFoundError: there is no such bucket.
    """
    from google.api_core import exceptions

    found = []
    for folder in folders:
        bucket, _, path = folder.removeprefix("gs://").rstrip("/").partition("/")
        below = path and f"{path}/"
        try:
            for blob in client.list_blobs(bucket, prefix=path):
                is_file = not blob.name.endswith("/") and (blob.name == path or blob.name.startswith(below))
                if is_file and not (destination and is_written(address(blob), destination)):
                    found.append(blob)
        except exceptions.NotFound:
            raise FileNotFoundError(f"no bucket gs://{bucket}") from None
    return found


def is_written(uri: str, destination: str) -> bool:
    """Whether `uri` is what `gather` sends to `destination`, or what the service writes there for a job."""
    name = uri.removeprefix(f"{destination.rstrip('/')}/")
    return name != uri and re.match(r"input-\d{8}-\d{6}[-\w]*\.(jsonl|txt)$|prediction-[^/]+/", name) is not None


def address(blob: "storage.Blob") -> str:
    """The address of `blob`, gs://BUCKET/NAME."""
    return f"gs://{blob.bucket.name}/{blob.name}"


def send_list(blobs: "list[storage.Blob]", uri: str, client: "storage.Client", max_pixels: int | None) -> Inputs:
    """Writes the addresses of `blobs` to `uri`, but for those that no request can hold, which are named.

    Unless `max_pixels`, of one request, is None, headers are read, and each image counts as many pixels as the largest
    that a request can hold.

    Raises:
        ValueError: there is none.
    """
    small = []
    for blob in blobs:
        if is_too_large(blob.size):
            print(f"left out, {TOO_LARGE}: {address(blob)}")
        else:
            small.append(blob)
    if not small:
        raise ValueError("there is no photo")
    with progress(f"listing {len(small)} image(s) in {uri}"), open_blob(uri, client, "wb") as lines:
        for blob in small:
            lines.write(f"{address(blob)}\n".encode())
    if max_pixels is None:
        return Inputs([uri], [], "file-list")
    looked_at = sorted(small, key=lambda blob: -blob.size)[:LOOKED_AT]
    with progress(f"reading the headers of {len(looked_at)} image(s), for the size of a request"):
        with ThreadPoolExecutor(16) as threads:
            most = max((n for n in threads.map(header_pixels, looked_at) if n <= max_pixels), default=0)
    return Inputs([uri], [(4 * (blob.size + 2) // 3 + 100, most) for blob in small], "file-list")


def header_pixels(blob: "storage.Blob") -> int:
    """The pixels of an image in Cloud Storage, by its first bytes; 0 where they do not tell."""
    data = blob.download_as_bytes(end=HEADER - 1) if blob.size else b""
    return pixels({"b64": base64.b64encode(data).decode()})


def wait_for(job: "aiplatform.BatchPredictionJob", version: str) -> str:
    """The folder with the job's results, once it has ended; RuntimeError where it ended without any."""
    what = f"batch prediction with version {version} (often 10 minutes before the first image)"
    with progress(what, stop="python -m deployment.ai_platform delete, which cancels the job first"):
        while (state := job.state.name) not in ENDED:
            time.sleep(WAIT)
    if state in FAILED:
        raise RuntimeError(f"the job ended as {state}: {job.error.message if job.error else 'without a reason'}")
    return job.output_info.gcs_output_directory


def check_sizes(files: Sequence[Path]) -> None:
    """ValueError for an image file that no request can hold; for all of them before anything is sent."""
    for path in files:
        if is_too_large(path.stat().st_size):
            raise ValueError(f"{path} is {TOO_LARGE}")


def is_too_large(size: int) -> bool:
    """Whether no request can hold a file of `size` bytes."""
    return 4 * size / 3 > MAX_BYTES


def measure(uri: str, client: "storage.Client") -> list[tuple[int, int]]:
    """The bytes and the pixels of each line in `uri`; ValueError for one that is no JSON."""
    sizes = []
    with progress(f"reading {uri}, for the size of a request"), open_blob(uri, client, "rb") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                try:
                    sizes.append((len(line), pixels(json.loads(line))))
                except ValueError as error:
                    raise ValueError(f"line {n} of {uri} is no JSON: {error}") from None
    return sizes


def send(files: Sequence[Path], uri: str, client: "storage.Client") -> list[tuple[int, int]]:
    """Writes image files to `uri`, one `{"b64": …, "name": …}` a line; the bytes and the pixels of each line."""
    sizes = []
    with progress(f"sending {len(files)} image(s) to {uri}"), open_blob(uri, client, "wb") as lines:
        for path in files:
            instance = {"b64": base64.b64encode(path.read_bytes()).decode(), "name": str(path)}
            line = json.dumps(instance).encode() + b"\n"
            sizes.append((len(line), pixels(instance)))
            lines.write(line)
    return sizes


def pixels(instance: dict) -> int:
    """The pixels of the photo in `instance`, by its header; 0 for what is no photo, which costs the server nothing."""
    try:
        data = instance["data"] if "data" in instance else instance
        with Image.open(io.BytesIO(base64.b64decode(data["b64"]))) as image:
            return image.width * image.height
    except Exception:  # decoders raise all kinds of errors; the server says what is wrong with this row
        return 0


def lines_per_request(sizes: Iterable[tuple[int, int]], max_pixels: int = MAX_PIXELS) -> int:
    """How many lines, at most, may go into one request, whichever they are; `sizes` holds bytes and pixels of each.

    Raises:
        ValueError: there is no line, or one that is too large alone.
    """
    size_limit = MAX_BYTES - 1000  # less what is around the lines
    counts = [MAX_INSTANCES]
    # A photo that has too many pixels by itself is refused by its header, alone: it counts for nothing.
    seen = [(size, n if n <= max_pixels else 0) for size, n in sizes]
    if not seen:
        raise ValueError("there is no photo")
    for values, limit in zip(zip(*seen, strict=True), (size_limit, max_pixels), strict=True):
        total = count = 0
        for value in sorted(values, reverse=True):
            total, count = total + value, count + 1
            if total > limit:
                counts.append(count - 1)
                break
    if not min(counts):
        raise ValueError(f"a line is larger than the container takes ({MAX_BYTES / 1e6:g} MB)")
    return min(counts)


def storage_client() -> "storage.Client":
    """A client of Cloud Storage with the SDK's project and credentials; an emulator takes no credentials."""
    from google.cloud import aiplatform, storage

    config, emulated = aiplatform.initializer.global_config, "STORAGE_EMULATOR_HOST" in os.environ
    return storage.Client(project=config.project, credentials=None if emulated else config.credentials)


@contextlib.contextmanager
def open_blob(uri: str, client: "storage.Client", mode: str) -> Iterator:
    """A file in Cloud Storage, read or written piece by piece: it need not fit into memory.

    Raises:
        FileNotFoundError: there is no such file, or no such bucket.
    """
    from google.api_core import exceptions
    from google.cloud import storage

    options = {"content_type": "application/jsonl"} if "w" in mode else {}
    try:
        with storage.Blob.from_uri(uri, client).open(mode, **options) as file:
            yield file
    except exceptions.NotFound:
        raise FileNotFoundError(f"no {uri}, or no such bucket") from None
