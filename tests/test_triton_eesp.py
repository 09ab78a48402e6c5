"""The Triton kernels of whole units, eesp and down_sampler, against a composition of the reference's functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_exact
from torch import Tensor
from triton_tests import DEVICE, LAYOUTS, gpu_or_interpreter

from espkernels import reference

pytestmark = gpu_or_interpreter()


class Unit(NamedTuple):
    """Sizes of one unit; ``image`` counts the channels of the shortcut's image, 0 for none."""

    inputs: int
    channels: int
    outputs: int
    height: int
    width: int
    stride: int = 1
    branches: int = 4
    reduce_groups: int = 4
    hff: bool = True
    image: int = 3
    batch: int = 2


UNITS = {
    "one launch, sums": Unit(16, 8, 32, 4, 5),
    "one launch, dot": Unit(64, 64, 64, 3, 3, batch=1),
    "one launch, odd sizes": Unit(20, 20, 80, 7, 8, stride=2, reduce_groups=1),
    "one launch, no hff": Unit(24, 12, 24, 5, 5, branches=3, reduce_groups=2, hff=False),
    "two launches": Unit(16, 4, 16, 9, 10, stride=2, image=1),
    "no image": Unit(8, 8, 16, 5, 5, stride=2, branches=2, reduce_groups=1, image=0),
    "batch 0": Unit(8, 4, 16, 5, 5, stride=2, batch=0),
}


def whole(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=draw).double()


def slope(draw: torch.Generator, channels: int) -> Tensor:
    return 0.5 ** torch.randint(1, 3, (channels,), generator=draw).double()


def arguments(unit: Unit, draw: torch.Generator) -> tuple[Any, ...]:
    """What eesp and down_sampler take after the maps, up to ``shift``; on whole numbers every sum is exact."""
    d, n, k = unit.channels, unit.outputs, unit.branches
    return (
        whole(draw, d, unit.inputs // unit.reduce_groups), unit.reduce_groups, whole(draw, d), slope(draw, d),
        whole(draw, k, d, 3, 3), (1, 2, 3, 4)[:k], 2 * slope(draw, k * d), whole(draw, k * d), slope(draw, k * d),
        whole(draw, n, d), k, whole(draw, n),
    )  # fmt: skip


def expected_unit(x: Tensor, given: tuple[Any, ...], residual: Any, last: Any, stride: int, hff: bool) -> Tensor:
    weight, groups, shift, slope, pyramid, dilations, *vectors, expand, expand_groups, expand_shift = given
    reduced = reference.group_pointwise(x, weight, groups, None, shift, None, slope)
    return reference.pyramid_pointwise(
        reduced, pyramid, dilations, expand, expand_groups, *vectors, None, expand_shift, residual, last, stride, hff
    )


def sent(values: Any, dtype: torch.dtype) -> list[Any]:
    return [v.to(DEVICE, dtype) if isinstance(v, Tensor) else v for v in values]


each_unit = pytest.mark.parametrize("unit", UNITS.values(), ids=[name.replace(" ", "-") for name in UNITS])
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@each_unit
def test_eesp(unit: Unit) -> None:
    from espkernels.triton.eesp import eesp

    draw, layout = torch.Generator().manual_seed(0), list(LAYOUTS.values())[unit.height % 2]
    size = [(n - 1) // unit.stride + 1 for n in (unit.height, unit.width)]
    x, residual = (
        whole(draw, unit.batch, unit.inputs, unit.height, unit.width),
        whole(draw, unit.batch, unit.outputs, *size),
    )
    given, last = arguments(unit, draw), slope(draw, unit.outputs)
    for second, third in ((residual, last), (None, None)):
        x_there, *rest = sent((x, *given, second, third), torch.float32)
        output = eesp(x_there.contiguous(memory_format=layout), *rest, unit.stride, unit.hff)
        assert_exact("output", output.cpu(), expected_unit(x, given, second, third, unit.stride, unit.hff))
        assert output.is_contiguous(memory_format=layout) or not unit.batch


@pytest.mark.parametrize("unit", [u for u in UNITS.values() if u.stride == 2], ids=str)
@each_layout
def test_down_sampler(unit: Unit, layout: torch.memory_format) -> None:
    from espkernels.triton.down_sampler import down_sampler

    draw = torch.Generator().manual_seed(1)
    x = 9 * whole(draw, unit.batch, unit.inputs, unit.height, unit.width)  # so that the average of nine is whole
    given, both = arguments(unit, draw), unit.inputs + unit.outputs
    pooled = F.avg_pool2d(x, 3, 2, 1)
    expected = torch.cat([pooled, expected_unit(x, given, None, None, 2, unit.hff)], 1)
    image = weight = shift = None
    if unit.image:
        image, weight = whole(draw, unit.batch, unit.image, *pooled.shape[2:]), whole(draw, both, unit.image)
        shift = whole(draw, both)
        expected = expected + reference.group_pointwise(image, weight, 1, None, shift)
    last = slope(draw, both)
    x_there, *rest = sent((x, image, *given, weight, shift, last), torch.float32)
    output = down_sampler(x_there.contiguous(memory_format=layout), *rest, unit.hff)
    assert_exact("output", output.cpu(), reference.epilogue(expected, slope=last))
    # Whatever the format of x: the two halves lie side by side in each pixel.
    assert output.is_contiguous(memory_format=torch.channels_last) or not unit.batch


def test_half_types_within_rounding() -> None:
    # Two launches round the reduced map once more than the result: 2^-8 each in bfloat16, cut rather than rounded by
    # the interpreter, of values whose parts are of their own size; a wrong channel or tap is off by that whole size.
    from espkernels.triton.eesp import eesp

    draw = torch.Generator().manual_seed(2)
    unit = UNITS["two launches"]
    given = arguments(unit, draw)
    x = whole(draw, unit.batch, unit.inputs, unit.height, unit.width)
    expected = expected_unit(x, given, None, None, 1, True)
    half = [
        v.to(DEVICE, torch.bfloat16 if v.dim() > 1 else torch.float32) if isinstance(v, Tensor) else v for v in given
    ]
    output = eesp(x.to(DEVICE, torch.bfloat16), *half, None, None, 1, True).cpu().double()
    assert (output - expected).norm() <= 2**-6 * expected.norm()
