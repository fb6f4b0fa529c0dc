"""Host the serving image on Google Cloud AI Platform (today Vertex AI): upload, deploy, predict, scale, clean up.

    python -m deployment.ai_platform upload REGION-docker.pkg.dev/PROJECT/fastunet/serve:1
    python -m deployment.ai_platform deploy --accelerator T4
    python -m deployment.ai_platform predict street.png
    python -m deployment.ai_platform delete

Model and endpoint bear one name, `fastunet` unless told otherwise: `upload` adds a version to the model where it
exists, `deploy` makes the endpoint where it does not. Credentials are Google's application-default ones.

The functions are the commands. They raise the service's own errors (`google.api_core.exceptions`), and `remedy` knows
for the usual ones the command that helps.
"""

import argparse
import base64
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the SDK takes seconds to import: only what calls the service pays for it
    import numpy as np
    from google.cloud import aiplatform

MAX_BYTES = 1_500_000  # of a request on a shared public endpoint
MAX_BYTES_DEDICATED = 10_000_000  # on a dedicated one
ACCELERATORS = {  # accelerator: the API's name for it, the machine that carries it
    "none": (None, "n1-standard-4"),
    "T4": ("NVIDIA_TESLA_T4", "n1-standard-4"),
    "L4": ("NVIDIA_L4", "g2-standard-4"),
}


def connect(project: str | None = None, location: str | None = None, api_endpoint: str | None = None) -> None:
    """Tells the SDK which project (default: the credentials' own) and which location (us-central1) to use.

    `api_endpoint` (or AI_PLATFORM_API_ENDPOINT) is another address of the API, such as a private one.

    Raises:
        google.auth.exceptions.DefaultCredentialsError: there are no credentials.
        ValueError: no project is known.
    """
    import google.auth
    from google.cloud import aiplatform

    credentials, default = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    project = project or default
    if not project:
        raise ValueError("no project: pass --project, or `gcloud config set project PROJECT`")
    api_endpoint = api_endpoint or os.environ.get("AI_PLATFORM_API_ENDPOINT")
    logging.getLogger("google.cloud.aiplatform").setLevel(logging.WARNING)  # `progress` tells what goes on
    aiplatform.init(project=project, location=location, credentials=credentials, api_endpoint=api_endpoint)


def upload(image: str, name: str = "fastunet", artifacts: str | None = None) -> "aiplatform.Model":
    """Registers `image` (in Artifact Registry) as the newest version of the model `name`, and as its default.

    With `artifacts`, a `gs://` folder that holds `fastunet.mar`, the container fetches the archive from there.
    """
    from google.api_core import exceptions
    from google.cloud import aiplatform

    try:
        identity = {"parent_model": aiplatform.Model(name).resource_name}
    except exceptions.NotFound:
        identity = {"model_id": name}
    with progress(f"uploading {image}"):
        return aiplatform.Model.upload(
            serving_container_image_uri=image,
            serving_container_predict_route="/predictions/fastunet",
            serving_container_health_route="/ping",
            serving_container_ports=[8080],
            artifact_uri=artifacts,
            display_name=name,
            **identity,
        )


def find_endpoint(name: str = "fastunet") -> "aiplatform.Endpoint | None":
    """The endpoint of that display name, None where there is none; ValueError where there are several."""
    from google.cloud import aiplatform

    found = aiplatform.Endpoint.list(filter=f'display_name="{name}"')
    if len(found) > 1:
        raise ValueError(f"{len(found)} endpoints are named {name}: delete all but one, or use another --name")
    return found[0] if found else None


def get_endpoint(name: str = "fastunet") -> "aiplatform.Endpoint":
    """The endpoint of that display name; NotFound where there is none."""
    from google.api_core import exceptions

    endpoint = find_endpoint(name)
    if endpoint is None:
        raise exceptions.NotFound(f"there is no endpoint {name}")
    return endpoint


def deploy(
    name: str = "fastunet",
    version: str | None = None,
    *,
    accelerator: str = "none",
    machine: str | None = None,
    min_replicas: int = 1,
    max_replicas: int = 1,
    target: int = 60,
    share: int | None = None,
    dedicated: bool = False,
    log_to: str | None = None,
    log_rate: float = 1.0,
) -> "aiplatform.Endpoint":
    """Deploys a version of the model (default: the newest) to the endpoint `name`, which it makes where there is none.

    Args:
        accelerator: none, T4 or L4; one per replica.
        machine: the machine type; by default one that carries the accelerator.
        target: percent of use (of the GPU where there is one, else of the CPU) at which replicas are added.
        share: percent of the traffic for this version, taken from the others alike (default: all of it on a new
            endpoint, none on one that serves already).
        dedicated: make a dedicated endpoint: requests of 10 MB instead of 1.5 MB, an address of its own.
        log_to: BigQuery table `bq://project.dataset.table` for requests and answers, `log_rate` of them (0 to 1).

    Raises:
        ValueError: `dedicated` or `log_to` for an endpoint that exists without it: both are settled at its creation.
    """
    from google.cloud import aiplatform

    model = aiplatform.Model(name, version=version)
    endpoint = find_endpoint(name)
    if endpoint is None:
        with progress(f"making endpoint {name}"):
            endpoint = aiplatform.Endpoint.create(
                display_name=name,
                dedicated_endpoint_enabled=dedicated,
                enable_request_response_logging=bool(log_to),
                request_response_logging_bq_destination_table=log_to,
                request_response_logging_sampling_rate=log_rate,
            )
    elif dedicated and not endpoint.dedicated_endpoint_enabled:
        raise ValueError(f"endpoint {name} is a shared one already: delete it first, or use another --name")
    elif log_to and not endpoint.gca_resource.predict_request_response_logging_config.enabled:
        raise ValueError(f"endpoint {name} exists without a request log: delete it first, or use another --name")
    gpu, carrier = ACCELERATORS[accelerator]
    metric = "autoscaling_target_accelerator_duty_cycle" if gpu else "autoscaling_target_cpu_utilization"
    with progress(f"deploying version {model.version_id} to endpoint {name} (often 5 to 15 minutes)"):
        return model.deploy(
            endpoint,
            machine_type=machine or carrier,
            accelerator_type=gpu,
            accelerator_count=1 if gpu else None,
            min_replica_count=min_replicas,
            max_replica_count=max(min_replicas, max_replicas),
            traffic_percentage=share or 0,
            **{metric: target},
        )


def request_body(images: Sequence[Path | str | bytes], **parameters: str) -> dict:
    """`{"instances": [{"b64": …}, …], "parameters": {…}}` of image files (or of their bytes)."""
    data = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in images]
    body = {"instances": [{"b64": base64.b64encode(d).decode()} for d in data]}
    return body | ({"parameters": parameters} if parameters else {})


def predict(images: Sequence[Path | str | bytes], name: str = "fastunet", **parameters: str) -> list[dict]:
    """One answer per image, in order, as the server gives it; `parameters` are the server's `format` and `size`.

    An image the server could not read has `{"error": …}` in its place.

    Raises:
        ValueError: the request is larger than the endpoint takes.
    """
    body = request_body(images, **parameters)
    endpoint = get_endpoint(name)
    size, limit = len(json.dumps(body)), MAX_BYTES_DEDICATED if endpoint.dedicated_endpoint_enabled else MAX_BYTES
    if size > limit:
        raise ValueError(
            f"{len(images)} image(s) make a request of {size / 1e6:.2f} MB, and this endpoint takes {limit / 1e6} MB: "
            "send fewer at once, scale them down (the model sees its own size anyway), use `batch`"
            + ("" if endpoint.dedicated_endpoint_enabled else ", or a `--dedicated` endpoint (10 MB)")
        )
    return endpoint.predict(body["instances"], body.get("parameters")).predictions


def mask(prediction: dict) -> "np.ndarray":
    """The class mask, uint8 (height, width), of one answer in the default format."""
    import numpy as np

    height, width = map(int, prediction["shape"])  # the API carries every number as a float
    return np.frombuffer(base64.b64decode(prediction["base64_prediction"]), np.uint8).reshape(height, width)


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


def traffic(shares: dict[str, int], name: str = "fastunet", undeploy: bool = False) -> dict[str, int]:
    """Splits the endpoint's traffic by model version, `{"1": 90, "2": 10}`; versions not named get none.

    With `undeploy`, versions that get none are undeployed: an idle replica costs what a busy one does.

    Raises:
        ValueError: a version is not deployed, or the shares do not sum to 100.
    """
    endpoint = get_endpoint(name)
    deployed = endpoint.list_models()
    missing = set(shares) - {d.model_version_id for d in deployed}
    if missing:
        raise ValueError(f"version {', '.join(sorted(missing))} is not deployed to endpoint {name}")
    newest = {d.model_version_id: d.id for d in sorted(deployed, key=lambda d: d.create_time)}
    split = {newest[version]: share for version, share in shares.items() if share}
    endpoint.update(traffic_split=split)
    if undeploy:
        for d in deployed:
            if d.id not in split:
                with progress(f"undeploying version {d.model_version_id}"):
                    endpoint.undeploy(d.id)
    return shares


def describe(name: str = "fastunet") -> str:
    """The model's versions, what is deployed with which share of the traffic, and the batch jobs, as text."""
    from google.api_core import exceptions
    from google.cloud import aiplatform

    lines = []
    with contextlib.suppress(exceptions.NotFound):
        model = aiplatform.Model(name)
        lines.append(model.resource_name)
        for v in model.versioning_registry.list_versions():
            lines.append(f"  version {v.version_id}  {', '.join(v.version_aliases)}")
    if endpoint := find_endpoint(name):
        kind = "dedicated" if endpoint.dedicated_endpoint_enabled else "shared"
        lines.append(f"{endpoint.resource_name}  ({kind})")
        for d in endpoint.list_models():
            resources = d.dedicated_resources
            gpu = resources.machine_spec.accelerator_type
            lines.append(
                f"  version {d.model_version_id}  {endpoint.traffic_split.get(d.id, 0)} % of traffic  "
                f"{resources.machine_spec.machine_type}{f' + {gpu.name}' if gpu else ''}  "
                f"{resources.min_replica_count} to {resources.max_replica_count} replica(s)"
            )
    for job in aiplatform.BatchPredictionJob.list(filter=f'display_name="{name}"'):
        lines.append(f"{job.resource_name}  {job.state.name}")
    return "\n".join(lines) or f"nothing is named {name}"


def delete(name: str = "fastunet") -> list[str]:
    """Deletes the endpoint with all that is deployed to it, the batch jobs, and the model with all its versions.

    Returns the names of what it deleted; none where nothing was left. Files in Cloud Storage, rows in BigQuery and
    images in Artifact Registry stay.
    """
    from google.api_core import exceptions
    from google.cloud import aiplatform

    resources = [find_endpoint(name), *aiplatform.BatchPredictionJob.list(filter=f'display_name="{name}"')]
    with contextlib.suppress(exceptions.NotFound):
        resources.append(aiplatform.Model(name))
    deleted = []
    for resource in filter(None, resources):
        with progress(f"deleting {resource.resource_name}"), contextlib.suppress(exceptions.NotFound):
            resource.delete(**({"force": True} if isinstance(resource, aiplatform.Endpoint) else {}))
            deleted.append(resource.resource_name)
    return deleted


@contextlib.contextmanager
def progress(what: str, every: float = 15) -> Iterator[None]:
    """Prints `what`, the seconds gone every now and then, and the time it took."""
    start, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(every):
            print(f"  … {time.monotonic() - start:.0f} s", flush=True)

    print(what, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
    print(f"  done in {time.monotonic() - start:.1f} s", flush=True)


def remedy(error: Exception, project: str = "PROJECT", image: str = "IMAGE") -> str:
    """What to do about `error`, mostly a command; empty where this module has no advice."""
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    text = str(error)
    match error:
        case auth.DefaultCredentialsError() | auth.RefreshError() | exceptions.Unauthenticated():
            return "gcloud auth application-default login"
        case exceptions.PermissionDenied() if "SERVICE_DISABLED" in text or "has not been used" in text:
            return f"gcloud services enable aiplatform.googleapis.com --project={project}"
        case exceptions.PermissionDenied():
            return f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=roles/aiplatform.user"
        case exceptions.ResourceExhausted():
            return (
                "another --accelerator or --location, or ask for more: gcloud beta quotas preferences create "
                f"--service=aiplatform.googleapis.com --project={project} --preferred-value=1 --quota-id=QUOTA "
                "--dimensions=region=LOCATION (QUOTA such as CustomModelServingT4GPUsPerProjectPerRegion)"
            )
        case exceptions.NotFound() if "mage" in text:
            return f"gcloud builds submit --config=cloudbuild.yaml --substitutions=_IMAGE={image}"
        case exceptions.NotFound() if "odel" in text:
            return "python -m deployment.ai_platform upload IMAGE"
        case exceptions.NotFound() if "ndpoint" in text:
            return "python -m deployment.ai_platform deploy"
        case exceptions.FailedPrecondition() if "server" in text:
            return (
                f"gcloud logging read resource.type=aiplatform.googleapis.com/Endpoint --limit=50 --project={project}"
            )
        case exceptions.ServiceUnavailable():
            return "check the network and --location, then try again"
    return ""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    show = argparse.ArgumentDefaultsHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="fastunet", help="name of the model and of the endpoint")
    common.add_argument("--project", help="Google Cloud project (default: the credentials' own)")
    common.add_argument("--location", help="region, such as us-central1 or europe-west4")
    common.add_argument("--api-endpoint", help="another address of the API, such as a private one")
    machines = argparse.ArgumentParser(add_help=False)
    machines.add_argument("--version", help="version or alias of the model (default: the newest)")
    machines.add_argument("--accelerator", choices=ACCELERATORS, default="none", help="GPU of each replica")
    machines.add_argument("--machine", help="machine type (default: one that carries the accelerator)")
    machines.add_argument("--max-replicas", type=int, default=1, help="grow to so many machines")

    parser = argparse.ArgumentParser(prog="python -m deployment.ai_platform", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[common, *parents], formatter_class=show)

    p = command("upload", "register an image as the model's newest version")
    p.add_argument("image", help="REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG")
    p.add_argument("--artifacts", help="gs:// folder with fastunet.mar, for an image that holds none")

    p = command("deploy", "put a version behind the endpoint; make the endpoint where there is none", machines)
    p.add_argument("--min-replicas", type=int, default=1, help="never fewer machines than this; each costs all day")
    p.add_argument("--target", type=int, default=60, help="percent of GPU (or CPU) use that adds a machine")
    p.add_argument("--share", type=int, help="percent of the traffic (default: 100 on a new endpoint, else 0)")
    p.add_argument("--dedicated", action="store_true", help="requests of up to 10 MB, on an address of their own")
    p.add_argument("--log-to", metavar="bq://PROJECT.DATASET.TABLE", help="log requests and answers to BigQuery")
    p.add_argument("--log-rate", type=float, default=1.0, help="part of the requests to log, 0 to 1")

    p = command("predict", "send image files; print the share of each class, or write pictures")
    p.add_argument("images", nargs="+", type=Path)
    p.add_argument("--format", choices=["png", "overlay"], help="write masks (.png) or overlays (.jpg) to --out")
    p.add_argument("--size", choices=["original"], help="masks at the photos' own size")
    p.add_argument("--out", type=Path, default=".", help="folder for the pictures")

    p = command("batch", "predict many images by a job, from and to Cloud Storage", machines)
    p.add_argument("source", nargs="+", help='image files, or gs:// files of {"b64": …} lines')
    p.add_argument("--to", required=True, metavar="gs://BUCKET/FOLDER", help="where the results go")

    p = command("traffic", "split the traffic between deployed versions: 1=90 2=10 (canary), 1=100 (roll back)")
    p.add_argument("shares", nargs="+", metavar="VERSION=PERCENT")
    p.add_argument("--undeploy", action="store_true", help="undeploy the versions that get none: they cost money")

    command("list", "show versions, deployments, traffic and jobs")
    command("delete", "delete the endpoint, the jobs and the model; costs end here")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    common = {"command", "project", "location", "api_endpoint"}
    options = {key: value for key, value in vars(args).items() if key not in common and value is not None}
    match args.command:
        case "upload":
            model = upload(**options)
            print(f"{model.resource_name} version {model.version_id}")
        case "deploy":
            print(deploy(**options).resource_name)
        case "predict":
            images, out = options.pop("images"), options.pop("out")
            answers = predict(images, **options)
            for path, answer in zip(images, answers, strict=True):
                kind = next((k for k in ("png", "jpeg") if k in answer), None)
                if kind:
                    target = out / f"{path.stem}.{'png' if kind == 'png' else 'jpg'}"
                    write(target, base64.b64decode(answer[kind]))
                print(json.dumps({"file": str(path)} | ({"written": str(target)} if kind else shown(answer))))
            if all("error" in answer for answer in answers):
                sys.exit(1)
        case "batch":
            print(batch(destination=options.pop("to"), **options))
        case "traffic":
            shares = dict(share.split("=") for share in options.pop("shares"))
            traffic({version: int(percent) for version, percent in shares.items()}, **options)
            print(describe(args.name))
        case "list":
            print(describe(args.name))
        case "delete":
            deleted = delete(args.name)
            print("\n".join(f"deleted {d}" for d in deleted) or f"nothing was left of {args.name}")


def shown(answer: dict) -> dict:
    """An answer without its long field."""
    return {key: value for key, value in answer.items() if key != "base64_prediction"}


def write(path: Path, data: bytes) -> None:
    """Writes `data` so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError

    try:
        connect(args.project, args.location, args.api_endpoint)
        run(args)
    except (GoogleAPICallError, GoogleAuthError, ValueError, OSError, RuntimeError) as e:
        advice = remedy(e, args.project or "PROJECT", getattr(args, "image", "IMAGE"))
        message = " ".join(str(getattr(e, "message", e)).split())
        sys.exit(f"error: {message}" + (f"\n  try: {advice}" if advice else ""))


if __name__ == "__main__":
    main()
