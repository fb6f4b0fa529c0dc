"""fastai's `DynamicUnet` in pure PyTorch: the same parameter names, the same arithmetic, no fastai.

`DynamicUnetDIY(...).load_state_dict(learn.model.state_dict(), strict=True)` is the whole weight transfer. The layout
follows `fastai.vision.models.unet.DynamicUnet` step by step; where fastai keeps the encoder's activations with forward
hooks, this model walks the encoder and keeps them in a plain list, so that it can be scripted, exported and converted.
"""

import re
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

NORM_TYPES = (None, "Batch", "BatchZero", "Weight", "Spectral", "Instance", "InstanceZero")
ACTIVATIONS = {"softmax": lambda x: x.softmax(dim=1), "sigmoid": torch.sigmoid, None: lambda x: x}


class WeightNormConv2d(nn.Conv2d):
    """`torch.nn.utils.weight_norm(nn.Conv2d(...))` without its hook: weight = g * v / |v|, per output channel."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        v = self.weight
        del self.weight
        self.weight_g = nn.Parameter(torch.norm_except_dim(v.detach(), 2, 0))
        self.weight_v = nn.Parameter(v.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, torch._weight_norm(self.weight_v, self.weight_g, 0), self.bias)


class SpectralNorm:
    """Makes a convolution what `torch.nn.utils.spectral_norm` makes of it, in evaluation mode and without its hook.

    The power iteration that updates u and v belongs to training, which happens in fastai.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weight = self.weight
        del self.weight
        self.weight_orig = nn.Parameter(weight.detach())
        self.register_buffer("weight_u", F.normalize(torch.randn(weight.shape[0]), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(weight[0].numel()), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight_orig.reshape(self.weight_orig.size(0), -1)
        sigma = torch.dot(self.weight_u, torch.mv(matrix, self.weight_v))
        return self._conv_forward(x, self.weight_orig / sigma, self.bias)


class SpectralNormConv1d(SpectralNorm, nn.Conv1d):
    """Convolution over one dimension whose weight is divided by its largest singular value."""


class SpectralNormConv2d(SpectralNorm, nn.Conv2d):
    """Convolution over two dimensions whose weight is divided by its largest singular value."""


class ConvLayer(nn.Sequential):
    """Convolution, normalization, activation and, optionally, one `xtra` layer, in that order."""

    def __init__(self, ni, nf, ks=3, norm_type="Batch", act_cls="ReLU", xtra=None):
        norm = {"Batch": nn.BatchNorm2d, "Instance": nn.InstanceNorm2d}.get((norm_type or "").removesuffix("Zero"))
        conv = {"Weight": WeightNormConv2d, "Spectral": SpectralNormConv2d}.get(norm_type, nn.Conv2d)
        layers = [conv(ni, nf, ks, padding=(ks - 1) // 2, bias=norm is None)]
        if norm:
            layers.append(norm(nf, affine=True))
        if act_cls:
            layers.append(activation(act_cls))
        if xtra is not None:
            layers.append(xtra)
        super().__init__(*layers)


class Encoder(nn.Sequential):
    """The body of a torchvision model; it saves the activations that leave as skip connections."""

    uses_saved: Final[bool] = True
    skips: list[int]  # indices of the children whose outputs are saved

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        for i, child in enumerate(self):
            x = child(x)
            if i in self.skips:
                saved.append(x)
        return x


class PixelShuffleICNR(nn.Sequential):
    """Upsample by two: a 1 x 1 convolution to four times the channels, then `PixelShuffle`, then an optional blur."""

    def __init__(self, ni, nf, blur=False, norm_type=None, act_cls="ReLU"):
        layers = [ConvLayer(ni, nf * 4, ks=1, norm_type=norm_type, act_cls=act_cls), nn.PixelShuffle(2)]
        if blur:
            layers += [nn.ReplicationPad2d((1, 0, 1, 0)), nn.AvgPool2d(2, stride=1)]
        super().__init__(*layers)


class SelfAttention(nn.Module):
    """Self-attention over all positions of a feature map (Zhang et al., 2018), as fastai's `SelfAttention`."""

    def __init__(self, n_channels):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Sequential(SpectralNormConv1d(n_channels, nf, 1, bias=False))
            for nf in (n_channels // 8, n_channels // 8, n_channels)
        )
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        f, g, h = self.query(flat), self.key(flat), self.value(flat)
        beta = F.softmax(torch.bmm(f.transpose(1, 2), g), dim=1)
        return (self.gamma * torch.bmm(h, beta) + flat).reshape(x.shape)


class UnetBlock(nn.Module):
    """One step up the decoder: upsample, join the skip connection saved last, two convolutions."""

    uses_saved: Final[bool] = True

    def __init__(
        self,
        up_in_c,
        x_in_c,
        final_div=True,
        blur=False,
        self_attention=False,
        act_cls="ReLU",
        norm_type=None,
    ):
        super().__init__()
        self.shuf = PixelShuffleICNR(up_in_c, up_in_c // 2, blur, norm_type, act_cls)
        self.bn = nn.BatchNorm2d(x_in_c)
        ni = up_in_c // 2 + x_in_c
        nf = ni if final_div else ni // 2
        self.conv1 = ConvLayer(ni, nf, norm_type=norm_type, act_cls=act_cls)
        attention = SelfAttention(nf) if self_attention else None
        self.conv2 = ConvLayer(nf, nf, norm_type=norm_type, act_cls=act_cls, xtra=attention)
        self.relu = activation(act_cls)

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        skip = saved.pop()
        x = resize_to(self.shuf(x), skip)
        return self.conv2(self.conv1(self.relu(torch.cat([x, self.bn(skip)], dim=1))))


class ResizeToOrig(nn.Module):
    """Bring the features to the size of the input image."""

    uses_saved: Final[bool] = True

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        return resize_to(x, saved[0])


class MergeLayer(nn.Module):
    """Append the input image to the features."""

    uses_saved: Final[bool] = True

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        return torch.cat([x, saved[0]], dim=1)


class ResBlock(nn.Module):
    """Two convolutions beside an identity path, which gets a 1 x 1 convolution where the channels change."""

    def __init__(self, ni, nf, norm_type=None, act_cls="ReLU"):
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

    def __init__(self, low, high):
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
        blur, blur_final, self_attention, y_range, last_cross, bottle: as in fastai's `DynamicUnet`; its `init` is of
            no use to loaded weights.
        act_cls: name of an activation of `torch.nn`, or `[name, keyword arguments]`.
        norm_type: one of `NORM_TYPES`, the names of fastai's `NormType`.

    Raises:
        ValueError: `arch`, `act_cls` or `norm_type` is unknown, `arch` has no body that can be cut and walked, or
            `bottle` is combined with `last_cross`, of which fastai too builds a model that cannot run.
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
        bottle: bool = False,
        act_cls: str | Sequence = "ReLU",
        norm_type: str | None = None,
    ):
        super().__init__()
        if norm_type not in NORM_TYPES:
            raise ValueError(f"unknown norm_type {norm_type!r}: one of {', '.join(map(str, NORM_TYPES))}")
        if bottle and last_cross:
            raise ValueError("bottle=True halves the channels before the last layer, which expects all (as in fastai)")
        encoder = create_body(arch, n_in, cut)
        sizes = activation_shapes(encoder, n_in, img_size)
        # fastai looks at the last dimension alone: a skip connection leaves before each child that changes it.
        encoder.skips = [i for i in range(len(sizes) - 1) if sizes[i][-1] != sizes[i + 1][-1]]
        like = dict(norm_type=norm_type, act_cls=act_cls)

        ni = sizes[-1][1]
        middle_conv = nn.Sequential(ConvLayer(ni, ni * 2, **like), ConvLayer(ni * 2, ni, **like))
        layers = [encoder, nn.BatchNorm2d(ni), nn.ReLU(), middle_conv]
        for i, idx in enumerate(reversed(encoder.skips)):
            not_final = i != len(encoder.skips) - 1
            do_blur = blur and (not_final or blur_final)
            sa = self_attention and i == len(encoder.skips) - 3
            layers.append(UnetBlock(ni, sizes[idx][1], not_final, do_blur, sa, **like))
            ni = layers[-1].conv2[0].out_channels
        if tuple(img_size) != tuple(sizes[0][-2:]):
            layers.append(PixelShuffleICNR(ni, ni, **like))
        layers.append(ResizeToOrig())
        if last_cross:
            layers.append(MergeLayer())
            ni += n_in
            layers.append(ResBlock(ni, ni, **like))
        layers.append(ConvLayer(ni, n_classes, ks=1, norm_type=norm_type, act_cls=None))
        if y_range is not None:
            layers.append(SigmoidRange(*y_range))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of an image batch: (N, n_in, H, W) float to (N, n_classes, H, W) float."""
        saved: list[Tensor] = [x]  # the image, then the skip connections: what fastai keeps with hooks
        for layer in self.layers:
            if hasattr(layer, "uses_saved"):
                x = layer(x, saved)
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
    options = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    try:
        model = torchvision.models.get_model(arch, weights=None, **options)
    except RuntimeError:  # some compute their widths with tensors, which the meta device cannot
        with torch.device("cpu"):
            model = torchvision.models.get_model(arch, weights=None, **options)
    if n_in != 3:
        replace_first_conv(model, n_in)
    if cut is not None and not isinstance(cut, int):
        name, cut = cut
        model = model.get_submodule(name)
    children = list(model.children())
    if cut is None and arch.startswith("densenet"):
        cut = -1
    if cut is None:
        pools = [i for i, child in enumerate(children) if has_pool(child)]
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


def has_pool(module: nn.Module) -> bool:
    """True if `module` or one below it is a pooling layer, by the rule of fastai's `has_pool_type`."""
    return any(re.search(r"Pool[123]d$", type(m).__name__) for m in module.modules())


def activation_shapes(encoder: nn.Sequential, n_in: int, img_size: Sequence[int]) -> list[torch.Size]:
    """The shape of the activation after each child of `encoder`, for one image of `img_size` (height, width).

    Raises:
        ValueError: the children do not run one after the other, or not on images of `img_size`.
    """
    shapes = []
    x = torch.zeros(1, n_in, *img_size, device=next(encoder.parameters()).device)
    encoder.eval()
    for i, child in enumerate(encoder):
        try:
            with torch.no_grad():
                x = child(x)
            shapes.append(x.shape)
        except (RuntimeError, ValueError, TypeError, AttributeError) as e:
            message = f"child {i} of the encoder, {type(child).__name__}, cannot follow the one before: {e}"
            raise ValueError(message) from e
    encoder.train()
    return shapes


def activation(act_cls: str | Sequence) -> nn.Module:
    """The activation layer of `torch.nn` called `act_cls`, or made from `[name, keyword arguments]`."""
    name, options = (act_cls, {}) if isinstance(act_cls, str) else act_cls
    layer = getattr(nn, name, None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(f"torch.nn has no activation named {name!r}")
    return layer(**options)


def resize_to(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`, by nearest neighbour."""
    if x.shape[-2:] != like.shape[-2:]:
        x = F.interpolate(x, like.shape[-2:], mode="nearest")
    return x


def decode(logits: Tensor, activation: str | None = "softmax", threshold: float | None = None) -> Tensor:
    """The mask that `learn.predict` makes of `logits`: its loss function's `activation`, then its `decodes`.

    The activation stays in because rounding can make equal what was not: ties go to the first class.

    Args:
        logits: (N, n_classes, H, W) float.
        activation: one of `ACTIVATIONS`.
        threshold: None for the class of the highest value; a number, with one output channel, for class 1 above it.

    Returns:
        (N, H, W) uint8.
    """
    values = ACTIVATIONS[activation](logits)
    return (values.argmax(dim=1) if threshold is None else values[:, 0] > threshold).to(torch.uint8)
