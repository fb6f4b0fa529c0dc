"""fastai's `DynamicUnet` in pure PyTorch: the same parameter names, the same arithmetic, no fastai.

`DynamicUnetDIY(...).load_state_dict(learn.model.state_dict(), strict=True)` is the whole weight transfer. Where fastai
catches the encoder's activations with forward hooks, this model walks the encoder and hands its skip connections to the
decoder, so that it can be exported, compiled and converted.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

NORM_TYPES = (None, "Batch", "BatchZero", "Weight", "Spectral", "Instance", "InstanceZero")


class WeightNormConv2d(nn.Conv2d):
    """`torch.nn.utils.weight_norm(nn.Conv2d(...))` without its hook: weight = g * v / |v|, per output channel."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        v = self.weight
        del self.weight
        self.weight_g = nn.Parameter(torch.norm_except_dim(v.detach(), 2, 0))
        self.weight_v = nn.Parameter(v.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, torch._weight_norm(self.weight_v, self.weight_g, 0), self.bias)


class SpectralNorm(nn.modules.conv._ConvNd):
    """What `torch.nn.utils.spectral_norm` makes of a convolution in evaluation mode: no hook, no power iteration."""

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        weight = self.weight
        del self.weight
        self.weight_orig = nn.Parameter(weight.detach())
        self.register_buffer("weight_u", F.normalize(torch.randn(self.weight_orig.shape[0]), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(self.weight_orig[0].numel()), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight_orig.reshape(self.weight_orig.size(0), -1)
        sigma = torch.dot(self.weight_u, torch.mv(matrix, self.weight_v))
        return self._conv_forward(x, self.weight_orig / sigma, self.bias)


class SpectralNormConv1d(SpectralNorm, nn.Conv1d):
    """1D convolution whose weight is divided by its largest singular value."""


class SpectralNormConv2d(SpectralNorm, nn.Conv2d):
    """2D convolution whose weight is divided by its largest singular value."""


class ConvLayer(nn.Sequential):
    """Convolution, normalization, activation and, optionally, one `xtra` layer, in that order."""

    def __init__(
        self,
        ni: int,
        nf: int,
        ks: int = 3,
        norm_type: str | None = "Batch",
        act_cls: str | Sequence | None = "ReLU",
        xtra: nn.Module | None = None,
    ):
        norm = {"Batch": nn.BatchNorm2d, "Instance": nn.InstanceNorm2d}.get((norm_type or "").removesuffix("Zero"))
        conv = {"Weight": WeightNormConv2d, "Spectral": SpectralNormConv2d}.get(norm_type or "", nn.Conv2d)
        layers = [conv(ni, nf, ks, padding=(ks - 1) // 2, bias=norm is None)]
        layers += [norm(nf, affine=True)] if norm else []
        layers += [activation(act_cls)] if act_cls else []
        layers += [xtra] if xtra is not None else []
        super().__init__(*layers)


class Encoder(nn.Sequential):
    """The body of a torchvision model, which also returns the activations that leave as skip connections."""

    skip_indices: list[int]  # children whose outputs the decoder gets

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, child in enumerate(self):
            x = child(x)
            if i in self.skip_indices:
                skips.append(x)
        return x, skips


class PixelShuffleICNR(nn.Sequential):
    """Upsample by two: a 1 x 1 convolution to four times the channels, then `PixelShuffle`, then an optional blur."""

    def __init__(
        self, ni: int, nf: int, blur: bool = False, norm_type: str | None = None, act_cls: str | Sequence = "ReLU"
    ):
        layers = [ConvLayer(ni, nf * 4, ks=1, norm_type=norm_type, act_cls=act_cls), nn.PixelShuffle(2)]
        if blur:
            layers += [nn.ReplicationPad2d((1, 0, 1, 0)), nn.AvgPool2d(2, stride=1)]
        super().__init__(*layers)


class SelfAttention(nn.Module):
    """Self-attention over all positions of a feature map (Zhang et al., 2018), as fastai's `SelfAttention`."""

    def __init__(self, n: int):
        super().__init__()
        widths = (n // 8, n // 8, n)
        self.query, self.key, self.value = (nn.Sequential(SpectralNormConv1d(n, w, 1, bias=False)) for w in widths)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        f, g, h = self.query(flat), self.key(flat), self.value(flat)
        beta = F.softmax(torch.bmm(f.transpose(1, 2), g), dim=1)
        return (self.gamma * torch.bmm(h, beta) + flat).reshape(x.shape)


class UnetBlock(nn.Module):
    """One step up the decoder: upsample, join the skip connection, two convolutions."""

    def __init__(
        self,
        up_in_c: int,
        x_in_c: int,
        final_div: bool = True,
        blur: bool = False,
        self_attention: bool = False,
        act_cls: str | Sequence = "ReLU",
        norm_type: str | None = None,
    ):
        super().__init__()
        self.shuf = PixelShuffleICNR(up_in_c, up_in_c // 2, blur, norm_type, act_cls)
        self.bn = nn.BatchNorm2d(x_in_c)
        ni = up_in_c // 2 + x_in_c
        self.channels = nf = ni if final_div else ni // 2
        self.conv1 = ConvLayer(ni, nf, norm_type=norm_type, act_cls=act_cls)
        self.conv2 = ConvLayer(nf, nf, 3, norm_type, act_cls, xtra=SelfAttention(nf) if self_attention else None)
        self.relu = activation(act_cls)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = resize_to(self.shuf(x), skip)
        return self.conv2(self.conv1(self.relu(torch.cat([x, self.bn(skip)], dim=1))))


class ResizeToOrig(nn.Module):
    """Bring the features to the size of the input image."""

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return resize_to(x, image)


class MergeLayer(nn.Module):
    """Append the input image to the features."""

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return torch.cat([x, image], dim=1)


class ResBlock(nn.Module):
    """Two convolutions beside an identity path, which gets a 1 x 1 convolution where the channels change."""

    def __init__(self, ni: int, nf: int, norm_type: str | None = None, act_cls: str | Sequence = "ReLU"):
        super().__init__()
        self.convpath = nn.Sequential(
            ConvLayer(ni, nf, norm_type=norm_type, act_cls=act_cls),
            ConvLayer(nf, nf, norm_type=norm_type, act_cls=None),
        )
        self.idpath = nn.Sequential(*([ConvLayer(ni, nf, ks=1, act_cls=None)] if ni != nf else []))
        self.act = activation(act_cls)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.convpath(x) + self.idpath(x))


class SigmoidRange(nn.Module):
    """Sigmoid stretched to the open interval (low, high)."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (self.high - self.low) + self.low


class DynamicUnetDIY(nn.Module):
    """U-Net on a torchvision encoder, equal in evaluation mode to what fastai's `unet_learner` builds.

    Args:
        arch: name of a torchvision classification model, e.g. `"resnet34"`; its body becomes the encoder.
        n_classes: number of output channels.
        img_size: (height, width) in pixels that the U-Net was built for; any other size can be given to `forward`.
        n_in: number of input channels.
        cut: index of the first child of `arch` that the encoder leaves out, or `[name, index]` to count the children
            of a submodule, e.g. `["features", 18]`; default: fastai's rule for `arch`.
        blur, blur_final, self_attention, y_range, last_cross: as in fastai's `DynamicUnet`. (Its `init` and `bottle`
            are left out: loaded weights need no initialization, and `bottle` has no effect on any model that runs.)
        act_cls: name of an activation of `torch.nn`, or `[name, keyword arguments]`.
        norm_type: one of `NORM_TYPES`, the names of fastai's `NormType`.

    Raises:
        ValueError: `arch`, `act_cls` or `norm_type` is unknown, or `arch` has no body that can be cut and walked.
    """

    def __init__(
        self,
        arch: str = "resnet34",
        n_classes: int = 32,
        img_size: Sequence[int] = (96, 128),
        *,
        n_in: int = 3,
        cut: int | Sequence | None = None,
        blur: bool = False,
        blur_final: bool = True,
        self_attention: bool = False,
        y_range: Sequence[float] | None = None,
        last_cross: bool = True,
        act_cls: str | Sequence = "ReLU",
        norm_type: str | None = None,
    ):
        super().__init__()
        if norm_type not in NORM_TYPES:
            raise ValueError(f"unknown norm_type {norm_type!r}: one of {', '.join(map(str, NORM_TYPES))}")
        encoder = create_body(arch, n_in, cut)
        sizes = activation_shapes(encoder, n_in, img_size)
        # fastai looks at the last dimension alone: a skip connection leaves before each child that changes it.
        encoder.skip_indices = [i for i in range(len(sizes) - 1) if sizes[i][-1] != sizes[i + 1][-1]]
        style = dict(norm_type=norm_type, act_cls=act_cls)

        ni = sizes[-1][1]
        middle_conv = nn.Sequential(ConvLayer(ni, ni * 2, **style), ConvLayer(ni * 2, ni, **style))
        layers: list[nn.Module] = [encoder, nn.BatchNorm2d(ni), nn.ReLU(), middle_conv]
        for i, idx in enumerate(reversed(encoder.skip_indices)):
            final, third_last = i == len(encoder.skip_indices) - 1, i == len(encoder.skip_indices) - 3
            blurred, attention = blur and (blur_final or not final), self_attention and third_last
            block = UnetBlock(ni, sizes[idx][1], not final, blurred, attention, **style)
            layers.append(block)
            ni = block.channels
        if tuple(img_size) != tuple(sizes[0][-2:]):
            layers.append(PixelShuffleICNR(ni, ni, **style))
        layers.append(ResizeToOrig())
        if last_cross:
            layers.append(MergeLayer())
            ni += n_in
            layers.append(ResBlock(ni, ni, **style))
        layers.append(ConvLayer(ni, n_classes, ks=1, norm_type=norm_type, act_cls=None))
        if y_range is not None:
            layers.append(SigmoidRange(*y_range))
        self.layers = nn.ModuleList(layers)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of an image batch: (N, n_in, H, W) float to (N, n_classes, H, W) float."""
        encoder, norm, relu, middle_conv, *decoder = self.layers
        x, skips = encoder(image)
        x = middle_conv(relu(norm(x)))
        for layer in decoder:
            if isinstance(layer, UnetBlock):
                x = layer(x, skips.pop())
            elif isinstance(layer, ResizeToOrig | MergeLayer):
                x = layer(x, image)
            else:
                x = layer(x)
        return x


def create_body(arch: str, n_in: int = 3, cut: int | Sequence | None = None) -> Encoder:
    """The children of torchvision model `arch` up to its head, cut where fastai's `create_body` cuts.

    Raises:
        ValueError: torchvision has no such model, its first layer is no convolution of three channels, or it has no
            pooling layer to cut at.
    """
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no classification model named {arch!r}")
    without_aux = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    build = partial(torchvision.models.get_model, arch, weights=None, **without_aux)
    try:
        model = build()
    except RuntimeError:  # some compute their widths with tensors, which the meta device cannot
        with torch.device("cpu"):
            model = build()
    if n_in != 3:
        replace_first_conv(model, n_in)
    if cut is not None and not isinstance(cut, int):
        name, cut = cut
        model = model.get_submodule(name)
    children = list(model.children())
    if cut is None and arch.startswith("densenet"):
        cut = -1
    if cut is None:
        layers = [[type(module).__name__ for module in child.modules()] for child in children]
        pools = [i for i, names in enumerate(layers) if re.search(r"Pool[123]d\b", " ".join(names))]
        if not pools:
            raise ValueError(f"{arch!r} has no pooling layer before its head, where fastai would cut it")
        cut = pools[-1]
    return Encoder(*children[:cut])


def replace_first_conv(model: nn.Module, n_in: int) -> None:
    """Give the first layer of `model` `n_in` input channels."""
    path = next(name for name, _ in model.named_parameters()).rpartition(".")[0]
    conv = model.get_submodule(path)
    if not isinstance(conv, nn.Conv2d) or conv.in_channels != 3:
        raise ValueError(f"n_in={n_in}: the first layer of {type(model).__name__} is no convolution of three channels")
    same = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    new = nn.Conv2d(n_in, bias=conv.bias is not None, **{k: getattr(conv, k) for k in same})
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def activation_shapes(encoder: nn.Sequential, n_in: int, img_size: Sequence[int]) -> list[torch.Size]:
    """The shape of the activation after each child of `encoder`, for one image of `img_size` (height, width).

    Raises:
        ValueError: the children do not run one after the other, or not on images of `img_size`.
    """
    shapes = []
    x = torch.zeros(1, n_in, *img_size, device=next(encoder.parameters()).device)
    encoder.eval()
    with torch.no_grad():
        for i, child in enumerate(encoder):
            try:
                x = child(x)
                shapes.append(x.shape)
            except (RuntimeError, ValueError, TypeError, AttributeError) as e:
                raise ValueError(
                    f"child {i} of the encoder, {type(child).__name__}, cannot follow the one before: {e}"
                ) from e
    encoder.train()
    return shapes


def activation(act_cls: str | Sequence) -> nn.Module:
    """The activation layer of `torch.nn` called `act_cls`, or made from `[name, keyword arguments]`."""
    name, options = (act_cls, {}) if isinstance(act_cls, str) else act_cls
    layer = getattr(nn, name, None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(f"torch.nn has no activation named {name!r}")
    return layer(**options)


def resize_to(x: Tensor, target: Tensor) -> Tensor:
    """`x` at the height and width of `target`, by nearest neighbor."""
    if x.shape[-2:] != target.shape[-2:]:
        x = F.interpolate(x, target.shape[-2:], mode="nearest")
    return x
