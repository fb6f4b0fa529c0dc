"""A version of the model on machines of its own, behind an endpoint; and the same on more or fewer machines."""

import copy
import logging
from typing import TYPE_CHECKING, Any

from .client import ACCELERATORS, check_gpu, find_endpoint, get_endpoint, get_model, promote, set_sdk_level
from .progress import limited, progress

if TYPE_CHECKING:
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1.types import DeployedModel

# Of what is deployed, all that can be changed in place (of `dedicated_resources`).
SCALING = ("min_replica_count", "max_replica_count", "autoscaling_metric_specs")
METRICS = {  # what --scale-on names: the SDK's argument, the API's metric
    "requests": ("autoscaling_target_request_count_per_minute", "request_count"),
    "cpu": ("autoscaling_target_cpu_utilization", "cpu/utilization"),
    "gpu": ("autoscaling_target_accelerator_duty_cycle", "accelerator/duty_cycle"),
}
IDLE = (300, 28_800)  # seconds that --idle-after may be
LONGEST = 7 * 24 * 3600  # seconds that --flex-start may be


@limited(2 * 3600)
def deploy(
    name: str = "fastunet",
    version: str | None = None,
    *,
    accelerator: str | None = None,
    machine: str | None = None,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    scale_on: str | None = None,
    target: int | None = None,
    idle_after: int | None = None,
    share: int | None = None,
    shared: bool = False,
    spot: bool = False,
    flex_start: int | None = None,
    gpu_partition: str | None = None,
    service_account: str | None = None,
    kms_key: str | None = None,
    inference_timeout: int | None = None,
    labels: dict[str, str] | None = None,
    log_to: str | None = None,
    log_rate: float = 1.0,
) -> "aiplatform.Endpoint":
    """Deploys a version of the model (default: the newest) to the endpoint `name`, which it makes where there is none.

    A version that runs there is not deployed once more: its replicas and its target become what is given here, and
    stay as they are where nothing is given. A version that has all of the traffic becomes the model's `default`.

    Args:
        accelerator, machine: one of `ACCELERATORS`, one per replica, and the machine type; by default those of the
            version where it runs, else no GPU, and the smallest machine that carries the accelerator.
        min_replicas: 1 by default. 0 lets the last replica go when no request came for `idle_after` seconds (300 to
            28,800), and costs nothing then. Requests fail until one runs again, for minutes. (A preview: API v1beta1.)
        max_replicas: 1 by default. The quota must hold so many.
        scale_on: what adds replicas, of `METRICS`; by default as it is deployed, else the GPU's use, or the CPU's. On a
            machine with a GPU the service looks at both, whichever is higher; the other one's target is 60.
        target: percent of use, 60 by default; of `requests` how many a minute each replica takes, which has no default.
        share: percent of the traffic, taken from the others alike (default: all on a new endpoint, else none).
        shared: make a shared endpoint: requests of 1.5 MB and 60 s, where a dedicated one takes 10 MB and 10 minutes.
        spot: on Spot machines, which are cheaper and may be taken away at any time.
        flex_start, gpu_partition: see `check_machines`.
        service_account: that the container runs as, by default one without rights in the project.
        kms_key, inference_timeout, labels, log_to, log_rate: of the endpoint, see `endpoint_for`.

    Raises:
        ValueError: options that do not go together, or that a version or an endpoint that exists cannot get in place.
    """
    check_scaling(scale_on, target, min_replicas, idle_after)
    check_machines(accelerator, spot, gpu_partition, flex_start, preview=min_replicas == 0 or flex_start is not None)
    machines: dict[str, Any] = dict(accelerator=accelerator, machine=machine, spot=spot, gpu_partition=gpu_partition)
    model, endpoint, deployed = look_up(name, version, service_account, machines, scale_on, share)
    settled = {"shared": shared, "log_to": log_to, "kms_key": kms_key, "inference_timeout": inference_timeout}
    endpoint = endpoint_for(name, endpoint, log_rate=log_rate, labels=labels, **settled)
    scaling: dict[str, Any] = {"min_replicas": min_replicas, "max_replicas": max_replicas, "scale_on": scale_on}
    scaling |= {"target": target, "idle_after": idle_after, "flex_start": flex_start}
    if deployed:
        rescale(endpoint, deployed, share, **scaling)
    else:
        deploy_new(endpoint, model, share=share, service_account=service_account, **machines, **scaling)
    return with_default(name)


def look_up(
    name: str,
    version: str | None,
    service_account: str | None,
    machines: dict,
    scale_on: str | None,
    share: int | None,
) -> "tuple[aiplatform.Model, aiplatform.Endpoint | None, DeployedModel | None]":
    """The version, the endpoint where there is one, and what that has of the version on such `machines`.

    Raises:
        ValueError: it would be deployed, and needs a GPU that the machines do not have, is to be scaled by the use of
            one, or would be the only version and get a part of the traffic.
    """
    model, endpoint = get_model(name, version), find_endpoint(name)
    deployed = find_deployed(endpoint, model.version_id, service_account, **machines) if endpoint else None
    if not deployed:
        gpu, _ = ACCELERATORS[machines["accelerator"] or "none"]
        check_gpu(model, gpu)
        metric_of(scale_on, gpu)
        if endpoint is None and share not in (None, 100):
            raise ValueError("the first version of an endpoint gets all of its traffic: leave --share out")
    return model, endpoint, deployed


def with_default(name: str) -> "aiplatform.Endpoint":
    """The endpoint as it is now; a version with all of its traffic becomes the model's `default`."""
    endpoint = get_endpoint(name)
    for deployed in endpoint.list_models():
        if endpoint.traffic_split.get(deployed.id) == 100:
            promote(name, deployed.model_version_id)
    return endpoint


def check_scaling(scale_on: str | None, target: int | None, min_replicas: int | None, idle_after: int | None) -> None:
    """Raises ValueError for numbers that do not go together, before anything is made."""
    if scale_on == "requests" and target is None:
        raise ValueError("--scale-on requests needs a --target: how many requests a minute one replica takes")
    if idle_after is not None and (min_replicas != 0 or not IDLE[0] <= idle_after <= IDLE[1]):
        raise ValueError(f"--idle-after takes {IDLE[0]} to {IDLE[1]} seconds, and goes with --min-replicas 0")


def check_machines(
    accelerator: str | None, spot: bool, gpu_partition: str | None, flex_start: int | None, preview: bool
) -> None:
    """Raises ValueError for machines that cannot be had.

    Args:
        gpu_partition: each replica gets a part of the GPU, such as `1g.10gb` of an H100 (by API v1beta1).
        flex_start: wait until such machines are free, for GPUs that are hard to get; after so many seconds the service
            ends the deployment (a preview, by API v1beta1).
        preview: the SDK's `preview` is needed, which takes neither Spot machines nor parts of GPUs.
    """
    for option, given in {"--spot": spot, "--gpu-partition": gpu_partition}.items():
        if given and preview:
            raise ValueError(f"{option} and --min-replicas 0 or --flex-start, which are previews, do not go together")
    if gpu_partition and accelerator in (None, "none"):
        raise ValueError("--gpu-partition needs an --accelerator")
    if flex_start is not None and not 0 < flex_start <= LONGEST:
        raise ValueError(f"--flex-start takes 1 to {LONGEST} seconds, which is a week")


def endpoint_for(
    name: str,
    endpoint: "aiplatform.Endpoint | None",
    *,
    shared: bool,
    log_to: str | None,
    log_rate: float,
    kms_key: str | None,
    inference_timeout: int | None,
    labels: dict[str, str] | None,
) -> "aiplatform.Endpoint":
    """The endpoint `name` of the kind that `deploy` is asked for: the one that exists, or a new one.

    Args:
        log_to: BigQuery table `bq://project.dataset.table` for requests and answers, `log_rate` of them (0 to 1).
        kms_key: a key of Cloud KMS, `projects/…/cryptoKeys/…`; the version must have been uploaded with it.
        inference_timeout: seconds that a dedicated endpoint waits for an answer, 3600 at most (default: 600).
        labels: an endpoint that exists gets them in place of those it has.

    Raises:
        ValueError: there is one of another kind; all but the labels is settled when it is made.
    """
    from google.cloud import aiplatform

    if endpoint is None:
        if shared and inference_timeout:
            raise ValueError("a shared endpoint waits 60 s: --inference-timeout is for a dedicated one")
        with progress(f"making endpoint {name}"):
            return aiplatform.Endpoint.create(
                display_name=name,
                labels=labels,
                encryption_spec_key_name=kms_key,
                dedicated_endpoint_enabled=not shared,
                inference_timeout=inference_timeout,
                enable_request_response_logging=bool(log_to),
                request_response_logging_bq_destination_table=log_to,
                request_response_logging_sampling_rate=log_rate,
                create_request_timeout=60,
            )
    made = endpoint.gca_resource
    otherwise = ""
    if shared and endpoint.dedicated_endpoint_enabled:
        otherwise = "is a dedicated one already"
    log = made.predict_request_response_logging_config
    if log_to and not log.enabled:
        otherwise = "exists without a request log"
    elif log_to and not f"{log.bigquery_destination.output_uri}.".startswith(f"{log_to}."):
        otherwise = "exists with another --log-to"
    if kms_key and made.encryption_spec.kms_key_name != kms_key:
        otherwise = "exists without that --kms-key"
    waits = made.client_connection_config.inference_timeout
    if inference_timeout and (not waits or waits.total_seconds() != inference_timeout):
        otherwise = "exists with another --inference-timeout"
    if otherwise:
        raise ValueError(f"endpoint {name} {otherwise}: delete it first, or use another --name")
    if labels and endpoint.labels != labels:
        endpoint.update(labels=labels)
    return endpoint


def find_deployed(
    endpoint: "aiplatform.Endpoint",
    version: str,
    service_account: str | None,
    *,
    accelerator: str | None,
    machine: str | None,
    spot: bool,
    gpu_partition: str | None,
) -> "DeployedModel | None":
    """What `endpoint` has of this version, on such machines and as that account, where any are named; else None."""
    gpu, carrier = ACCELERATORS[accelerator or "none"]
    unnamed = (accelerator, machine, spot, gpu_partition) == (None, None, False, None)
    for deployed in endpoint.list_models():
        resources = deployed.dedicated_resources
        spec = resources.machine_spec
        has_gpu = spec.accelerator_type.name if spec.accelerator_type else None
        has = (spec.machine_type, has_gpu, resources.spot, spec.gpu_partition_size or None)
        same_machine = unnamed or has == (machine or carrier, gpu, spot, gpu_partition)
        same_account = service_account in (None, deployed.service_account)
        if same_machine and same_account and deployed.model_version_id == version:
            return deployed
    return None


def metric_of(scale_on: str | None, gpu: object) -> tuple[str, str]:
    """The SDK's argument and the API's metric for what adds replicas.

    Raises:
        ValueError: it is the GPU's use, and there is none.
    """
    if scale_on == "gpu" and not gpu:
        raise ValueError("--scale-on gpu needs an --accelerator")
    return METRICS[scale_on or ("gpu" if gpu else "cpu")]


def deploy_new(
    endpoint: "aiplatform.Endpoint",
    model: "aiplatform.Model",
    *,
    accelerator: str | None,
    machine: str | None,
    spot: bool,
    gpu_partition: str | None,
    share: int | None,
    idle_after: int | None,
    flex_start: int | None,
    service_account: str | None,
    min_replicas: int | None,
    max_replicas: int | None,
    scale_on: str | None,
    target: int | None,
) -> None:
    """Deploys `model` to `endpoint` on machines of its own, and waits for it."""
    min_replicas = 1 if min_replicas is None else min_replicas
    options: dict[str, object] = {"spot": spot, "gpu_partition_size": gpu_partition}
    if not min_replicas or flex_start:
        from google.cloud.aiplatform.preview import models as preview

        set_sdk_level(logging.getLogger("google.cloud.aiplatform.models").level)  # of what was just imported
        options = {"max_runtime_duration": flex_start}
        if not min_replicas:
            options |= {"initial_replica_count": 1, "idle_scaledown_period": idle_after}
        model = preview.Model(model.name, version=model.version_id)
        endpoint = preview.Endpoint(endpoint.resource_name)
    gpu, carrier = ACCELERATORS[accelerator or "none"]
    argument, _ = metric_of(scale_on, gpu)
    what = f"deploying version {model.version_id} to endpoint {endpoint.display_name} (often 5 to 15 minutes)"
    stop = f"python -m deployment.ai_platform delete --name {endpoint.display_name}, once it is deployed"
    with progress(what, stop):
        model.deploy(
            endpoint,
            machine_type=machine or carrier,
            accelerator_type=gpu,
            accelerator_count=1 if gpu else None,
            min_replica_count=min_replicas,
            max_replica_count=max(min_replicas, max_replicas or 1),
            traffic_percentage=share or 0,
            service_account=service_account,
            deploy_request_timeout=60,
            **{argument: 60 if target is None else target},
            **options,
        )


def rescale(
    endpoint: "aiplatform.Endpoint",
    deployed: "DeployedModel",
    share: int | None,
    min_replicas: int | None,
    max_replicas: int | None,
    scale_on: str | None,
    target: int | None,
    idle_after: int | None,
    flex_start: int | None,
) -> None:
    """Changes the replicas and the target of what is deployed in place, where they differ, and waits for it.

    Raises:
        ValueError: see `deploy`.
    """
    resources, version = deployed.dedicated_resources, deployed.model_version_id
    if idle_after or flex_start:
        print("warning: --idle-after and --flex-start are settled when a version is deployed: they stay as they are")
    has_share = endpoint.traffic_split.get(deployed.id, 0)
    if share not in (None, has_share):
        raise ValueError(f"version {version} is deployed with {has_share} % of the traffic: use `traffic`")
    wanted = copy.deepcopy(resources)
    if max_replicas is not None:
        wanted.max_replica_count = max_replicas
    if min_replicas is not None:
        wanted.min_replica_count = min_replicas
        wanted.max_replica_count = max(min_replicas, wanted.max_replica_count)
    if target is not None or scale_on:
        targets = {spec.metric_name: spec.target for spec in resources.autoscaling_metric_specs}
        if scale_on or len(targets) != 1:
            _, metric = metric_of(scale_on, resources.machine_spec.accelerator_type)
            name = f"aiplatform.googleapis.com/prediction/online/{metric}"
        else:
            [name] = targets
        if target is None:
            target = targets.get(name, 60)
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
        # the SDK has no wrapper for it
        endpoint.api_client.mutate_deployed_model(request=request, timeout=60).result()
