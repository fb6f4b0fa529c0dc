"""Capture a network as a program of `torch.export`, which torch alone can run: no fastai, no timm, hooks included."""

import contextlib
import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..config import Config
from .learner import ExportError


def capture(network: nn.Module, n_in: int, img_size: Sequence[int], free_size: bool = False) -> ExportedProgram:
    """`network` as a program: float32 (N, n_in, H, W), any N, to its output.

    Height and width are those of `img_size`, or free with `free_size`.

    Raises:
        ExportError: what the network computes depends on the photo in a way that no program can hold.
    """
    h, w = img_size
    free = {0: Dim.DYNAMIC}
    if free_size:  # where sizes do not fit, a network may resize: with odd sides it does, and the program always will
        h, w, free = h | 1, w | 1, free | {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    example = torch.rand(2, n_in, h, w, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(plain(network, example), (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # of the network, or of torch.export, which has many
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ExportError(f"torch.export cannot capture the network {type(network).__name__}: {reason}") from error
    program.example_inputs = None  # they would be saved with it, as a pickle
    return program


def capture_widest(network: nn.Module, config: Config) -> ExportedProgram:
    """`capture` for photos as `config` makes them: of every size where they keep their own and the network can."""
    if config.keeps_photo_size:
        with contextlib.suppress(ExportError):
            return capture(network, config.n_in, config.img_size, free_size=True)
    return capture(network, config.n_in, config.img_size)


def has_free_size(program: ExportedProgram) -> bool:
    """Whether `program` takes photos of every height and width."""
    photo = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    return not isinstance(photo.meta["val"].shape[2], int)


def plain(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of `network` on the CPU in evaluation mode, without fastai's tensor class, which torch.export cannot see.

    Its layer `ToTensorBase` only changes the class. `example` goes through it once: hooks that compute a weight leave
    one that can be copied then.
    """
    network.eval()(example.to(next(network.parameters()).device))
    network = copy.deepcopy(network).cpu().requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if type(child).__name__ == "ToTensorBase" and type(child).__module__ == "fastai.layers":
                parent._modules[name] = nn.Identity()
        for tensors in (parent._parameters, parent._buffers):
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, nn.Parameter):
                    value = value.detach().as_subclass(torch.Tensor)
                    tensors[name] = nn.Parameter(value, False) if tensors is parent._parameters else value
    return network
