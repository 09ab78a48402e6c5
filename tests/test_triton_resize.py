"""The Triton kernels of resize and resized_argmax: weights of quarters mix whole numbers without rounding."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_exact
from triton_tests import DEVICE, LAYOUTS, gpu_or_interpreter

import espkernels
from espkernels import inference, reference

pytestmark = gpu_or_interpreter()

QUARTERS = [
    ((1, 1), (5, 7)), ((2, 3), (5, 9)), ((3, 2), (9, 2)), ((5, 4), (5, 4)), ((9, 5), (3, 2)), ((2, 2), (1, 1)),
]  # fmt: skip
each_size = pytest.mark.parametrize("sizes", QUARTERS, ids=lambda s: f"{s[0][0]}x{s[0][1]}-{s[1][0]}x{s[1][1]}")
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def whole(draw: torch.Generator, *size: int) -> torch.Tensor:
    return torch.randint(-4, 5, size, generator=draw).double()


@each_size
@each_layout
def test_resize_and_merge(sizes: tuple[tuple[int, int], tuple[int, int]], layout: torch.memory_format) -> None:
    before, after = sizes
    draw = torch.Generator().manual_seed(0)
    x, skip, gate = whole(draw, 2, 10, *before), whole(draw, 2, 10, *after), torch.zeros(2, 10, 1, 1).double()
    scale, shift, slope = whole(draw, 10), whole(draw, 10), whole(draw, 10) / 4
    for arguments in ((), (skip,), (skip, gate, scale, shift, slope)):
        expected = reference.resize(x, *after, *arguments)
        for dtype in (torch.float32, torch.float64):
            there = [a.to(DEVICE, dtype) for a in arguments]
            with espkernels.use_backend("triton"):
                given = x.to(DEVICE, dtype).contiguous(memory_format=layout)
                output = inference.resize(given, *after, *there)
            assert output.is_contiguous(memory_format=torch.channels_last)
            assert_exact(str(dtype), output.cpu(), expected)


def test_a_gate_within_rounding() -> None:
    draw = torch.Generator().manual_seed(1)
    x, skip, gate = (torch.randn(size, generator=draw) for size in ((2, 9, 4, 5), (2, 9, 7, 11), (2, 9, 1, 1)))
    with espkernels.use_backend("triton"):
        output = inference.resize(x.to(DEVICE), 7, 11, skip.to(DEVICE), gate.to(DEVICE)).cpu()
    expected = reference.resize(x.double(), 7, 11, skip.double(), gate.double())
    # Two mixes, a product, a sum and a sigmoid, of numbers up to 4: some ten roundings of 2^-24 of them.
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=4 * 10 * 2**-24)


@each_size
def test_classes_and_ties(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    before, after = sizes
    draw = torch.Generator().manual_seed(2)
    for channels, layout, dtype in (
        (1, torch.contiguous_format, torch.float16),
        (9, torch.channels_last, torch.float32),
    ):
        x = torch.randint(-2, 3, (2, channels, *before), generator=draw).double()
        expected = reference.resized_argmax(x, *after)
        given, wide = x.to(DEVICE, dtype).contiguous(memory_format=layout), channels == 1
        with espkernels.use_backend("triton"):
            output = inference.resized_argmax(given, *after, wide)
        assert output.dtype == (torch.int64 if wide else torch.uint8)
        assert torch.equal(output.cpu(), expected.to(output.dtype))


def test_the_first_nan_wins_and_many_classes_are_wide() -> None:
    x = torch.randint(-2, 3, (1, 257, 3, 4), generator=torch.Generator().manual_seed(3)).double()
    x[0, 256, 1, 2] = x[0, 100, 1, 2] = x[0, 256, 2, 0] = torch.nan
    with espkernels.use_backend("triton"):
        output = inference.resized_argmax(x.float().to(DEVICE), 5, 7)
    assert output.dtype == torch.int64
    assert torch.equal(output.cpu(), reference.resized_argmax(x, 5, 7))
