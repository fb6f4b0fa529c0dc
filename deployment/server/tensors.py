"""The handler's answers as tensors, and tensors as the Open Inference Protocol has them: as JSON, or as binary data.

| task | tensors; the first axis is the image |
|---|---|
| segmentation | `mask` UINT8 [n, height, width], or for a picture `picture` BYTES [n]; `names` BYTES, one per class |
| classification | `label` BYTES [n], `classes` BYTES and `probabilities` FP32 [n, k], most probable first |
| multi-label | `classes` and `probabilities` likewise, `chosen` BOOL [n, k]: above the learner's threshold |
| regression | `values` FP32 [n, k] |
| points | `points` FP32 [n, k, 2]: x and y in pixels of the image as it was sent |

A tensor is a NumPy array; one of BYTES holds objects: text, or the bytes of a picture, which in JSON are base64.
"""

import base64
import io
import json
from collections.abc import Iterator

import numpy as np

from ..answers import number
from ..config import Config
from ..protocol import bad_request

DATATYPES = {"uint8": "UINT8", "float32": "FP32", "bool": "BOOL", "object": "BYTES"}
DIGITS = np.array([f"{value:3d}," for value in range(256)], "S4")  # each uint8 as JSON has it, with its comma
BLOCK = 2**20  # values of a mask that are written at a time


def describe(config: Config) -> list[dict]:
    """Name, datatype and shape of each tensor that the model may answer with; -1 where a request decides."""
    ranked = [("classes", "BYTES", [-1, -1]), ("probabilities", "FP32", [-1, -1])]
    tensors = {
        "segmentation": [
            ("mask", "UINT8", [-1, -1, -1]),
            ("picture", "BYTES", [-1]),
            ("names", "BYTES", [len(config.classes)]),
        ],
        "classification": [("label", "BYTES", [-1]), *ranked],
        "multi-label": [*ranked, ("chosen", "BOOL", [-1, -1])],
        "regression": [("values", "FP32", [-1, -1])],
        "points": [("points", "FP32", [-1, -1, 2])],
    }
    return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in tensors[config.task]]


def make_tensors(answers: list[dict], config: Config) -> dict[str, np.ndarray]:
    """The tensors of `answers`, one per image, as `answers.make_answer` makes them.

    Raises:
        Rejected: 400 where their shapes differ.
    """
    rows = [make_row(answer, config.task) for answer in answers]
    tensors = {}
    for name in rows[0]:
        column = [row[name] for row in rows]
        if any(value.shape != column[0].shape for value in column):
            raise bad_request("the answers have different shapes: send one image per request, or ask for format=png")
        tensors[name] = np.stack(column)
    if config.task == "segmentation":
        tensors["names"] = np.array(config.classes, object)
    return tensors


def make_row(answer: dict, task: str) -> dict[str, np.ndarray]:
    """The part of each tensor that is the answer to one image."""
    if task == "segmentation":
        if "base64_prediction" in answer:
            return {"mask": np.frombuffer(answer["base64_prediction"], np.uint8).reshape(answer["shape"])}
        return {"picture": np.array(answer.get("png") or answer.get("jpeg"), object)}
    if task in ("regression", "points"):
        return {name: np.array(values, np.float32) for name, values in answer.items()}
    names, values = list(answer["probabilities"]), list(answer["probabilities"].values())
    ranked = {"classes": np.array(names, object), "probabilities": np.array(values, np.float32)}
    if task == "multi-label":
        return ranked | {"chosen": np.array([name in answer["labels"] for name in names], bool)}
    return {"label": np.array(answer["label"], object)} | ranked


def as_json(tensor: np.ndarray) -> Iterator[bytes]:
    """The values of `tensor`, row by row, as the inside of a JSON array, in parts."""
    if tensor.dtype == np.uint8:  # a mask has millions, and each would become an object for the json module
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            text = DIGITS[flat[start : start + BLOCK]].tobytes()
            yield text if start + BLOCK < flat.size else text[:-1]
    else:
        yield json.dumps([json_value(value) for value in tensor.reshape(-1)]).encode()[1:-1]


def json_value(value: bytes | str | np.bool_ | np.float32) -> str | bool | float:
    """`value`, of a tensor that is no mask, as the json module takes it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, np.bool_):
        return bool(value)
    return number(value) if isinstance(value, np.float32) else value


def as_binary(tensor: np.ndarray) -> bytes:
    """The values of `tensor`, row by row, little-endian; each of a BYTES tensor after its length in four bytes."""
    if tensor.dtype != object:
        return tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
    values = [value if isinstance(value, bytes) else str(value).encode() for value in tensor.reshape(-1)]
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def read_binary(binary: bytes, n: int) -> list[bytes]:
    """The `n` elements of a BYTES tensor: each follows its length in four bytes, little-endian.

    Raises:
        Rejected: 400 where `binary` is not as many.
    """
    elements, at = [], 0
    for _ in range(n):
        begin = at + 4
        at = begin + int.from_bytes(binary[at:begin], "little")
        elements.append(binary[begin:at])
    if at != len(binary):
        raise bad_request("the binary data must be as many files as `shape` says, each after its length in four bytes")
    return elements


def write(about: dict, tensors: dict[str, np.ndarray], binary: set[str]) -> tuple[bytes, int]:
    """The body of a response: the JSON object `about` with the outputs `tensors`, then the data of those in `binary`.

    Returns:
        The body, and how many bytes of it are JSON.
    """
    body, after = io.BytesIO(), []  # a bytearray would be copied once more
    body.write(json.dumps(about).encode()[:-1] + b', "outputs": [')
    for i, (name, tensor) in enumerate(tensors.items()):
        head = {"name": name, "datatype": DATATYPES[tensor.dtype.name], "shape": list(tensor.shape)}
        if i:
            body.write(b", ")
        if name in binary:
            after.append(as_binary(tensor))
            body.write(json.dumps(head | {"parameters": {"binary_data_size": len(after[-1])}}).encode())
        else:
            body.write(json.dumps(head).encode()[:-1] + b', "data": [')
            body.writelines(as_json(tensor))
            body.write(b"]}")
    body.write(b"]}")
    length = body.tell()
    body.writelines(after)
    return body.getvalue(), length
