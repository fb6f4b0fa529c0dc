"""The Vertex AI client, through the unmodified SDK, against the stand-in and the real server behind it."""

import base64
import contextlib
import inspect
import io
import json
import logging
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from google.api_core import exceptions
from google.api_core.future import polling
from google.cloud import aiplatform, storage
from google.cloud.aiplatform_v1 import types
from google.oauth2.credentials import Credentials
from google.rpc import error_details_pb2
from PIL import Image

from deployment import ai_platform
from deployment.ai_platform import jobs, online, progress
from deployment.ai_platform.__main__ import main
from deployment.ai_platform.advice import remedy
from deployment.ai_platform.client import ACCELERATORS, known_endpoints
from deployment.archive import fetch
from deployment.handler import Handler
from deployment.runtime import cores
from deployment.server.torchserve import workers_and_threads
from tests import cloud_check
from tests.conftest import draw_photo, encoded, learner_masks
from tests.test_gcloud import parsed
from tests.vertex_stand_in import Container, as_v1beta1, check_machine, passes, vertex_ai

# on uvicorn, which starts sooner; on TorchServe among the long tests
LONG = pytest.param("torchserve", marks=pytest.mark.soak)
quicker = pytest.mark.parametrize("kind", ["uvicorn", LONG], indirect=True, scope="session")
IMAGE = "us-central1-docker.pkg.dev/local-project/fastunet/serve"


@pytest.fixture(scope="module")
def stand_in(model_store, next_version, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    images = {f"{IMAGE}:1": model_store, f"{IMAGE}:2": next_version, f"{IMAGE}:empty": empty}
    with pytest.MonkeyPatch.context() as environment, vertex_ai(images) as service:
        environment.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "1")
        environment.setattr(polling.DEFAULT_POLLING, "_initial", 0.1)  # seconds between looks at an operation
        environment.setattr(polling.DEFAULT_POLLING, "_maximum", 0.5)
        environment.setattr(jobs, "WAIT", 0.3)
        ai_platform.connect()
        yield service
        running = [container.process for container in service.containers.values()]
    assert all(process.poll() is not None for process in running)


@pytest.fixture
def service(stand_in):
    """The stand-in with nothing in it, whatever the test before left there."""
    yield stand_in
    stand_in.clear()
    known_endpoints.clear()


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [encoded(draw_photo(seed)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def reference(stand_in, learner, model_store, next_version, kind):
    """A function from a version and a photo to the mask that this version has to give, on servers of `kind`.

    It is `learn.predict`'s on as many threads as the stand-in's containers have, which is known once it has started:
    on some processors logits differ between one thread and two.
    """
    stores = {"1": model_store, "2": next_version}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SERVER", kind)  # for the image that the stand-in starts
        threads = workers_and_threads()[1] if kind == "torchserve" else cores()
        masks = {version: learner_masks(learner, threads) for version in stores}

        def mask_of(version: str, photo: bytes) -> np.ndarray:
            learner.model.load_state_dict(torch.load(stores[version] / "fastunet.pth", weights_only=True))
            return masks[version](photo)

        yield mask_of
        learner.model.load_state_dict(torch.load(stores["1"] / "fastunet.pth", weights_only=True))


@pytest.mark.parametrize(
    "kind", ["torchserve", pytest.param("uvicorn", marks=pytest.mark.soak)], indirect=True, scope="session"
)
def test_canary_from_upload_to_clean_up(service, photos, reference, tmp_path, capsys):
    def served(version: str) -> bool:
        masks = [ai_platform.mask(ai_platform.predict([photo])[0]) for photo in photos]
        return np.array_equal(masks, [reference(version, photo) for photo in photos])

    assert ai_platform.upload(f"{IMAGE}:1").version_id == "1"
    endpoint = ai_platform.deploy(max_replicas=3, target=70, log_to="bq://local-project.logs.requests", log_rate=0.1)
    assert endpoint.dedicated_endpoint_enabled
    service.calls.clear()
    assert served("1")
    assert "ListEndpoints" not in service.calls[1:]  # looked up once, for all photos
    assert ai_platform.deploy().resource_name == endpoint.resource_name
    assert len(service.containers) == 1  # no second machine for the same version
    with pytest.raises(ValueError, match="deployed with 100 % of the traffic"):
        ai_platform.deploy(share=50)

    def default() -> str:
        return aiplatform.Model("fastunet").version_id

    assert ai_platform.upload(f"{IMAGE}:2").version_id == "2"
    assert default() == "1"  # the canary is not what others get who ask for the model
    assert ai_platform.deploy(accelerator="T4", spot=True).resource_name == endpoint.resource_name
    assert "uploaded as an image for the CPU" in capsys.readouterr().out
    assert served("1")  # deployed without traffic
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, photo in zip(files, photos, strict=False):
        file.write_bytes(photo)
    out = tmp_path / "masks"
    main(["predict", *map(str, files), "--format=png", "--size=original", f"--out={out}"])
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png"]
    assert Image.open(out / "1.png").size == Image.open(files[1]).size
    assert np.array_equal(ai_platform.mask(ai_platform.predict_raw(files[0])), reference("1", photos[0]))
    main(["predict", "--raw", *map(str, files), "--format=png", f"--out={tmp_path / 'raw'}"])
    for file, photo in zip(files, photos, strict=False):
        assert np.array_equal(Image.open(tmp_path / "raw" / file.name), reference("1", photo))
    capsys.readouterr()
    (tmp_path / "none.png").write_bytes(b"no photo")
    with pytest.raises(SystemExit, match="1 of 2 photo"):
        main(["predict", "--raw", str(tmp_path / "none.png"), str(files[1])])
    assert "not an image" in capsys.readouterr().out
    random.seed(0)  # the stand-in draws each request's version
    ai_platform.traffic({"1": 50, "2": 50})
    endpoint = aiplatform.Endpoint(endpoint.resource_name)
    answers = [endpoint.predict(ai_platform.request_body(photos[:1])["instances"]) for _ in range(12)]
    assert {a.model_version_id for a in answers} == {"1", "2"}
    for a in answers:
        assert np.array_equal(ai_platform.mask(a.predictions[0]), reference(a.model_version_id, photos[0]))

    ai_platform.traffic({"1": 100})
    assert served("1") and default() == "1"
    ai_platform.traffic({"2": 100}, undeploy=True)
    assert served("2") and default() == "2"
    assert "version 2 of fastunet is `default` now, in place of 1" in capsys.readouterr().out
    assert len(endpoint.list_models()) == len(service.containers) == 1
    with pytest.raises(ValueError, match="version 1 is not deployed"):
        ai_platform.traffic({"1": 100})
    described = ai_platform.overview()
    assert "version 2  100 % of traffic  n1-standard-4 + NVIDIA_TESLA_T4  1 to 1 replica(s), Spot" in described
    log = endpoint.gca_resource.predict_request_response_logging_config
    assert log.enabled and log.sampling_rate == pytest.approx(0.1)

    assert len(ai_platform.delete()) == 2
    assert ai_platform.delete() == []
    assert not service.containers and not service.endpoints and not service.models


@quicker
def test_large_photos_need_a_dedicated_endpoint(service, next_version, reference):
    blob = storage.Client().bucket("local-bucket").blob("v2/fastunet.mar")
    blob.upload_from_filename(next_version / "fastunet.mar")
    ai_platform.upload(
        f"{IMAGE}:empty", name="large", artifacts="gs://local-bucket/v2"
    )  # fetched at the server's start
    large = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (700, 800, 3), np.uint8)))
    endpoint = ai_platform.deploy("large", shared=True)
    with pytest.raises(ValueError, match="2.24 MB, and this endpoint takes 1.5 MB"):
        ai_platform.predict([large], name="large")
    with pytest.raises(exceptions.InvalidArgument, match="payload size"):
        endpoint.predict(ai_platform.request_body([large])["instances"])
    with pytest.raises(ValueError, match="1.68 MB, and this endpoint takes 1.5 MB"):
        ai_platform.predict_raw(large, name="large")
    with pytest.raises(exceptions.InvalidArgument, match="payload size"):
        raise online.refusal(400, endpoint.raw_predict(large, {"Content-Type": "image/png"}).text)
    small = encoded(draw_photo(1))  # the SDK sends it to the API's public address
    assert np.array_equal(ai_platform.mask(ai_platform.predict_raw(small, name="large")), reference("2", small))
    picture = ai_platform.predict_raw(small, name="large", format="png")
    assert np.array_equal(Image.open(io.BytesIO(picture)), reference("2", small))
    endpoint.delete(force=True)
    with pytest.raises(exceptions.NotFound):
        ai_platform.predict([b""], name="large")

    ai_platform.deploy("large", min_replicas=0, max_replicas=2, idle_after=600)  # scale to zero, by v1beta1
    assert "n1-standard-4  0 to 2 replica(s)" in ai_platform.overview("large")
    with pytest.raises(ValueError, match="dedicated one already"):
        ai_platform.deploy("large", shared=True)
    with pytest.raises(exceptions.InvalidArgument, match="no instance is good"):  # what the SDK calls a ValueError
        ai_platform.predict([b"no photo"], name="large")
    answer = ai_platform.predict([large], name="large")
    assert np.array_equal(ai_platform.mask(answer[0]), reference("2", large))
    larger = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (1600, 1700, 3), np.uint8)))
    assert 8e6 < len(larger) < 10e6  # as base64 it is too large
    with pytest.raises(ValueError, match="10.90 MB, and this endpoint takes 10.0 MB"):
        ai_platform.predict([larger], name="large")
    assert np.array_equal(ai_platform.mask(ai_platform.predict_raw(larger, name="large")), reference("2", larger))
    ai_platform.delete("large")


def test_previews_keep_their_logs_and_are_deleted_without_traffic(service, monkeypatch, capsys):
    def start(model: types.Model, id: str, endpoint: types.Endpoint) -> None:
        service.containers[id] = Container(None, "", service.folder, contextlib.ExitStack())  # nobody asks it anything

    monkeypatch.setattr(service, "_start", start)
    ai_platform.upload(f"{IMAGE}:1", name="preview")
    ai_platform.deploy("preview", min_replicas=0, idle_after=600)
    ai_platform.upload(f"{IMAGE}:1", name="preview")
    ai_platform.deploy("preview", accelerator="H100", flex_start=86_400)
    part = {"accelerator": "H100", "gpu_partition": "1g.10gb"}
    endpoint = ai_platform.deploy("preview", **part)
    zero, flex, partition = (as_v1beta1(d) for d in sorted(endpoint.list_models(), key=lambda d: d.create_time))
    assert zero.enable_container_logging and flex.enable_container_logging  # off by default in v1beta1
    assert zero.dedicated_resources.scale_to_zero_spec.idle_scaledown_period.total_seconds() == 600
    assert flex.dedicated_resources.flex_start.max_runtime_duration.total_seconds() == 86_400
    assert partition.dedicated_resources.machine_spec.gpu_partition_size == "1g.10gb"

    ai_platform.deploy("preview", **part)  # it runs already
    assert service.calls.count("DeployModel") == 3
    main(["deploy", "--name=preview", "--version=1", "--min-replicas=0", "--idle-after=300"])
    assert "--idle-after and --flex-start are settled when a version is deployed" in capsys.readouterr().out
    for wrong, message in [
        ({"min_replicas": 0, "spot": True}, "--spot and --min-replicas 0 or --flex-start"),
        ({"flex_start": 60, **part}, "--gpu-partition and --min-replicas 0 or --flex-start"),
        ({"gpu_partition": "1g.10gb"}, "--gpu-partition needs an --accelerator"),
        ({"flex_start": 604_801}, "--flex-start takes 1 to 604800 seconds"),
    ]:
        with pytest.raises(ValueError, match=message):
            ai_platform.deploy("preview", **wrong)
    ai_platform.traffic({"1": 100}, "preview")
    assert ai_platform.get_endpoint("preview").traffic_split == {zero.id: 100}  # the others are not even in it
    assert len(ai_platform.delete("preview")) == 2  # endpoint and model
    assert service.calls.count("UndeployModel") == 3
    assert not service.containers and not service.endpoints and not service.models


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_service_has_the_accelerators_and_their_machines(accelerator):
    name, machine = ACCELERATORS[accelerator]
    spec = types.MachineSpec(machine_type=machine, accelerator_type=name, accelerator_count=1 if name else 0)
    assert name is None or spec.accelerator_type.name in types.AcceleratorType.__members__
    check_machine(spec)


@quicker
def test_batch_of_large_photos(service, reference, tmp_path, capsys):
    """64 photos of two megapixels are more than one request may hold, and one file is no photo."""
    ai_platform.upload(f"{IMAGE}:1", name="batch")
    files = [tmp_path / "photos" / f"{i:02}.png" for i in range(64)]
    files[0].parent.mkdir()
    for i, file in enumerate(files):
        Image.new("RGB", (1920, 1080), (4 * i, 255 - 4 * i, i)).save(file, compress_level=1)
    files[7].write_bytes(b"no photo")
    command = ["batch", "--name=batch", "--to=gs://local-bucket/out", "--machine=n1-standard-2", "--replicas=2"]
    with pytest.raises(SystemExit, match="1 of 64 photo"):
        main([*command, *map(str, files)])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["file"] for row in printed if "error" in row] == [str(files[7])]
    [job] = service.jobs.values()
    assert job.manual_batch_tuning_parameters.batch_size == 24  # 50 million pixels; the service's default is 64
    assert job.completion_stats.successful_count == 64
    assert job.dedicated_resources.starting_replica_count == 2  # the other number is not looked at
    rows = {row["instance"]["name"]: row for row in ai_platform.batch_results(job.output_info.gcs_output_directory)}
    with pytest.raises(ValueError, match="got no mask: not an image"):
        ai_platform.mask(rows[str(files[7])]["prediction"])
    for file in (files[0], files[63]):
        assert np.array_equal(ai_platform.mask(rows[str(file)]["prediction"]), reference("1", file.read_bytes()))

    [source] = job.input_config.gcs_source.uris  # the same lines again, in requests that are too large
    with pytest.raises(SystemExit, match="24 of 64 photo"):
        main([*command, "--batch-size=48", "--format=png", f"--out={tmp_path / 'masks'}", source])
    assert len(list((tmp_path / "masks").iterdir())) == 40
    assert Image.open(tmp_path / "masks" / "00.png").size == (96, 64)

    storage.Client().bucket("local-bucket").blob("two.jsonl").upload_from_string(
        json.dumps(rows[str(files[7])]["instance"]) + "\n" + json.dumps(rows[str(files[0])]["instance"]) + "\n"
    )
    folder = ai_platform.batch(["gs://local-bucket/two.jsonl"], "gs://local-bucket/out", "batch", batch_size=1)
    good, bad = ai_platform.batch_results(folder)  # a request that failed is in a file of its own
    assert ai_platform.error_in(good) is None and "not an image" in ai_platform.error_in(bad)
    assert bad["instance"] == {} and "Exceeded retries: Non-OK result 400" in bad["error"]["message"]
    with pytest.raises(FileNotFoundError, match="no gs://local-bucket/none.jsonl"):
        ai_platform.batch(["gs://local-bucket/none.jsonl"], "gs://local-bucket/out", "batch")
    with pytest.raises(RuntimeError, match="404"):
        ai_platform.batch(["gs://local-bucket/none.jsonl"], "gs://local-bucket/out", "batch", batch_size=1)

    running = aiplatform.BatchPredictionJob.submit(
        job_display_name="batch", model_name="batch", gcs_source=source, gcs_destination_prefix="gs://local-bucket/out",
        machine_type="n1-standard-2", batch_size=1,
    )  # fmt: skip
    with pytest.raises(exceptions.FailedPrecondition, match="still running"):
        running.delete()
    stays = ai_platform.left_over("batch")
    assert f"gcloud artifacts docker images delete {IMAGE}:1 --delete-tags" in stays
    assert f"gcloud storage rm --recursive {folder}" in stays and f"gcloud storage rm --recursive {source}" in stays
    for command in stays:
        parsed(command)  # gcloud knows it
    assert len(ai_platform.delete("batch")) == 6 and "CancelBatchPredictionJob" in service.calls


@pytest.mark.parametrize("keeps_addresses", [True, False], ids=["addresses", "contents"])
def test_batch_of_a_bucket(service, next_version, tmp_path, capsys, monkeypatch, keeps_addresses):
    """Images are read where they are, and the rows, in any order, get their names back, whatever the service keeps."""
    monkeypatch.setenv("SERVER", "uvicorn")
    monkeypatch.setattr(service, "keeps_addresses", keeps_addresses)
    ai_platform.upload(f"{IMAGE}:2", name="bucket")
    bucket, folder = storage.Client().bucket("local-bucket"), f"images-{keeps_addresses}"
    sent = {f"{folder}/street {i}/{i}.png": encoded(draw_photo(i)) for i in range(5)}
    sent |= {f"{folder}/again.png": sent[f"{folder}/street 0/0.png"], f"{folder}/broken.jpg": b"no image"}
    huge, large = f"{folder}/huge.tif", "larger than the container takes (20 MB as base64)"
    beside = {f"{folder}-old/0.png": b"", f"{folder}/out/prediction-bucket-1/mask.png": b"", huge: bytes(16 << 20)}
    for name, data in (sent | beside).items():
        bucket.blob(name).upload_from_string(data)
    command = ["batch", f"gs://local-bucket/{folder}", "--name=bucket", f"--to=gs://local-bucket/{folder}/out"]
    with pytest.raises(SystemExit, match="2 of 8 photo"):
        main([*command, "--format=png", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert f"left out, {large}: gs://local-bucket/{huge}" in printed
    rows = {row["file"]: row for row in map(json.loads, re.findall(r"^\{.*$", printed, re.M))}
    assert rows.keys() == {f"gs://local-bucket/{name}" for name in [*sent, huge]}
    assert "not an image" in rows[f"gs://local-bucket/{folder}/broken.jpg"]["error"]
    assert rows[f"gs://local-bucket/{huge}"]["error"] == f"no answer: {large}"
    handler = Handler()
    handler.load(next_version, threads=cores())
    for name in sent:
        if "broken" not in name:
            job = handler.preprocess({"body": sent[name]}, "image/png")
            handler.inference(job.items)
            written = Path(rows[f"gs://local-bucket/{name}"]["written"]).read_bytes()
            assert written == handler.postprocess(job).body
    [job] = service.jobs.values()
    assert job.input_config.instances_format == "file-list"
    [listed] = job.input_config.gcs_source.uris
    lines = storage.Blob.from_uri(listed, storage.Client()).download_as_text().splitlines()
    assert sorted(lines) == sorted(f"gs://local-bucket/{name}" for name in sent)
    assert job.manual_batch_tuning_parameters.batch_size == 64
    with pytest.raises(ValueError, match="make two jobs"):
        ai_platform.batch([f"gs://local-bucket/{folder}", "a.png"], "gs://local-bucket/out", "bucket")
    with pytest.raises(ValueError, match="no photo"):
        ai_platform.batch(["gs://local-bucket/none"], "gs://local-bucket/out", "bucket")


def test_requests_of_a_bucket_hold_what_the_container_takes(service):
    """By the sizes of the objects, and by the pixels of the largest ones, whose headers alone are read."""
    bucket, client = storage.Client().bucket("local-bucket"), storage.Client()
    large = encoded(Image.new("RGB", (4000, 3000)), "JPEG") + bytes(2_000_000)  # 12 megapixels
    for i in range(3):
        bucket.blob(f"large/{i}.jpg").upload_from_string(large)
    blobs = jobs.objects(["gs://local-bucket/large"], client)
    inputs = jobs.send_list(blobs, "gs://local-bucket/list.txt", client, 50_000_000)
    assert {pixels for _, pixels in inputs.sizes} == {12_000_000} and len(inputs.sizes) == 3
    assert all(size >= len(base64.b64encode(large)) for size, _ in inputs.sizes)
    assert jobs.lines_per_request(inputs.sizes * 10) == 4
    assert jobs.send_list(blobs, "gs://local-bucket/list.txt", client, None).sizes == []
    too_many = jobs.send_list(blobs, "gs://local-bucket/list.txt", client, 10_000_000)
    assert {pixels for _, pixels in too_many.sizes} == {0}  # each is refused by its header, alone
    bucket.blob("large/input-20261127-120000.txt").upload_from_string("")  # what jobs write is no photo
    bucket.blob("large/prediction-fastunet-1/prediction.results-00000-of-00001").upload_from_string("")
    for destination in ("gs://local-bucket", "gs://local-bucket/", "gs://local-bucket/large"):
        found = jobs.objects(["gs://local-bucket/large"], client, destination)
        listed = {blob.name.removeprefix("large/") for blob in found}
        assert {"0.jpg", "1.jpg", "2.jpg"} <= listed
        assert len(listed) == (3 if destination.endswith("large") else 5)
    with pytest.raises(FileNotFoundError, match="no bucket gs://none"):
        jobs.objects(["gs://none/images"], client)


def test_the_cloud_check_passes_and_names_no_project(service, monkeypatch):
    monkeypatch.setenv("SERVER", "uvicorn")  # in the image that the stand-in starts
    seen = cloud_check.check(f"{IMAGE}:1", "local-bucket", "check")
    assert seen["refused raw"]["message"].startswith("not an image") and seen["refused"]["code"] == 400
    written = json.dumps(cloud_check.without_names(seen, "local-bucket", "local-project"))
    assert re.findall(r".{20}local-.*", written) == [] and "JOB_STATE_SUCCEEDED" in written
    assert types.Endpoint.from_json(json.dumps(seen["endpoint"])).dedicated_endpoint_enabled
    assert not service.containers and not service.endpoints and not service.models and not service.jobs


def test_a_running_version_is_scaled_in_place(service, monkeypatch, capsys):
    def scaling() -> tuple[int, int, int]:
        [deployed] = ai_platform.get_endpoint("scaled").list_models()
        resources = deployed.dedicated_resources
        return (
            resources.min_replica_count,
            resources.max_replica_count,
            resources.autoscaling_metric_specs[0].target,
        )

    monkeypatch.setenv("SERVER", "uvicorn")  # in the image that the stand-in starts
    ai_platform.upload(f"{IMAGE}:1", name="scaled")
    key = "projects/local-project/locations/us-central1/keyRings/ring/cryptoKeys/key"
    made = {"kms_key": key, "inference_timeout": 1800, "labels": {"team": "vision"}}
    endpoint = ai_platform.deploy("scaled", service_account="serve@local-project.iam.gserviceaccount.com", **made)
    assert endpoint.gca_resource.encryption_spec.kms_key_name == key and endpoint.labels == {"team": "vision"}
    assert endpoint.gca_resource.client_connection_config.inference_timeout.total_seconds() == 1800
    assert endpoint.list_models()[0].service_account == "serve@local-project.iam.gserviceaccount.com"
    with pytest.raises(ValueError, match="exists with another --inference-timeout"):
        ai_platform.deploy("scaled", inference_timeout=60)
    main(["deploy", "--name=scaled", "--labels=team=cars,year=2026"])
    assert ai_platform.get_endpoint("scaled").labels == {"team": "cars", "year": "2026"}
    assert scaling() == (1, 1, 60)
    main(["deploy", "--name=scaled", "--max-replicas=5"])
    assert scaling() == (1, 5, 60) and "1 to 5 replica(s)" in capsys.readouterr().out
    main(["deploy", "--name=scaled"])  # what is not said stays as it is
    assert scaling() == (1, 5, 60) and "version 1 is deployed to endpoint scaled already" in capsys.readouterr().out
    ai_platform.deploy("scaled", min_replicas=2, max_replicas=5, target=80)
    assert scaling() == (2, 5, 80)
    ai_platform.deploy("scaled", min_replicas=7)
    assert scaling() == (7, 7, 80)
    ai_platform.deploy("scaled", scale_on="requests", target=300)
    [metric] = ai_platform.get_endpoint("scaled").list_models()[0].dedicated_resources.autoscaling_metric_specs
    assert (metric.metric_name.split("/")[-1], metric.target) == ("request_count", 300)
    ai_platform.deploy("scaled", target=400)
    [metric] = ai_platform.get_endpoint("scaled").list_models()[0].dedicated_resources.autoscaling_metric_specs
    assert (metric.metric_name.split("/")[-1], metric.target) == ("request_count", 400)
    ai_platform.deploy("scaled", scale_on="cpu", target=80)
    ai_platform.deploy("scaled", scale_on="cpu")  # by which it is scaled already
    assert scaling() == (7, 7, 80)
    assert service.calls.count("MutateDeployedModel") == 6 and service.calls.count("DeployModel") == 1
    with pytest.raises(exceptions.InvalidArgument, match="max_replica_count must be at least"):
        ai_platform.deploy("scaled", max_replicas=3)
    with pytest.raises(ValueError, match="with --min-replicas 7, which cannot become 0 in place"):
        ai_platform.deploy("scaled", min_replicas=0)
    with pytest.raises(ValueError, match="deployed with 100 % of the traffic"):
        ai_platform.deploy("scaled", max_replicas=9, share=50)
    for wrong, message in [
        ({"scale_on": "requests"}, "needs a --target"),
        ({"scale_on": "gpu"}, "needs an --accelerator"),
        ({"idle_after": 600}, "goes with --min-replicas 0"),
        ({"min_replicas": 0, "idle_after": 60}, "takes 300 to 28800 seconds"),
    ]:
        with pytest.raises(ValueError, match=message):
            ai_platform.deploy("scaled", **wrong)
    assert scaling() == (7, 7, 80)

    [deployed] = endpoint.list_models()
    for id, path, error in [
        (deployed.id, "dedicated_resources.machine_spec", exceptions.InvalidArgument),
        ("5", "dedicated_resources.min_replica_count", exceptions.NotFound),
    ]:
        wrong = {"endpoint": endpoint.resource_name, "deployed_model": {"id": id}, "update_mask": {"paths": [path]}}
        with pytest.raises(error):
            endpoint.api_client.mutate_deployed_model(request=wrong)


def test_fetch_leaves_out_what_lies_in_subfolders(service):
    for path in ("fastunet.mar", "fastunet.mar.sha256", "old/fastunet.mar", "old/street.mar", "fastunet.mar.bak"):
        for folder in ("", "models/"):  # at the top of the bucket, and in a folder
            storage.Client().bucket("local-bucket").blob(folder + path).upload_from_string(folder + path)
    for folder in ("", "models/"):
        for name in (None, "fastunet"):
            fetched = sorted(fetch(f"gs://local-bucket/{folder}", name).iterdir())
            assert [file.name for file in fetched] == ["fastunet.mar", "fastunet.mar.sha256"]
            assert [file.read_text() for file in fetched] == [f"{folder}{file.name}" for file in fetched]
    with pytest.raises(FileNotFoundError, match="no archive street.mar in gs://local-bucket/models"):
        fetch("gs://local-bucket/models", "street")


def test_lines_per_request():
    def lines(*sizes, **options) -> int:
        return jobs.lines_per_request(sizes, **options)

    assert lines(*[(1000, 12_000)] * 100) == 64
    assert lines(*[(1_000_000, 0)] * 100) == 19
    assert lines(*[(1000, 2_000_000)] * 30, *[(1000, 1000)] * 100) == 25  # the worst that may come together
    assert lines((1000, 60_000_000), (1000, 1000)) == 64  # refused by its header, alone
    assert lines((1000, 3_000_000), (1000, 3_000_000), max_pixels=4_000_000) == 1
    with pytest.raises(ValueError, match="larger than the container takes"):
        lines((21_000_000, 1000))
    with pytest.raises(ValueError, match="no photo"):
        lines()


def test_a_server_that_does_not_start_fails_the_deployment(service):
    ai_platform.upload(f"{IMAGE}:empty", name="broken")
    with pytest.raises(exceptions.FailedPrecondition, match="(?s)exited unexpectedly.*no archive"):
        ai_platform.deploy("broken")
    assert ai_platform.get_endpoint("broken").list_models() == []
    ai_platform.delete("broken")


def test_wrong_calls_get_the_services_own_errors(service):
    model = ai_platform.upload(f"{IMAGE}:1", name="wrong")
    endpoint = aiplatform.Endpoint.create(display_name="wrong")
    client, instances = endpoint.api_client, [{"b64": ""}]

    def deploy(**options):
        model.deploy(endpoint, **{"machine_type": "n1-standard-2"} | options)

    def upload(image=f"{IMAGE}:1", **options):
        aiplatform.Model.upload(serving_container_image_uri=image, display_name="wrong", **options)

    gpu = {"accelerator_type": "NVIDIA_L4", "accelerator_count": 1}
    for error, call in [
        (exceptions.InvalidArgument, lambda: upload("docker.io/me/fastunet")),
        (exceptions.NotFound, lambda: upload(f"{IMAGE}:9")),
        (exceptions.NotFound, lambda: upload(parent_model="none")),
        (exceptions.AlreadyExists, lambda: upload(model_id="wrong")),
        (exceptions.InvalidArgument, lambda: upload(serving_container_predict_route="predict")),
        (exceptions.InvalidArgument, lambda: upload(serving_container_ports=[0])),
        (exceptions.InvalidArgument, lambda: upload(version_aliases=["9"])),
        (exceptions.InvalidArgument, lambda: upload(
            serving_container_startup_probe_exec=["true"], serving_container_startup_probe_period_seconds=60,
            serving_container_startup_probe_timeout_seconds=60)),
        (exceptions.InvalidArgument, lambda: upload(serving_container_environment_variables={"EMPTY": ""})),
        (exceptions.NotFound, lambda: aiplatform.Model("wrong", version="7")),
        (exceptions.InvalidArgument, lambda: deploy(**gpu)),  # an L4 sits in a g2 machine only
        (exceptions.InvalidArgument, lambda: deploy(min_replica_count=0)),  # the preview's API only
        (exceptions.InvalidArgument, lambda: deploy(accelerator_type="NVIDIA_H100_80GB", accelerator_count=1)),
        (exceptions.InvalidArgument, lambda: deploy(autoscaling_target_cpu_utilization=200)),
        (exceptions.InvalidArgument, lambda: deploy(traffic_split={"5": 100})),
        (exceptions.InvalidArgument, lambda: client.deploy_model(
            endpoint=endpoint.resource_name, deployed_model={"model": model.resource_name})),
        (exceptions.InvalidArgument, lambda: endpoint.update(traffic_split={"5": 100})),
        (exceptions.NotFound, lambda: endpoint.undeploy("5")),
        (exceptions.FailedPrecondition, lambda: endpoint.predict(instances)),  # nothing deployed
        (exceptions.InvalidArgument, lambda: client.update_endpoint(
            endpoint={"name": endpoint.resource_name}, update_mask={"paths": ["dedicated_endpoint_dns"]})),
        (exceptions.InvalidArgument, lambda: client.create_endpoint(parent="/".join(
            endpoint.resource_name.split("/")[:4]), endpoint={})),
        (exceptions.NotFound, lambda: aiplatform.Endpoint("1").predict(instances)),
        (exceptions.InvalidArgument, lambda: aiplatform.Endpoint.create(
            display_name="x", enable_request_response_logging=True, request_response_logging_sampling_rate=2)),
        (exceptions.FailedPrecondition, lambda: model.versioning_registry.delete_version("1")),
        (exceptions.PermissionDenied, lambda: aiplatform.Endpoint.create(display_name="x", project="other")),
        (exceptions.Unauthenticated, lambda: aiplatform.Endpoint.list(credentials=Credentials("stolen"))),
    ]:  # fmt: skip
        with pytest.raises(error):
            call()
    assert len(ai_platform.delete("wrong")) == 2


def test_commands_say_what_to_do(service, tmp_path, monkeypatch, capsys):
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        return str(exit.value)

    assert f"substitutions=_IMAGE={IMAGE}:9" in said("upload", f"{IMAGE}:9")
    assert "ai_platform upload" in said("deploy")
    assert "ai_platform deploy" in said("predict", __file__)
    assert "No such file" in said("predict", "none.png")
    main(["list"])
    assert capsys.readouterr().out.endswith(
        "nothing is named fastunet in us-central1, the only region looked through\n"
    )
    main(["upload", f"{IMAGE}:1"])
    assert capsys.readouterr().out.endswith("models/fastunet version 1\n")
    main(["delete"])
    main(["delete"])
    assert "\nnothing was left of fastunet in us-central1, the only region looked through" in capsys.readouterr().out

    key = json.loads(Path(service.folder / "key.json").read_text())
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    (tmp_path / "key.json").write_text(json.dumps(key | {"project_id": None}))
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    assert "gcloud config set project" in said("list")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))  # where gcloud would keep credentials
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert "gcloud auth application-default login" in said("list")


def test_advice_goes_by_class_and_reason(service):
    quota = remedy(exceptions.ResourceExhausted("quota"), "deploy", "mine", accelerator="L4", max_replicas=3)
    assert "--quota-id=CustomModelServingL4GPUsPerProjectPerRegion --preferred-value=3" in quota
    assert "again in some minutes" in remedy(exceptions.from_http_status(429, "not ready"), "predict")
    assert "roles/aiplatform.user" in remedy(exceptions.PermissionDenied("no model, image or endpoint"), "list", "mine")
    caller = remedy(exceptions.PermissionDenied("no"), "predict", "mine")
    assert "roles/aiplatform.user" not in caller and "aiplatform.endpoints.predict,aiplatform.endpoints.get" in caller
    assert remedy(exceptions.NotFound("some image"), "predict") == "python -m deployment.ai_platform deploy"
    assert "artifactregistry.reader" in remedy(exceptions.FailedPrecondition("image"), "upload", image=f"{IMAGE}:1")
    service.refused["UploadModel"] = exceptions.PermissionDenied(
        "not enabled", error_info=error_details_pb2.ErrorInfo(reason="SERVICE_DISABLED", domain="googleapis.com")
    )
    with pytest.raises(exceptions.PermissionDenied) as caught:  # its reason comes over the wire
        ai_platform.upload(f"{IMAGE}:1", name="advice")
    assert remedy(caught.value, "upload", "mine") == "gcloud services enable aiplatform.googleapis.com --project=mine"


def test_a_refusal_is_never_an_empty_list(service):
    ai_platform.upload(f"{IMAGE}:1", name="refused")
    aiplatform.Endpoint.create(display_name="refused", dedicated_endpoint_enabled=True)
    info = error_details_pb2.ErrorInfo(reason="BILLING_DISABLED", domain="googleapis.com")
    for call in ("ListEndpoints", "ListBatchPredictionJobs", "GetModel", "Predict"):
        service.refused = {call: exceptions.PermissionDenied("no", error_info=info)}
        with pytest.raises(exceptions.PermissionDenied) as caught:
            if call == "Predict":
                ai_platform.predict([b"photo"], name="refused")
            else:
                ai_platform.overview("refused")
        assert caught.value.reason == "BILLING_DISABLED", call
        if call != "Predict":
            with pytest.raises(exceptions.PermissionDenied):
                ai_platform.delete("refused")
    assert len(service.endpoints) == len(service.models) == 1


def test_several_endpoints_of_one_name_are_listed_and_not_half_deleted(service, capsys):
    ai_platform.upload(f"{IMAGE}:1", name="twice")
    for _ in range(2):
        aiplatform.Endpoint.create(display_name="twice")
    assert ai_platform.overview("twice").count("/endpoints/") == 2
    with pytest.raises(SystemExit, match="2 endpoints are named twice: use another --name, or `delete --all`") as exit:
        main(["delete", "--name=twice"])
    assert all(name in str(exit.value) for name in service.endpoints)
    assert len(service.endpoints) == 2 and len(service.models) == 1
    main(["delete", "--name=twice", "--all"])
    printed = capsys.readouterr().out
    assert "no more of twice in us-central1, the only region looked through" in printed
    assert f"gcloud artifacts docker images delete {IMAGE}:1 --delete-tags" in printed
    assert "gs://local-project_cloudbuild" in printed and not service.endpoints and not service.models


def test_quota_is_that_of_the_named_project(service, monkeypatch):
    user = Credentials(service.token, quota_project_id="where-i-logged-in")
    monkeypatch.setattr("google.auth.default", lambda **options: (user, "where-i-logged-in"))
    ai_platform.connect("local-project")
    ai_platform.overview("none")
    assert service.quota_projects == {"local-project"}
    monkeypatch.undo()
    ai_platform.connect()


def test_an_image_for_cuda_refuses_a_machine_without_gpu(service):
    ai_platform.upload(f"{IMAGE}:1", name="cuda", torch_backend="cu126")
    [version] = service.models.popitem()[1].values()
    assert {v.name: v.value for v in version.container_spec.env} == {"MODEL_NAME": "cuda", "REQUIRE_GPU": "1"}
    service.models[version.name] = {"1": version}
    with pytest.raises(ValueError, match="an image for CUDA, which serves on a GPU only"):
        ai_platform.deploy("cuda")
    with pytest.raises(ValueError, match="an image for CUDA, which serves on a GPU only"):
        ai_platform.batch(["gs://local-bucket/photos.jsonl"], "gs://local-bucket/out", "cuda")
    assert not service.endpoints


def test_what_cannot_be_deployed_makes_no_endpoint(service):
    ai_platform.upload(f"{IMAGE}:1", name="wrong")
    for wrong, message in [({"scale_on": "gpu"}, "needs an --accelerator"), ({"share": 50}, "gets all of its traffic")]:
        with pytest.raises(ValueError, match=message):
            ai_platform.deploy("wrong", **wrong)
    assert not service.endpoints


def test_the_startup_probe_waits_inside_its_command(service):
    def seconds_until_ready(probe: types.Probe, ready_at: float, waits_inside: bool) -> float | None:
        """How late a replica is that answers after `ready_at` seconds; None where it is started anew."""
        now = 0.0

        def attempt(timeout: float) -> bool:
            nonlocal now
            if waits_inside and now < ready_at:
                now = min(ready_at, now + timeout)
            return now >= ready_at

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        return now if passes(probe, attempt, lambda: True, sleep, lambda: now) else None

    ai_platform.upload(f"{IMAGE}:1", name="probe")
    [version] = service.models.popitem()[1].values()
    probe = version.container_spec.startup_probe
    assert probe.period_seconds < probe.timeout_seconds and "," not in probe.exec_.command[-1]
    assert seconds_until_ready(probe, 20, waits_inside=True) == 20
    assert seconds_until_ready(probe, 500, waits_inside=True) == 500
    assert seconds_until_ready(probe, 2000, waits_inside=True) is None
    minute = types.Probe(period_seconds=60, timeout_seconds=61)  # what a probe that fails at once would cost
    assert seconds_until_ready(minute, 20, waits_inside=False) == pytest.approx(60, abs=0.1)
    assert seconds_until_ready(minute, 121, waits_inside=False) is None
    liveness = types.Probe(period_seconds=10, timeout_seconds=1, failure_threshold=4)  # without a startup probe
    assert seconds_until_ready(liveness, 25, waits_inside=False) == pytest.approx(30, abs=0.1)
    assert seconds_until_ready(liveness, 31, waits_inside=False) is None


def test_no_call_is_waited_for_without_end(service, capsys):
    short = progress.limited(0.3)(ai_platform.find_endpoints.__wrapped__)
    service.answering.clear()
    try:
        with pytest.raises(exceptions.DeadlineExceeded, match="took more than 0.3 s"):
            short("none")
    finally:
        service.answering.set()
    for name in ("connect", "upload", "deploy", "traffic", "overview", "batch", "delete", "left_over", "get_model"):
        assert hasattr(getattr(ai_platform, name), "__wrapped__"), f"{name} may last for ever"
    for name in ("predict", "predict_raw"):
        assert inspect.signature(getattr(ai_platform, name)).parameters["timeout"].default == 60


def test_ctrl_c_says_what_goes_on(monkeypatch, capsys):
    started, done = threading.Event(), threading.Event()

    @progress.limited(60)
    def deploy() -> None:
        with progress.progress("deploying version 1", stop="delete, once it is deployed"):
            started.set()
            done.wait(60)

    def interrupted(thread: threading.Thread, seconds: float) -> None:
        started.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            deploy()
    done.set()
    printed = capsys.readouterr().out
    assert "this goes on at Google: deploying version 1\n  to stop it: delete, once it is deployed" in printed


def test_the_sdk_is_quiet_unless_asked(service, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("google.cloud.aiplatform"), "handlers", [caplog.handler])
    ai_platform.upload(f"{IMAGE}:1", name="quiet")
    assert "Creating Model" not in caplog.text
    ai_platform.connect(verbose=True)
    ai_platform.upload(f"{IMAGE}:1", name="quiet")
    ai_platform.connect()
    ai_platform.delete("quiet")
    assert "Model created" in caplog.text
