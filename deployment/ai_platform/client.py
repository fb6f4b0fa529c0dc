"""Models, endpoints and traffic, over Google's SDK.

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


def deploy(
    name: str = "fastunet",
    version: str | None = None,
    *,
    accelerator: str = "none",
    machine: str | None = None,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    target: int | None = None,
    share: int | None = None,
    shared: bool = False,
    spot: bool = False,
    log_to: str | None = None,
    log_rate: float = 1.0,
) -> "aiplatform.Endpoint":
    """Deploys a version of the model (default: the newest) to the endpoint `name`, which it makes where there is none.

    A version that the endpoint has on such a machine already is not deployed once more: its replicas and its target
    become what is given here, and stay as they are where nothing is given.

    Args:
        accelerator: none, T4 or L4; one per replica.
        machine: the machine type; by default one that carries the accelerator.
        min_replicas: 1 by default. 0 lets the last replica go when no request came for a while, and costs nothing then.
            Requests fail until one runs again, for minutes. (A preview: the SDK's `preview`, API v1beta1.)
        max_replicas: 1 by default.
        target: percent of use (of the GPU where there is one, else of the CPU) at which replicas are added; 60 by
            default.
        share: percent of the traffic for this version, taken from the others alike (default: all of it on a new
            endpoint, none on one that serves already).
        shared: make a shared endpoint: requests of 1.5 MB and 60 s, where a dedicated one takes 10 MB and an hour.
        spot: on Spot machines, which are cheaper and may be taken away at any time.
        log_to: BigQuery table `bq://project.dataset.table` for requests and answers, `log_rate` of them (0 to 1).

    Raises:
        ValueError: `shared` or `log_to` for an endpoint that exists without it (both are settled at its creation),
            another `share` for a version that is deployed already, `spot` with no `min_replicas`, or `min_replicas` 0
            for a version that is deployed with more, or the other way round.
    """
    from google.cloud import aiplatform

    if spot and min_replicas == 0:
        raise ValueError("--spot and --min-replicas 0 do not go together: the preview API takes no Spot machines")
    model = aiplatform.Model(name, version=version)
    gpu, carrier = ACCELERATORS[accelerator]
    machine = machine or carrier
    if gpu and model.labels.get("torch_backend") == "cpu":
        print(
            f"warning: version {model.version_id} was uploaded as an image for the CPU, which leaves the {accelerator} "
            "unused: build it with TORCH_BACKEND=cu126, and upload it with --torch-backend cu126",
            flush=True,
        )
    endpoint = endpoint_for(name, shared, log_to, log_rate)
    scaling = {"min_replicas": min_replicas, "max_replicas": max_replicas, "target": target}
    if deployed := find_deployed(endpoint, model.version_id, machine, gpu, spot):
        rescale(endpoint, deployed, share, **scaling)
    else:
        deploy_new(endpoint, model, machine, gpu, share=share, spot=spot, **scaling)
    return aiplatform.Endpoint(endpoint.resource_name)


def endpoint_for(name: str, shared: bool, log_to: str | None, log_rate: float) -> "aiplatform.Endpoint":
    """The endpoint `name` of the kind that `deploy` is asked for, made where there is none.

    Raises:
        ValueError: there is one of another kind.
    """
    from google.cloud import aiplatform

    endpoint = find_endpoint(name)
    if endpoint is None:
        with progress(f"making endpoint {name}"):
            return aiplatform.Endpoint.create(
                display_name=name,
                dedicated_endpoint_enabled=not shared,
                enable_request_response_logging=bool(log_to),
                request_response_logging_bq_destination_table=log_to,
                request_response_logging_sampling_rate=log_rate,
            )
    if shared and endpoint.dedicated_endpoint_enabled:
        raise ValueError(f"endpoint {name} is a dedicated one already: delete it first, or use another --name")
    if log_to and not endpoint.gca_resource.predict_request_response_logging_config.enabled:
        raise ValueError(f"endpoint {name} exists without a request log: delete it first, or use another --name")
    return endpoint


def find_deployed(
    endpoint: "aiplatform.Endpoint", version: str, machine: str, gpu: str | None, spot: bool
) -> "DeployedModel | None":
    """What `endpoint` has of this version on such machines, None where it has nothing."""
    for deployed in endpoint.list_models():
        spec = deployed.dedicated_resources.machine_spec
        has_gpu = spec.accelerator_type.name if spec.accelerator_type else None
        same_machine = (spec.machine_type, has_gpu, deployed.dedicated_resources.spot) == (machine, gpu, spot)
        if same_machine and deployed.model_version_id == version:
            return deployed
    return None


def deploy_new(
    endpoint: "aiplatform.Endpoint",
    model: "aiplatform.Model",
    machine: str,
    gpu: str | None,
    *,
    share: int | None,
    spot: bool,
    min_replicas: int | None,
    max_replicas: int | None,
    target: int | None,
) -> None:
    """Deploys `model` to `endpoint` on machines of its own, and waits for it."""
    min_replicas = 1 if min_replicas is None else min_replicas
    options: dict[str, object] = {"spot": spot}
    if not min_replicas:
        from google.cloud.aiplatform.preview import models as preview

        set_sdk_level(logging.getLogger("google.cloud.aiplatform.models").level)  # of what was just imported
        options = {"initial_replica_count": 1}
        model = preview.Model(model.name, version=model.version_id)
        endpoint = preview.Endpoint(endpoint.resource_name)
    metric = "autoscaling_target_accelerator_duty_cycle" if gpu else "autoscaling_target_cpu_utilization"
    with progress(f"deploying version {model.version_id} to endpoint {endpoint.display_name} (often 5 to 15 minutes)"):
        model.deploy(
            endpoint,
            machine_type=machine,
            accelerator_type=gpu,
            accelerator_count=1 if gpu else None,
            min_replica_count=min_replicas,
            max_replica_count=max(min_replicas, max_replicas or 1),
            traffic_percentage=share or 0,
            **{metric: 60 if target is None else target},
            **options,
        )


def rescale(
    endpoint: "aiplatform.Endpoint",
    deployed: "DeployedModel",
    share: int | None,
    min_replicas: int | None,
    max_replicas: int | None,
    target: int | None,
) -> None:
    """Changes the replicas and the target of what is deployed in place, where they differ, and waits for it.

    Raises:
        ValueError: see `deploy`.
    """
    resources, version = deployed.dedicated_resources, deployed.model_version_id
    has_share = endpoint.traffic_split.get(deployed.id, 0)
    if share not in (None, has_share):
        raise ValueError(f"version {version} is deployed with {has_share} % of the traffic: use `traffic`")
    low = resources.min_replica_count if min_replicas is None else min_replicas
    high = max(low, resources.max_replica_count if max_replicas is None else max_replicas)
    if (low == 0) != (resources.min_replica_count == 0):
        raise ValueError(
            f"version {version} is deployed with --min-replicas {resources.min_replica_count}, and only a new "
            f"deployment can change this to {low}: undeploy it with `traffic` first, or `delete` the endpoint"
        )
    metric = "accelerator/duty_cycle" if resources.machine_spec.accelerator_type else "cpu/utilization"
    has_metrics = [{"metric_name": spec.metric_name, "target": spec.target} for spec in resources.autoscaling_metric_specs]
    metrics = has_metrics
    if target is not None:
        metrics = [{"metric_name": f"aiplatform.googleapis.com/prediction/online/{metric}", "target": target}]
    has = {
        "min_replica_count": resources.min_replica_count,
        "max_replica_count": resources.max_replica_count,
        "autoscaling_metric_specs": has_metrics,
    }
    wanted = {"min_replica_count": low, "max_replica_count": high, "autoscaling_metric_specs": metrics}
    changed = {field: value for field, value in wanted.items() if value != has[field]}
    if not changed:
        print(f"version {version} is deployed to endpoint {endpoint.display_name} already, {has_share} % of the traffic")
        return
    request = {  # the SDK wraps the other calls, but not this one
        "endpoint": endpoint.resource_name,
        "deployed_model": {"id": deployed.id, "dedicated_resources": changed},
        "update_mask": {"paths": [f"dedicated_resources.{field}" for field in changed]},
    }
    with progress(f"scaling version {version} to {low} to {high} replica(s)"):
        endpoint.api_client.mutate_deployed_model(request=request).result()


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
