"""Models, endpoints, predictions and traffic, over Google's SDK.

Model and endpoint bear one name, `fastunet` unless told otherwise, which is also the archive's and the route's:
`upload` adds a version to the model where it exists, `deploy` makes the endpoint where it does not. Credentials are
Google's application-default ones.
"""

import base64
import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .progress import progress

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

    With `artifacts`, a `gs://` folder that holds the archive, the container fetches it from there.
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
            serving_container_predict_route=f"/predictions/{name}",
            serving_container_environment_variables={"MODEL_NAME": name},
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


def predict(images: Sequence[Path | str | bytes], name: str = "fastunet", **parameters: str | int) -> list[dict]:
    """One answer per image, in order, as the server gives it; `parameters` are the server's `format`, `size` and `top`.

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


def overview(name: str = "fastunet") -> str:
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
