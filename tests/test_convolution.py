"""Dense convolutions of few input channels and depthwise 3x3 ones: with shift and PReLU as inference runs them, and the
former without as training does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from closeness import assert_exact, assert_within_rounding
from operator_tests import DTYPES, each_layout, each_view
from torch import Tensor, nn

from espkernels import backends, inference, reference, single_layers

needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
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


# --- training: dense ones ---------------------------------------------------------------------------------------------


def of_weight(case: Convolution, grad: Tensor, x: Tensor) -> Tensor:
    function = torch.ops.espkernels.convolution_backward_weight.default
    result: Tensor = function(grad, x, *case.filter, case.stride, case.padding)
    return result


def right_of_weight(case: Convolution, grad: Tensor, x: Tensor) -> Tensor:
    weight = torch.zeros(case.outputs, case.channels, *case.filter, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(reference.convolution(x, weight, None, None, *case.options), weight, grad)[0]


def gradient(case: Convolution, integers: bool) -> Tensor:
    """Of the result of ``case``, as its numbers are."""
    shape, generator = right(case, numbers(case, integers)).shape, torch.Generator().manual_seed(8)
    if integers:
        return torch.randint(-2, 3, shape, generator=generator).double()
    return torch.randn(shape, generator=generator).bfloat16().half().double()


@needs_library
@pytest.mark.parametrize("case", _dense(), ids=str)
@each_layout
def test_gradient_of_the_weight(isa: str, case: Convolution, layout: torch.memory_format) -> None:
    for integers in (True, False):
        grad, x = gradient(case, integers), numbers(case, integers)["x"]
        expected = right_of_weight(case, grad, x)
        magnitude = right_of_weight(case, grad.abs(), x.abs())
        for dtype in DTYPES.values():
            given = [map_.to(dtype).contiguous(memory_format=layout) for map_ in (grad, x)]
            found = of_weight(case, *given)
            assert found.dtype == dtype and found.is_contiguous()
            if integers:  # at most 2 * 33 * 35 products up to 4: no sum leaves float32's whole numbers
                assert_exact(str(dtype), found, expected)
            else:
                assert_within_rounding(str(dtype), found, expected, magnitude, grad[:, 0].numel())


@needs_library
@pytest.mark.parametrize("case", [CASES[0], Convolution("5x2", filter=(5, 2), stride=2)], ids=str)
def test_gradients_of_gradients(case: Convolution) -> None:
    values = numbers(replace(case, height=5, width=6, outputs=3), integers=False)
    leaves = [values[name].contiguous(memory_format=torch.channels_last) for name in ("x", "weight")]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return inference.convolution(x, weight, None, None, *case.options)

    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@needs_library
def test_opcheck_of_the_weights_gradient() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch in (0, 2):
            x = torch.randn(batch, 3, 7, 6).contiguous(memory_format=layout).requires_grad_()
            grad = torch.randn(batch, 8, 4, 3).contiguous(memory_format=layout).requires_grad_()
            operator = torch.ops.espkernels.convolution_backward_weight.default
            torch.library.opcheck(operator, (grad, x, 3, 3, 2, 1))


@needs_library
def test_threads_change_no_bit_of_gradients(threads: None) -> None:
    case = Convolution("stem of an image", batch=3, height=90, width=70, outputs=32, stride=2)
    grad, x = gradient(case, integers=False).float(), numbers(case, integers=False)["x"].float()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(of_weight(case, grad, x))
    assert torch.equal(*found)


@needs_library
def test_gradients_of_what_does_not_fit_are_refused() -> None:
    x, grad = torch.zeros(2, 3, 7, 6), torch.zeros(2, 8, 4, 3)
    for arguments, message in (
        ((grad, x[:, :0], 3, 3, 2, 1), "at least one channel"),
        ((grad[:, :0], x, 3, 3, 2, 1), "at least one channel"),
        ((grad, x, 0, 3, 2, 1), "too small"),
        ((grad, x, 3, 3, 0, 1), "too small"),
        ((grad, x, 3, 3, 2, -1), "too small"),
        ((grad, x, 3, 3, 2, 2**40), "at most 2"),
        ((x.new_zeros(1, 2, 2, 2), x.new_zeros(1, 1, 1, 1), 1, 1, 2**31 - 1, 2**30), "too large for the filter"),
        ((grad, x, 10, 3, 2, 1), "smaller, padding included"),
        ((grad, x, 3, 3, 1, 1), "sizes of the convolution's result"),
        ((grad[:1], x, 3, 3, 2, 1), "sizes of the convolution's result"),
        ((grad.double(), x, 3, 3, 2, 1), "one dtype"),
        ((grad[0], x, 3, 3, 2, 1), "4 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.espkernels.convolution_backward_weight.default(*arguments)


@needs_library
def test_which_layers_run_so(calls_of: Callable[[Any, str], list[str]]) -> None:
    calls = calls_of(inference, "convolution")
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=torch.channels_last)
    layers = [nn.Conv2d(3, outputs, 3, stride, 1, bias=False) for outputs, stride in ((8, 1), (32, 2))]
    others = [
        nn.Conv2d(3, 7, 3, 2, 1, bias=False),  # few outputs
        nn.Conv2d(3, 8, 3, 2, 1),  # a bias
        nn.Conv2d(3, 8, 3, 2, bias=False),  # no padding
        nn.Conv2d(3, 8, 3, 1, 2, 2, bias=False),  # a dilation
        nn.Conv2d(3, 8, 5, 2, 2, bias=False),  # another filter
        nn.Conv2d(3, 8, 3, (1, 2), 1, bias=False),  # two strides
    ]
    for layer in (*layers, *others):
        torch.testing.assert_close(single_layers.run(layer, x), layer(x))
    assert len(calls) == len(layers)
    single_layers.run(layers[0], x.contiguous())
    assert len(calls) == len(layers)


# --- what is left to torch --------------------------------------------------------------------------------------------


def test_others_run_on_torchs_own() -> None:
    values = numbers(Convolution("wide", channels=64, outputs=6), integers=True)
    for x, weight, options in (
        (values["x"], values["weight"], (2, 1, 1, 1)),  # too deep
        (values["x"], values["weight"][:, :32], (1, 1, 1, 2)),  # groups
        (values["x"][:, :3], values["weight"][:, :3], (1, 2, 2, 1)),  # dilated
    ):
        output = inference.convolution(x, weight, values["shift"], values["slope"], *options)
        assert_exact("output", output, reference.convolution(x, weight, values["shift"], values["slope"], *options))
