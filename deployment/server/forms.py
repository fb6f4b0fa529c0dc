"""The body of a request to our own server, within limits, and the fields of a form. TorchServe does this in Java."""

from http import HTTPStatus

import anyio
import python_multipart
from starlette.requests import Request

from ..protocol import Rejected, bad_request, too_large

MAX_BYTES = 20 * 2**20  # of a request, as config.properties has it for TorchServe
READ_SECONDS = 60  # that a request may take to arrive


async def read_body(request: Request) -> bytes:
    """The body.

    Raises:
        Rejected: 413 for more than MAX_BYTES, before the rest is read; 408 where it does not arrive in time.
        starlette.requests.ClientDisconnect: the client has gone.
    """
    body = bytearray()
    try:
        with anyio.fail_after(READ_SECONDS):
            if int(request.headers.get("content-length", 0)) > MAX_BYTES:
                raise too_large(f"more than {MAX_BYTES} bytes")
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise too_large(f"more than {MAX_BYTES} bytes")
    except TimeoutError:
        message = f"the request took more than {READ_SECONDS} s to arrive"
        raise Rejected(HTTPStatus.REQUEST_TIMEOUT, "Timeout", message) from None
    return bytes(body)


def read_fields(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a multipart form, by name; any other body is the one field `body`, whatever its type says.

    Clients call an image all kinds of things; curl --data-binary and urllib call it a form of text fields.

    Raises:
        Rejected: 400 for a multipart form that cannot be read.
    """
    if not content_type.lower().startswith("multipart/"):
        return {"body": body}
    fields = {}

    def keep(part, value: bytes | None) -> None:
        fields[(part.field_name or b"").decode(errors="replace")] = value or b""

    def keep_file(part) -> None:
        part.file_object.seek(0)
        keep(part, part.file_object.read())

    try:
        parser = python_multipart.create_form_parser(
            {"Content-Type": content_type.encode("latin-1")},
            lambda part: keep(part, part.value),
            keep_file,
            config={"MAX_MEMORY_FILE_SIZE": MAX_BYTES},  # nothing goes to the disk
        )
        parser.write(body)
        parser.finalize()
    except ValueError:  # of which the parser's own errors are
        raise bad_request("the body is no multipart form") from None
    return fields
