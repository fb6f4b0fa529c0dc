"""Capture a network as a program of `torch.export`, which torch alone can run: no fastai, no timm, hooks included."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..config import Config
from ..runtime.pytorch import ServedModel, warm_up_size
from .learner import ExportError, unwrapped


class WithOwnTransforms(nn.Module):
    """A network with the reader's own batch transforms in front of it."""

    def __init__(self, transforms: list[Callable], network: nn.Module):
        super().__init__()
        self.transforms, self.network = transforms, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            x = transform(x)
        return self.network(x)


def capture(module: nn.Module, example: torch.Tensor, free_axes: Sequence[int] = (0,)) -> ExportedProgram:
    """`module` as a program of `torch.export`, for inputs like `example` whose `free_axes` may have any length.

    Raises:
        ExportError: what the module computes depends on its input in a way that no program can hold.
    """
    free = dict.fromkeys(free_axes, Dim.DYNAMIC)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # of the network, or of torch.export, which has many
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ExportError(f"torch.export cannot capture {name_of_network(module)}: {reason}") from error
    program.example_inputs = None  # they would be saved with it, as a pickle
    return program


def name_of_network(module: nn.Module) -> str:
    """What to call `module` in an error."""
    inner = module.network if isinstance(module, WithOwnTransforms | ServedModel) else module
    own = ", with batch transforms of your own" if isinstance(module, WithOwnTransforms) else ""
    return f"the network {type(inner).__name__}{own}"


def capture_network(
    network: nn.Module, transforms: list[Callable], shape: Sequence[int], free_size: bool
) -> ExportedProgram:
    """`network` behind the reader's own batch `transforms`: float32 (N, channels, H, W), any N, to logits.

    Args:
        shape: (channels, H, W) of an input.
        free_size: take inputs of every height and width, where the network can.

    Raises:
        ExportError: it cannot be captured.
    """
    channels, h, w = shape
    random = torch.Generator().manual_seed(0)
    module = plain(network, torch.rand(2, network_channels(network, channels), h, w, generator=random))
    if transforms:
        module = WithOwnTransforms(transforms, module)
    if free_size:
        with contextlib.suppress(ExportError):
            return capture(module, torch.rand(2, channels, odd(h), odd(w), generator=random), (0, 2, 3))
    return capture(module, torch.rand(2, channels, h, w, generator=random))


def odd(side: int) -> int:
    """A side of about this length that stays odd however often it is halved, up to five times.

    Where sizes do not fit, a network may resize. On such sides it always does, and so the program always will.
    """
    return (side + 31) // 32 * 32 + 1


def network_channels(network: nn.Module, channels: int) -> int:
    """The channels that `network` takes, by its first convolution; `channels` where it has none."""
    return next((part.in_channels for part in network.modules() if isinstance(part, nn.Conv2d)), channels)


def capture_served(model: ServedModel, config: Config) -> ExportedProgram:
    """The served `model` of `config`, from pixels (N, H, W, channels) to outputs: of every size where it can be free.

    Raises:
        ExportError: it cannot be captured.
    """
    h, w, channels = warm_up_size(config)
    random = np.random.default_rng(0)

    def example(h: int, w: int) -> torch.Tensor:
        return torch.from_numpy((255 * random.random((2, h, w, channels))).astype(config.dtype))

    if config.pixels_size is None:  # the images come in several sizes
        with contextlib.suppress(ExportError):
            return capture(model, example(odd(h), odd(w)), (0, 1, 2))
    return capture(model, example(h, w))


def input_of(program: ExportedProgram) -> torch.Tensor:
    """A stand-in for the input of `program`, without values; symbols in its shape are axes that are free."""
    node = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    return node.meta["val"]


def input_shape(program: ExportedProgram) -> list[int]:
    """The shape of the input of `program`; -1 for an axis that is free."""
    return [side if isinstance(side, int) else -1 for side in input_of(program).shape]


def free_sides(program: ExportedProgram) -> list[list[int | None]] | None:
    """The least and the greatest height and width of images that `program` holds for; None: its size is fixed.

    None in place of a number: there is no limit. A network that branches on the size is captured on one side of it.
    """
    sides = []
    for side in input_of(program).shape[2:]:
        if isinstance(side, int):
            return None
        limits = program.range_constraints.get(side.node.expr)
        low, high = (int(limits.lower), limits.upper) if limits is not None else (0, None)
        sides.append([low if low > 2 else None, int(high) if high is not None and str(high).isdigit() else None])
    return sides


def plain(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of `network` on the CPU in evaluation mode, without fastai's tensor class, which torch.export cannot see.

    Its layer `ToTensorBase` only changes the class. `example` goes through it once: hooks that compute a weight leave
    one that can be copied then.
    """
    with torch.no_grad():
        network.eval()(example)
    network = copy.deepcopy(network).cpu().requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if type(child).__name__ == "ToTensorBase" and type(child).__module__ == "fastai.layers":
                parent._modules[name] = nn.Identity()
            elif child is not None:
                parent._modules[name] = unwrapped(child)
        both: tuple[dict[str, Any], ...] = (parent._parameters, parent._buffers)
        for tensors in both:
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, nn.Parameter):
                    value = value.detach().as_subclass(torch.Tensor)
                    tensors[name] = nn.Parameter(value, False) if tensors is parent._parameters else value
    return network
