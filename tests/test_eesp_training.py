"""Whole units in training as one operator: the layers one by one are the specification, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_results import randomised, results, twin
from torch import Tensor, nn

from espkernels import nn as fused
from espkernels.fused_unit import fits

pytestmark = pytest.mark.usefixtures("same_each_time")

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def agrees(layer: nn.Module, x: Tensor, rtol: float = 1e-10) -> None:
    """Output, all gradients and buffers are those of the plain layers.

    The bound: a value passes through at most three batch norms and five products, each a chain of sums of n <= 2^14
    terms, which errs by 8 sqrt(n) u (closeness.py) = 1.1e-13 of its magnitude in float64; what the norms magnify, and
    five such steps one behind the other, leave a hundred times of room below 1e-10.
    """
    assert fits(layer.layers(), x.detach().requires_grad_()), "the unit runs layer by layer"  # type: ignore[operator]
    expected, actual = results(twin(layer), x), results(layer, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def floats(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the counts of batches."""
    return {name: value for name, value in found.items() if value.is_floating_point()}


UNITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: fused.EESP(16, 16, r_lim=9), (3, 16, 9, 14)),
    "one row": (lambda: fused.EESP(16, 16, r_lim=9), (2, 16, 1, 7)),
    "wider": (lambda: fused.EESP(8, 32, r_lim=7), (2, 8, 7, 5)),
    "strided": (lambda: fused.EESP(8, 16, 2, r_lim=9, down_method="avg"), (2, 8, 9, 12)),
    "strided with its prelu": (lambda: fused.EESP(16, 16, 2, r_lim=9), (2, 16, 8, 11)),
    "no hff": (lambda: fused.EESP(6, 18, k=3, r_lim=7, hff=False), (2, 6, 8, 9)),
    "five branches of seven channels": (lambda: fused.EESP(10, 175, k=5, r_lim=11), (2, 10, 6, 7)),
    "full vectors and a tail": (lambda: fused.EESP(80, 80, r_lim=9), (1, 80, 13, 12)),
    "several strips": (lambda: fused.EESP(64, 64, r_lim=9), (1, 64, 75, 31)),
    "several strips, strided": (lambda: fused.EESP(32, 64, 2, r_lim=13, down_method="avg"), (1, 32, 121, 66)),
    "map smaller than a dilation": (lambda: fused.EESP(16, 16, r_lim=9), (4, 16, 3, 2)),
}


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", UNITS, ids=lambda n: n.replace(" ", "-"))
def test_unit_in_double(name: str, layout: torch.memory_format, memory: str, isa: str, poison: None) -> None:
    build, shape = UNITS[name]
    layer = randomised(build()).double()
    layer.memory = memory  # type: ignore[assignment]
    agrees(layer, torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout))


@pytest.mark.parametrize("name", ["residual", "full vectors and a tail", "several strips", "strided"])
def test_unit_in_single(name: str, isa: str) -> None:
    """Sums of n products of numbers about 1 in size, one for each pixel, err by 8 sqrt(n) u n (closeness.py).

    That is for the parameters; maps have shorter sums and none of that size. A pixel lost would show: it is about 1.
    """
    build, shape = UNITS[name]
    layer, x = randomised(build()), torch.randn(shape)
    n, u = shape[0] * shape[2] * shape[3], torch.finfo(torch.float32).eps / 2
    truth = results(twin(layer).double(), x.double())
    for key, value in floats(results(layer, x)).items():
        size = max(truth[key].abs().max().item(), 1 if value.dim() == 4 and value.shape[0] == shape[0] else n)
        assert (value - truth[key]).abs().max() <= 8 * n**0.5 * u * size, key


def test_maps_that_outgrow_the_cache(isa: str) -> None:
    """Of more than 16 MiB, which the kernels store past the cache; the bound is that of the test above."""
    unit, x = randomised(fused.EESP(64, 64, r_lim=9)), torch.randn(2, 64, 192, 176)
    truth, n = results(twin(unit).double(), x.double()), 2 * 192 * 176
    for key, value in floats(results(unit, x.contiguous(memory_format=torch.channels_last))).items():
        size = max(truth[key].abs().max().item(), 1 if value.shape == x.shape else n)
        assert (value - truth[key]).abs().max() <= 8 * n**0.5 * torch.finfo(torch.float32).eps / 2 * size, key


@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12),
    st.integers(1, 3), st.integers(1, 2), st.booleans(), st.booleans(),
)  # fmt: skip
def test_unit_of_any_shape(
    k: int, m: int, n: int, height: int, width: int, batch: int, stride: int, average: bool, hff: bool
) -> None:
    down = "avg" if average else "esp"
    layer = randomised(fused.EESP(m * k, n * k**2, stride, k, 2 * k + 1, down, hff=hff)).double()
    if batch * ((height - 1) // stride + 1) * ((width - 1) // stride + 1) < 4:
        batch = 4  # two values have a variance that may be nearly nothing, which magnifies any rounding
    agrees(layer, torch.randn(batch, m * k, height, width, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("name", ["residual", "strided", "strided with its prelu", "no hff"])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_gradcheck_of_whole_units(name: str, training: bool, fused_calls: list[str]) -> None:
    build, shape = UNITS[name]
    layer = randomised(build()).double().train(training)
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    x = torch.randn(2, shape[1], 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    # Steps of 1e-6 cross no kink of a PReLU with these numbers, which are fixed by their seed.
    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=False, eps=1e-6, atol=1e-6)
    assert fused_calls


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
def test_variance_far_from_zero(layout: torch.memory_format, isa: str) -> None:
    """Mean 1e4 and variance about 1 in float32: squares of the values themselves would leave nothing of it."""
    unit = fused.EESP(32, 32, r_lim=9)
    x = (1e4 + torch.randn(8, 32, 28, 28)).contiguous(memory_format=layout)
    d, inner = 8, 32
    pick = torch.zeros(d, 8)
    pick[:, 0] = 1.0  # the reduced map is one channel of x for each of its own
    ones, zeros = torch.ones(d + 2 * inner), torch.zeros(d + 2 * inner)
    found = torch.ops.espkernels.eesp_training(
        x, pick, 4, unit.pyramid_weight().detach(), list(unit.dilations), torch.eye(8).repeat(4, 1), 4,
        ones, 1e4 + zeros, ones, None, None, [1e-5] * 3, [True] * 3, 1, True, False, True,
    )  # fmt: skip
    _, *maps, statistics = found
    first = 0
    for stored in maps:
        double, channels = stored.double().transpose(0, 1).flatten(1), stored.shape[1]
        mean, variance = statistics[:, first : first + channels]
        # 64 values at a time are summed in float32, around one of them: 8 sqrt(64) u = 4e-6, on both sides of a square.
        torch.testing.assert_close(mean, double.mean(1), rtol=4e-6, atol=0)
        torch.testing.assert_close(variance, double.var(1, correction=0), rtol=1e-5, atol=0)
        first += channels
    assert (maps[0].mean() - 1e4).abs() < 1


def test_bits_do_not_depend_on_threads() -> None:
    layer = randomised(fused.EESP(64, 64, r_lim=9))
    x = torch.randn(4, 64, 28, 28)
    state = copy.deepcopy(layer.state_dict())
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        layer.load_state_dict(state)
        found.append(results(layer, x))
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["autocast", "pure"])
def test_half_types(dtype: torch.dtype, kind: str, isa: str, fused_calls: list[str]) -> None:
    """Not much further from float64 than torch's own layers in the same type are.

    Where rounding chooses the side of a PReLU gradients jump, so that their error is the square root of the rounding's:
    up to a tenth in bfloat16. Which gradients meet such a place is chance, so torch's worst is the measure of ours.
    """
    layer = randomised(fused.EESP(32, 32, r_lim=9)).to(dtype).float()  # parameters that the half type holds
    x = torch.randn(4, 32, 12, 12).to(dtype).float()
    truth = results(twin(layer).double(), x.double())
    if kind == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            eager, found = results(twin(layer), x), results(layer, x)
        assert found["output"].dtype == dtype
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    else:
        eager, found = (results(each.to(dtype), x.to(dtype)) for each in (twin(layer), layer))
        assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())
    assert fused_calls == ["eesp_training"]

    def errors(results: dict[str, Tensor]) -> dict[str, float]:
        return {n: ((v.double() - truth[n]).norm() / truth[n].norm()).item() for n, v in floats(results).items()}

    ours, torchs = errors(found), errors(eager)
    assert ours.pop("output") <= 2 * torchs.pop("output")
    assert max(ours.values()) <= 2 * max(torchs.values()), ours


def test_operator_is_what_it_says_to_torch() -> None:
    unit = randomised(fused.EESP(8, 16, r_lim=9))
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    d, inner = 4, 16
    vectors = [torch.rand(d + 2 * inner, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(
        torch.ops.espkernels.eesp_training.default,
        (
            x, unit.proj_1x1.conv.weight.detach().flatten(1), 4, unit.pyramid_weight().detach(), list(unit.dilations),
            unit.conv_1x1_exp.conv.weight.detach().flatten(1), 4, *vectors, None, None,
            [1e-5] * 3, [True] * 3, 1, True, False, True,
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
