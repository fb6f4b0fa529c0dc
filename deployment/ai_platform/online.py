"""Predictions of an endpoint: photos in a request, its answers, and the mask in an answer."""

import base64
import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .client import get_endpoint, known_endpoints

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 10_000_000  # of a request on a dedicated endpoint
MAX_BYTES_SHARED = 1_500_000  # on a shared one


def request_body(images: Sequence[Path | str | bytes], **parameters: str) -> dict:
    """`{"instances": [{"b64": …}, …], "parameters": {…}}` of image files (or of their bytes)."""
    data = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in images]
    body = {"instances": [{"b64": base64.b64encode(d).decode()} for d in data]}
    return body | ({"parameters": parameters} if parameters else {})


def predict(images: Sequence[Path | str | bytes], name: str = "fastunet", **parameters: str) -> list[dict]:
    """One answer per image, in order, as the server gives it; `parameters` are the server's `format` and `size`.

    An image the server could not read has `{"error": …}` in its place. The endpoint is looked up the first time.

    Raises:
        ValueError: the request is larger than the endpoint takes.
    """
    from google.api_core import exceptions

    body = request_body(images, **parameters)
    endpoint = known_endpoints.get(name) or known_endpoints.setdefault(name, get_endpoint(name))
    size, limit = len(json.dumps(body)), MAX_BYTES if endpoint.dedicated_endpoint_enabled else MAX_BYTES_SHARED
    if size > limit:
        raise ValueError(
            f"{len(images)} image(s) make a request of {size / 1e6:.2f} MB, and this endpoint takes {limit / 1e6} MB: "
            "send fewer at once, scale them down (the model sees its own size anyway), use `batch`"
            + ("" if endpoint.dedicated_endpoint_enabled else ", or a dedicated endpoint (10 MB)")
        )
    try:
        return endpoint.predict(body["instances"], body.get("parameters")).predictions
    except ValueError as error:  # the SDK's word for any refusal of a dedicated endpoint
        raise refusal(error) from None
    except exceptions.NotFound:
        known_endpoints.pop(name)  # deleted since, and perhaps made again: the next call looks
        raise


def refusal(error: ValueError) -> Exception:
    """The API's error in the SDK's `Failed to make prediction request. Status code:400, response: …`, else `error`."""
    import grpc
    from google.api_core import exceptions

    if not (found := re.search(r"Status code: ?(\d+), response: (.*)\.$", str(error), re.DOTALL)):
        return error
    with contextlib.suppress(ValueError, KeyError, TypeError):  # the server's own answer has another form
        details = json.loads(found[2])["error"]
        return exceptions.from_grpc_status(grpc.StatusCode[details["status"]], details["message"])
    return exceptions.from_http_status(int(found[1]), found[2])


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
