"""What a batch job wrote: rows of predictions and of errors, and the image that each belongs to."""

import ast
import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .jobs import TOO_LARGE, address, is_too_large, objects, storage_client


def batch_results(folder: str) -> Iterator[dict]:
    """The rows of a batch job's output, in the service's order, those of requests that failed last.

    Each is `{"instance": …, "prediction": …}` or `{"instance": …, "error": …}`; `error_in` knows both kinds of errors.
    Of a request that failed as a whole the service may keep the reason alone: its row has an empty instance, and the
    photos of that request have no rows.
    """
    client = storage_client()
    bucket, _, prefix = folder.removeprefix("gs://").rstrip("/").partition("/")
    blobs = sorted(client.list_blobs(bucket, prefix=f"{prefix}/"), key=lambda blob: "error" in blob.name.split("/")[-1])
    for blob in blobs:
        if re.match(r"predictions?[._]|errors?[._]", blob.name.split("/")[-1]):
            with blob.open("rb") as lines:
                yield from (read_row(line.decode()) for line in lines if line.strip())


def read_row(line: str) -> dict:
    """One line of a batch job's output: JSON, or of a failed request a Python tuple of its message and its code."""
    with contextlib.suppress(ValueError):
        return json.loads(line)
    try:
        message, code = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError):
        message, code = line.strip(), 2  # UNKNOWN
    return {"instance": {}, "error": {"code": code, "message": message}}


def named(rows: Iterable[dict], source: Sequence[Path | str], destination: str = "") -> Iterator[tuple[str, dict]]:
    """The rows of `batch(source, destination)`, each with its image's name; last a row for each image that has none.

    The name is in the instance, or it is the instance; where the service kept an image's content in place of its
    address, it is found by that. Rows of lines that bear no name are numbered, and so is an error that may be theirs.
    """
    folders = [str(s) for s in source if str(s).startswith("gs://") and not str(s).endswith(".jsonl")]
    blobs = objects(folders, storage_client(), destination) if folders else []
    by_content: dict[str, list[str]] = {}
    for blob in blobs:
        by_content.setdefault(blob.md5_hash, []).append(address(blob))
    left = {str(Path(s)): "its request failed" for s in source if not str(s).startswith("gs://")}
    left |= {address(blob): TOO_LARGE if is_too_large(blob.size) else "its request failed" for blob in blobs}
    lines = not left or any(str(s).startswith("gs://") and str(s).endswith(".jsonl") for s in source)
    for n, row in enumerate(rows, 1):
        name = name_in(row["instance"], by_content)
        if name or row["instance"] or lines:
            left.pop(name or "", None)
            yield name or f"row-{n:06}", row
        else:
            print(f"a request failed: {error_in(row)}")
    for name, reason in left.items():
        yield name, {"error": f"no answer: {reason}"}


def name_in(instance: dict | str, by_content: dict[str, list[str]]) -> str | None:
    """The name of the image that `instance` stands for, one of those with its content; None where nothing tells."""
    if isinstance(instance, str):
        return instance
    if "name" in instance or "b64" not in instance:
        return instance.get("name")
    content = base64.b64encode(hashlib.md5(base64.b64decode(instance["b64"]), usedforsecurity=False).digest()).decode()
    names = by_content.get(content)
    return names.pop() if names else None


def error_in(row: dict) -> str | None:
    """Why the photo of a row got no answer: the server's word for it, or the service's; None where it got one."""
    error = row.get("error") or row.get("prediction", {}).get("error")
    return error and str(error.get("message", error) if isinstance(error, dict) else error)
