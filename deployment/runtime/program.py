"""A network that `torch.export` captured as a program: read from its file, once that is known to run no code."""

import ast
import io
import json
import re
import zipfile
from pathlib import Path

import sympy
import torch
from torch import nn
from torch.export.passes import move_to_device_pass
from torch.utils._sympy import functions

ENTRY = re.compile(r"[^/]+/(models/[^/]+\.json|data/(weights|constants|sample_inputs)/[^/]+|(\.data/)?[^/]+)")
# What the size of a tensor is made of, beside calls: names, numbers, and names and numbers in quotes.
PARTS = (ast.Expression, ast.Name, ast.Load, ast.keyword, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop)
QUOTED = re.compile(r"\w+|-?\d+\.\d*(e[+-]?\d+)?", re.ASCII)


def load_program(path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The program at `path` on `device`, as a module of torch's own operations and its tensors: no fastai, no timm.

    It moves there whole: operations that make tensors name their device, which a module's own `to` does not change.

    `torch.export.load` opens pickles, loads libraries that were compiled from a model (`load_pt2` in
    torch/export/pt2_archive/_package.py), and evaluates the sizes of tensors as Python (`_parse_sym_expr` in
    torch/_export/serde/serialize.py). Each could run any code; here they are looked at before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds a library, pickles of more than tensors, or sizes that are no arithmetic.
    """
    try:
        with zipfile.ZipFile(path) as file:
            check_entries(file)
            check_pickles(file)
            check_sizes(file)
        program = torch.export.load(path)
        if torch.device(device).type != "cpu":
            program = move_to_device_pass(program, str(device))
        module = program.module(check_guards=False).requires_grad_(False)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged file: any
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be loaded as a program of torch.export: {reason}") from None
    del module.train, module.eval  # which refuse: a program has no modes, and asking for one does no harm
    return module


def check_entries(file: zipfile.ZipFile) -> None:
    """Raises ValueError where `file` holds more than `torch.export.save` writes: a compiled library, for example."""
    for name in file.namelist():
        if not ENTRY.fullmatch(name):
            raise ValueError(f"an entry that a program does not have: {name}")


def check_pickles(file: zipfile.ZipFile) -> None:
    """Raises pickle.UnpicklingError where `file` holds pickles of more than tensors."""
    entries = {entry: entry.filename.rpartition("/")[2] for entry in file.infolist()}
    configs = [json.loads(file.read(entry)) for entry, name in entries.items() if name.endswith("_config.json")]
    payloads = [payload for config in configs for payload in config["config"].values()]
    pickled = {payload["path_name"] for payload in payloads if payload["use_pickle"]}
    for entry, name in entries.items():
        if entry.file_size and (name.endswith(".pt") or name in pickled):
            torch.load(io.BytesIO(file.read(entry)), weights_only=True)


def check_sizes(file: zipfile.ZipFile) -> None:
    """Raises ValueError where an expression in `file` is more than arithmetic with SymPy's and torch's own classes."""

    def check(fields: dict) -> dict:
        if "expr_str" in fields:
            check_expression(fields["expr_str"])
        return fields

    for entry in file.infolist():
        if entry.filename.endswith(".json"):
            json.loads(file.read(entry), object_hook=check)


def check_expression(expression: str) -> None:
    """Raises ValueError, or SyntaxError, where `expression` is more than arithmetic."""
    for node in ast.walk(ast.parse(expression, mode="eval")):
        if isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and is_expression_class(node.func.id)
        elif isinstance(node, ast.Constant):
            allowed = not isinstance(node.value, str) or QUOTED.fullmatch(node.value)
        else:
            allowed = isinstance(node, PARTS)
        if not allowed:
            raise ValueError(f"a size that may run code: {expression}")


def is_expression_class(name: str) -> bool:
    """Whether `name` is a class of which sizes are made: SymPy's, or torch's own in its manner."""
    found = getattr(functions, name, None) or getattr(sympy, name, None)
    return isinstance(found, type) and issubclass(found, sympy.Basic)
