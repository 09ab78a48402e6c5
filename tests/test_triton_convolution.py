"""The Triton kernel of convolution against the reference: on whole numbers bit for bit."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_exact
from triton_tests import DEVICE, LAYOUTS, gpu_or_interpreter

import espkernels
from espkernels import inference, reference

pytestmark = gpu_or_interpreter()

# x, weight, then stride, padding, dilation, groups
CASES = {
    "stem": ((2, 3, 9, 11), (8, 3, 3, 3), (2, 1, 1, 1)),
    "one channel, 17 outputs": ((1, 1, 5, 6), (17, 1, 3, 3), (2, 1, 1, 1)),
    "1x1": ((2, 4, 3, 5), (3, 4, 1, 1), (1, 0, 1, 1)),
    "two rows, five columns": ((1, 3, 6, 7), (4, 3, 2, 5), (1, 2, 1, 1)),
    "5x5 in steps of 3": ((1, 2, 8, 10), (3, 2, 5, 5), (3, 1, 1, 1)),
    "stride far above the size": ((1, 3, 4, 4), (2, 3, 3, 3), (2**40, 1, 1, 1)),
    "padding above the filter": ((1, 2, 4, 3), (2, 2, 3, 3), (1, 4, 1, 1)),
    "depthwise": ((2, 19, 5, 6), (19, 1, 3, 3), (1, 1, 1, 19)),
    "depthwise, dilation 2, steps of 2": ((1, 8, 9, 8), (8, 1, 3, 3), (2, 2, 2, 8)),
    "depthwise, dilation above the size": ((1, 3, 3, 4), (3, 1, 3, 3), (1, 1000, 1000, 3)),
    "narrow groups": ((2, 40, 4, 5), (16, 5, 3, 3), (1, 1, 1, 8)),
    "batch 0": ((0, 3, 5, 5), (4, 3, 3, 3), (1, 1, 1, 1)),
}  # fmt: skip


def whole(draw: torch.Generator, *size: int) -> torch.Tensor:
    return torch.randint(-2, 3, size, generator=draw).double()


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_exact_on_integers(case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> None:
    shape, weight_shape, options = case
    draw = torch.Generator().manual_seed(0)
    x, weight, shift = whole(draw, *shape), whole(draw, *weight_shape), whole(draw, weight_shape[0])
    slope = whole(draw, weight_shape[0]) / 4
    for number, (dtype, steps) in enumerate(
        ((torch.float32, (shift, slope)), (torch.float64, (None, None)), (torch.float16, (shift, None)))
    ):
        layout = list(LAYOUTS.values())[number % 2]
        vector = torch.float64 if dtype == torch.float64 else torch.float32
        given = [None if v is None else v.to(DEVICE, vector) for v in steps]
        with espkernels.use_backend("triton"):
            there = x.to(DEVICE, dtype).contiguous(memory_format=layout)
            output = inference.convolution(there, weight.to(DEVICE, dtype), *given, *options)
        assert output.is_contiguous(memory_format=torch.channels_last) and output.dtype == dtype
        assert_exact(str(dtype), output.cpu(), reference.convolution(x, weight, *steps, *options))


@pytest.mark.parametrize("groups", [1, 3])
def test_an_infinity_stays_where_it_is(groups: int) -> None:
    x, weight = torch.ones(1, 3, 5, 6, dtype=torch.float64), torch.ones(3, 3 // groups, 3, 3, dtype=torch.float64)
    x[0, 1, 2, 3] = torch.inf
    with espkernels.use_backend("triton"):
        output = inference.convolution(x.float().to(DEVICE), weight.float().to(DEVICE), None, None, 1, 1, 1, groups)
    assert torch.equal(output.cpu().double(), reference.convolution(x, weight, None, None, 1, 1, 1, groups))
