"""Batch norm as nn.BatchNorm2d does it, in every state a user puts it in, and units of every small size."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from layer_results import randomised, results, twin
from torch import Tensor, nn

from espkernels import nn as fused

pytestmark = pytest.mark.usefixtures("same_each_time")


def norms(layer: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in layer.modules() if isinstance(part, nn.BatchNorm2d)]


def each(change: Callable[[nn.BatchNorm2d], object]) -> Callable[[nn.Module], None]:
    def changed(layer: nn.Module) -> None:
        for norm in norms(layer):
            change(norm)

    return changed


def one_frozen(layer: nn.Module) -> None:
    norms(layer)[1].eval().requires_grad_(False)


def without_affine(layer: nn.Module) -> None:
    for part in layer.modules():
        if isinstance(getattr(part, "bn", None), nn.BatchNorm2d):
            part.bn = nn.BatchNorm2d(part.bn.num_features, affine=False).double()


def without_statistics(layer: nn.Module) -> None:
    for part in layer.modules():
        if isinstance(getattr(part, "bn", None), nn.BatchNorm2d):
            made = nn.BatchNorm2d(part.bn.num_features, track_running_stats=False).double()
            made.load_state_dict(
                {name: value for name, value in part.bn.state_dict().items() if name in ("weight", "bias")}
            )
            part.bn = made


STATES: dict[str, Callable[[nn.Module], object]] = {
    "training": lambda layer: None,
    "evaluation": lambda layer: layer.eval(),
    "statistics frozen": each(lambda norm: norm.eval()),
    "statistics and parameters frozen": each(lambda norm: norm.eval().requires_grad_(False)),
    "parameters frozen": each(lambda norm: norm.requires_grad_(False)),
    "one of them frozen": one_frozen,
    "cumulative average": each(lambda norm: setattr(norm, "momentum", None)),
    "no momentum": each(lambda norm: setattr(norm, "momentum", 0.0)),
    "momentum 1": each(lambda norm: setattr(norm, "momentum", 1.0)),
    "large epsilon": each(lambda norm: setattr(norm, "eps", 0.5)),
    "tracking turned off": each(lambda norm: setattr(norm, "track_running_stats", False)),
    "without statistics": without_statistics,
    "without statistics in evaluation": lambda layer: (without_statistics(layer), layer.eval()),
    "without affine": without_affine,
}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize(
    "build",
    [lambda: fused.EESP(16, 16, r_lim=9), lambda: fused.EESP(8, 16, 2), lambda: fused.DownSampler(8, 24)],
    ids=["unit", "strided", "down"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_norms_are_torchs(
    build: Callable[[], nn.Module], state: Callable[[nn.Module], object], layout: torch.memory_format
) -> None:
    """Three steps, so that statistics are read after they were written; gradients for what wants one, and only that."""
    layer = randomised(build()).double()
    state(layer)
    other = twin(layer)
    unit = layer.eesp if isinstance(layer, fused.DownSampler) else layer
    for _ in range(3):
        inputs = [torch.randn(3, unit.proj_1x1.conv.in_channels, 7, 6, dtype=torch.float64)]  # type: ignore[union-attr]
        if isinstance(layer, fused.DownSampler):
            inputs.append(torch.randn(3, 3, 14, 12, dtype=torch.float64))
        inputs = [value.contiguous(memory_format=layout) for value in inputs]
        assert_same(results(layer, *inputs), results(other, *inputs))
    wanting = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert wanting == {name for name, parameter in other.named_parameters() if parameter.grad is not None}


def test_frozen_norms_leave_their_statistics_alone() -> None:
    layer = randomised(fused.EESP(8, 16))
    STATES["statistics frozen"](layer)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    results(layer, torch.randn(2, 8, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_frozen_layers_before_need_no_gradient_and_layers_after_get_theirs() -> None:
    """Fine-tuning: the input wants no gradient, and what is frozen gets none."""
    layer = randomised(fused.EESP(16, 16)).double()
    other, x = twin(layer), torch.randn(2, 16, 6, 7, dtype=torch.float64)
    for each_layer in (layer, other):
        each_layer.proj_1x1.requires_grad_(False).eval()  # type: ignore[union-attr]
        each_layer(x).square().sum().backward()
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert_same({name: p.grad for name, p in layer.named_parameters() if p.grad is not None}, expected)
    assert not any(name.startswith("proj_1x1") for name in expected)


@st.composite
def problems(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A whole unit of few channels, and a map for it, down to one pixel of one image."""
    k = draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    layer = fused.EESP(
        k * draw(st.integers(1, 4)),
        k**2 * draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        k,
        draw(st.integers(3, 13)),
        draw(st.sampled_from(["esp", "avg"])),
        hff=draw(st.booleans()),
        dilated=draw(st.booleans()),
    )
    shape = (draw(st.integers(1, 3)), layer.proj_1x1.conv.in_channels, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = torch.randn(shape, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return randomised(layer).double().train(draw(st.booleans())), x


def outcome(layer: nn.Module, x: Tensor) -> dict[str, Tensor] | str:
    """All that a step gives, or why there is none."""
    try:
        return results(layer, x)
    except ValueError as reason:
        return str(reason)


@hypothesis.given(problems())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_units_of_every_small_size(problem: tuple[nn.Module, Tensor]) -> None:
    """Of two values a channel batch norm divides by their difference, and magnifies rounding 1e-16 so much the more."""
    layer, x = problem
    expected, actual = outcome(twin(layer), x), outcome(layer, x)
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected
        assert actual.startswith("Expected more than 1 value per channel")
    else:
        assert_same(actual, expected, 1e-8)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_value_a_channel_is_refused_as_by_torch(stride: int) -> None:
    layer = fused.EESP(8, 16, stride).double()
    for size in ((1, 1), (2, 2))[:stride]:
        x = torch.randn(1, 8, *size, dtype=torch.float64)
        for module in (layer, twin(layer)):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                module(x)
        for norm in norms(layer):
            norm.eval()
        assert_same(results(layer, x), results(twin(layer), x))
        layer.train()
