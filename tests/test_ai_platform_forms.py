"""The client without the stand-in: on samples of what the service sends, and against Google's own references."""

import base64
import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import types
from google.cloud.aiplatform_v1.services.endpoint_service import EndpointServiceClient
from google.cloud.aiplatform_v1.services.job_service import JobServiceClient
from google.cloud.aiplatform_v1.services.model_service import ModelServiceClient
from google.longrunning import operations_pb2
from google.protobuf import json_format

from deployment import ai_platform
from deployment.ai_platform import jobs, online, results
from deployment.ai_platform.__main__ import main, report
from deployment.ai_platform.advice import remedy
from deployment.ai_platform.client import known_endpoints
from deployment.ai_platform.deployments import endpoint_for

SAMPLES = Path(__file__).parent / "samples"
SEEN = json.loads((SAMPLES / "ai_platform.json").read_text())
BEHAVIOR = json.loads((SAMPLES / "field_behavior.json").read_text())["fields"]


@pytest.fixture
def endpoint(monkeypatch) -> types.Endpoint:
    """The sample's endpoint, which the SDK finds in place of asking the service."""
    message = types.Endpoint.from_json(json.dumps(SEEN["endpoint"]["endpoint"]))
    monkeypatch.setattr(EndpointServiceClient, "list_endpoints", lambda self, *args, **options: [message])
    monkeypatch.setattr(EndpointServiceClient, "get_endpoint", lambda self, *args, **options: message)
    monkeypatch.setattr(JobServiceClient, "list_batch_prediction_jobs", lambda self, *args, **options: [])

    def no_model(self, *args, **options):
        raise exceptions.NotFound("no model")

    monkeypatch.setattr(ModelServiceClient, "get_model", no_model)
    monkeypatch.setattr("google.auth.default", lambda **options: (AnonymousCredentials(), "my-project"))
    monkeypatch.delenv("AI_PLATFORM_API_ENDPOINT", raising=False)
    ai_platform.connect()
    yield message
    known_endpoints.clear()


@pytest.mark.parametrize("sample", SEEN["error_lines"], ids=lambda sample: str(sample["code"]))
def test_lines_of_failed_requests(sample):
    row = results.read_row(sample["line"])
    assert sample["message"] in ai_platform.error_in(row) and row["error"]["code"] == sample["code"]


@pytest.mark.parametrize(
    "names",
    [
        ("prediction.errors_stats-00000-of-00001", "prediction.results-00000-of-00001"),
        ("errors_0001.jsonl", "predictions_0001.jsonl"),
    ],
)
def test_results_and_errors_are_read_by_both_names_that_google_gives(names, monkeypatch):
    lines = {"error": SEEN["error_lines"][0]["line"], "predict": '{"instance": {}, "prediction": {"label": "cat"}}'}

    def blob(name: str) -> SimpleNamespace:
        text = lines["error" if "error" in name else "predict"]
        return SimpleNamespace(name=f"out/job/{name}", open=lambda mode: io.BytesIO(f"{text}\n\n".encode()))

    def list_blobs(bucket: str, prefix: str) -> list[SimpleNamespace]:
        blobs = [blob(name) for name in (*names, "input.jsonl")]
        return [b for b in blobs if b.name.startswith(prefix)]

    monkeypatch.setattr(results, "storage_client", lambda: SimpleNamespace(list_blobs=list_blobs))
    for folder in ("gs://bucket/out/job", "gs://bucket/out/job/"):
        good, bad = ai_platform.batch_results(folder)
        assert good["prediction"] == {"label": "cat"} and "504" in ai_platform.error_in(bad)


def test_photos_of_a_failed_request_are_named(capsys):
    rows = [{"instance": {"name": "b.png"}, "prediction": {}}, results.read_row(SEEN["error_lines"][0]["line"])]
    named = dict(ai_platform.named(rows, ["a.png", "b.png", "c.png"]))
    assert list(named) == ["b.png", "a.png", "c.png"]  # the service keeps no order
    assert ai_platform.error_in(named["a.png"]) == "no answer: its request failed"
    assert "Non-OK result 504" in capsys.readouterr().out


def test_rows_without_a_name_are_numbered(capsys):
    lines = [{"instance": {"b64": "eA=="}, "prediction": {}}, {"instance": {"b64": "eA==", "name": "a.png"}}]
    failed = results.read_row(SEEN["error_lines"][0]["line"])
    named = dict(ai_platform.named([*lines, failed], ["./a.png", "gs://bucket/lines.jsonl"]))
    assert list(named) == ["row-000001", "a.png", "row-000003"]  # a photo is named as `send` names it
    assert "504" in ai_platform.error_in(named["row-000003"])  # of a line, perhaps: it must not be lost
    assert list(dict(ai_platform.named(lines, ["a.png"]))) == ["row-000001", "a.png"]
    assert "None" not in capsys.readouterr().out


def test_no_picture_is_written_over(tmp_path):
    names, picture = ["x/a-3.png", "y/a.png", "z/a.png"], base64.b64encode
    report([(name, {"prediction": {"png": picture(name.encode()).decode()}}) for name in names], tmp_path)
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == names


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["json", "raw"])
def test_no_photo_is_written_over(endpoint, monkeypatch, tmp_path, raw):
    """Pictures go to the working folder, where the photos may lie."""

    def post(self, url, data=None, headers=None, timeout=None):
        answer = requests.Response()
        answer.status_code, answer.headers["Content-Type"] = 200, "image/png" if raw else "application/json"
        answer._content = b"mask" if raw else json.dumps({"predictions": [{"png": "bWFzaw=="}] * 3}).encode()
        return answer

    monkeypatch.setattr("google.auth.transport.requests.AuthorizedSession.post", post)
    monkeypatch.chdir(tmp_path)
    photos = [tmp_path / "far" / "b.png", tmp_path / "a.png", tmp_path / "b.png"]
    photos[0].parent.mkdir()
    for photo in photos:
        photo.write_bytes(b"photo")
    main(["predict", str(photos[0]), "a.png", "far/../b.png", "--format=png", *raw])
    assert all(photo.read_bytes() == b"photo" for photo in photos)
    written = {file.name for file in tmp_path.iterdir() if file.is_file()} - {"a.png", "b.png"}
    assert written == {"b-1.png", "a-2.png", "b-3.png"}
    assert all((tmp_path / name).read_bytes() == b"mask" for name in written)


@pytest.mark.parametrize("share", ["1", "1=", "=100", "1=half"])
def test_shares_that_cannot_be_read_are_named(share, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["traffic", share])
    assert f"{share} is not VERSION=PERCENT" in capsys.readouterr().err


def test_an_endpoint_that_two_threads_find_gone(endpoint, monkeypatch):
    """Both are told so; the second finds it forgotten already."""

    def gone(self, **options):
        known_endpoints.clear()
        answer = requests.Response()
        answer.status_code, answer._content = 404, b'{"error": {"status": "NOT_FOUND", "message": "deleted"}}'
        return answer

    monkeypatch.setattr("google.auth.transport.requests.AuthorizedSession.post", gone)
    for ask in (lambda: ai_platform.predict([b"photo"]), lambda: ai_platform.predict_raw(b"photo")):
        with pytest.raises(exceptions.NotFound, match="deleted"):
            ask()


def test_the_commands_that_remove_what_stays(endpoint, monkeypatch):
    """What a job was given is the user's own; a name with a space is one name."""
    own = "gs://my bucket/out/input-20261127-120000-0a1b2c.jsonl"
    job = types.BatchPredictionJob.from_json(json.dumps(SEEN["job"]["job"]))
    job.input_config.gcs_source.uris = ["gs://my bucket/labels.jsonl", own]
    job.output_config.gcs_destination.output_uri_prefix = "gs://my bucket/out/"
    job.output_info.gcs_output_directory = "gs://my bucket/out/prediction-fastunet-1"
    monkeypatch.setattr(JobServiceClient, "list_batch_prediction_jobs", lambda self, *args, **options: [job])
    removed = [shlex.split(command)[-1] for command in ai_platform.left_over() if "my bucket" in command]
    assert removed == [own, job.output_info.gcs_output_directory]


def test_jobs_of_one_second_read_what_is_theirs(monkeypatch):
    monkeypatch.setattr(jobs, "storage_client", lambda: None)
    monkeypatch.setattr(jobs, "check_sizes", lambda files: None)
    monkeypatch.setattr(jobs, "send", lambda files, uri, client: [])
    monkeypatch.setattr("time.strftime", lambda form: "20261127-120000")
    [one], [other] = (jobs.gather(["a.png"], "gs://bucket/out", None).uris for _ in range(2))
    assert one != other and jobs.is_written(one, "gs://bucket/out") and not jobs.is_written(one, "gs://bucket/in")


def test_a_line_that_is_no_json_is_named(monkeypatch):
    monkeypatch.setattr(jobs, "open_blob", lambda *args: contextlib.nullcontext([b'{"b64": ""}\n', b"\n", b"{\n"]))
    with pytest.raises(ValueError, match="line 3 of gs://bucket/lines.jsonl is no JSON"):
        jobs.measure("gs://bucket/lines.jsonl", None)


def test_an_endpoint_logs_to_one_table(endpoint):
    log = endpoint.predict_request_response_logging_config
    log.enabled, log.bigquery_destination.output_uri = True, "bq://mine.logs.requests"
    found, otherwise = ai_platform.find_endpoint(), dict(shared=False, log_rate=1.0)
    otherwise |= dict.fromkeys(["kms_key", "inference_timeout", "labels"])
    for table in ("bq://mine.logs.requests", "bq://mine"):  # of a project alone the service makes the rest
        assert endpoint_for("fastunet", found, log_to=table, **otherwise) is found
    for table in ("bq://mine.logs.others", "bq://min"):
        with pytest.raises(ValueError, match="exists with another --log-to"):
            endpoint_for("fastunet", found, log_to=table, **otherwise)


@pytest.mark.parametrize("sample", SEEN["refusals"], ids=lambda sample: sample["class"])
def test_refusals_keep_class_and_reason(sample):
    error = online.refusal(sample["status"], json.dumps(sample["body"]))
    assert type(error) is getattr(exceptions, sample["class"]) and error.reason == sample["reason"]
    assert error.message == sample["body"].get("error", sample["body"])["message"]


def test_an_endpoint_is_shown_and_asked_at_its_own_address(endpoint, monkeypatch):
    asked = []

    def post(self, url, data=None, headers=None, timeout=None):
        asked.append((url, data, headers["Content-Type"], timeout))
        answer = requests.Response()
        answer.status_code, answer.headers["Content-Type"] = 200, "application/json"
        answer._content = b'{"predictions": [{"label": "cat"}]}' if url.endswith(":predict") else b'{"label": "cat"}'
        return answer

    monkeypatch.setattr("google.auth.transport.requests.AuthorizedSession.post", post)
    shown = ai_platform.overview()
    assert "version 3  100 % of traffic  g2-standard-4 + NVIDIA_L4  1 to 4 replica(s)" in shown
    assert ai_platform.predict([b"photo"]) == [{"label": "cat"}]
    assert ai_platform.predict_raw(b"photo") == {"label": "cat"}
    ai_platform.predict_raw(b"photo", format="png", timeout=1800)  # for which the SDK wants requests-toolbelt
    base = f"https://{endpoint.dedicated_endpoint_dns}/v1/{endpoint.name}"
    [json_, raw, form] = asked
    assert json_[0] == f"{base}:predict" and json.loads(json_[1]) == {"instances": [{"b64": "cGhvdG8="}]}
    assert raw == (f"{base}:rawPredict", b"photo", "application/octet-stream", 60)
    assert form[0] == raw[0] and b'name="format"\r\n\r\npng' in form[1] and form[2].startswith("multipart/form-data")
    assert json_[3] == 60 and form[3] == 1800
    with pytest.raises(ValueError, match="10.67 MB, and this endpoint takes 10.0 MB"):
        ai_platform.predict([bytes(8_000_000)])
    ai_platform.predict_raw(bytes(9_900_000))
    with pytest.raises(ValueError, match="10.10 MB, and this endpoint takes 10.0 MB"):
        ai_platform.predict_raw(bytes(10_100_000))


def test_a_request_without_an_answer_ends(endpoint, monkeypatch):
    def post(self, **options):
        raise requests.ReadTimeout("read timed out")

    monkeypatch.setattr("google.auth.transport.requests.AuthorizedSession.post", post)
    for ask in (lambda: ai_platform.predict([b"photo"], timeout=5), lambda: ai_platform.predict_raw(b"", timeout=5)):
        with pytest.raises(exceptions.DeadlineExceeded, match="no answer within 5 s"):
            ask()


@pytest.mark.parametrize("state", sorted(jobs.ENDED))
def test_every_end_of_a_job_is_known(state, endpoint, monkeypatch):
    assert state in types.JobState.__members__
    made = []
    job = types.BatchPredictionJob.from_json(json.dumps(SEEN["job"]["job"]))

    def create(self, *args, **options):
        made.append(options["batch_prediction_job"])
        return job

    def look(self, *args, **options):
        job.state = types.JobState.JOB_STATE_RUNNING if len(made) == 1 else state
        made.append(None)
        return job

    model = types.Model(name=job.model, version_id="3", version_aliases=["default"])
    monkeypatch.setattr(JobServiceClient, "create_batch_prediction_job", create)
    monkeypatch.setattr(JobServiceClient, "get_batch_prediction_job", look)
    monkeypatch.setattr(ModelServiceClient, "get_model", lambda self, *args, **options: model)
    monkeypatch.setattr(jobs, "WAIT", 0)
    ask = {"source": ["gs://bucket/input.jsonl"], "destination": "gs://bucket/out", "batch_size": 8, "replicas": 3}
    if state in jobs.FAILED:
        with pytest.raises(RuntimeError, match=f"the job ended as {state}"):
            ai_platform.batch(**ask)
    else:
        assert ai_platform.batch(**ask) == job.output_info.gcs_output_directory
    sent = made[0]
    assert sent.dedicated_resources.starting_replica_count == 3  # what counts: jobs do not autoscale
    assert sent.input_config.instances_format == "jsonl" and sent.manual_batch_tuning_parameters.batch_size == 8


def test_the_sdk_deprecates_nothing_of_this():
    for cls in (aiplatform.Model, aiplatform.Endpoint, aiplatform.BatchPredictionJob):
        for name in ("__init__", "upload", "deploy", "predict", "raw_predict", "create", "submit", "list"):
            assert "deprecated" not in (getattr(getattr(cls, name, None), "__doc__", None) or "").lower()


def test_a_deployment_that_fails_says_where_to_look():
    operation = json_format.ParseDict(SEEN["operation"]["operation"], operations_pb2.Operation())
    error = exceptions.from_grpc_status(operation.error.code, operation.error.message)
    assert isinstance(error, exceptions.FailedPrecondition) and "never became ready" in error.message
    assert remedy(error, "deploy", "mine").startswith("gcloud logging read")


def test_the_annotations_are_those_of_the_installed_sdk():
    """The SDK's docstrings are the comments of the same protos, in which Google names what is required and fixed."""
    words = {"REQUIRED": "Required", "IMMUTABLE": "Immutable", "OUTPUT_ONLY": "Output only"}
    for name, fields in BEHAVIOR.items():
        message = types
        for part in name.split("."):
            message = getattr(message, part)
        documented = dict(re.findall(r"^ +(\w+) \([^\n]*\n(.*?)(?=^ +\w+ \(|\Z)", message.__doc__, re.M | re.S))
        for field, behavior in fields.items():
            assert all(words[b] in documented[field] for b in behavior), f"{name}.{field} is no longer {behavior}"
