"""Batch prediction: many photos by a job, from and to Cloud Storage."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .client import ACCELERATORS, request_body
from .progress import progress


def batch(
    source: Sequence[Path | str],
    destination: str,
    name: str = "fastunet",
    version: str | None = None,
    *,
    accelerator: str = "none",
    machine: str | None = None,
    max_replicas: int = 1,
    **parameters: str,
) -> str:
    """Runs a batch prediction job; returns the `gs://` folder below `destination` that holds its results.

    `source` are image files, which are sent to `destination` as JSONL first, or `gs://` files in that form: one
    `{"b64": …}` a line. The job brings its own machines and needs no endpoint.
    """
    from google.cloud import aiplatform, storage

    model = aiplatform.Model(name, version=version)
    inputs = [str(s) for s in source if str(s).startswith("gs://")]
    files = [s for s in source if not str(s).startswith("gs://")]
    if files:
        lines = [json.dumps(instance) + "\n" for instance in request_body(files)["instances"]]
        uri = f"{destination.rstrip('/')}/input-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        client = storage.Client(project=model.project, credentials=None if emulated() else model.credentials)
        with progress(f"sending {len(files)} image(s) to {uri}"):
            storage.Blob.from_uri(uri, client).upload_from_string("".join(lines), "application/jsonl")
        inputs.append(uri)
    gpu, carrier = ACCELERATORS[accelerator]
    with progress(f"batch prediction with version {model.version_id} (often 10 minutes before the first image)"):
        job = model.batch_predict(
            job_display_name=name,
            gcs_source=inputs,
            gcs_destination_prefix=destination,
            model_parameters=parameters or None,
            machine_type=machine or carrier,
            accelerator_type=gpu,
            accelerator_count=1 if gpu else None,
            starting_replica_count=1,
            max_replica_count=max_replicas,
        )
    return job.output_info.gcs_output_directory


def emulated() -> bool:
    """Whether Cloud Storage is an emulator, which takes no credentials (google-cloud-storage's own variable)."""
    return "STORAGE_EMULATOR_HOST" in os.environ


def batch_results(folder: str) -> Iterator[dict]:
    """The rows of a batch job's output, `{"instance": …, "prediction": …}` each; their order is the service's."""
    from google.cloud import aiplatform, storage

    config = aiplatform.initializer.global_config
    client = storage.Client(project=config.project, credentials=None if emulated() else config.credentials)
    bucket, _, prefix = folder.removeprefix("gs://").partition("/")
    for blob in client.list_blobs(bucket, prefix=f"{prefix}/prediction.results"):
        yield from map(json.loads, blob.download_as_text().splitlines())
