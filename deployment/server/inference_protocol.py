"""The Open Inference Protocol (V2) beside our own, as KServe's and Triton's clients speak it: images in, tensors out.

Specification: github.com/kserve/open-inference-protocol, inference_rest.md. Its extension `binary_tensor_data`, as
KServe and Triton document it, has tensors after the JSON, whose length is then a header of its own.

A request becomes what `Handler.read` takes; admission, limits and turns are those of `/predictions`. The model's one
input is `image`, BYTES of shape [n]: files, in JSON as base64. The parameters `format`, `size` and `top` are our own.
The outputs are in `tensors`. An answer is one to all images of a request, or an error.
"""

import functools
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import protocol
from ..handler import Handler, Job
from ..protocol import MAX_INSTANCES, Rejected, bad_request, too_large
from . import tensors

LENGTH = "Inference-Header-Content-Length"  # the header that says how many bytes of JSON there are before binary data
MAX_ID = 256
FORM = 'JSON must be {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [n], "data": [base64, …]}]}'


@dataclass(frozen=True)
class Asked:
    """What a request says of its answer."""

    id: str  # comes back with it
    outputs: dict[str, bool]  # the outputs it names, and whether each comes as binary data; none: all
    binary: bool  # whether all come as binary data where it names none


class InferenceProtocol:
    """What is under /v2 of a server that has the model `name` in `handler`.

    Args:
        answer: that reads a request and has it computed in its turn: `app.Application.answer`.
    """

    def __init__(self, handler: Handler, name: str, version: str, answer: Callable[..., Awaitable[Response]]):
        self.handler, self.name, self.version, self.answer = handler, name, version, answer

    def routes(self) -> list[Route]:
        routes = [Route("/v2", self.server)]
        routes += [Route(path, self.health) for path in ("/v2/health/live", "/v2/health/ready")]
        for path in (f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/{self.version}"):
            routes.append(Route(path, self.model))
            routes.append(Route(f"{path}/ready", self.health))
            routes.append(Route(f"{path}/infer", self.infer, methods=["POST"]))
        return routes

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": self.name, "version": self.version, "extensions": ["binary_tensor_data"]})

    async def health(self, request: Request) -> Response:
        """Live is ready: the port opens once the model is loaded, and nothing but a new process helps a broken one."""
        healthy = not self.handler.broken
        content = {"name": self.name, "live": healthy, "ready": healthy}
        return JSONResponse(content, HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    async def model(self, request: Request) -> Response:
        config = self.handler.config
        about = {"name": self.name, "versions": [self.version], "platform": f"{config.runtime}_{config.precision}"}
        inputs = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
        return JSONResponse(about | {"inputs": inputs, "outputs": tensors.describe(config)})

    async def infer(self, request: Request) -> Response:
        return await self.answer(request, self.read, refusal)

    def read(self, request: Request, body: bytes) -> Job:
        """The request in `body` as a job of the handler.

        Raises:
            Rejected: as `read_request`; 400 for a wrong length in the header; 503 or 507 where memory is short.
        """
        given = request.headers.get(LENGTH, str(len(body)))
        length = int(given) if given.isdecimal() and len(given) < 10 else -1
        if not 0 <= length <= len(body):
            raise bad_request(f"the header {LENGTH} must be the number of bytes of JSON that the body begins with")
        text = body[:length]
        with self.handler.budget.hold(protocol.memory_to_read({"body": text})):
            fields, asked = read_request(text, body[length:])
            job = self.handler.read({"body": fields}, "")
        job.respond = functools.partial(self.respond, asked)
        return job

    def respond(self, asked: Asked, request: protocol.Request, answers: list[dict | Rejected]) -> protocol.Response:
        """The response to `request`, one of `answers` per image: what `protocol.respond` is for our own protocol.

        Raises:
            Rejected: 400 where it asks for an output that there is not, or as `tensors.make_tensors`.
        """
        errors = [(i, answer) for i, answer in enumerate(answers) if isinstance(answer, Rejected)]
        if errors:
            i, worst = next(((i, error) for i, error in errors if error.status >= 500), errors[0])
            message = f"image {i}: {worst.message}" if len(answers) > 1 else worst.message
            content = json.dumps({"error": message}).encode()
            return protocol.Response(worst.status, "application/json", content, worst.headers)
        good = [answer for answer in answers if not isinstance(answer, Rejected)]
        made = tensors.make_tensors(good, self.handler.config)
        wanted = asked.outputs or dict.fromkeys(made, asked.binary)
        if wanted.keys() - made.keys():
            raise bad_request(f"`outputs` of this model are, in this format: {', '.join(made)}")
        about = {"model_name": self.name, "model_version": self.version} | ({"id": asked.id} if asked.id else {})
        binary = {name for name in wanted if wanted[name]}
        body, length = tensors.write(about, {name: made[name] for name in wanted}, binary)
        if not binary:
            return protocol.Response(HTTPStatus.OK, "application/json", body)
        return protocol.Response(HTTPStatus.OK, "application/octet-stream", body, {LENGTH: str(length)})


def refusal(error: Rejected) -> Response:
    """`error` as the answer to a whole request."""
    return JSONResponse({"error": error.message}, error.status, error.headers)


def read_request(text: bytes, binary: bytes) -> tuple[dict, Asked]:
    """The request in JSON `text`, and `binary` after it, as one of `protocol`, and what it says of its answer.

    Raises:
        Rejected: 400 for what is no request, 413 for too many images, or values in the JSON.
    """
    content = protocol.read_json(text)
    inputs = content.get("inputs") if isinstance(content, dict) else None
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise bad_request(FORM)
    if inputs[0].get("name") != "image" or inputs[0].get("datatype") != "BYTES":
        raise bad_request("the model has one input: the tensor `image` of the datatype BYTES")
    given, identifier = parameters(content), content.get("id") or ""
    if not isinstance(identifier, str) or len(identifier) > MAX_ID:
        raise bad_request(f"`id` must be a string of up to {MAX_ID} characters")
    as_binary = given.get("binary_data_output") is True
    asked = Asked(
        id=identifier,
        outputs=read_outputs(content.get("outputs") or [], as_binary),
        binary=as_binary,
    )
    options = {name: given[name] for name in protocol.OPTIONS if name in given}
    return {"instances": read_images(inputs[0], binary), "parameters": options}, asked


def read_outputs(outputs: object, binary: bool) -> dict[str, bool]:
    """The names in the `outputs` of a request, and whether each comes as binary data: `binary` where it does not say.

    Raises:
        Rejected: 400 for what is no list of outputs.
    """
    wanted = {}
    for output in outputs if isinstance(outputs, list) else [None]:
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise bad_request('`outputs` must be [{"name": …}, …]')
        wanted[output["name"]] = parameters(output).get("binary_data", binary) is True
    return wanted


def parameters(part: dict) -> dict:
    """The parameters of a request or of a tensor in it. Raises Rejected, 400, where they are no object."""
    given = part.get("parameters") or {}
    if not isinstance(given, dict):
        raise bad_request("`parameters` must be an object")
    return given


def read_images(tensor: dict, binary: bytes) -> list[bytes] | list[dict]:
    """The elements of the input `tensor` as instances of `protocol`: files in `binary`, or base64 of its own.

    Raises:
        Rejected: 400 where shape and data do not agree, 413 for more than MAX_INSTANCES images.
    """
    shape, size, data = tensor.get("shape"), parameters(tensor).get("binary_data_size"), tensor.get("data")
    if not isinstance(shape, list) or not shape or not all(type(side) is int and side > 0 for side in shape):
        raise bad_request("`shape` must be [n], for n images")
    n = math.prod(min(side, MAX_INSTANCES + 1) for side in shape[:8])
    if n > MAX_INSTANCES:
        raise too_large(f"more than {MAX_INSTANCES} images in one request")
    if size is not None:
        if size != len(binary):
            raise bad_request("`binary_data_size` must be the number of bytes after the JSON")
        return tensors.read_binary(binary, n)
    while isinstance(data, list) and data and all(isinstance(row, list) for row in data):  # nested, as the shape may be
        data = [value for row in data for value in row]
    if not isinstance(data, list) or len(data) != n or not all(isinstance(value, str) for value in data):
        raise bad_request("`data` must have a file in base64 for each of the images that `shape` says")
    return [{"b64": value} for value in data]
