"""Models, endpoints and traffic, over Google's SDK; `deployments` puts the one behind the other.

Model and endpoint bear one name, `fastunet` unless told otherwise, which is also the archive's and the route's:
`upload` adds a version to the model where it exists, `deploy` makes the endpoint where it does not. Credentials are
Google's application-default ones.
"""

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from .progress import QUICK, limited, progress

if TYPE_CHECKING:  # the SDK takes seconds to import: only what calls the service pays for it
    from google.cloud import aiplatform

ACCELERATORS = {  # accelerator: the API's name for it, the smallest machine that carries it
    "none": (None, "n1-standard-4"),
    "T4": ("NVIDIA_TESLA_T4", "n1-standard-4"),
    "L4": ("NVIDIA_L4", "g2-standard-4"),
    "H100": ("NVIDIA_H100_80GB", "a3-highgpu-1g"),
    "RTX-PRO-6000": ("NVIDIA_RTX_PRO_6000", "g4-standard-48"),
}
# Run in the container until it succeeds. The wait is inside the command: a probe that failed at once would be tried
# again only a period later, and every replica would be late by that. The period must be less than the timeout; three
# timeouts, and the container is started anew. There is no comma in it, since gcloud takes the command as a list.
STARTUP_PROBE = [
    "sh",
    "-c",
    'until python -c "import urllib.request as r; r.urlopen(\\"http://127.0.0.1:$AIP_HTTP_PORT/ping\\")" 2>/dev/null; '
    "do sleep 1; done",
]
PROBE_PERIOD, PROBE_TIMEOUT = 10, 300  # seconds


@limited(QUICK)
def connect(
    project: str | None = None,
    location: str | None = None,
    api_endpoint: str | None = None,
    verbose: bool = False,
) -> None:
    """Tells the SDK which project (default: the credentials' own) and which location (us-central1) to use.

    A user's calls count against the quota of the same project, unless GOOGLE_CLOUD_QUOTA_PROJECT names another; what
    Google takes by itself is the project in which the user happened to log in.

    `api_endpoint` (or AI_PLATFORM_API_ENDPOINT) is another address of the API, such as a private one. `verbose` shows
    what the SDK says of each step; without it `progress` alone tells what goes on.

    Raises:
        google.auth.exceptions.DefaultCredentialsError: there are no credentials.
        ValueError: no project is known.
    """
    import google.auth
    from google.cloud import aiplatform
    from google.oauth2.credentials import Credentials as UserCredentials

    credentials, default = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    project = project or default
    if not project:
        raise ValueError("no project: pass --project, or `gcloud config set project PROJECT`")
    if isinstance(credentials, UserCredentials) and "GOOGLE_CLOUD_QUOTA_PROJECT" not in os.environ:
        credentials = credentials.with_quota_project(project)
    api_endpoint = api_endpoint or os.environ.get("AI_PLATFORM_API_ENDPOINT")
    set_sdk_level(logging.INFO if verbose else logging.WARNING)
    aiplatform.init(project=project, location=location, credentials=credentials, api_endpoint=api_endpoint)
    known_endpoints.clear()


def place() -> tuple[str, str]:
    """The project and the location that `connect` chose."""
    from google.cloud import aiplatform

    config = aiplatform.initializer.global_config
    return config.project, config.location


def set_sdk_level(level: int) -> None:
    """Sets the level of the SDK's loggers; each of its modules has one with a level of its own."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("google.cloud.aiplatform.") and isinstance(logger, logging.Logger):
            logger.setLevel(level)


@limited(1800)
def upload(
    image: str,
    name: str = "fastunet",
    artifacts: str | None = None,
    torch_backend: str = "cpu",
    *,
    kms_key: str | None = None,
    labels: dict[str, str] | None = None,
) -> "aiplatform.Model":
    """Registers `image` (in Artifact Registry) as the newest version of the model `name`.

    The first version gets the alias `default`. A later one is a candidate without it, until `deploy` or `traffic` gives
    it all of the traffic: who asks for the model without a version gets the one that has proven good.

    Args:
        artifacts: a `gs://` folder that holds the archive; the container fetches it from there.
        torch_backend: the TORCH_BACKEND that the image was built with. It becomes a label of the version, by which
            `deploy` knows whether the image can use a GPU. An image for CUDA is told to refuse to serve without one.
        kms_key: a key of Cloud KMS, `projects/…/cryptoKeys/…`, that encrypts the version.
        labels: of the version.
    """
    from google.api_core import exceptions
    from google.cloud import aiplatform

    try:
        identity = {"parent_model": aiplatform.Model(name).resource_name, "is_default_version": False}
    except exceptions.NotFound:
        identity = {"model_id": name}
    environment = {"MODEL_NAME": name} | ({} if torch_backend == "cpu" else {"REQUIRE_GPU": "1"})
    with progress(f"uploading {image}"):
        return aiplatform.Model.upload(
            serving_container_image_uri=image,
            serving_container_predict_route=f"/predictions/{name}",
            serving_container_environment_variables=environment,
            serving_container_health_route="/ping",
            serving_container_ports=[8080],
            serving_container_startup_probe_exec=STARTUP_PROBE,
            serving_container_startup_probe_period_seconds=PROBE_PERIOD,
            serving_container_startup_probe_timeout_seconds=PROBE_TIMEOUT,
            artifact_uri=artifacts,
            display_name=name,
            labels={"torch_backend": torch_backend} | (labels or {}),
            encryption_spec_key_name=kms_key,
            **identity,
        )


@limited(QUICK)
def get_model(name: str = "fastunet", version: str | None = None) -> "aiplatform.Model":
    """The version (or alias) of the model, by default the newest, whichever of them is called `default`.

    Raises:
        google.api_core.exceptions.NotFound: there is no such model or version.
    """
    from google.cloud import aiplatform

    model = aiplatform.Model(name, version=version)
    if version:
        return model
    newest = max((v.version_id for v in model.versioning_registry.list_versions()), key=int)
    return model if model.version_id == newest else aiplatform.Model(name, version=newest)


def check_gpu(model: "aiplatform.Model", gpu: str | None) -> None:
    """Raises ValueError for an image that needs a GPU on a machine without, and warns about a GPU it cannot use."""
    needs_gpu = any(v.name == "REQUIRE_GPU" and v.value == "1" for v in model.container_spec.env)
    if needs_gpu and not gpu:
        raise ValueError(f"version {model.version_id} is an image for CUDA, which serves on a GPU only: --accelerator")
    if gpu and model.labels.get("torch_backend") == "cpu":
        print(
            f"warning: version {model.version_id} was uploaded as an image for the CPU, which leaves the {gpu} "
            "unused: build it with TORCH_BACKEND=cu126, and upload it with --torch-backend cu126",
            flush=True,
        )


def promote(name: str, version: str) -> None:
    """Gives the alias `default` to a version that gets all of the traffic; it leaves the version that had it."""
    from google.cloud import aiplatform

    model = aiplatform.Model(name)
    if model.version_id != version:
        model.versioning_registry.add_version_aliases(["default"], version)
        print(f"version {version} of {name} is `default` now, in place of {model.version_id}", flush=True)


@limited(QUICK)
def find_endpoints(name: str = "fastunet") -> "list[aiplatform.Endpoint]":
    """All endpoints of that display name; names of endpoints need not be unique."""
    from google.cloud import aiplatform

    return aiplatform.Endpoint.list(filter=f'display_name="{name}"')


def find_endpoint(name: str = "fastunet") -> "aiplatform.Endpoint | None":
    """The endpoint of that display name, None where there is none.

    Raises:
        ValueError: there are several; the message lists them.
    """
    found = find_endpoints(name)
    if len(found) > 1:
        listed = "".join(f"\n  {e.resource_name}, made {e.create_time:%Y-%m-%d %H:%M}" for e in found)
        raise ValueError(f"{len(found)} endpoints are named {name}: use another --name, or `delete --all`{listed}")
    return found[0] if found else None


def get_endpoint(name: str = "fastunet") -> "aiplatform.Endpoint":
    """The endpoint of that display name; NotFound where there is none."""
    from google.api_core import exceptions

    endpoint = find_endpoint(name)
    if endpoint is None:
        raise exceptions.NotFound(f"there is no endpoint {name} in {place()[1]}")
    return endpoint


known_endpoints: dict[str, "aiplatform.Endpoint"] = {}  # by name: `predict` looks each up once


@limited(1800)
def traffic(shares: dict[str, int], name: str = "fastunet", undeploy: bool = False) -> dict[str, int]:
    """Splits the endpoint's traffic by model version, `{"1": 90, "2": 10}`; versions not named get none.

    A version that gets all of it becomes the model's `default`. With `undeploy`, versions that get none are undeployed:
    an idle replica costs what a busy one does.

    Raises:
        ValueError: a version is not deployed, or the shares do not sum to 100.
    """
    endpoint = get_endpoint(name)
    deployed = endpoint.list_models()
    missing = set(shares) - {d.model_version_id for d in deployed}
    if missing:
        raise ValueError(f"version {', '.join(sorted(missing))} is not deployed to endpoint {name}")
    if sum(shares.values()) != 100 or min(shares.values()) < 0:
        raise ValueError(f"the shares must sum to 100, not {sum(shares.values())}")
    newest = {d.model_version_id: d.id for d in sorted(deployed, key=lambda d: d.create_time)}
    split = {newest[version]: share for version, share in shares.items() if share}
    endpoint.update(traffic_split=split)
    for version, share in shares.items():
        if share == 100:
            promote(name, version)
    if undeploy:
        for d in deployed:
            if d.id not in split:
                with progress(f"undeploying version {d.model_version_id}"):
                    endpoint.undeploy(d.id)
    return shares


@limited(QUICK)
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
    for endpoint in find_endpoints(name):
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
    return "\n".join(lines) or f"nothing is named {name} in {place()[1]}, the only region looked through"
