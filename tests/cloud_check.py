"""The cloud chapter against the real service, once, on the CPU, for about a dollar: `make cloud-check PROJECT=…`.

Model and endpoint get a name of their own, so that nothing else is touched, and are deleted in any case. What the
service sends is written to tests/samples/seen.json, without the project's name, so that it can be committed.
"""

import argparse
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from google.api_core import exceptions
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import types
from PIL import Image

from deployment import ai_platform

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "sample" / "street_view_of_a_small_neighborhood.png"
SEEN = ROOT / "tests" / "samples" / "seen.json"
MACHINE = "n1-standard-2"


def check(image: str, bucket: str, name: str) -> dict:
    """Runs the chapter with the image; returns what the service sent. `connect` has been called.

    Raises:
        AssertionError: something is not as the chapter says.
        google.api_core.exceptions.GoogleAPICallError: the service refused a step.
    """
    seen: dict = {}
    try:
        run_chapter(image, bucket, name, seen)
    finally:
        deleted = ai_platform.delete(name, every_endpoint=True)
    assert len(deleted) == 3, f"endpoint, job and model were to be deleted, not {deleted}"
    assert ai_platform.find_endpoints(name) == [] and "nothing is named" in ai_platform.overview(name)
    return seen


def run_chapter(image: str, bucket: str, name: str, seen: dict) -> None:
    assert ai_platform.upload(image, name, labels={"purpose": "check"}).version_id == "1"
    ai_platform.deploy(name, machine=MACHINE, max_replicas=2, labels={"purpose": "check"})
    (answer,) = ai_platform.predict([PHOTO], name)
    mask = ai_platform.mask(answer)
    raw = ai_platform.predict_raw(PHOTO, name)
    picture = np.array(Image.open(io.BytesIO(ai_platform.predict_raw(PHOTO, name, format="png"))))
    assert np.array_equal(ai_platform.mask(raw), mask) and np.array_equal(picture, mask), "raw, the mask is another"
    for kind, ask in [
        ("refused", lambda: ai_platform.predict([b"no photo"], name)),
        ("refused raw", lambda: ai_platform.predict_raw(b"no photo", name)),
    ]:
        try:
            ask()
        except exceptions.GoogleAPICallError as error:
            seen[kind] = {"class": type(error).__name__, "code": error.code, "message": error.message}
        assert seen[kind]["code"] == 400, seen[kind]

    ai_platform.deploy(name, max_replicas=1)  # in place
    assert ai_platform.upload(image, name).version_id == "2"
    assert aiplatform.Model(name).version_id == "1", "the canary took the alias default"
    endpoint = ai_platform.deploy(name, machine=MACHINE, share=50)
    assert sorted(endpoint.traffic_split.values()) == [50, 50]
    seen["endpoint"] = json.loads(types.Endpoint.to_json(endpoint.gca_resource, use_integers_for_enums=False))
    ai_platform.traffic({"1": 100}, name, undeploy=True)
    assert [d.model_version_id for d in endpoint.list_models()] == ["1"]
    assert aiplatform.Model(name).version_id == "1", "the alias default is not on the good version"

    folder = ai_platform.batch([PHOTO], f"gs://{bucket}/{name}", name, version="1", machine=MACHINE)
    (row,) = ai_platform.batch_results(folder)
    assert (ai_platform.mask(row["prediction"]) == mask).mean() > 0.999, "the job's mask is another"
    (job,) = aiplatform.BatchPredictionJob.list(filter=f'display_name="{name}"')
    seen["job"] = json.loads(types.BatchPredictionJob.to_json(job.gca_resource, use_integers_for_enums=False))
    print("what stays, and how to remove it:", *ai_platform.left_over(name), sep="\n  ")


def without_names(seen: dict, *names: str) -> dict:
    """`seen` with the project's number and `names` (of project and bucket) replaced."""
    text = re.sub(r"projects/\d+/", "projects/123456789012/", json.dumps(seen))
    text = re.sub(r"-\d+\.prediction\.vertexai", "-123456789012.prediction.vertexai", text)
    for name in names:
        text = text.replace(name, "my-project")
    return json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make cloud-check", description="Run the cloud chapter on Google Cloud, once."
    )
    parser.add_argument("project")
    parser.add_argument("--location", default="us-central1", help="region")
    parser.add_argument("--image", help="for the CPU (default: LOCATION-docker.pkg.dev/PROJECT/fastunet/serve:1)")
    parser.add_argument("--bucket", help="for the batch (default: PROJECT-fastunet)")
    args = parser.parse_args()
    image = args.image or f"{args.location}-docker.pkg.dev/{args.project}/fastunet/serve:1"
    bucket, name = args.bucket or f"{args.project}-fastunet", f"check-{int(time.time())}"
    ai_platform.connect(args.project, args.location)
    start = time.monotonic()
    try:
        seen = check(image, bucket, name)
    except (AssertionError, exceptions.GoogleAPICallError, RuntimeError, ValueError, OSError) as error:
        sys.exit(
            f"error: {error}\n{name} was deleted again; `python -m deployment.ai_platform list --name {name}` looks"
        )
    SEEN.write_text(json.dumps(without_names(seen, bucket, args.project), indent=1) + "\n")
    minutes = (time.monotonic() - start) / 60
    print(f"all as it should be, in {minutes:.0f} minutes; {SEEN.relative_to(ROOT)} can be committed")


if __name__ == "__main__":
    main()
