"""fastai's `DynamicUnet` in pure PyTorch: the same parameter names, the same arithmetic, no fastai.

`DynamicUnetDIY(...).load_state_dict(learn.model.state_dict(), strict=True)` is the whole weight transfer. The layout
follows `fastai.vision.models.unet.DynamicUnet` step by step; where fastai keeps the encoder's activations with forward
hooks, this model walks the encoder and keeps them in a plain list, so that it can be scripted, exported and converted.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

NORM_TYPES = (None, "Batch", "BatchZero", "Weight", "Spectral", "Instance", "InstanceZero")


class ConvLayer(nn.Sequential):
    """Convolution, normalization, activation and, optionally, one `xtra` layer, in that order."""

    def __init__(self, ni, nf, ks=3, ndim=2, norm_type="Batch", act_cls="ReLU", bias=None, xtra=None):
        norm = {"Batch": f"BatchNorm{ndim}d", "Instance": f"InstanceNorm{ndim}d"}.get(
            (norm_type or "").removesuffix("Zero")
        )
        conv_cls = nn.Conv1d if ndim == 1 else nn.Conv2d
        conv = conv_cls(ni, nf, ks, padding=(ks - 1) // 2, bias=norm is None if bias is None else bias)
        if norm_type == "Weight":
            conv = weight_norm(conv)
        elif norm_type == "Spectral":
            conv = spectral_norm(conv)
        layers = [conv]
        if norm:
            layers.append(getattr(nn, norm)(nf, affine=True))
        if act_cls:
            layers.append(activation(act_cls))
        if xtra is not None:
            layers.append(xtra)
        super().__init__(*layers)


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
            ConvLayer(n_channels, nf, ks=1, ndim=1, norm_type="Spectral", act_cls=None, bias=False)
            for nf in (n_channels // 8, n_channels // 8, n_channels)
        )
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

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = resize_to(self.shuf(x), skip)
        return self.conv2(self.conv1(self.relu(torch.cat([x, self.bn(skip)], dim=1))))


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
    """U-Net on a torchvision encoder, equal to what fastai's `unet_learner` builds.

    Args:
        arch: name of a torchvision classification model, e.g. `"resnet34"`; its body becomes the encoder.
        n_classes: number of output channels.
        img_size: (height, width) in pixels that the U-Net was built for; any other size can be given to `forward`.
        n_in: number of input channels.
        cut: index of the encoder's first child to leave out; default: fastai's rule for `arch`.
        blur, blur_final, self_attention, y_range, last_cross, bottle: as in fastai's `DynamicUnet`.
        act_cls: name of an activation of `torch.nn`, or `[name, keyword arguments]`.
        norm_type: one of `NORM_TYPES`, the names of fastai's `NormType`.

    Raises:
        ValueError: `arch`, `act_cls` or `norm_type` is unknown, or `arch` has no body that can be cut.
    """

    def __init__(
        self,
        arch: str = "resnet34",
        n_classes: int = 32,
        img_size: Sequence[int] = (96, 128),
        *,
        n_in: int = 3,
        cut: int | None = None,
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
        encoder = create_body(arch, n_in, cut)
        sizes = activation_shapes(encoder, n_in, img_size)
        # fastai looks at the width alone: a skip connection leaves before each child that changes it.
        self.skips = [i for i in range(len(sizes) - 1) if sizes[i][-1] != sizes[i + 1][-1]]
        like = dict(norm_type=norm_type, act_cls=act_cls)

        ni = sizes[-1][1]
        middle_conv = nn.Sequential(ConvLayer(ni, ni * 2, **like), ConvLayer(ni * 2, ni, **like))
        layers = [encoder, nn.BatchNorm2d(ni), nn.ReLU(), middle_conv]
        for i, idx in enumerate(reversed(self.skips)):
            not_final = i != len(self.skips) - 1
            block = UnetBlock(
                ni,
                sizes[idx][1],
                final_div=not_final,
                blur=blur and (not_final or blur_final),
                self_attention=self_attention and i == len(self.skips) - 3,
                **like,
            )
            layers.append(block)
            ni = block.conv2[0].out_channels
        if tuple(img_size) != tuple(sizes[0][-2:]):
            layers.append(PixelShuffleICNR(ni, ni, **like))
        self.resize_at = len(layers)
        layers.append(nn.Identity())  # fastai's ResizeToOrig, done in forward
        if last_cross:
            layers.append(nn.Identity())  # fastai's MergeLayer, done in forward
            ni += n_in
            layers.append(ResBlock(ni, ni // 2 if bottle else ni, **like))
        layers.append(ConvLayer(ni, n_classes, ks=1, norm_type=norm_type, act_cls=None))
        if y_range is not None:
            layers.append(SigmoidRange(*y_range))
        self.last_cross = last_cross
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of an image batch: (N, n_in, H, W) float to (N, n_classes, H, W) float."""
        image = x
        skips: list[Tensor] = []
        for i, child in enumerate(self.layers[0]):
            x = child(x)
            if i in self.skips:
                skips.append(x)
        x = self.layers[3](self.layers[2](self.layers[1](x)))
        for block in self.layers[4 : 4 + len(self.skips)]:
            x = block(x, skips.pop())
        for layer in self.layers[4 + len(self.skips) : self.resize_at]:
            x = layer(x)
        x = resize_to(x, image)
        if self.last_cross:
            x = torch.cat([x, image], dim=1)
        for layer in self.layers[self.resize_at :]:
            x = layer(x)
        return x


def create_body(arch: str, n_in: int = 3, cut: int | None = None) -> nn.Sequential:
    """The children of torchvision model `arch` up to its head, cut where fastai's `create_body` cuts.

    Raises:
        ValueError: torchvision has no such model, or it has no pooling layer to cut at.
    """
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no classification model named {arch!r}")
    model = torchvision.models.get_model(arch, weights=None)
    if n_in != 3:
        parent, first = first_conv(model)
        conv = getattr(parent, first)
        same = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        new = nn.Conv2d(n_in, bias=conv.bias is not None, **{k: getattr(conv, k) for k in same})
        setattr(parent, first, new)
    children = list(model.children())
    if cut is None and arch.startswith("densenet"):
        cut = -1
    if cut is None:
        pools = [i for i, child in enumerate(children) if has_pool(child)]
        if not pools:
            raise ValueError(f"{arch!r} has no pooling layer before its head, where fastai would cut it")
        cut = pools[-1]
    return nn.Sequential(*children[:cut])


def has_pool(module: nn.Module) -> bool:
    """True if `module` or one below it is a pooling layer, by the rule of fastai's `has_pool_type`."""
    return any(re.search(r"Pool[123]d$", type(m).__name__) for m in module.modules())


def first_conv(model: nn.Module) -> tuple[nn.Module, str]:
    """The parent of the model's first layer and the layer's name in it."""
    path = next(iter(dict(model.named_parameters()))).rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def activation_shapes(encoder: nn.Sequential, n_in: int, img_size: Sequence[int]) -> list[torch.Size]:
    """The shape of the activation after each child of `encoder`, for one image of `img_size` (height, width)."""
    shapes = []
    training = encoder.training
    with torch.no_grad():
        x = torch.zeros(1, n_in, *img_size)
        for child in encoder.eval():
            x = child(x)
            shapes.append(x.shape)
    encoder.train(training)
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
