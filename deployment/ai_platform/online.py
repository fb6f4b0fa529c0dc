"""Predictions of an endpoint: photos in a request, its answers, and the mask in an answer."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .client import get_endpoint, known_endpoints

if TYPE_CHECKING:
    import numpy as np
    from google.cloud import aiplatform

MAX_BYTES = 10_000_000  # of a request on a dedicated endpoint
MAX_BYTES_SHARED = 1_500_000  # on a shared one
TIMEOUT = 60  # seconds for an answer; a shared endpoint gives up after as many


def request_body(images: Sequence[Path | str | bytes], **parameters: str) -> dict:
    """`{"instances": [{"b64": …}, …], "parameters": {…}}` of image files (or of their bytes)."""
    body = {"instances": [{"b64": base64.b64encode(read(image)).decode()} for image in images]}
    return body | ({"parameters": parameters} if parameters else {})


def read(image: Path | str | bytes) -> bytes:
    """The bytes of an image file; bytes are taken as they are."""
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def predict(
    images: Sequence[Path | str | bytes], name: str = "fastunet", timeout: float = TIMEOUT, **parameters: str
) -> list[dict]:
    """One answer per image, in order, as the server gives it; `parameters` are the server's `format` and `size`.

    An image the server could not read has `{"error": …}` in its place. The endpoint is looked up the first time.

    Args:
        timeout: seconds to wait for the answer. The service itself gives up after 10 minutes (`deploy
            --inference-timeout` sets another time), on a shared endpoint after one.

    Raises:
        ValueError: the request is larger than the endpoint takes.
        google.api_core.exceptions.GoogleAPICallError: the service or the server refused it, or gave no answer in time.
    """
    import requests
    from google.api_core import exceptions

    body = request_body(images, **parameters)
    endpoint = endpoint_of(name)
    check_size(len(json.dumps(body)), len(images), endpoint)
    try:
        return endpoint.predict(body["instances"], body.get("parameters"), timeout=timeout).predictions
    except exceptions.NotFound:
        known_endpoints.pop(name, None)  # deleted since, and perhaps made again: the next call looks
        raise
    except requests.Timeout:
        raise exceptions.DeadlineExceeded(f"no answer within {timeout:g} s") from None
    except ValueError as error:  # the SDK's word for any refusal of a dedicated endpoint
        found = re.search(r"Status code: ?(\d+), response: (.*)\.$", str(error), re.DOTALL)
        if not found:
            raise
        refused = refusal(int(found[1]), found[2])
    if isinstance(refused, exceptions.NotFound):
        known_endpoints.pop(name, None)
    raise refused


def predict_raw(
    image: Path | str | bytes, name: str = "fastunet", timeout: float = TIMEOUT, **parameters: str
) -> dict | bytes:
    """The answer to one image, sent as it is: without base64 an image of 10 MB fits where 7.5 MB did.

    The answer is the server's own: a dictionary, or the bytes of a PNG (`format="png"`) or JPEG (`format="overlay"`).
    Without `parameters` the image is the request's body, with them it is a field of a form. The arguments and the
    errors are those of `predict`.
    """
    import requests
    from google.api_core import exceptions

    data = read(image)
    if parameters:  # in a form, as a browser sends it: nobody says whether the service hands `Accept` on
        form = requests.Request("POST", "https://localhost", files={"data": data}, data=parameters).prepare()
        assert isinstance(form.body, bytes)
        body, content_type = form.body, form.headers["Content-Type"]
    else:
        body, content_type = data, "application/octet-stream"
    endpoint = endpoint_of(name)
    check_size(len(body), 1, endpoint)
    try:
        answer = endpoint.raw_predict(body, {"Content-Type": content_type}, timeout=timeout)
    except requests.Timeout:
        raise exceptions.DeadlineExceeded(f"no answer within {timeout:g} s") from None
    if answer.status_code != 200:
        refused = refusal(answer.status_code, answer.text)
        if isinstance(refused, exceptions.NotFound):
            known_endpoints.pop(name, None)
        raise refused
    return answer.json() if answer.headers["Content-Type"].startswith("application/json") else answer.content


def endpoint_of(name: str) -> "aiplatform.Endpoint":
    """The endpoint of that name, as it was when it was first looked up."""
    return known_endpoints.get(name) or known_endpoints.setdefault(name, get_endpoint(name))


def check_size(size: int, images: int, endpoint: "aiplatform.Endpoint") -> None:
    """Raises ValueError where the endpoint takes no request of `size` bytes."""
    limit = MAX_BYTES if endpoint.dedicated_endpoint_enabled else MAX_BYTES_SHARED
    if size > limit:
        raise ValueError(
            f"{images} image(s) make a request of {size / 1e6:.2f} MB, and this endpoint takes {limit / 1e6} MB: "
            "send fewer at once, send each raw (`predict --raw`, a quarter smaller), scale them down (the model sees "
            "its own size anyway), use `batch`"
            + ("" if endpoint.dedicated_endpoint_enabled else ", or a dedicated endpoint (10 MB)")
        )


def refusal(status: int, text: str) -> Exception:
    """The API's error in a response that is none of success, with its reason and details (`google.rpc.ErrorInfo`)."""
    import grpc
    from google.api_core import exceptions
    from google.rpc import error_details_pb2

    try:
        body = json.loads(text)
        if "error" not in body:  # the server's own: {"code", "type", "message"}
            return exceptions.from_http_status(status, body["message"])
        error = body["error"]
        code, message, details = grpc.StatusCode[error["status"]], error["message"], error.get("details", [])
    except (ValueError, KeyError, TypeError):
        return exceptions.from_http_status(status, text)
    info = next((d for d in details if d.get("@type", "").endswith("google.rpc.ErrorInfo")), None)
    if info:
        info = error_details_pb2.ErrorInfo(
            reason=info.get("reason", ""), domain=info.get("domain", ""), metadata=info.get("metadata", {})
        )
    return exceptions.from_grpc_status(code, message, details=details, error_info=info)


def mask(prediction: dict) -> "np.ndarray":
    """The class mask, uint8 (height, width), of one answer in the default format.

    Raises:
        ValueError: the answer holds an error, or a picture in place of a mask; the message says so.
    """
    import numpy as np

    if "error" in prediction:
        raise ValueError(f"this photo got no mask: {prediction['error'].get('message', prediction['error'])}")
    if "base64_prediction" not in prediction:
        raise ValueError(f"an answer with {', '.join(prediction)} holds no mask: ask without `format`")
    height, width = map(int, prediction["shape"])  # the API carries every number as a float
    return np.frombuffer(base64.b64decode(prediction["base64_prediction"]), np.uint8).reshape(height, width)
