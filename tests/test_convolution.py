"""Dense convolutions of few input channels and depthwise 3x3 ones, with shift and PReLU, as inference runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from closeness import assert_exact, assert_within_rounding
from operator_tests import DTYPES, each_layout, each_view
from torch import Tensor

from espkernels import inference, reference

pytestmark = pytest.mark.usefixtures("poison", "same_each_time")


@dataclass(frozen=True)
class Convolution:
    """x [batch, channels, height, width] with `outputs` filters; groups == channels where it is depthwise."""

    name: str
    batch: int = 2
    channels: int = 3
    height: int = 7
    width: int = 9
    outputs: int = 8
    filter: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    depthwise: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def options(self) -> tuple[int, int, int, int]:
        return self.stride, self.padding, self.dilation, self.channels if self.depthwise else 1


def _dense() -> list[Convolution]:
    stem = Convolution("stem", height=33, width=35, outputs=16, stride=2)
    return [
        stem,
        replace(stem, name="stem of one channel", channels=1, outputs=17),
        replace(stem, name="stem of four channels", channels=4, outputs=33),
        replace(stem, name="stem of an even map", height=32, width=32),
        replace(stem, name="stem of many outputs", height=6, width=6, outputs=130),
        *(replace(stem, name=f"stem width {w}", height=3, width=w) for w in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65)),
        Convolution("1x1", filter=(1, 1), padding=0),
        Convolution("1x1 in steps of 2, padded", filter=(1, 1), stride=2),
        Convolution("5x5", filter=(5, 5), padding=2),
        Convolution("5x5 in steps of 3, padded by 1", height=14, width=21, filter=(5, 5), stride=3),
        Convolution("two rows, five columns", filter=(2, 5), padding=2),
        Convolution("stride above the filter", height=10, width=11, filter=(2, 2), stride=3, padding=0),
        Convolution("stride far above the size", stride=2**40),
        Convolution("no padding", padding=0),
        Convolution("padding above the filter", padding=4, stride=2),
        Convolution("filter as large as the map", height=5, width=4, filter=(5, 4), padding=0),
        Convolution("one pixel", height=1, width=1),
        Convolution("one row", height=1, width=19),
        Convolution("one column", height=19, width=1),
        Convolution("one output", outputs=1),
        Convolution("28 channels", channels=28, outputs=20),
        Convolution("five rows", height=5, width=6),
        Convolution("batch 0", batch=0),
    ]


def _depthwise() -> list[Convolution]:
    one = Convolution("depthwise", channels=8, outputs=8, depthwise=True)
    dilated = [replace(one, name=f"depthwise, dilation {d}", padding=d, dilation=d) for d in (2, 4, 9, 1000)]
    return [
        one,
        *dilated,
        *(replace(one, name=f"depthwise, {c} channels", channels=c, outputs=c) for c in (1, 3, 16, 17, 33)),
        replace(one, name="depthwise in steps of 2", stride=2),
        replace(one, name="depthwise in steps of 3, dilation 2", stride=3, padding=2, dilation=2, width=20),
        replace(one, name="depthwise, one pixel", height=1, width=1),
        replace(one, name="depthwise, 7 by 7", height=7, width=7, channels=40, outputs=40),
        replace(one, name="depthwise, batch 0", batch=0),
    ]


CASES = _dense() + _depthwise()
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def numbers(case: Convolution, integers: bool) -> dict[str, Tensor]:
    """x, weight, shift and slope in float64: whole numbers and powers of two, or reals that every type holds."""
    generator = torch.Generator().manual_seed(7)
    weight_shape = (case.outputs, 1 if case.depthwise else case.channels, *case.filter)
    shapes = {
        "x": (case.batch, case.channels, case.height, case.width),
        "weight": weight_shape,
        "shift": (case.outputs,),
        "slope": (case.outputs,),
    }
    if integers:
        values = {name: torch.randint(-2, 3, shape, generator=generator).double() for name, shape in shapes.items()}
        return values | {"slope": values["slope"] / 4}
    return {name: torch.randn(shape, generator=generator).bfloat16().half().double() for name, shape in shapes.items()}


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(case: Convolution, x: Tensor, values: dict[str, Tensor], steps: tuple[str, ...] = ("shift", "slope")) -> Tensor:
    vectors = [values[name].to(compute(x.dtype)) if name in steps else None for name in ("shift", "slope")]
    return inference.convolution(x, values["weight"].to(x.dtype), *vectors, *case.options)


def right(case: Convolution, values: dict[str, Tensor], steps: tuple[str, ...] = ("shift", "slope")) -> Tensor:
    vectors = [values[name] if name in steps else None for name in ("shift", "slope")]
    return reference.convolution(values["x"], values["weight"], *vectors, *case.options)


@each_case
@each_layout
def test_exact_on_integers(isa: str, case: Convolution, layout: torch.memory_format) -> None:
    # At most 256 products of whole numbers up to 4: no sum leaves float32's whole numbers.
    values = numbers(case, integers=True)
    expected = right(case, values)
    for dtype in DTYPES.values():
        output = run(case, values["x"].to(dtype).contiguous(memory_format=layout), values)
        assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
        assert_exact(str(dtype), output, expected)


@each_case
@each_layout
def test_error_bound_on_reals(isa: str, case: Convolution, layout: torch.memory_format) -> None:
    values = numbers(case, integers=False)
    expected = right(case, values)
    # prelu(x) is x or slope * x, and what it rounds is at most the sum of the absolute products and the shift.
    absolute = {name: value.abs() for name, value in values.items()}
    magnitude = right(case, absolute, ("shift",)) * (1 + absolute["slope"].view(1, -1, 1, 1))
    for dtype in DTYPES.values():
        output = run(case, values["x"].to(dtype).contiguous(memory_format=layout), values)
        assert_within_rounding(str(dtype), output, expected, magnitude, values["weight"][0].numel() + 2)


@each_layout
@pytest.mark.parametrize("case", [CASES[0], CASES[-1], _depthwise()[0]], ids=str)
def test_steps_left_out(isa: str, case: Convolution, layout: torch.memory_format) -> None:
    values = numbers(case, integers=True)
    for steps in ((), ("shift",), ("slope",)):
        output = run(case, values["x"].float().contiguous(memory_format=layout), values, steps)
        assert_exact(str(steps), output, right(case, values, steps))


@each_view
@pytest.mark.parametrize("case", [Convolution("5x5", filter=(5, 5), padding=2), _depthwise()[1]], ids=str)
def test_views(case: Convolution, view: Callable[[Tensor], Tensor]) -> None:
    values = numbers(case, integers=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = view(values["x"].to(dtype))
        assert_exact(str(dtype), run(case, x, values), right(case, values | {"x": x.double()}))


@each_layout
@pytest.mark.parametrize("case", [CASES[0], _depthwise()[0]], ids=str)
def test_infinities_stay_where_they_are(isa: str, case: Convolution, layout: torch.memory_format) -> None:
    # Weights without zeros: zero times infinity is NaN.
    values = {name: torch.where(value == 0, 1.0, value) for name, value in numbers(case, integers=True).items()}
    for value in (torch.inf, torch.nan):
        x = values["x"].clone()
        x[0, -1, 2, 3] = value
        output = run(case, x.float().contiguous(memory_format=layout), values)
        expected = right(case, values | {"x": x})
        assert torch.equal(output.isfinite(), expected.isfinite())
        assert torch.equal(output.isnan(), expected.isnan())


@pytest.mark.parametrize("case", [CASES[0], _depthwise()[0]], ids=str)
def test_gradients_of_every_argument(case: Convolution) -> None:
    # Whole numbers, so that torch's own backward is exact as well.
    values = numbers(case, integers=True)
    answers = []
    for function in (inference.convolution, reference.convolution):
        leaves = [value.clone().requires_grad_() for value in values.values()]
        output = function(*leaves, *case.options)
        grad = torch.arange(output.numel()).view(output.shape).remainder(5).double() - 2
        answers.append(torch.autograd.grad(output, leaves, grad))
    for name, actual, expected in zip(values, *answers, strict=True):
        assert_exact(name, actual, expected)


def test_others_run_on_torchs_own() -> None:
    values = numbers(Convolution("wide", channels=64, outputs=6), integers=True)
    for x, weight, options in (
        (values["x"], values["weight"], (2, 1, 1, 1)),  # too deep
        (values["x"], values["weight"][:, :32], (1, 1, 1, 2)),  # groups
        (values["x"][:, :3], values["weight"][:, :3], (1, 2, 2, 1)),  # dilated
    ):
        output = inference.convolution(x, weight, values["shift"], values["slope"], *options)
        assert_exact("output", output, reference.convolution(x, weight, values["shift"], values["slope"], *options))
