"""Models, endpoints and traffic, over Google's SDK; `deployments` puts the one behind the other.

Model and endpoint bear one name, `fastunet` unless told otherwise, which is also the archive's and the route's:
`upload` adds a version to the model where it exists, `deploy` makes the endpoint where it does not. Credentials are
Google's application-default ones.
"""

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from .progress import progress

if TYPE_CHECKING:  # the SDK takes seconds to import: only what calls the service pays for it
    from google.cloud import aiplatform

ACCELERATORS = {  # accelerator: the API's name for it, the machine that carries it
    "none": (None, "n1-standard-4"),
    "T4": ("NVIDIA_TESLA_T4", "n1-standard-4"),
    "L4": ("NVIDIA_L4", "g2-standard-4"),
}
# Run in the container, in its folder /, until it succeeds: whether the server answers. Three tries, a minute apart.
STARTUP_PROBE = [
    "python",
    "-c",
    "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['AIP_HTTP_PORT'] + '/ping')",
]


def connect(
    project: str | None = None,
    location: str | None = None,
    api_endpoint: str | None = None,
    verbose: bool = False,
) -> None:
    """Tells the SDK which project (default: the credentials' own) and which location (us-central1) to use.

    `api_endpoint` (or AI_PLATFORM_API_ENDPOINT) is another address of the API, such as a private one. `verbose` shows
    what the SDK says of each step; without it `progress` alone tells what goes on.

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
    set_sdk_level(logging.INFO if verbose else logging.WARNING)
    aiplatform.init(project=project, location=location, credentials=credentials, api_endpoint=api_endpoint)
    known_endpoints.clear()


def set_sdk_level(level: int) -> None:
    """Sets the level of the SDK's loggers; each of its modules has one with a level of its own."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("google.cloud.aiplatform.") and isinstance(logger, logging.Logger):
            logger.setLevel(level)


def upload(
    image: str, name: str = "fastunet", artifacts: str | None = None, torch_backend: str = "cpu"
) -> "aiplatform.Model":
    """Registers `image` (in Artifact Registry) as the newest version of the model `name`, and as its default.

    Args:
        artifacts: a `gs://` folder that holds the archive; the container fetches it from there.
        torch_backend: the TORCH_BACKEND that the image was built with. It becomes a label of the version, by which
            `deploy` knows whether the image can use a GPU.
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
            serving_container_startup_probe_exec=STARTUP_PROBE,
            serving_container_startup_probe_period_seconds=60,
            serving_container_startup_probe_timeout_seconds=60,
            artifact_uri=artifacts,
            display_name=name,
            labels={"torch_backend": torch_backend},
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


known_endpoints: dict[str, "aiplatform.Endpoint"] = {}  # by name: `predict` looks each up once


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
                f"{resources.min_replica_count} to {resources.max_replica_count} replica(s){', Spot' * resources.spot}"
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

    known_endpoints.pop(name, None)
    resources = [find_endpoint(name), *aiplatform.BatchPredictionJob.list(filter=f'display_name="{name}"')]
    with contextlib.suppress(exceptions.NotFound):
        resources.append(aiplatform.Model(name))
    deleted = []
    for resource in filter(None, resources):
        with progress(f"deleting {resource.resource_name}"), contextlib.suppress(exceptions.NotFound):
            resource.delete(**({"force": True} if isinstance(resource, aiplatform.Endpoint) else {}))
            deleted.append(resource.resource_name)
    return deleted
