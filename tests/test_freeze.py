"""Frozen models give the results of the models they were made from, and leave those alone."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from somebody import CBR
from torch import Tensor, nn

import espkernels
from espkernels import models
from espkernels.frozen import FrozenConvolution, FrozenDownSampler, FrozenEESP
from espkernels.models import plain
from espkernels.models.pyramid_pooling import EfficientPyramidPooling


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with the statistics, affines and slopes that training would leave, none of them the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.running_mean, -0.2, 0.2),
                (part.running_var, 0.5, 1.5),
                (part.weight.data, 0.5, 1.5),
                (part.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))
        elif isinstance(part, nn.PReLU):
            part.weight.data.uniform_(-0.1, 0.6, generator=generator)
    return module


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def assert_same(frozen: Tensor, expected: Tensor, tolerance: float) -> None:
    assert frozen.shape == expected.shape
    assert (frozen.double() - expected).abs().max() <= tolerance * expected.abs().max()


UNITS = {
    "residual": (plain.EESP, dict(in_channels=16, out_channels=16, r_lim=9)),
    "expanding": (plain.EESP, dict(in_channels=8, out_channels=32, r_lim=7)),
    "strided esp": (plain.EESP, dict(in_channels=16, out_channels=32, stride=2, r_lim=13)),
    "strided avg": (plain.EESP, dict(in_channels=16, out_channels=32, stride=2, r_lim=13, down_method="avg")),
    "three branches": (plain.EESP, dict(in_channels=18, out_channels=18, k=3, r_lim=7)),
    "no fusion": (plain.EESP, dict(in_channels=16, out_channels=16, hff=False)),
    "down-sampler": (plain.DownSampler, dict(in_channels=16, out_channels=48, r_lim=11)),
    "down-sampler without shortcut": (plain.DownSampler, dict(in_channels=16, out_channels=48, reinf=False)),
}


def layer_by_layer(frozen: nn.Module, *inputs: Tensor) -> Tensor:
    """What its own forward gives, without a replay."""
    result: Tensor = type(frozen).__mro__[2].forward(frozen, *inputs)  # type: ignore[attr-defined]
    return result


def packed_units(frozen: nn.Module) -> list[FrozenEESP]:
    """The units with a pack of their own; convolutions inside have others."""
    return [part for part in frozen.modules() if isinstance(part, FrozenEESP)]


@pytest.mark.parametrize("name", UNITS)
def test_units_in_float64(name: str) -> None:
    kind, arguments = UNITS[name]
    unit = trained(kind(**arguments)).double().eval()
    frozen = espkernels.freeze(unit)
    assert isinstance(frozen, (FrozenEESP, FrozenDownSampler))
    x = image(2, arguments["in_channels"], 11, 14)
    assert_same(frozen(x), unit(x), 1e-13)
    if kind is plain.DownSampler and arguments.get("reinf", True):
        photograph = image(2, 3, 41, 55)
        assert_same(frozen(x, photograph), unit(x, photograph), 1e-13)


def test_convolution_blocks() -> None:
    block = trained(nn.Sequential(nn.Conv2d(6, 9, 3, 2, 1), nn.BatchNorm2d(9), nn.PReLU())).double().eval()
    frozen = espkernels.freeze(block)
    assert [type(part) for part in frozen] == [FrozenConvolution, nn.Identity, nn.Identity]
    x = image(2, 6, 9, 7)
    assert_same(frozen(x), block(x), 1e-13)


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [nn.Conv2d(6, 9, 1, padding=1)],
        lambda: [nn.Conv2d(6, 9, 1, padding=1), nn.BatchNorm2d(9)],
        lambda: [nn.Conv2d(6, 9, 3, padding=1), nn.PReLU()],
    ],
    ids=["padded", "padded, with a norm", "one slope"],
)
def test_padded_products_and_slopes_alone(parts: Any) -> None:
    block = trained(nn.Sequential(*parts())).double().eval()
    x = image(2, 6, 9, 7)
    frozen = espkernels.freeze(block)
    assert frozen(x).shape == block(x).shape
    assert_same(frozen(x), block(x), 1e-13)


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_that_do_not_pad_with_zeros(size: int) -> None:
    conv = nn.Conv2d(6, 9, size, padding=1, padding_mode="reflect")
    x = image(2, 6, 9, 7)
    for following in ([], [nn.BatchNorm2d(9)], [nn.BatchNorm2d(9), nn.PReLU(9)]):
        block = trained(nn.Sequential(conv, *following)).double().eval()
        assert_same(espkernels.freeze(block)(x), block(x), 1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_whole_classification_network(dtype: torch.dtype, tolerance: float) -> None:
    network = trained(models.espnetv2(0.5, num_classes=10, plain=True)).double().eval()
    x = image(2, 3, 65, 97)
    with torch.no_grad():
        expected = network(x)
        frozen = espkernels.freeze(copy.deepcopy(network).to(dtype))
        assert_same(frozen(x.to(dtype)), expected, tolerance)


def test_whole_segmentation_network() -> None:
    network = trained(models.espnetv2_segmentation(0.5, 5, plain=True)).double().eval()
    x = image(1, 3, 70, 54)
    with torch.no_grad():
        assert_same(espkernels.freeze(network)(x), network(x), 1e-12)


def test_the_model_is_left_alone() -> None:
    network = models.espnetv2(0.5, num_classes=10, plain=True).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kinds = [type(part) for part in network.modules()]
    frozen = espkernels.freeze(network)
    frozen(image(1, 3, 64, 64, dtype=torch.float32))
    assert network.training and not frozen.training
    assert kinds == [type(part) for part in network.modules()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_every_layer_is_frozen() -> None:
    frozen = espkernels.freeze(models.espnetv2(0.5, plain=True))
    assert not any(isinstance(part, (nn.BatchNorm2d, nn.PReLU, nn.Conv2d)) for part in frozen.modules())


class Halved(espkernels.nn.EESP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class PlainHalved(plain.EESP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class HalfInside(espkernels.nn.EESP):
    """Another forward by a method that ours calls."""

    def _reduce(self, x: Tensor) -> Tensor:
        return 0.5 * super()._reduce(x)


class Raised(espkernels.nn.CBR):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class PlainDoubledImage(plain.DownSampler):
    """Another forward, which only a call with an image shows."""

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        return super().forward(x, None if image is None else 2 * image)


class Doubled(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.part(x)


def with_a_forward_of_its_own() -> nn.Module:
    unit = plain.EESP(16, 16)
    unit.forward = types.MethodType(lambda self, x: 0.5 * plain.EESP.forward(self, x), unit)  # type: ignore
    return unit


def with_part(block: nn.Module, name: str, part: nn.Module) -> nn.Module:
    block.set_submodule(name, part)
    return block


# Layers with the parts of ours, or almost, that are something else.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "unit": lambda: Halved(16, 16),
    "plain unit": lambda: PlainHalved(16, 16),
    "unit by another method": lambda: HalfInside(16, 16),
    "unit with a forward of its own": with_a_forward_of_its_own,
    "unit ending with ReLU": lambda: with_part(plain.EESP(16, 16), "module_act", nn.ReLU()),
    "unit without a norm": lambda: with_part(plain.EESP(16, 16), "conv_1x1_exp.bn", nn.Identity()),
    "unit with a bias": lambda: with_part(plain.EESP(16, 16), "conv_1x1_exp.conv", nn.Conv2d(16, 16, 1, groups=4)),
    "convolution": lambda: Raised(16, 16, 3),
    "convolution with ReLU": lambda: with_part(plain.CBR(16, 16, 3), "act", nn.ReLU()),
    "down-sampler": lambda: PlainDoubledImage(16, 48),
    "down-sampler of another pooling": lambda: with_part(
        plain.DownSampler(16, 48), "avg", nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    "down-sampler of another unit": lambda: with_part(
        espkernels.nn.DownSampler(16, 48), "eesp", PlainHalved(16, 32, 2, down_method="avg")
    ),
    "pyramid pooling": lambda: with_part(
        EfficientPyramidPooling(16, 4, 8), "merge_layer.3", Doubled(nn.Conv2d(4, 8, 1))
    ),
}


@pytest.mark.parametrize("name", OTHERS, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_layers_that_only_look_like_ours_stay(name: str) -> None:
    layer = trained(OTHERS[name]()).double().eval()
    x, photograph = image(2, 16, 11, 14), image(2, 3, 41, 55)
    frozen = espkernels.freeze(nn.Sequential(layer))[0]
    for inputs in ((x,), (x, photograph)) if "down-sampler" in name else ((x,),):
        assert_same(frozen(*inputs), layer(*inputs), 1e-13)


def test_running_statistics_are_needed() -> None:
    unit = plain.EESP(16, 16)
    unit.br_after_cat.bn = nn.BatchNorm2d(16, track_running_stats=False)
    frozen = espkernels.freeze(unit)
    assert not isinstance(frozen, FrozenEESP)


def test_saved_copied_and_converted() -> None:
    network = trained(models.espnetv2(0.5, num_classes=10)).eval()
    frozen = espkernels.freeze(network)
    x = image(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        expected = frozen(x)
        assert torch.equal(copy.deepcopy(frozen)(x), expected)

        memory = io.BytesIO()
        torch.save(frozen.state_dict(), memory)
        memory.seek(0)
        other = espkernels.freeze(trained(models.espnetv2(0.5, num_classes=10), seed=5))
        assert not torch.equal(other(x), expected)
        other.load_state_dict(torch.load(memory, weights_only=True))
        assert torch.equal(other(x), expected)  # packs follow the loaded weights

        assert_same(copy.deepcopy(frozen).double()(x.double()), network.double()(x.double()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_types_after_freezing(dtype: torch.dtype) -> None:
    network = trained(nn.Sequential(plain.CBR(3, 16, 3), plain.EESP(16, 16), nn.BatchNorm2d(16))).eval()
    x = image(1, 3, 9, 11, dtype=dtype)
    frozen = espkernels.freeze(network)
    whole = {name: buffer.clone() for name, buffer in frozen.named_buffers() if buffer.dim() == 1}
    frozen.to(dtype)
    vectors = {name: buffer for name, buffer in frozen.named_buffers() if buffer.dtype == torch.float32}
    assert vectors.keys() == whole.keys() and all(torch.equal(vectors[name], whole[name]) for name in whole)
    # Weights, the reduced map and the results of the three layers are rounded, by half an epsilon each.
    assert_same(frozen(x), network.double()(x.double()), 4 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_one_image_without_a_batch() -> None:
    block = nn.Sequential(nn.Conv2d(6, 9, 1)).double().eval()
    x = image(6, 9, 7)
    assert_same(espkernels.freeze(block)(x), block(x), 1e-13)


class Walking(nn.Module):
    def __init__(self, parts: Callable[[nn.Sequential], Iterable[nn.Module]]) -> None:
        super().__init__()
        self.convolution = nn.Sequential(nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9), nn.PReLU(9))
        self.affine = nn.Sequential(nn.BatchNorm2d(9), nn.PReLU(9))
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.parts(self.convolution), *self.parts(self.affine)):
            x = part(x)
        return x


@pytest.mark.parametrize(
    "parts",
    [iter, nn.Module.children, lambda chain: [part for _, part in chain.named_children()],
     lambda chain: chain._modules.values(), lambda chain: [chain[place] for place in range(len(chain))],
     lambda chain: (chain[:1], chain[1:])],
    ids=["iter", "children", "named_children", "modules", "places", "slices"],
)  # fmt: skip
@torch.no_grad()
def test_models_that_walk_through_a_folded_sequence(parts: Any) -> None:
    model = trained(Walking(parts)).double().eval()
    frozen, x = espkernels.freeze(model), image(2, 6, 9, 7)
    assert isinstance(frozen.convolution[0], FrozenConvolution)
    assert_same(frozen(x), model(x), 1e-13)


class Clamped(CBR):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class Optional(CBR):
    def forward(self, x: Tensor, activate: bool = True) -> Tensor:
        y = self.bn(self.conv(x))
        return self.act(y) if activate else y


@pytest.mark.parametrize("kind", [Clamped, Optional])
@torch.no_grad()
def test_blocks_that_do_more_than_their_parts_stay(kind: type[CBR]) -> None:
    model = trained(nn.Sequential(kind(3, 9, 3))).double().eval()
    frozen, x = espkernels.freeze(model), 255 * image(2, 3, 9, 7)
    assert type(frozen[0]) is kind
    assert_same(frozen(x), model(x), 1e-13)


@pytest.mark.parametrize("build", [models.espnetv2, models.espnetv2_segmentation], ids=["classifier", "segmentation"])
def test_frozen_networks_under_autocast(build: Any) -> None:
    network = trained(build(0.5, num_classes=5)).eval()
    frozen, x = espkernels.freeze(network), image(1, 3, 64, 96).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = network(x), frozen(x)
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, 32, 32), r"image: shape \(3, 32, 32\), expected \[B, C, H, W\]"),
        (torch.zeros(1, 4, 32, 32), r"x: shape \(1, 4, 32, 32\), expected \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "x: dtype torch.float64, expected torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "x: dtype torch.int64, expected torch.float32"),
    ],
)
@torch.no_grad()
def test_images_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        espkernels.freeze(models.espnetv2(0.5, num_classes=5).eval())(x)


@torch.no_grad()
def test_results_lie_where_their_input_does() -> None:
    frozen: Any = espkernels.freeze(trained(models.espnetv2(0.5, num_classes=5)).eval())
    x = image(1, 3, 32, 32).float()
    expected = frozen(x)
    with torch.device("meta"):
        assert torch.equal(frozen(x), expected)


def test_names_of_the_users() -> None:
    class Named(nn.Sequential):
        def classes(self) -> list[str]:
            return ["cat", "dog"]

    assert espkernels.freeze(Named(nn.PReLU(3))).classes() == ["cat", "dog"]
    model = nn.Sequential(nn.PReLU(3))
    model.plans = [1]
    with pytest.raises(ValueError, match="Sequential has an attribute 'plans'"):
        espkernels.freeze(model)


@torch.no_grad()
def test_export_with_the_names_of_the_inputs() -> None:
    frozen: Any = espkernels.freeze(trained(models.espnetv2(0.5, num_classes=5)).eval())
    x = image(2, 3, 32, 32).float()
    names = list(inspect.signature(frozen.forward).parameters)
    assert names == list(inspect.signature(models.espnetv2(0.5).forward).parameters)
    program = torch.export.export(frozen, (x,), dynamic_shapes={names[0]: {0: torch.export.Dim("images")}})
    assert_same(program.module()(x[:1].repeat(3, 1, 1, 1)), frozen(x[:1].repeat(3, 1, 1, 1)), 1e-5)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_models_that_look_at_the_bias_of_a_linear_layer(bias: bool) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, bias=bias, dtype=torch.float64).eval()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same(espkernels.freeze(model)(x), model(x), 1e-13)


def test_an_image_for_a_down_sampler_without_shortcut() -> None:
    unit = espkernels.nn.DownSampler(16, 48, reinf=False).double().eval()
    inputs = image(1, 16, 8, 8), image(1, 3, 32, 32)
    for module in (unit, espkernels.freeze(unit)):
        with pytest.raises(ValueError, match=r"image: shape \(1, 3, 32, 32\), expected None"):
            module(*inputs)


def test_packs_follow_the_instruction_set() -> None:
    library = espkernels.backends.library
    if library is None:
        pytest.skip("the compiled library is not there")
    unit = trained(plain.EESP(64, 64)).eval()
    x = image(1, 64, 9, 9, dtype=torch.float32)
    before = library.isa()
    with torch.no_grad():
        expected = unit.double()(x.double())
        frozen = espkernels.freeze(unit.float())
        try:
            for isa in library.available_isas():
                library.set_isa(isa)
                assert_same(frozen(x), expected, 5e-6)
        finally:
            library.set_isa(before)


@pytest.mark.parametrize("name", ["residual", "strided avg", "three branches", "down-sampler"])
@torch.no_grad()
def test_units_use_their_packs(name: str) -> None:
    if espkernels.backends.library is None:
        pytest.skip("the compiled library is not there")
    kind, arguments = UNITS[name]
    one, other = (espkernels.freeze(trained(kind(**arguments), seed).eval()) for seed in (0, 1))
    inputs = [image(2, arguments["in_channels"], 11, 14, dtype=torch.float32)]
    if kind is plain.DownSampler:
        inputs.append(image(2, 3, 41, 55, dtype=torch.float32))
    expected = layer_by_layer(one, *inputs)
    (unit,), (another,) = packed_units(one), packed_units(other)
    unit.packed = None
    assert torch.equal(layer_by_layer(one, *inputs), expected)  # prepared in the call, to the same bits
    unit.packed = another.packed
    assert not torch.equal(layer_by_layer(one, *inputs), expected)  # the pack's weights, not the buffers
    one.load_state_dict(one.state_dict())
    assert torch.equal(layer_by_layer(one, *inputs), expected)
    one.load_state_dict(other.state_dict())
    assert torch.equal(layer_by_layer(one, *inputs), layer_by_layer(other, *inputs))
    assert another.packed is not None
    unit.packed = torch.zeros_like(another.packed)  # of no machine: not used
    assert torch.equal(layer_by_layer(one, *inputs), layer_by_layer(other, *inputs))


@torch.no_grad()
def test_packs_are_made_where_a_copy_is_not_stored_with_it() -> None:
    if espkernels.backends.library is None:
        pytest.skip("the compiled library is not there")
    unit = espkernels.freeze(trained(plain.EESP(64, 64)).eval())
    x = image(1, 64, 9, 9, dtype=torch.float32)
    for made in (pickle.loads(pickle.dumps(unit)), copy.deepcopy(unit)):
        (packed,) = packed_units(made)
        packed.expand_weight.zero_()  # an edit in place, which no pack follows
        assert torch.equal(layer_by_layer(made, x), layer_by_layer(unit, x))
    weights = sum(tensor.numel() * tensor.itemsize for tensor in unit.state_dict().values())
    assert len(pickle.dumps(unit)) < 1.2 * weights + 10_000


def test_gradients_reach_the_input() -> None:
    unit = trained(plain.EESP(16, 16)).double().eval()
    x = image(2, 16, 7, 5)
    expected, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = image(2, 16, 7, 5)
    (unit(expected) * weight).sum().backward()
    (espkernels.freeze(unit)(given) * weight).sum().backward()
    assert given.grad is not None and expected.grad is not None
    assert_same(given.grad, expected.grad, 1e-12)


def test_reference_backend() -> None:
    unit = trained(plain.EESP(16, 16)).double().eval()
    x = image(2, 16, 7, 5)
    frozen = espkernels.freeze(unit)
    with espkernels.use_backend("reference"):
        assert_same(frozen(x), unit(x), 1e-13)


def test_hooks_of_gradients_are_called() -> None:
    network = nn.Sequential(trained(plain.EESP(16, 16)), trained(plain.CBR(16, 16, 3))).double().eval()
    calls: list[str] = []
    network[0].register_full_backward_hook(lambda *_: calls.append("behind the unit"))
    network[1].bn.register_full_backward_pre_hook(lambda *_: calls.append("before the norm"))
    given = image(2, 16, 7, 5).requires_grad_()
    network(given).sum().backward()
    expected, given.grad = given.grad, None
    espkernels.freeze(network)(given).sum().backward()
    assert calls == ["before the norm", "behind the unit"] * 2
    assert given.grad is not None and expected is not None
    assert_same(given.grad, expected, 1e-12)
