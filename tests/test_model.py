"""DynamicUnetDIY against fastai's DynamicUnet, bit for bit. `python tests/test_model.py` writes the table anew."""

import inspect
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from deployment.model import DynamicUnetDIY  # noqa: E402

README = ROOT / "deployment" / "README.md"
HEADER = ["| architecture | options | built for | classes | logits bit-equal |", "|---|---|---|---|---|"]
SIZE = (32, 48)

# architecture, options, image size, classes
CASES = [
    *[
        (arch, {}, SIZE, 32)
        for arch in """
        resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2
        vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
        densenet121 squeezenet1_0 squeezenet1_1
        regnet_x_400mf regnet_x_800mf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf
        efficientnet_b0
        googlenet mobilenet_v3_small shufflenet_v2_x1_0 convnext_tiny swin_t
        """.split()
    ],
    # wide ones, whose last ResBlock would take long
    *[
        (arch, {"last_cross": False}, SIZE, 32)
        for arch in """
        densenet161 densenet169 densenet201 efficientnet_b1 efficientnet_b4 efficientnet_v2_s mobilenet_v3_large
        regnet_x_3_2gf convnext_base
        """.split()
    ],
    ("alexnet", {}, (64, 96), 32),
    ("inception_v3", {"last_cross": False}, (96, 128), 32),
    ("vgg11_bn", {"cut": ["features", 28]}, SIZE, 11),
    ("vgg16", {"cut": ["features", 30], "self_attention": True}, (48, 80), 11),
    ("densenet121", {"cut": ["features", 11]}, SIZE, 11),
    ("squeezenet1_1", {"cut": ["features", 13]}, SIZE, 11),
    ("mobilenet_v2", {"cut": ["features", 18]}, SIZE, 11),
    ("mnasnet0_5", {"cut": ["layers", 14]}, SIZE, 11),
    ("efficientnet_b0", {"cut": ["features", 8], "blur": True}, SIZE, 11),
    ("mobilenet_v3_small", {"cut": ["features", 12], "act_cls": "Hardswish"}, (61, 83), 11),
    ("resnet18", {"cut": 7}, SIZE, 12),
    ("resnet18", {"cut": 5}, (97, 61), 12),
    ("resnet18", {}, (96, 128), 1),
    ("resnet18", {}, (63, 95), 2),
    ("resnet18", {}, (101, 37), 12),
    ("resnet18", {}, (70, 110), 256),
    ("resnet18", {}, (17, 33), 12),
    ("resnet34", {}, (90, 120), 12),
    ("resnet50", {"self_attention": True, "blur": True}, (57, 71), 12),
    ("resnet18", {"blur": True}, SIZE, 12),
    ("resnet18", {"blur": True, "blur_final": False}, SIZE, 12),
    ("resnet18", {"self_attention": True}, SIZE, 12),
    ("resnet34", {"self_attention": True}, (75, 99), 12),
    ("resnet18", {"y_range": [-1.5, 2.0]}, SIZE, 1),
    ("resnet18", {"last_cross": False}, SIZE, 12),
    ("resnet18", {"act_cls": "Mish"}, SIZE, 12),
    ("resnet18", {"act_cls": "SiLU"}, SIZE, 12),
    ("resnet18", {"act_cls": ["LeakyReLU", {"negative_slope": 0.1}]}, SIZE, 12),
    ("resnet18", {"act_cls": "GELU"}, SIZE, 12),
    *[("resnet18", {"norm_type": norm}, SIZE, 12) for norm in ("Batch", "BatchZero", "Weight", "Spectral", "Instance")],
    ("resnet18", {"norm_type": "InstanceZero", "act_cls": "ELU"}, SIZE, 12),
    ("resnet18", {"norm_type": "Weight", "self_attention": True, "blur": True}, (63, 95), 12),
    ("resnet18", {"norm_type": "Spectral", "self_attention": True, "last_cross": False}, (63, 95), 12),
    ("resnet18", {"norm_type": "Batch", "act_cls": "Mish", "y_range": [0.0, 1.0]}, (66, 98), 1),
    ("resnet18", {"n_in": 1}, SIZE, 12),
    ("resnet18", {"n_in": 4}, SIZE, 12),
    ("resnet18", {"n_in": 7, "norm_type": "Weight"}, (63, 95), 12),
    ("densenet121", {"n_in": 1}, (80, 48), 12),
    ("vgg11_bn", {"n_in": 2, "self_attention": True}, (50, 70), 12),
    ("regnet_y_400mf", {"blur": True, "self_attention": True, "norm_type": "Batch"}, (91, 61), 12),
]


def fastai_unet(arch: str, options: dict, img_size: tuple[int, int], n_classes: int) -> nn.Module:
    """What fastai's `unet_learner` builds, in evaluation mode, with random numbers in every tensor."""
    from fastai.layers import NormType
    from fastai.vision.learner import create_unet_model

    options = dict(options)
    if options.get("norm_type"):
        options["norm_type"] = NormType[options["norm_type"]]
    if "act_cls" in options:
        name, arguments = options["act_cls"] if isinstance(options["act_cls"], list) else (options["act_cls"], {})
        options["act_cls"] = partial(getattr(nn, name), **arguments)
    if isinstance(options.get("cut"), list):
        part, n = options["cut"]
        options["cut"] = lambda model: nn.Sequential(*list(getattr(model, part).children())[:n])
    builder = getattr(torchvision.models, arch)
    if arch in ("googlenet", "inception_v3"):  # fastai can only cut them without their auxiliary heads
        plain = partial(builder, aux_logits=False, init_weights=False)

        def builder(pretrained):
            return plain()

    build = partial(create_unet_model, builder, n_classes, img_size, pretrained=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the argument `pretrained`
        # Without memory until `fill`, but for architectures that compute widths or buffers with tensors.
        place = torch.device("cpu" if arch.startswith(("regnet", "swin")) else "meta")
        with place, mock.patch.object(nn.init, "trunc_normal_"):  # slow, and overwritten anyway
            model = build()
    fill(model)
    return model.eval()


NOISE = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
POOLS: dict[int, torch.Tensor] = {}  # exponent → noise of standard deviation 2 ** exponent


def noise(shape: torch.Size) -> torch.Tensor:
    """Normal noise for a weight of `shape`, scaled by its fan-in. Weights share memory: a big U-Net has 400 million."""
    n = shape.numel()
    exponent = round(-0.5 * math.log2(n / shape[0]))
    if exponent not in POOLS or len(POOLS[exponent]) < n:
        POOLS[exponent] = NOISE.repeat(math.ceil(n / len(NOISE))).mul_(2.0**exponent)
    return POOLS[exponent][:n].view(shape)


def fill(model: nn.Module) -> None:
    """Put random numbers of a sensible scale into all parameters and buffers of `model`."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                value = noise(p.shape) if p.ndim > 1 else NOISE[: p.numel()] * 0.2
                if name == "weight_g" or name == "weight" and p.ndim == 1:
                    value = value.abs() + 0.5
                module._parameters[name] = nn.Parameter(value.reshape(p.shape), requires_grad=False)
        for name, b in module._buffers.items():
            if b is None:
                continue
            if name == "num_batches_tracked":
                module._buffers[name] = torch.tensor(7)
            elif name in ("running_mean", "running_var", "weight_u", "weight_v"):
                value = NOISE[: b.numel()] / math.sqrt(b.numel() if name.startswith("weight") else 100)
                module._buffers[name] = value.abs() + 0.5 if name == "running_var" else value
            elif b.is_meta:
                raise AssertionError(f"no values for the buffer {name} of {type(module).__name__}")


def copy_of(model: nn.Module, arch: str, options: dict, img_size: tuple[int, int], n_classes: int) -> DynamicUnetDIY:
    """The `DynamicUnetDIY` that shares the tensors of fastai's `model`, in evaluation mode."""
    with torch.device("meta"):
        copy = DynamicUnetDIY(arch, n_classes, img_size, **options)
    copy.load_state_dict(model.state_dict(), strict=True, assign=True)
    return copy.eval()


@torch.inference_mode()
def bit_equal(model: nn.Module, copy: DynamicUnetDIY, shape: tuple[int, ...]) -> bool:
    """Whether both give the same logits, bit for bit, for a random batch of `shape`, and no constant or NaN."""
    from fastai.torch_core import TensorImage

    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs = model(TensorImage(x.clone())).as_subclass(torch.Tensor)
    ours = copy(x)
    assert theirs.isfinite().all() and theirs.std() > 0
    return torch.equal(theirs, ours)


def row(arch: str, options: dict, img_size: tuple[int, int], n_classes: int) -> str:
    """The line of the parity table for one case, after building and running both models."""
    model = fastai_unet(arch, options, img_size, n_classes)
    copy = copy_of(model, arch, options, img_size, n_classes)
    equal = bit_equal(model, copy, (1, options.get("n_in", 3), *img_size))
    told = ", ".join(f"`{k}={v!r}`" for k, v in options.items()) or "defaults"
    return f"| {arch} | {told} | {img_size[0]} × {img_size[1]} | {n_classes} | {'yes' if equal else 'no'} |"


def table() -> list[str]:
    """The lines of the parity table in deployment/README.md."""
    lines = README.read_text().splitlines()
    begin = lines.index(HEADER[0])
    end = next(i for i in range(begin, len(lines) + 1) if i == len(lines) or not lines[i].startswith("|"))
    return lines[begin:end]


def first_of_their_kind() -> set[int]:
    """The numbers of the cases that bring something that no case before has: an option, a norm or a family of encoders.

    A family is a module of torchvision. Cases with resnet18, which is small, come first.
    """
    chosen, met = set(), set()
    for i in sorted(range(len(CASES)), key=lambda i: CASES[i][0] != "resnet18"):
        arch, options = CASES[i][:2]
        brings = {getattr(torchvision.models, arch).__module__, *options, options.get("norm_type")}
        if brings - met:
            chosen.add(i)
        met |= brings
    return chosen


DEFAULT = first_of_their_kind()  # the others run with `pytest -m tasks`, and when the table is written


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(i, id=f"{case[0]}-{i}", marks=[] if i in DEFAULT else pytest.mark.tasks)
        for i, case in enumerate(CASES)
    ],
)
def test_table_row_is_what_the_models_give(case):
    line = row(*CASES[case])
    assert line.endswith("| yes |")
    assert table()[2:][case] == line, "run `python tests/test_model.py` to write the table anew"


def test_table_is_complete():
    assert table()[:2] == HEADER
    assert len(table()) - 2 == len(CASES) >= 60


SIDE = st.integers(5, 90)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "cut": st.integers(4, 7),
        "n_in": st.integers(1, 5),
        "blur": st.booleans(),
        "blur_final": st.booleans(),
        "self_attention": st.booleans(),
        "y_range": st.sampled_from([[0.0, 1.0], [-2.5, 7.25]]),
        "last_cross": st.booleans(),
        "act_cls": st.sampled_from(["ReLU", "Mish", "GELU", "Hardswish", ["LeakyReLU", {"negative_slope": 0.3}]]),
        "norm_type": st.sampled_from([None, "Batch", "BatchZero", "Weight", "Spectral", "Instance", "InstanceZero"]),
    },
)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["resnet18", "resnet34"]), OPTIONS, st.tuples(SIDE, SIDE), st.integers(1, 40))
def test_any_combination_is_bit_equal(arch, options, img_size, n_classes):
    options = {"cut": 6} | options  # the whole body adds nothing but time here
    try:
        model = fastai_unet(arch, options, img_size, n_classes)
        shape = (2, options.get("n_in", 3), *img_size)
        with torch.inference_mode():
            model(torch.zeros(shape))
    except (ValueError, RuntimeError, ZeroDivisionError):  # what fastai cannot build or run, we need not
        assume(False)
    assert bit_equal(model, copy_of(model, arch, options, img_size, n_classes), shape)


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (128, 70), (45, 160)])
def test_photos_of_other_sizes_than_built_for(size):
    case = ("resnet18", {"cut": 7, "blur": True}, SIZE, 5)
    model = fastai_unet(*case)
    assert bit_equal(model, copy_of(model, *case), (2, 3, *size))


def test_loads_fastai_weights_strictly_without_the_meta_device():
    case = ("resnet18", {"cut": 6, "norm_type": "Spectral"}, SIZE, 5)
    model = fastai_unet(*case)
    copy = DynamicUnetDIY(case[0], 5, SIZE, **case[1])
    copy.load_state_dict(model.state_dict(), strict=True)
    assert bit_equal(model, copy.eval(), (1, 3, *SIZE))


def test_weight_norm_starts_like_torch():
    copy = DynamicUnetDIY("resnet18", 5, SIZE, cut=5, norm_type="Weight")
    conv = copy.layers[3][0][0]
    norm = conv.weight_v.flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.weight_g.flatten(), norm)


def test_defaults_are_fastais():
    from fastai.vision.learner import create_unet_model
    from fastai.vision.models.unet import DynamicUnet

    theirs = inspect.signature(DynamicUnet.__init__).parameters | inspect.signature(create_unet_model).parameters
    for name, parameter in inspect.signature(DynamicUnetDIY).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name != "act_cls":
            assert theirs[name].default == parameter.default, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet35"}, "no classification model named 'resnet35'"),
        ({"arch": "mobilenet_v2"}, "no pooling layer"),
        ({"arch": "vit_b_16"}, "no pooling layer"),
        ({"arch": "mnasnet1_0"}, "no pooling layer"),
        ({"arch": "maxvit_t"}, "cannot follow the one before"),
        ({"norm_type": "Layer"}, "unknown norm_type 'Layer'"),
        ({"act_cls": "Relu"}, "no activation named 'Relu'"),
        ({"arch": "alexnet", "img_size": (16, 16)}, "cannot follow"),
    ],
)
def test_refuses_clearly(arguments, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        DynamicUnetDIY(**arguments)


@pytest.fixture(scope="module", params=[{}, {"self_attention": True}], ids=["defaults", "self_attention"])
def unet(request):
    model = fastai_unet("resnet18", request.param, SIZE, 12)
    return copy_of(model, "resnet18", request.param, SIZE, 12)


@pytest.fixture(scope="module")
def x():
    return torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))


def test_exports(unet, x):
    with torch.no_grad():
        assert torch.equal(torch.export.export(unet, (x,)).module()(x), unet(x))


@torch.inference_mode()
def test_compiles(unet, x):
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), unet(x), rtol=1e-3, atol=1e-3)


def test_converts_to_onnx_and_openvino(unet, x, tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        expected = unet(x)
        torch.onnx.export(unet, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        direct = openvino.convert_model(torch.export.export(unet, (x,)))
    for model in (openvino.Core().read_model(tmp_path / "model.onnx"), direct):
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        (found,) = openvino.compile_model(model, "CPU", exact)(x.numpy()).values()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    text = README.read_text()
    rows = []
    for number, case in enumerate(CASES, 1):
        rows.append(row(*case))
        print(f"{number:3}/{len(CASES)} {rows[-1]}", flush=True)
    README.write_text(text.replace("\n".join(table()), "\n".join(HEADER + rows)))
