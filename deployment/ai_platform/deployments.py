"""A version of the model on machines of its own, behind an endpoint; and the same on more or fewer machines."""

import copy
import logging
from typing import TYPE_CHECKING

from .client import ACCELERATORS, find_endpoint, set_sdk_level
from .progress import progress

if TYPE_CHECKING:
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1.types import DeployedModel

# Of what is deployed, all that can be changed in place (of `dedicated_resources`).
SCALING = ("min_replica_count", "max_replica_count", "autoscaling_metric_specs")


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
    wanted = copy.deepcopy(resources)
    if max_replicas is not None:
        wanted.max_replica_count = max_replicas
    if min_replicas is not None:
        wanted.min_replica_count = min_replicas
        wanted.max_replica_count = max(min_replicas, wanted.max_replica_count)
    if target is not None:
        metric = "accelerator/duty_cycle" if resources.machine_spec.accelerator_type else "cpu/utilization"
        name = f"aiplatform.googleapis.com/prediction/online/{metric}"
        wanted.autoscaling_metric_specs = [{"metric_name": name, "target": target}]
    if bool(wanted.min_replica_count) != bool(resources.min_replica_count):
        raise ValueError(
            f"version {version} is deployed with --min-replicas {resources.min_replica_count}, which cannot become "
            f"{wanted.min_replica_count} in place: undeploy it first (`traffic --undeploy`, or `delete`)"
        )
    changed = [field for field in SCALING if getattr(wanted, field) != getattr(resources, field)]
    if not changed:
        where = f"endpoint {endpoint.display_name} already, with {has_share} % of the traffic"
        print(f"version {version} is deployed to {where}")
        return
    request = {
        "endpoint": endpoint.resource_name,
        "deployed_model": {"id": deployed.id, "dedicated_resources": wanted},
        "update_mask": {"paths": [f"dedicated_resources.{field}" for field in changed]},
    }
    with progress(f"scaling version {version}: {wanted.min_replica_count} to {wanted.max_replica_count} replica(s)"):
        endpoint.api_client.mutate_deployed_model(request=request).result()  # the SDK has no wrapper for it
