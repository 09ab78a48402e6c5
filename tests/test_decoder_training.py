"""What a decoder trains with: resizing, averaging, convolutions in many groups, and pyramid pooling of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_within_rounding
from layer_results import pixels, randomised, results
from operator_tests import DTYPES, LAYOUTS
from somebody_segmentation import Mix, Pooling, Weighting
from torch import Tensor, nn

import espkernels
from espkernels import backends, fused_pooling, inference, models, ops, single_layers
from espkernels import nn as fused
from espkernels.models.pyramid_pooling import EfficientPyramidPooling, FusedPyramidPooling
from espkernels.models.pyramid_pooling import resized as models_resized

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.usefixtures("poison", "same_each_time"),
]

Function = Callable[..., Tensor]


# --- operators --------------------------------------------------------------------------------------------------------

# Enlarging and reducing, to one pixel and from one; channels below, at and above a vector and a block of them.
RESAMPLED = [
    (1, (1, 1), (1, 1)), (1, (31, 9), (20, 17)), (3, (1, 4), (5, 1)), (10, (6, 9), (12, 18)), (16, (5, 7), (8, 11)),
    (37, (9, 8), (3, 5)), (8, (13, 2), (2, 13)), (2, (40, 33), (5, 70)),
]  # fmt: skip

# Groups, inputs and outputs of each, rows, columns; beyond a panel, a vector of groups, and maps below the filter.
GROUPED = [
    (8, 1, 1, 6, 5), (16, 8, 3, 9, 7), (9, 3, 2, 4, 100), (64, 4, 1, 5, 6), (17, 2, 8, 3, 3), (8, 5, 4, 1, 3),
    (10, 8, 8, 2, 1), (33, 6, 7, 1, 1),
]  # fmt: skip


def resized(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=True)


def averaged(x: Tensor, height: int, width: int) -> Tensor:
    return F.adaptive_avg_pool2d(x, (height, width))


RESAMPLING: dict[str, tuple[Function, Function]] = {
    "resize": (inference.resize, resized),
    "adaptive_average": (inference.adaptive_average, averaged),
    "global_average": (lambda x, *_: inference.global_average(x), lambda x, *_: averaged(x, 1, 1)),
}


def grouped(groups: int) -> tuple[Function, Function]:
    return (
        lambda x, weight: inference.convolution(x, weight, None, None, 1, 1, 1, groups),
        lambda x, weight: F.conv2d(x, weight, padding=1, groups=groups),
    )


def check(name: str, ours: Function, exact: Function, tensors: list[Tensor], terms: list[int], places: int = 0) -> None:
    """Result and gradients of ``tensors`` as ``exact`` has them; ``terms`` of the longest sum behind each.

    ``places`` are roundings in float64, in whatever type: no more than those of ``exact`` itself beside float64.
    """
    for dtype in DTYPES.values():
        for layout in LAYOUTS.values():
            given = [t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in tensors]
            wide = [t.detach().double().requires_grad_() for t in given]
            sizes = [t.detach().double().abs().requires_grad_() for t in given]
            actual, expected, bound = ours(*given), exact(*wide), exact(*sizes)
            grad = torch.randn(expected.shape).to(dtype)
            answers = [
                [result.detach(), *torch.autograd.grad(result, leaves, behind.to(result.dtype))]
                for result, leaves, behind in (
                    (actual, given, grad), (expected, wide, grad.double()), (bound, sizes, grad.double().abs())
                )
            ]  # fmt: skip
            for number, (got, wanted, size) in enumerate(zip(*answers, strict=True)):
                assert got.dtype == dtype
                count = terms[number] + (places if dtype == torch.float64 else 0)
                assert_within_rounding(f"{name}, {number}, {dtype}", got, wanted, size, count)


@pytest.mark.parametrize("operator", RESAMPLING)
@pytest.mark.parametrize("case", RESAMPLED, ids=str)
def test_resampling(isa: str, operator: str, case: tuple[int, tuple[int, int], tuple[int, int]]) -> None:
    channels, size, target = case
    ours, exact = (lambda x, f=function: f(x, *target) for function in RESAMPLING[operator])
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    if operator == "global_average":
        target = (1, 1)
    # As many rows times columns as one number reads, or is read by, at most; two shares, their product and a division.
    reads = [-(-one // other) + 2 for one, other in zip((*size, *target), (*target, *size), strict=True)]
    longest = max(reads[0] * reads[1], reads[2] * reads[3]) + 6
    # Where a result lies between two numbers is found in float64, twice rounded at the size of the place itself, along
    # two axes; the reference's own is as far off.
    check(operator, ours, exact, [x], [longest] * 2, places=8 * max(*size, *target))


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_convolutions_in_groups(isa: str, case: tuple[int, int, int, int, int]) -> None:
    groups, inputs, outputs, height, width = case
    tensors = [
        torch.randn(2, groups * inputs, height, width, dtype=torch.float64),
        torch.randn(groups * outputs, inputs, 3, 3, dtype=torch.float64),
    ]
    check("convolution", *grouped(groups), tensors, [9 * inputs, 9 * outputs, 2 * height * width])


def test_gradients_of_many_outputs_are_torchs() -> None:
    ours, exact = grouped(8)
    leaves = pixels(2, 16, 4, 3).requires_grad_(), torch.randn(72, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    actual, expected = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (ours, exact))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("branches", [1, 2, 5, 8])
@pytest.mark.parametrize("channels", [2, 10, 33])
def test_the_convolution_behind_a_shuffle(isa: str, branches: int, channels: int) -> None:
    def exact(z: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.channel_shuffle(z, branches), weight, padding=1, groups=channels)

    tensors = [
        torch.randn(2, branches * channels, 6, 7, dtype=torch.float64),
        torch.randn(channels, branches, 3, 3, dtype=torch.float64),
    ]
    check("shuffled", fused_pooling.shuffled_convolution, exact, tensors, [9 * branches, 9, 2 * 6 * 7])


def test_gradients_of_gradients() -> None:
    x = pixels(2, 16, 4, 5).requires_grad_()
    weight = torch.randn(8, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    shuffled = torch.randn(8, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda x: inference.resize(x, 6, 3), (x,)),
        (lambda x: inference.adaptive_average(x, 3, 7), (x,)),
        (inference.global_average, (x,)),
        (grouped(8)[0], (x, weight)),
        (fused_pooling.shuffled_convolution, (x, shuffled)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_a_batch_of_nothing() -> None:
    x = torch.empty(0, 16, 4, 5, requires_grad=True)
    weight = torch.randn(16, 2, 3, 3, requires_grad=True)
    inference.resize(x, 3, 9).sum().backward()
    inference.adaptive_average(x, 3, 2).sum().backward()
    grouped(8)[0](x, weight).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


def test_opcheck() -> None:
    for layout in LAYOUTS.values():
        for shape in ((2, 16, 5, 4), (1, 16, 1, 1), (0, 16, 3, 2)):
            x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
            grad = torch.randn(shape[0], 24, *shape[2:]).contiguous(memory_format=layout).requires_grad_()
            weight = torch.randn(24, 2, 3, 3).requires_grad_()
            for name, arguments in (
                ("resize", (x, 3, 7)),
                ("resize_backward", (x, 3, 7)),
                ("adaptive_average", (x, 3, 2)),
                ("adaptive_average_backward", (x, 6, 5)),
                ("global_average", (x,)),
                ("convolution", (x, weight, None, None, 1, 1, 1, 8)),
                ("grouped_convolution_backward_weight", (grad, x, 8)),
            ):
                torch.library.opcheck(getattr(torch.ops.espkernels, name).default, arguments)


def test_threads_change_no_bit(threads: None) -> None:
    x, weight = pixels(3, 32, 40, 50, dtype=torch.float32), torch.randn(16, 4, 3, 3)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        result = inference.adaptive_average(inference.resize(grouped(8)[0](*leaves), 70, 61), 33, 20)
        result.square().sum().backward()
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))  # type: ignore[arg-type]


def test_where_there_is_no_derivative() -> None:
    operators: Any = torch.ops.espkernels
    x, vector = pixels(1, 16, 3, 3, dtype=torch.float32).requires_grad_(), torch.ones(16)
    for result in (
        operators.resize(x, 5, 5, slope=vector),
        operators.convolution(x, torch.ones(16, 2, 3, 3), None, vector, 1, 1, 1, 8),
    ):
        with pytest.raises(RuntimeError, match="has no derivative with"):
            result.sum().backward()
    with pytest.raises(RuntimeError, match="a divisor of the channels"):
        operators.grouped_convolution_backward_weight(x, x, 3)
    with pytest.raises(RuntimeError, match="1 to 8 channels a group"):
        operators.grouped_convolution_backward_weight(x, x, 1)
    with pytest.raises(RuntimeError, match="at least one row and column"):
        operators.resize_backward(x, 0, 3)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_map_is_resized_in_its_own_format(
    layout: torch.memory_format, calls_of: Callable[[Any, str], list[str]]
) -> None:
    calls = calls_of(inference, "resize")
    x = torch.randn(2, 5, 9, 6, dtype=torch.float64).contiguous(memory_format=layout)
    for given in (x, x[:, :, 1:]):  # with rows left out, a contiguous map is torch's
        found = []
        for plain in (True, False):
            leaf = given.detach().requires_grad_()
            result = models_resized(leaf, 12, 11, plain)
            assert result.is_contiguous(memory_format=layout)
            result.backward(torch.linspace(-1, 1, result.numel()).double().view(result.shape))
            found.append([result.detach(), leaf.grad])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert len(calls) == (1 if layout == torch.contiguous_format else 2)


def test_a_mean_leaves_the_format_of_gradients_alone() -> None:
    """Behind torch's the sum of the map's gradients would be contiguous."""
    chain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1).double())
    x, grad = pixels(2, 6, 5, 7).requires_grad_(), pixels(2, 6, 5, 7)
    found: list[Tensor] = []
    for replaced in (False, True):
        assert not replaced or espkernels.replace(chain).replaced == [""]
        map_ = x * 1
        map_.register_hook(found.append)
        (map_ * 2 + chain(map_)).backward(grad)
        assert found[-1].is_contiguous(memory_format=torch.channels_last) is replaced
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


def test_which_layers_run_on_operators(calls_of: Callable[[Any, str], list[str]]) -> None:
    calls = [calls_of(inference, name) for name in ("convolution", "global_average")]
    calls.append(calls_of(ops, "group_pointwise"))
    x = pixels(2, 16, 6, 5)
    narrow = nn.Conv2d(16, 24, 3, padding=1, groups=8, bias=False).double()
    pointwise = nn.Conv2d(16, 24, 1, groups=4, bias=False).double()
    layers = (narrow, nn.AdaptiveAvgPool2d(1), pointwise)
    others: list[nn.Module] = [
        nn.Conv2d(16, 24, 3, padding=1, groups=8).double(),  # a bias
        nn.Conv2d(16, 24, 3, groups=8, bias=False).double(),  # no padding
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False).double(),  # depthwise
        nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False).double(),  # few groups
        nn.Conv2d(16, 24, 1, bias=False).double(),  # one group
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(1),
    ]
    for layer in (*layers, *others):
        torch.testing.assert_close(single_layers.run(layer, x), layer(x), rtol=1e-13, atol=1e-13)
    assert [len(names) for names in calls] == [1, 1, 1]
    for layer in (narrow, pointwise):
        single_layers.run(layer, x.contiguous())
        with torch.autocast("cpu", torch.bfloat16):
            assert single_layers.run(layer.float(), x.float()).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="expected input"):
            single_layers.run(layer.double(), pixels(2, 8, 6, 5))
    with espkernels.use_backend("reference"):
        for layer in layers:
            single_layers.run(layer, x)
    seen: list[str] = []
    for count, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_: seen.append(""))
        single_layers.run(layer, x)
        assert len(seen) == count + 1
    assert [len(names) for names in calls] == [1, 1, 1]


@pytest.fixture
def shuffled_calls(calls_of: Callable[[Any, str], list[str]]) -> list[str]:
    """A name for each merge without a shuffle so far."""
    return calls_of(fused_pooling, "shuffled_convolution")


def assert_same_results(one: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    actual, expected = results(one, *inputs), results(other, *inputs)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scales", [(2.0, 1.5, 1.0, 0.5, 0.1), (2.0, 1.0), (0.5,)], ids=str)
def test_pyramid_pooling(training: bool, scales: tuple[float, ...], shuffled_calls: list[str]) -> None:
    plain = randomised(EfficientPyramidPooling(6, 10, 8, scales)).double().train(training)
    block = copy.deepcopy(plain)
    block.__class__ = FusedPyramidPooling
    for size in ((9, 12), (16, 7), (1, 3)):
        assert_same_results(block, plain, pixels(2, 6, *size))
    assert len(shuffled_calls) == 3
    assert_same_results(block, plain, torch.randn(2, 6, 9, 12, dtype=torch.float64))
    with espkernels.use_backend("reference"):
        assert_same_results(block, plain, pixels(2, 6, 9, 12))
    assert len(shuffled_calls) == 3


def test_where_the_merge_runs_by_its_modules(shuffled_calls: list[str]) -> None:
    x = pixels(2, 6, 9, 12)

    def block() -> Any:
        return randomised(FusedPyramidPooling(6, 10, 8, (2.0, 1.0))).double()

    def hook(module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: None)

    def exchange(module: Any, place: int, part: nn.Module) -> None:
        module[place] = part.double()

    for change in (
        lambda m: hook(m.merge_layer),
        lambda m: hook(m.merge_layer[1]),
        lambda m: hook(m.merge_layer[2]),
        lambda m: hook(m.merge_layer[2].cbr),
        lambda m: hook(m.merge_layer[2].cbr[0]),
        lambda m: exchange(m.merge_layer, 1, nn.Identity()),
        lambda m: exchange(m.merge_layer, 1, nn.ChannelShuffle(5)),
        lambda m: exchange(m.merge_layer, 2, nn.Conv2d(20, 10, 1)),
        lambda m: m.merge_layer.append(nn.Identity()),
        lambda m: m.merge_layer[2].cbr.append(nn.Identity()),
        lambda m: exchange(m.merge_layer[2].cbr, 0, nn.Conv2d(20, 10, 3, padding=1, groups=10)),
        lambda m: exchange(m.merge_layer[2].cbr, 0, nn.Conv2d(20, 10, 3, padding=1, groups=5, bias=False)),
    ):
        changed = block()
        change(changed)
        plain = copy.deepcopy(changed)
        plain.__class__ = EfficientPyramidPooling
        assert_same_results(changed, plain, x)
    assert shuffled_calls == []
    block()(x)
    assert len(shuffled_calls) == 1


def test_pooling_under_autocast(shuffled_calls: list[str]) -> None:
    block = randomised(FusedPyramidPooling(6, 10, 8)).eval()
    x = pixels(2, 6, 9, 12, dtype=torch.float32)
    plain = copy.deepcopy(block).double()
    plain.__class__ = EfficientPyramidPooling
    with torch.autocast("cpu", torch.bfloat16):
        result = block(x)
    assert result.dtype == torch.bfloat16 and len(shuffled_calls) == 1
    expected = plain(x.double())
    # Eight bits of a number, rounded at each of the ten maps that follow one another.
    assert (result.double() - expected).abs().max() <= 10 * 2**-8 * expected.abs().max()


class Otherwise(Pooling):
    """Somebody's pooling that doubles its result."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Twice(Mix):
    """Another shuffle."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


@pytest.mark.parametrize("last", [True, False])
def test_somebody_elses_pooling_is_replaced(last: bool, shuffled_calls: list[str]) -> None:
    block = randomised(Pooling(6, 10, 8, not last)).double()
    model, other = nn.ModuleList([block]), copy.deepcopy(block)
    report = espkernels.replace(model)
    assert "0" in report.replaced and isinstance(block, FusedPyramidPooling) and isinstance(block, Pooling)
    assert_same_results(block, other, pixels(2, 6, 9, 12))
    assert len(shuffled_calls) == 1
    again = espkernels.replace(model)
    assert not again.replaced
    block.merge_layer[1] = nn.Identity()  # no longer what was tried
    other.merge_layer[1] = nn.Identity()
    assert_same_results(block, other, pixels(2, 6, 9, 12))
    assert len(shuffled_calls) == 1
    espkernels.restore(model)
    assert type(block) is Pooling and vars(block).keys() == vars(other).keys()


def test_a_pooling_that_does_something_else_stays() -> None:
    other = Pooling(6, 10, 8)
    other.merge_layer[1] = Twice(5)
    for block in (Otherwise(6, 10, 8), other):
        assert "0" not in espkernels.replace(nn.ModuleList([block])).replaced


def test_replacement_is_verified() -> None:
    """In evaluation too, where a norm with its PReLU has no convolution whose terms would allow for rounding."""
    block = randomised(nn.ModuleList([Pooling(6, 10, 8), Weighting(8, 8)]))
    model = nn.Sequential(*block)
    x = pixels(2, 6, 9, 12, dtype=torch.float32)
    for training in (True, False):
        report = espkernels.replace(model.train(training), verify=x)
        assert not report.reverted and {"0", "1.wt_layer", "0.br.br"} <= set(report.replaced), str(report)
        espkernels.restore(model)


def test_networks_of_ours_train_on_these_operators(shuffled_calls: list[str]) -> None:
    x = pixels(1, 3, 64, 64, dtype=torch.float32)
    models.espnetv2_segmentation(0.5, 5)(x).sum().backward()
    assert len(shuffled_calls) == 4
    detector = models.espnetv2_detection(0.5, 5, 256)
    sum(part.sum() for part in detector(pixels(1, 3, 256, 256, dtype=torch.float32))).backward()
    assert len(shuffled_calls) > 4
    models.espnetv2_segmentation(0.5, 5, plain=True)(x).sum().backward()
    assert not any(isinstance(part, fused.Chain) for part in models.espnetv2_segmentation(0.5, 5, plain=True).modules())
