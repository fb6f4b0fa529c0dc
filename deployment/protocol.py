"""The HTTP contract without a server: what a request may look like, and the answer with its status.

| request | |
|---|---|
| an image as the body | |
| multipart form | the image in the field `data`, options in `format`, `size` and `top` |
| JSON | `{"instances": [{"b64": …} or {"data": {"b64": …}}, …], "parameters": {…}}`, as AI Platform sends it |
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from http import HTTPStatus

MEDIA_TYPES = {"json": "application/json", "png": "image/png", "overlay": "image/jpeg"}  # by format of the answer
SIZES = ("model", "original")
OPTIONS = ("format", "size", "top")  # that come with an image, as fields of a form or as parameters
MAX_INSTANCES = 64  # images in one JSON request
MAX_VALUES = 10_000  # commas, and brackets, in the JSON of a request: the largest good one has some hundreds
PART_HEADERS = 1000  # bytes
LARGE_JSON = 2**20  # bytes, from which on it counts what reading JSON takes
JSON_COPIES = 5  # of the body that it makes: text, values, the files in them


class Rejected(Exception):
    """Why a request, or one image of it, gets an error for an answer. `message` never repeats what was sent."""

    def __init__(self, status: HTTPStatus, type: str, message: str, cause: Exception | None = None):
        super().__init__(message)
        self.status, self.type, self.message, self.__cause__ = status, type, message, cause

    @property
    def headers(self) -> dict[str, str]:
        """What the answer to a whole request has beside it."""
        return {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status, {})

    def as_json(self) -> dict:
        return {"code": self.status.value, "type": self.type, "message": self.message}


def bad_request(message: str) -> Rejected:
    """400: what was sent is no request."""
    return Rejected(HTTPStatus.BAD_REQUEST, "BadRequest", message)


def bad_image(message: str) -> Rejected:
    """400: what was sent is no image that can be taken."""
    return Rejected(HTTPStatus.BAD_REQUEST, "BadImage", message)


def too_large(message: str) -> Rejected:
    """413: more than a limit allows."""
    return Rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", message)


def busy(message: str = "too many requests: try again in a second") -> Rejected:
    """503: there is no place, or no memory, for the request at the moment."""
    return Rejected(HTTPStatus.SERVICE_UNAVAILABLE, "Busy", message)


def rejection(error: Exception) -> Rejected:
    """What the client hears of `error`: 507 where memory ran out, 500 for what is not a `Rejected` already.

    A `Rejected` comes back without its stack and context, whose frames hold the image that is to hold the error: Python
    would clear away such a circle only after thousands of requests. A `__cause__` keeps its own, for the log.
    """
    if isinstance(error, Rejected):
        error.__traceback__ = error.__context__ = None
        return error
    if out_of_memory(error):
        return Rejected(HTTPStatus.INSUFFICIENT_STORAGE, "OutOfMemory", "not enough memory for this photo")
    message = "the server failed on this photo; its log says why"
    return Rejected(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError", message, cause=error)


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out: Python's own, torch's on either device, or OpenVINO's."""
    words = "out of memory|not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|_ALLOC_FAILED"
    return (
        isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(re.search(words, str(error), re.I))
    )


def reasons(errors: list[Rejected]) -> str:
    """What is wrong with a request, for the log: each kind of error once."""
    return ", ".join(sorted({f"{error.type}: {error.message}" for error in errors}))


@dataclass(frozen=True)
class Request:
    """What one request asks for."""

    instances: list  # one per image: bytes, or, of a JSON request, what `read_instance` makes bytes of
    format: str = "json"  # of the answer: one of MEDIA_TYPES
    size: str = "model"  # of the mask: one of SIZES
    top: int | None = None  # so many probabilities, the highest; None: all
    or_json: bool = False  # the client takes JSON where the task of the model gives no picture
    is_json: bool = False  # then the answers, one per instance, lie under "predictions"


@dataclass(frozen=True)
class Response:
    """The answer to one request."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)  # others than the content type


def check_complete(fields: dict, length: int) -> None:
    """Raises Rejected, 400, where much of a form of `length` bytes is in none of its `fields`.

    Of fields of one name TorchServe hands over the last. A part's own headers may have PART_HEADERS bytes.
    """
    got = sum(len(value) for value in fields.values() if isinstance(value, str | bytes | bytearray))
    if length - got > PART_HEADERS * (len(fields) + 1):
        raise bad_request("a field came more than once: send several images as JSON")


def memory_to_read(fields: dict) -> int:
    """The bytes that `read_request` takes where `fields` hold large JSON; else 0."""
    body = fields.get("data", fields.get("body"))
    is_large = isinstance(body, bytes | bytearray) and len(body) > LARGE_JSON
    return JSON_COPIES * len(body) if is_large and body[:100].lstrip()[:1] == b"{" else 0


def read_request(fields: dict, accept: str = "") -> Request:
    """The request in `fields`: `{"body": …}`, or the fields of a multipart form. `accept` is its header.

    Raises:
        Rejected: 400 for what has none of the three forms of a request, 413 for too many instances.
    """
    body = fields.get("data", fields.get("body"))
    if isinstance(body, str):
        body = body.encode()
    if isinstance(body, bytes | bytearray):
        if not body:
            raise bad_request("the request is empty: send a photo as the body or in the multipart field `data`")
        begin = body[:100].lstrip()[:1]
        if begin not in (b"{", b"["):
            or_json = "format" not in fields and read_accept(accept)[1]
            return Request([bytes(body)], *read_options(fields, accept), or_json)
        body = [] if begin == b"[" else read_json(body)
    if isinstance(body, list):
        raise bad_request('JSON must be an object, {"instances": [{"b64": …}, …]}, and not an array')
    if not isinstance(body, dict):
        raise bad_request('no photo: send it as the body, in the field `data`, or as {"instances": [{"b64": …}]}')
    instances, parameters = body.get("instances"), body.get("parameters")
    if not isinstance(instances, list) or not instances:
        raise bad_request('JSON must be {"instances": [{"b64": …}, …]} with at least one instance')
    if len(instances) > MAX_INSTANCES:
        raise too_large(f"more than {MAX_INSTANCES} instances in one request")
    if not isinstance(parameters, dict | None):
        raise bad_request("`parameters` must be an object")
    around = {name: fields[name] for name in OPTIONS if name in fields}  # of a form or of the address
    return Request(instances, *read_options(around | (parameters or {})), is_json=True)


def read_json(body: bytes | bytearray) -> dict:
    """The object that `body` begins with.

    What separates values is counted first, which is a hundred times as fast as reading them: a request costs memory for
    what is accepted of it, and not for what is sent. Base64 has none of these characters.

    Raises:
        Rejected: 400 for what is not JSON, or nested too deeply; 413 for more than MAX_VALUES values.
    """
    if body.count(b",") > MAX_VALUES:
        raise too_large(f"more than {MAX_INSTANCES} instances, or {MAX_VALUES} values, in one request")
    if body.count(b"{") + body.count(b"[") > MAX_VALUES:
        raise bad_request("the body begins like JSON but is not JSON, or is nested too deeply")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise bad_request("the body begins like JSON but is not JSON") from None


def read_options(fields: dict, accept: str = "") -> tuple[str, str, int | None]:
    """Format, size and top of the answer: those in `fields`; the format else the one that `accept` prefers.

    Raises:
        Rejected: 400 for a format, a size or a number that does not exist.
    """
    values = []
    for name, choices, value in (("format", MEDIA_TYPES, read_accept(accept)[0]), ("size", SIZES, "model")):
        given = fields.get(name)
        if isinstance(given, bytes | bytearray):
            given = given.decode(errors="replace")
        if given is not None and not (isinstance(given, str) and given in choices):
            raise bad_request(f"`{name}` must be one of: {', '.join(choices)}")
        values.append(given or value)
    top = fields.get("top")
    if isinstance(top, str | bytes | bytearray) and top.isascii() and top.isdigit() and len(top) < 10:
        top = int(top)
    elif isinstance(top, float) and top.is_integer():  # as AI Platform sends it
        top = int(top)
    if top is not None and (type(top) is not int or top < 1):
        raise bad_request("`top` must be a whole number above 0")
    return values[0], values[1], top


def read_accept(accept: str) -> tuple[str, bool]:
    """The format that the header `accept` prefers, by weight and then by place, and whether JSON will do for a picture.

    JSON is what everybody gets who names no type that there is.
    """
    formats = {media_type: name for name, media_type in MEDIA_TYPES.items()}
    formats |= {"*/*": "json", "application/*": "json", "image/*": "png"}
    ranges = []
    for media_range in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in media_range.split(";"))
        weight = next((weight_of(value[2:]) for value in parameters if value.startswith("q=")), 1.0)
        if media_type in formats and weight > 0:
            ranges.append((weight, media_type))
    ranges.sort(key=lambda pair: -pair[0])  # of equal weight the first stays first
    accepted = [formats[media_type] for _, media_type in ranges] or ["json"]
    return accepted[0], accepted[0] != "json" and ("json" in accepted or ranges[0][1] == "image/*")


def weight_of(q: str) -> float:
    """The weight of a media range, from 0 to 1; 1 for what is no weight."""
    try:
        return float(q) if 0 <= float(q) <= 1 else 1.0
    except ValueError:
        return 1.0


def read_instance(instance: object) -> bytes:
    """The bytes of the image in one of `Request.instances`.

    Raises:
        Rejected: 400 when it is not `{"b64": …}` or `{"data": {"b64": …}}`, or not base64.
    """
    if isinstance(instance, bytes):
        return instance
    if isinstance(instance, dict) and isinstance(instance.get("data"), dict):
        instance = instance["data"]
    if not isinstance(instance, dict) or not isinstance(instance.get("b64"), str):
        raise bad_request('an instance must be {"b64": …} or {"data": {"b64": …}}')
    try:
        text = instance["b64"]
        for space in "\r\n\t ":  # not split(), which would make a list of 20 million characters
            text = text.replace(space, "")
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("`b64` is not base64") from None


def respond(request: Request, answers: list[dict | Rejected]) -> Response:
    """The response to `request`: one answer per image, in which bytes (a mask, a picture) become base64 in JSON.

    It is an error when no image could be answered: the server's own where there is one among them, else the first.
    """
    errors = [answer for answer in answers if isinstance(answer, Rejected)]
    status, worst, answer = HTTPStatus.OK, None, answers[0]
    if len(errors) == len(answers):
        worst = next((error for error in errors if error.status >= 500), errors[0])
        status = worst.status if not request.is_json or worst.status >= 500 else HTTPStatus.BAD_REQUEST
    if request.is_json:
        content = {"predictions": [as_json(answer) for answer in answers]}
        if worst:
            content |= Rejected(status, worst.type, f"no instance is good: {worst.message}").as_json()
    elif isinstance(answer, Rejected):
        content = answer.as_json()
    else:
        picture = next((value for value in answer.values() if isinstance(value, bytes)), None)
        if request.format != "json" and picture is not None:
            return Response(status, MEDIA_TYPES[request.format], picture)
        content = as_json(answer)
    return Response(status, MEDIA_TYPES["json"], json.dumps(content).encode(), worst.headers if worst else {})


def as_json(answer: dict | Rejected) -> dict:
    """`answer` as JSON can hold it."""
    if isinstance(answer, Rejected):
        return {"error": answer.as_json()}
    return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in answer.items()}
