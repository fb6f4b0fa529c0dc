"""A local stand-in for Vertex AI: the service's wire protocol on loopback, the real server behind it.

    with vertex_ai({"us-central1-docker.pkg.dev/…/fastunet:1": "model_store"}) as service:
        aiplatform.init(project=service.project, location=service.location, api_endpoint=service.api_endpoint)

What is real here
  * the wire: gRPC over TLS with the SDK's own protobuf types, so that an unmodified google-cloud-aiplatform
    talks to it; predictions on dedicated endpoints go over HTTPS, as they do with the service, as JSON or raw, and so
    do raw ones on shared endpoints, to the API's public address, which leads here while the stand-in runs;
    v1beta1 is v1 with scale to zero; long operations take time, and are asked for until they are done;
  * what a request must hold, and what may not be changed: by the annotations in Google's protos;
  * the credentials: a service account's key file (GOOGLE_APPLICATION_CREDENTIALS) whose signed tokens are verified;
  * Cloud Storage: gcp-storage-emulator, spoken to by an unmodified google-cloud-storage;
  * prediction: deploying (or a batch job) starts the image's command, `python -m deployment.serve`, with the AIP_*
    variables, waits for its startup probe (run in /, by its period and its timeout, and the container is started
    anew where it fails) and its health route, and sends it the JSON that the service would send; a batch job sends 64
    instances in one request unless the job says otherwise, and a request that fails again, up to three times; of a
    file-list it reads each object.

What is not
  * An image is a name and the model store it would hold: nothing is pulled, isolated, or limited (test_image.py
    tests the image itself). All servers share one loopback, so AIP_HTTP_PORT is a free port, not the declared one.
  * There is one process per deployment, whatever the replica counts say: no scaling, no hardware behind
    machine types and accelerators, no Spot, no request log in BigQuery. Those settings are checked and kept.
  * No IAM, quota, regions or billing, but a test can have any call refused; Cloud Storage asks for no credentials;
    operations that take the service minutes take a moment. List filters know `display_name="…"` only.
  * Checks follow the API's reference. Where it names no error class, the nearest canonical one is used.
"""

import atexit
import base64
import contextlib
import copy
import functools
import http.server
import json
import os
import random
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import requests
import trustme
from gcp_storage_emulator.server import create_server as create_storage_emulator
from google.api import httpbody_pb2
from google.api_core import exceptions
from google.auth import jwt
from google.cloud import aiplatform_v1beta1, storage
from google.cloud.aiplatform_v1 import types
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2, json_format, timestamp_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from deployment.server.processes import free_ports, started

ROOT = Path(__file__).parents[1]
PACKAGE = "google.cloud.aiplatform.v1."
PROJECT, LOCATION = "local-project", "us-central1"
PARENT = f"projects/{PROJECT}/locations/{LOCATION}"
MAX_BYTES = {"shared": 1_500_000, "dedicated": 10_000_000}  # a request or an answer, by kind of endpoint
PUBLIC = f"{LOCATION}-aiplatform.googleapis.com"  # where the SDK sends raw predictions on shared endpoints
TIMEOUTS = {"shared": 60, "dedicated": 600}  # seconds
IMAGE_URI = re.compile(r"[a-z0-9-]+-docker\.pkg\.dev/[^/]+/[^/]+/.+|([a-z]+\.)?gcr\.io/.+")
ACCELERATORS = {  # accelerator: the machine types that take it
    "NVIDIA_TESLA_T4": "n1-",
    "NVIDIA_L4": "g2-",
    "NVIDIA_H100_80GB": "a3-",
    "NVIDIA_RTX_PRO_6000": "g4-",
}
# What MutateDeployedModel may change, by the comment on its request in Google's proto, although annotated as immutable.
SCALING = ("min_replica_count", "max_replica_count", "required_replica_count", "autoscaling_metric_specs")
# Message and field: REQUIRED, IMMUTABLE, OUTPUT_ONLY, from Google's protos. The Python SDK's own have no annotations.
BEHAVIOR = json.loads((Path(__file__).parent / "samples" / "field_behavior.json").read_text())["fields"]
RETRIES = 3  # of a batch job's request
STARTS = 2  # of a container, before the deployment fails; the service goes on for longer
MOMENT = 0.1  # seconds that an operation takes at least
METRICS = ("cpu/utilization", "accelerator/duty_cycle", "request_count")


def check(condition: object, message: str, error: type = exceptions.InvalidArgument, reason: str = "") -> None:
    if not condition:
        info = error_details_pb2.ErrorInfo(reason=reason, domain="googleapis.com") if reason else None
        raise error(message, error_info=info)


def new_id() -> str:
    return str(random.randrange(10**18, 10**19))


@functools.cache
def authority() -> trustme.CA:
    """One certificate authority per process: gRPC reads its root certificates only once."""
    return trustme.CA()


@dataclass
class Container:
    """One running server: the image's command, listening on loopback."""

    process: subprocess.Popen
    url: str
    log: Path
    resources: contextlib.ExitStack
    ready: bool = False

    def healthy(self, route: str) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(self.url + route, timeout=10).status_code == 200
        return False

    def ask(self, route: str, body: bytes, content_type: str, timeout: float) -> requests.Response:
        """The server's answer to one request, whatever its status."""
        try:
            return requests.post(self.url + route, body, headers={"Content-Type": content_type}, timeout=timeout)
        except requests.Timeout as e:
            raise exceptions.DeadlineExceeded("The model server did not answer in time.") from e
        except requests.ConnectionError as e:
            raise exceptions.ServiceUnavailable("The model server is not reachable.") from e

    def predict(self, route: str, body: bytes, timeout: float) -> list:
        """Sends one prediction request; returns the answer's `predictions`, or raises the service's error."""
        answer = self.ask(route, body, "application/json", timeout)
        if answer.status_code != 200:
            error = exceptions.from_http_status(answer.status_code, answer.text)
            bad_request = 400 <= answer.status_code < 500 and not error.grpc_status_code
            raise exceptions.InvalidArgument(answer.text) if bad_request else error
        try:
            return answer.json()["predictions"]
        except (ValueError, KeyError, TypeError) as e:
            raise exceptions.InternalServerError("The model server's answer is no JSON with `predictions`.") from e

    def stop(self) -> None:
        self.resources.close()


@dataclass
class VertexAI:
    """The state and the methods of the service; each method is the RPC of its name."""

    images: dict[str, Path]  # image URI: the model store in it
    folder: Path  # keys, certificates and the containers' logs
    project: str = PROJECT
    location: str = LOCATION
    api_endpoint: str = ""
    token: str = ""  # an access token that is taken
    refused: dict[str, exceptions.GoogleAPICallError] = field(default_factory=dict)  # by the name of the RPC
    calls: list[str] = field(default_factory=list)  # the names of the RPCs, in order
    quota_projects: set[str] = field(default_factory=set)  # that callers named
    keeps_addresses: bool = True  # as instances of a file-list's rows: what the service has there, no source says
    answering: threading.Event = field(default_factory=threading.Event)  # not set: calls hang
    models: dict[str, dict[str, types.Model]] = field(default_factory=dict)  # name: {version: model}
    endpoints: dict[str, types.Endpoint] = field(default_factory=dict)
    jobs: dict[str, types.BatchPredictionJob] = field(default_factory=dict)
    operations: dict[str, operations_pb2.Operation] = field(default_factory=dict)
    containers: dict[str, Container] = field(default_factory=dict)  # by the deployed model's or the job's id
    lock: threading.RLock = field(default_factory=threading.RLock)
    # Threads that live as long as the service: a process started by a thread that ends would be told its parent died.
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def __post_init__(self) -> None:
        self.answering.set()

    # Models and their versions

    def UploadModel(self, request: types.UploadModelRequest) -> operations_pb2.Operation:
        model, spec = request.model, request.model.container_spec
        check(request.parent == PARENT, f"No permission on {request.parent}.", exceptions.PermissionDenied)
        check(IMAGE_URI.fullmatch(spec.image_uri), f"{spec.image_uri} is no image in Artifact Registry.")
        check(spec.image_uri in self.images, f"Image {spec.image_uri} not found.", exceptions.NotFound)
        check(all(0 < p.container_port < 65536 for p in spec.ports), "container ports must be 1 to 65535.")
        for route in (spec.predict_route, spec.health_route):
            check(not route or route.startswith("/"), f"Route {route!r} must start with a slash.")
        for probe in (spec.startup_probe, spec.health_probe, spec.liveness_probe):
            check(not probe.period_seconds or not probe.timeout_seconds or probe.period_seconds < probe.timeout_seconds,
                  "A probe's period_seconds must be less than its timeout_seconds.")  # fmt: skip
        check(not model.artifact_uri or model.artifact_uri.startswith("gs://"), "artifact_uri must be gs://…")
        for alias in model.version_aliases:
            check(re.fullmatch(r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]", alias), f"Invalid version alias {alias!r}.")
        with self.lock:
            if request.parent_model:
                name = request.parent_model.split("@")[0]
                self._model(name)
            else:
                check(not request.model_id or re.fullmatch(r"[a-z_][a-z0-9_-]{0,62}", request.model_id),
                      f"Invalid model_id {request.model_id!r}.")  # fmt: skip
                name = f"{PARENT}/models/{request.model_id or new_id()}"
                check(name not in self.models, f"{name} already exists.", exceptions.AlreadyExists)
            versions = self.models.setdefault(name, {})
            model.name, model.version_id = name, str(max(map(int, versions), default=0) + 1)
            if not versions and "default" not in model.version_aliases:
                model.version_aliases.append("default")
            self._move_aliases(versions, model)
            model.create_time = model.update_time = model.version_create_time = time_now()
            model.supported_deployment_resources_types = [types.Model.DeploymentResourcesType.DEDICATED_RESOURCES]
            versions[model.version_id] = model
        return self._later(lambda: types.UploadModelResponse(model=name, model_version_id=model.version_id))

    def MergeVersionAliases(self, request: types.MergeVersionAliasesRequest) -> types.Model:
        model = self._model(request.name)
        for alias in request.version_aliases:
            name = alias.removeprefix("-")
            check(re.fullmatch(r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]", name), f"Invalid version alias {name!r}.")
            check(alias != "-default", "The alias default can be moved, not removed.")
            kept = [a for a in model.version_aliases if a != name]
            model.version_aliases = kept if alias.startswith("-") else [*kept, name]
        self._move_aliases(self.models[model.name], model)
        return model

    @staticmethod
    def _move_aliases(versions: dict[str, types.Model], taker: types.Model) -> None:
        """An alias names one version: the newest taker."""
        for other in versions.values():
            if other is not taker:
                other.version_aliases = [a for a in other.version_aliases if a not in taker.version_aliases]

    def GetModel(self, request: types.GetModelRequest) -> types.Model:
        return self._model(request.name)

    def ListModels(self, request: types.ListModelsRequest) -> types.ListModelsResponse:
        newest = [self._model(name) for name in self.models]
        return types.ListModelsResponse(models=matching(newest, request.filter))

    def ListModelVersions(self, request: types.ListModelVersionsRequest) -> types.ListModelVersionsResponse:
        self._model(request.name)
        return types.ListModelVersionsResponse(models=list(self.models[request.name.split("@")[0]].values()))

    def DeleteModelVersion(self, request: types.DeleteModelVersionRequest) -> operations_pb2.Operation:
        model = self._model(request.name)
        check(len(self.models[model.name]) > 1, "The last version cannot be deleted; delete the model.",
              exceptions.FailedPrecondition)  # fmt: skip
        check("default" not in model.version_aliases, "The default version cannot be deleted.",
              exceptions.FailedPrecondition)  # fmt: skip
        self._check_not_deployed(model.name, model.version_id)
        del self.models[model.name][model.version_id]
        return self._later(empty_pb2.Empty)

    def DeleteModel(self, request: types.DeleteModelRequest) -> operations_pb2.Operation:
        self._check_not_deployed(self._model(request.name).name)
        del self.models[request.name]
        return self._later(empty_pb2.Empty)

    def _model(self, name: str) -> types.Model:
        """The version that `name` (`…/models/ID`, or with `@version` or `@alias`) stands for."""
        base, _, version = name.partition("@")
        for model in self.models.get(base, {}).values():
            if (version or "default") in (model.version_id, *model.version_aliases):
                return model
        raise exceptions.NotFound(f"The Model {name} does not exist.")

    def _check_not_deployed(self, name: str, version: str | None = None) -> None:
        for endpoint in self.endpoints.values():
            for d in endpoint.deployed_models:
                check(d.model.split("@")[0] != name or (version and d.model_version_id != version),
                      f"{name} is deployed to {endpoint.name}: undeploy it first.",
                      exceptions.FailedPrecondition)  # fmt: skip

    # Endpoints

    def CreateEndpoint(self, request: types.CreateEndpointRequest) -> operations_pb2.Operation:
        endpoint, log = request.endpoint, request.endpoint.predict_request_response_logging_config
        check(request.parent == PARENT, f"No permission on {request.parent}.", exceptions.PermissionDenied)
        check(not log.enabled or 0 < log.sampling_rate <= 1, "sampling_rate must be above 0 and at most 1.")
        check(not log.bigquery_destination.output_uri or log.bigquery_destination.output_uri.startswith("bq://"),
              "The logging destination must be bq://…")  # fmt: skip
        check(not request.endpoint_id or re.fullmatch(r"[0-9]{1,10}", request.endpoint_id), "Invalid endpoint_id.")
        endpoint.name = f"{PARENT}/endpoints/{request.endpoint_id or new_id()}"
        check(endpoint.name not in self.endpoints, f"{endpoint.name} already exists.", exceptions.AlreadyExists)
        endpoint.create_time = endpoint.update_time = time_now()
        if endpoint.dedicated_endpoint_enabled:
            endpoint.dedicated_endpoint_dns = self.dedicated_dns
        timeout = endpoint.client_connection_config.inference_timeout
        check(not timeout or endpoint.dedicated_endpoint_enabled and timeout.total_seconds() <= 3600,
              "inference_timeout is for dedicated endpoints, at most an hour.")  # fmt: skip
        self.endpoints[endpoint.name] = endpoint
        return self._later(lambda: endpoint)

    def GetEndpoint(self, request: types.GetEndpointRequest) -> types.Endpoint:
        return self._endpoint(request.name)

    def ListEndpoints(self, request: types.ListEndpointsRequest) -> types.ListEndpointsResponse:
        return types.ListEndpointsResponse(endpoints=matching(self.endpoints.values(), request.filter))

    def UpdateEndpoint(self, request: types.UpdateEndpointRequest) -> types.Endpoint:
        endpoint = self._endpoint(request.endpoint.name)
        with self.lock:
            for path in request.update_mask.paths:
                check_mutable("Endpoint", path)
                if path == "traffic_split":
                    self._check_traffic(endpoint, dict(request.endpoint.traffic_split))
                setattr(endpoint, path, getattr(request.endpoint, path))
        return endpoint

    def DeleteEndpoint(self, request: types.DeleteEndpointRequest) -> operations_pb2.Operation:
        endpoint = self._endpoint(request.name)
        check(not endpoint.deployed_models, f"{endpoint.name} has deployed models: undeploy them first.",
              exceptions.FailedPrecondition)  # fmt: skip
        del self.endpoints[endpoint.name]
        return self._later(empty_pb2.Empty)

    def _endpoint(self, name: str) -> types.Endpoint:
        check(name in self.endpoints, f"The Endpoint {name} does not exist.", exceptions.NotFound)
        return self.endpoints[name]

    @staticmethod
    def _check_traffic(endpoint: types.Endpoint, split: dict[str, int], extra: tuple[str, ...] = ()) -> None:
        known = {d.id for d in endpoint.deployed_models} | set(extra)
        check(set(split) <= known, f"traffic_split names {sorted(set(split) - known)}, which are not deployed here.")
        check(all(0 <= share <= 100 for share in split.values()), "Every share of traffic must be 0 to 100.")
        check(not split or sum(split.values()) == 100, f"Traffic must sum to 100, not {sum(split.values())}.")

    # Deployment

    def DeployModel(self, request: types.DeployModelRequest, api: str) -> operations_pb2.Operation:
        endpoint, deployed = self._endpoint(request.endpoint), request.deployed_model
        model, resources = self._model(deployed.model), deployed.dedicated_resources
        split = dict(request.traffic_split)
        check_machine(resources.machine_spec)
        beta = as_v1beta1(deployed).dedicated_resources
        newer = "scale_to_zero_spec" in beta or beta.initial_replica_count or "flex_start" in beta
        check(not newer or api == "v1beta1", "Unknown name: scale_to_zero_spec, initial_replica_count or flex_start.")
        longest = beta.flex_start.max_runtime_duration
        check(not longest or longest.days <= 7, "max_runtime_duration must be at most 7 days.")
        for period in (beta.scale_to_zero_spec.idle_scaledown_period, beta.scale_to_zero_spec.min_scaleup_period):
            check(not period or 300 <= period.total_seconds() <= 28_800, "A period must be 300 to 28,800 seconds.")
        to_zero = "scale_to_zero_spec" in beta and 0 < beta.initial_replica_count <= beta.max_replica_count
        check_scaling(resources, to_zero)
        self._check_traffic(endpoint, split, extra=("0",))
        deployed.id, deployed.create_time = deployed.id or new_id(), time_now()
        deployed.model, deployed.model_version_id = f"{model.name}@{model.version_id}", model.version_id
        deployed.display_name = deployed.display_name or model.display_name

        def deploy() -> types.DeployModelResponse:
            self._start(model, deployed.id, endpoint)
            with self.lock:
                endpoint.deployed_models.append(deployed)
                if split:
                    endpoint.traffic_split = {deployed.id if k == "0" else k: v for k, v in split.items()}
            return types.DeployModelResponse(deployed_model=deployed)

        return self._later(deploy, api)

    def MutateDeployedModel(self, request: types.MutateDeployedModelRequest) -> operations_pb2.Operation:
        endpoint, new = self._endpoint(request.endpoint), request.deployed_model.dedicated_resources
        deployed = next((d for d in endpoint.deployed_models if d.id == request.deployed_model.id), None)
        check(deployed, f"{request.deployed_model.id} is not deployed here.", exceptions.NotFound)
        check(request.update_mask.paths, "update_mask is required.")
        changed = copy.deepcopy(deployed.dedicated_resources)
        for path in request.update_mask.paths:
            place, _, field = path.rpartition(".")
            check_mutable("DedicatedResources", field, but=SCALING)
            check(place == "dedicated_resources" and field in SCALING, f"Cannot update {path}.")
            setattr(changed, field, getattr(new, field))
        check_scaling(changed, to_zero=not deployed.dedicated_resources.min_replica_count)

        def mutate() -> types.MutateDeployedModelResponse:
            with self.lock:
                deployed.dedicated_resources = changed
            return types.MutateDeployedModelResponse(deployed_model=deployed)

        return self._later(mutate)

    def UndeployModel(self, request: types.UndeployModelRequest) -> operations_pb2.Operation:
        endpoint, id = self._endpoint(request.endpoint), request.deployed_model_id
        remaining = [d for d in endpoint.deployed_models if d.id != id]
        check(len(remaining) < len(endpoint.deployed_models), f"{id} is not deployed here.", exceptions.NotFound)
        split = dict(request.traffic_split) or (dict(endpoint.traffic_split) if remaining else {})
        check(not split.get(id), f"{id} still has traffic: move it away first.", exceptions.FailedPrecondition)
        with self.lock:
            self._check_traffic(endpoint, split)
            endpoint.deployed_models, endpoint.traffic_split = remaining, split

        def undeploy() -> types.UndeployModelResponse:
            self.containers.pop(id).stop()
            return types.UndeployModelResponse()

        return self._later(undeploy)

    def _start(self, model: types.Model, id: str, endpoint: types.Endpoint | None = None) -> Container:
        """Runs the model's image as the service does, and returns once its health route answers 200."""
        spec, (port, management, metrics) = model.container_spec, free_ports(3)
        log, problem = self.folder / f"{id}.log", ""
        environment = os.environ | {e.name: e.value for e in spec.env} | {
            "AIP_MODE": "PREDICTION",
            "AIP_HTTP_PORT": str(port),
            "AIP_HEALTH_ROUTE": spec.health_route or "/v1/health",
            "AIP_PREDICT_ROUTE": spec.predict_route or "/v1/predict",
            "AIP_STORAGE_URI": model.artifact_uri,
            "TMPDIR": str(self.folder),
            "AIP_DEPLOYED_MODEL_ID": id,
            "AIP_ENDPOINT_ID": endpoint.name.split("/")[-1] if endpoint else "",
        }  # fmt: skip
        command = [sys.executable, "-m", "deployment.serve", "--model-store", str(self.images[spec.image_uri])]
        command += ["--host", "127.0.0.1", f"--management-port={management}", f"--metrics-port={metrics}", *spec.args]
        for _ in range(STARTS):
            resources = contextlib.ExitStack()
            output = resources.enter_context(log.open("wb"))
            process = resources.enter_context(
                started(command, environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            )
            container = self.containers[id] = Container(process, f"http://127.0.0.1:{port}", log, resources)
            try:
                if self._becomes_ready(container, spec, environment):
                    return container
                problem = "never became ready" if process.poll() is None else "exited unexpectedly"
            finally:
                if not container.ready:
                    self.containers.pop(id).stop()
        raise exceptions.FailedPrecondition(f"Model server {problem}. Its logs: {log}\n{tail(log)}")

    def _becomes_ready(self, container: Container, spec: types.ModelContainerSpec, environment: dict) -> bool:
        """Waits as the service does: for the startup probe, without one for the port, then for the health route."""
        exited = container.process.poll
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"

        def run_probe(timeout: float) -> bool:
            command = list(spec.startup_probe.exec_.command)
            probe = subprocess.Popen(
                command, env=environment | {"PATH": path}, cwd="/", start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            end = time.monotonic() + timeout
            while probe.poll() is None and exited() is None and time.monotonic() < end:
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(probe.pid, signal.SIGKILL)
            return probe.wait() == 0

        def open_port(timeout: float) -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(environment["AIP_HTTP_PORT"])), timeout).close()
                return True
            return False

        if spec.startup_probe.exec_.command:
            passed = passes(spec.startup_probe, run_probe, alive=lambda: exited() is None)
        else:
            liveness = types.Probe(period_seconds=10, timeout_seconds=1, failure_threshold=4)
            passed = passes(liveness, open_port, alive=lambda: exited() is None)
        deadline = time.monotonic() + 60
        while passed and not container.ready and exited() is None and time.monotonic() < deadline:
            container.ready = container.healthy(environment["AIP_HEALTH_ROUTE"])
            time.sleep(0 if container.ready else 0.2)
        return container.ready

    # Prediction

    def Predict(self, request: types.PredictRequest) -> types.PredictResponse:
        body = {"instances": [json_format.MessageToDict(i) for i in request._pb.instances]}
        if request._pb.HasField("parameters"):
            body["parameters"] = json_format.MessageToDict(request._pb.parameters)
        predictions, served = self._predict(request.endpoint, json.dumps(body).encode(), "shared")
        response = types.PredictResponse(**served)
        json_format.ParseDict({"predictions": predictions}, response._pb)
        return response

    def RawPredict(self, request: types.RawPredictRequest) -> httpbody_pb2.HttpBody:
        sent = request.http_body
        answer, _ = self._raw_predict(request.endpoint, sent.data, sent.content_type, "shared")
        return httpbody_pb2.HttpBody(content_type=answer.headers["Content-Type"], data=answer.content)

    def _predict(self, name: str, body: bytes, kind: str) -> tuple[list, dict[str, str]]:
        """Routes one request by the endpoint's traffic; returns the predictions and what served them."""
        id, model, timeout = self._route(name, body, kind)
        predictions = self.containers[id].predict(model.container_spec.predict_route or "/v1/predict", body, timeout)
        check_answer(len(json.dumps(predictions)), kind)
        served = {"deployed_model_id": id, "model": model.name, "model_version_id": model.version_id,
                  "model_display_name": model.display_name}  # fmt: skip
        return predictions, served

    def _raw_predict(self, name: str, body: bytes, content_type: str, kind: str) -> tuple[requests.Response, str]:
        """The server's answer to any body, and the id of what gave it; of the headers the content type alone arrives,
        since nobody says whether the others do."""
        id, model, timeout = self._route(name, body, kind)
        route = model.container_spec.predict_route or "/v1/predict"
        answer = self.containers[id].ask(route, body, content_type, timeout)
        check_answer(len(answer.content), kind)
        return answer, id

    def _route(self, name: str, body: bytes, kind: str) -> tuple[str, types.Model, float]:
        """What serves one request: the deployed model's id, its model, and the seconds it has."""
        endpoint, limit = self._endpoint(name), MAX_BYTES[kind]
        dedicated = endpoint.dedicated_endpoint_enabled
        check(dedicated == (kind == "dedicated"), f"{name} is {'' if dedicated else 'not '}a dedicated endpoint.",
              exceptions.FailedPrecondition)  # fmt: skip
        check(len(body) <= limit, f"Request payload size exceeds the limit: {limit} bytes.")
        with self.lock:
            split = dict(endpoint.traffic_split)
            check(split, f"Endpoint {name} doesn't have traffic_split.", exceptions.FailedPrecondition)
            id = random.choices(list(split), weights=split.values())[0]
            deployed = next(d for d in endpoint.deployed_models if d.id == id)
        own = endpoint.client_connection_config.inference_timeout
        timeout = own.total_seconds() if own else TIMEOUTS[kind]
        return id, self._model(deployed.model), timeout

    # Batch prediction

    def CreateBatchPredictionJob(self, request: types.CreateBatchPredictionJobRequest) -> types.BatchPredictionJob:
        job = request.batch_prediction_job
        model, source = self._model(job.model), list(job.input_config.gcs_source.uris)
        destination = job.output_config.gcs_destination.output_uri_prefix
        resources = job.dedicated_resources
        check(resources.starting_replica_count <= (resources.max_replica_count or 10),
              "starting_replica_count must not be greater than max_replica_count.")  # fmt: skip
        check(job.input_config.instances_format in ("jsonl", "file-list")
              and job.output_config.predictions_format == "jsonl",
              "This stand-in reads jsonl and file-list, and writes jsonl, only.")  # fmt: skip
        check(source and all(uri.startswith("gs://") for uri in [*source, destination]),
              "The source and the destination must be gs://…")  # fmt: skip
        check_machine(resources.machine_spec)
        job.name = f"{PARENT}/batchPredictionJobs/{new_id()}"
        job.model, job.create_time, job.state = model.name, time_now(), types.JobState.JOB_STATE_PENDING
        self.jobs[job.name] = job
        answer = copy.deepcopy(job)  # as it was made: what is done with it comes with GetBatchPredictionJob
        self.workers.submit(self._run_job, job, model, source, destination)
        return answer

    def _run_job(self, job, model: types.Model, source: list[str], destination: str) -> None:
        """Sends every line of the source to a server of its own, `batch_size` lines a request, and writes one file of
        results and one of errors, as the service names them. The machines are those of the start: no job autoscales."""
        id = job.name.split("/")[-1]
        route = model.container_spec.predict_route or "/v1/predict"
        parameters = json_format.MessageToDict(job._pb.model_parameters) if job._pb.HasField("model_parameters") else 0
        results, errors, failed, begun = [], [], 0, time.monotonic()
        replicas = job.dedicated_resources.starting_replica_count or 1  # max_replica_count is not looked at
        try:
            job.state, job.start_time = types.JobState.JOB_STATE_RUNNING, time_now()
            client = storage.Client(project=PROJECT)
            text = "\n".join(storage.Blob.from_uri(uri, client).download_as_text() for uri in source)
            lines = [line for line in text.splitlines() if line.strip()]
            is_list = job.input_config.instances_format == "file-list"
            instances = [as_instance(line, client) if is_list else json.loads(line) for line in lines]
            kept = lines if is_list and self.keeps_addresses else instances
            if stopped(job):
                return
            container = self._start(model, id)
            size = job.manual_batch_tuning_parameters.batch_size or 64
            for i in range(0, len(instances), size):
                batch = instances[i : i + size]
                if stopped(job):
                    return
                body = json.dumps({"instances": batch} | ({"parameters": parameters} if parameters else {})).encode()
                start = time.monotonic()
                for _ in range(1 + RETRIES):
                    answer = container.ask(route, body, "application/json", 600)
                    if answer.status_code == 200:
                        rows = zip(kept[i : i + size], answer.json()["predictions"], strict=True)
                        results += [{"instance": a, "prediction": p} for a, p in rows]
                        break
                else:  # a Python tuple without the instances, as the service writes it
                    reason = (
                        f"Post request fails. Cannot get predictions. Error: Exceeded retries: Non-OK result "
                        f"{answer.status_code} ({answer.text}) from server, retry={RETRIES}, "
                        f"elapsed={time.monotonic() - start:.2f}s."
                    )
                    errors.append(repr((reason, code_pb2.UNAUTHENTICATED)))
                    failed += len(batch)
            job.resources_consumed.replica_hours = replicas * (time.monotonic() - begun) / 3600
            random.shuffle(results)  # the order is not kept
            folder = f"{destination.rstrip('/')}/prediction-{model.display_name}-{time.strftime('%Y_%m_%dT%H_%M_%S')}"
            for name, lines in ("prediction.results", map(json.dumps, results)), ("prediction.errors_stats", errors):
                blob = storage.Blob.from_uri(f"{folder}/{name}-00000-of-00001", client)
                blob.upload_from_string("".join(line + "\n" for line in lines))
            job.output_info.gcs_output_directory = folder
            job.completion_stats = types.CompletionStats(successful_count=len(results), failed_count=failed)
            check(results, f"All {failed} instances failed; see {folder}.")
            job.state = types.JobState.JOB_STATE_SUCCEEDED
        except Exception as e:  # whatever it is, the job ends and says why
            job.error.code, job.error.message, job.state = 3, str(e), types.JobState.JOB_STATE_FAILED
        finally:
            job.end_time = time_now()
            if id in self.containers:
                self.containers.pop(id).stop()

    def GetBatchPredictionJob(self, request: types.GetBatchPredictionJobRequest) -> types.BatchPredictionJob:
        check(request.name in self.jobs, f"{request.name} does not exist.", exceptions.NotFound)
        return self.jobs[request.name]

    def ListBatchPredictionJobs(self, request: types.ListBatchPredictionJobsRequest):
        return types.ListBatchPredictionJobsResponse(batch_prediction_jobs=matching(self.jobs.values(), request.filter))

    def CancelBatchPredictionJob(self, request: types.CancelBatchPredictionJobRequest) -> empty_pb2.Empty:
        job = self.GetBatchPredictionJob(request)
        if not job.end_time:  # what runs is stopped before the next request
            job.state = types.JobState.JOB_STATE_CANCELLING
        return empty_pb2.Empty()

    def DeleteBatchPredictionJob(self, request: types.DeleteBatchPredictionJobRequest) -> operations_pb2.Operation:
        job = self.GetBatchPredictionJob(request)
        check(job.end_time, f"{job.name} is still running: cancel it first.", exceptions.FailedPrecondition)
        del self.jobs[job.name]
        return self._later(empty_pb2.Empty)

    # Long-running operations

    def GetOperation(self, request: operations_pb2.GetOperationRequest) -> operations_pb2.Operation:
        check(request.name in self.operations, f"{request.name} does not exist.", exceptions.NotFound)
        return self.operations[request.name]

    def _later(self, work, api: str = "v1") -> operations_pb2.Operation:
        """An operation that is under way; its response, what `work` gives, has the type that `api` gives it."""
        operation = operations_pb2.Operation(name=f"{PARENT}/operations/{new_id()}")
        self.operations[operation.name] = operation

        def run() -> None:
            finished = operations_pb2.Operation(name=operation.name, done=True)
            try:
                time.sleep(MOMENT)
                result = work()
                finished.response.Pack(type(result).pb(result) if hasattr(type(result), "pb") else result)
                finished.response.type_url = finished.response.type_url.replace(".v1.", f".{api}.")
            except Exception as e:  # the operation carries it to the client
                finished.error.code = getattr(e, "grpc_status_code", None).value[0] if is_api_error(e) else 13
                finished.error.message = getattr(e, "message", str(e))
            self.operations[operation.name] = finished

        self.workers.submit(run)
        return operation

    def clear(self) -> None:
        """Forgets all that was made, and stops what runs."""
        for container in list(self.containers.values()):
            container.stop()
        for made in (self.containers, self.models, self.endpoints, self.jobs, self.operations, self.calls,
                     self.refused, self.quota_projects):  # fmt: skip
            made.clear()

    def stop(self) -> None:
        for container in list(self.containers.values()):
            container.stop()
        self.workers.shutdown(cancel_futures=True)


def passes(probe: types.Probe, attempt, alive, sleep=time.sleep, clock=time.monotonic) -> bool:
    """Whether a probe passes, by Kubernetes' rules: tried at once, then a period after the last try began (at once
    where that took longer), until it has failed `failure_threshold` times. `attempt` gets the timeout of a try."""
    for left in reversed(range(probe.failure_threshold or 3)):
        begun = clock()
        if attempt(probe.timeout_seconds or 1):
            return True
        while left and alive() and clock() < begun + (probe.period_seconds or 10):
            sleep(0.05)
        if not alive():
            return False
    return False


def check_required(message: Message, api: str) -> None:
    """Raises where a field is empty that Google's protos call REQUIRED, in `message` and in what it holds."""
    name, given = message.DESCRIPTOR.full_name.removeprefix(PACKAGE), message.ListFields()
    missing = [field for field, behavior in BEHAVIOR.get(name, {}).items() if "REQUIRED" in behavior]
    missing = [field for field in missing if field not in {descriptor.name for descriptor, _ in given}]
    if api == "v1beta1" and name == "DedicatedResources":  # there 0 is a number that may be given
        missing = [field for field in missing if field != "min_replica_count"]
    check(not missing, f"{name}: {', '.join(missing)} is required.")
    if "update_mask" in message.DESCRIPTOR.fields_by_name:
        return  # it holds a part of a resource
    for descriptor, value in given:
        kind = descriptor.message_type
        if kind and kind.full_name.startswith(PACKAGE) and not kind.GetOptions().map_entry:
            for part in [value] if isinstance(value, Message) else value:
                check_required(part, api)


def check_mutable(message: str, path: str, but: tuple[str, ...] = ()) -> None:
    """Raises for a field that Google's protos call IMMUTABLE or OUTPUT_ONLY, except those in `but`."""
    fixed = {"IMMUTABLE", "OUTPUT_ONLY"} & set(BEHAVIOR[message].get(path, ()))
    check(path in but or not fixed, f"Cannot update {path}: it is {' and '.join(fixed).lower()}.")


def stopped(job: types.BatchPredictionJob) -> bool:
    """Whether the job was cancelled; it is over then."""
    if job.state != types.JobState.JOB_STATE_CANCELLING:
        return False
    job.state = types.JobState.JOB_STATE_CANCELLED
    return True


def as_instance(address: str, client: storage.Client) -> dict:
    """What the service makes of one line of a file-list: the content of the object at `address`."""
    data = storage.Blob.from_uri(address.strip(), client).download_as_bytes()
    return {"b64": base64.b64encode(data).decode()}


def check_answer(size: int, kind: str) -> None:
    limit = MAX_BYTES[kind]
    check(size <= limit, f"Response size too large. Received at least {size} bytes; max is {limit}.")


def check_machine(spec: types.MachineSpec) -> None:
    check(spec.machine_type, "machine_spec.machine_type is required.")
    if spec.accelerator_type:
        name = spec.accelerator_type.name
        check(spec.accelerator_count > 0, "accelerator_count is required with accelerator_type.")
        check(not spec.gpu_partition_size or spec.accelerator_count == 1, "gpu_partition_size takes one accelerator.")
        check(spec.machine_type.startswith(ACCELERATORS.get(name, "")),
              f"{name} needs a {ACCELERATORS.get(name)}* machine, not {spec.machine_type}.")  # fmt: skip


def as_v1beta1(deployed: types.DeployedModel) -> aiplatform_v1beta1.DeployedModel:
    """What was sent to v1beta1, with the fields that v1 does not know."""
    return aiplatform_v1beta1.DeployedModel.deserialize(types.DeployedModel.serialize(deployed))


def check_scaling(resources: types.DedicatedResources, to_zero: bool) -> None:
    check(resources.min_replica_count >= 1 or to_zero, "min_replica_count must be at least 1.")
    check(not resources.max_replica_count or resources.max_replica_count >= resources.min_replica_count,
          "max_replica_count must be at least min_replica_count.")  # fmt: skip
    for spec in resources.autoscaling_metric_specs:
        metric = spec.metric_name.removeprefix("aiplatform.googleapis.com/prediction/online/")
        check(metric in METRICS, f"Unknown autoscaling metric {spec.metric_name}.")
        check(spec.target >= 1 and (metric == "request_count" or spec.target <= 100), "Target out of range.")


def matching(resources, filter: str) -> list:
    wanted = re.fullmatch(r'\s*(?:display_name|displayName)\s*=\s*"([^"]*)"\s*', filter or 'display_name=""')
    check(wanted, f"This stand-in cannot read the filter {filter!r}.")
    return [r for r in resources if not filter or r.display_name == wanted[1]]


def is_api_error(e: Exception) -> bool:
    return isinstance(e, exceptions.GoogleAPICallError) and e.grpc_status_code is not None


def tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def time_now() -> timestamp_pb2.Timestamp:
    now = timestamp_pb2.Timestamp()
    now.GetCurrentTime()
    return now


# The two doors: gRPC for the API, HTTPS for tokens and for dedicated endpoints.


class Methods(grpc.GenericRpcHandler):
    """Leads `/google.cloud.aiplatform.v1….Service/Method` to `VertexAI.Method`; asks each call for a valid token."""

    def __init__(self, service: VertexAI, verify) -> None:
        self.service_, self.verify = service, verify

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = details.method.rsplit("/", 1)[-1]
        api = "v1beta1" if ".v1beta1." in details.method else "v1"
        method = getattr(self.service_, name, None)
        if method is None or not name[0].isupper():
            return None  # gRPC answers UNIMPLEMENTED
        request_type = getattr(types, f"{name}Request", None) or getattr(operations_pb2, f"{name}Request")

        def call(request, context: grpc.ServicerContext):
            try:
                self.service_.calls.append(name)
                metadata = dict(context.invocation_metadata())
                self.verify(metadata.get("authorization", ""))
                self.service_.quota_projects.add(metadata.get("x-goog-user-project", ""))
                self.service_.answering.wait()
                if error := self.service_.refused.get(name):
                    raise error
                if hasattr(type(request), "pb"):
                    check_required(type(request).pb(request), api)
                return method(request, api) if name == "DeployModel" else method(request)
            except exceptions.GoogleAPICallError as e:
                code = e.grpc_status_code or grpc.StatusCode.INTERNAL
                status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=e.message)
                if e.reason:
                    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=e.reason, domain=e.domain))
                context.abort_with_status(rpc_status.to_status(status))

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=getattr(request_type, "deserialize", None) or request_type.FromString,
            response_serializer=lambda m: m.SerializeToString() if hasattr(m, "DESCRIPTOR") else type(m).serialize(m),
        )


def https_server(service: VertexAI, verify, token: str, tls: ssl.SSLContext) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                if self.path == "/token":  # OAuth's exchange of a signed assertion for an access token
                    self.answer(200, {"access_token": token, "expires_in": 3600, "token_type": "Bearer"})
                    return
                verify(self.headers.get("Authorization", ""))
                name = re.fullmatch(r"/v1/(projects/.+):(predict|rawPredict)", self.path)
                check(name, f"{self.path} is not served here.", exceptions.NotFound)
                if error := service.refused.get("Predict"):
                    raise error
                kind = "shared" if self.headers["Host"] == PUBLIC else "dedicated"
                if name[2] == "rawPredict":
                    content_type = self.headers.get("Content-Type", "")
                    answer, id = service._raw_predict(name[1], body, content_type, kind)
                    ids = {"X-Vertex-AI-Endpoint-Id": name[1].split("/")[-1], "X-Vertex-AI-Deployed-Model-Id": id}
                    self.send(answer.status_code, answer.content, answer.headers["Content-Type"], **ids)
                    return
                predictions, served = service._predict(name[1], body, kind)
                camel = {"deployed_model_id": "deployedModelId", "model_version_id": "modelVersionId",
                         "model_display_name": "modelDisplayName", "model": "model"}  # fmt: skip
                self.answer(200, {"predictions": predictions} | {camel[k]: v for k, v in served.items()})
            except exceptions.GoogleAPICallError as e:
                status = e.grpc_status_code.name if e.grpc_status_code else "INTERNAL"
                error = {"code": e.code, "message": e.message, "status": status}
                if e.reason:
                    kind = "type.googleapis.com/google.rpc.ErrorInfo"
                    error["details"] = [{"@type": kind, "reason": e.reason, "domain": e.domain}]
                self.answer(e.code, {"error": error})

        def answer(self, status: int, content: dict) -> None:
            self.send(status, json.dumps(content).encode(), "application/json")

        def send(self, status: int, data: bytes, content_type: str, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def vertex_ai(images: dict[str, Path | str], bucket: str = "local-bucket") -> Iterator[VertexAI]:
    """Runs the stand-in on loopback, and points this process (and those it starts) at it by the environment variables
    that Google's libraries read. `images` maps an image URI to the model store that the image holds."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vertex-")))
        service = VertexAI({image: Path(store).resolve() for image, store in images.items()}, folder)
        stack.callback(service.stop)
        atexit.register(service.stop)
        stack.callback(atexit.unregister, service.stop)

        root = folder / "root.pem"
        authority().cert_pem.write_to_path(str(root))
        certificate = authority().issue_cert("localhost", "127.0.0.1", PUBLIC)
        account = authority().issue_cert("tester@example.com", key_type=trustme.KeyType.RSA)
        token = service.token = secrets.token_urlsafe()

        def verify(authorization: str) -> None:
            sent = authorization.removeprefix("Bearer ")
            try:
                if sent != token:
                    jwt.decode(sent, account.cert_chain_pems[0].bytes())
            except Exception as e:
                raise exceptions.Unauthenticated("Request had invalid authentication credentials.") from e

        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(tls)
        web = https_server(service, verify, token, tls)
        stack.callback(web.server_close)
        stack.callback(web.shutdown)
        service.dedicated_dns = f"localhost:{web.server_port}"
        stack.enter_context(leads_to(web.server_port, PUBLIC))

        credentials = grpc.ssl_server_credentials(
            [(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())]
        )
        server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
        server.add_generic_rpc_handlers((Methods(service, verify),))
        service.api_endpoint = f"localhost:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        stack.callback(lambda: server.stop(grace=1).wait())

        key = {
            "type": "service_account", "project_id": PROJECT, "private_key_id": "local",
            "private_key": account.private_key_pem.bytes().decode(), "client_email": "tester@example.com",
            "token_uri": f"https://{service.dedicated_dns}/token",
        }  # fmt: skip
        (folder / "key.json").write_text(json.dumps(key))
        (folder / "key.json").chmod(0o600)

        [port] = free_ports(1)
        stack.enter_context(create_storage_emulator("127.0.0.1", port, in_memory=True, default_bucket=bucket))
        stack.enter_context(environment(
            GOOGLE_APPLICATION_CREDENTIALS=str(folder / "key.json"),
            GOOGLE_CLOUD_PROJECT=PROJECT,
            AI_PLATFORM_API_ENDPOINT=service.api_endpoint,
            STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{port}",
            GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=str(root),
            REQUESTS_CA_BUNDLE=str(root),
            NO_PROXY=f"localhost,127.0.0.1,{PUBLIC}",
        ))  # fmt: skip
        yield service


@contextlib.contextmanager
def leads_to(port: int, name: str) -> Iterator[None]:
    """In this process `name` is this machine, and each of its ports is `port`."""
    look_up = socket.getaddrinfo

    def here(host, service, *args, **options):
        place = ("127.0.0.1", port) if host == name else (host, service)
        return look_up(*place, *args, **options)

    socket.getaddrinfo = here
    try:
        yield
    finally:
        socket.getaddrinfo = look_up


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
