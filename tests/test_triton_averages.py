"""The Triton kernels of average_pool, global_average and adaptive_average: whole means are exact."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_exact
from triton_tests import DEVICE, LAYOUTS, gpu_or_interpreter

import espkernels
from espkernels import inference, reference

pytestmark = gpu_or_interpreter()

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
DTYPES = (torch.float32, torch.float64, torch.float16)


def multiples(of: int, *shape: int) -> torch.Tensor:
    return of * torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).double()


@each_layout
@pytest.mark.parametrize("shape", [(2, 19, 7, 6), (1, 1, 1, 1), (1, 5, 2, 9), (0, 3, 4, 4)], ids=str)
def test_average_pool(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = multiples(9, *shape)
    for dtype in DTYPES:
        there = x.to(DEVICE, dtype).contiguous(memory_format=layout)
        with espkernels.use_backend("triton"):
            output = inference.average_pool(there)
        assert output.is_contiguous(memory_format=layout) or 1 in shape or not shape[0]
        assert_exact(str(dtype), output.cpu(), reference.average_pool(x))


@each_layout
@pytest.mark.parametrize("shape", [(2, 19, 7, 7), (3, 1, 1, 1), (1, 5, 40, 31), (2, 40, 20, 30), (0, 3, 4, 4)], ids=str)
def test_global_average(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = multiples(1, *shape)
    # The last number makes each sum a multiple of the number of pixels.
    pixels = math.prod(shape[2:])
    x[..., -1, -1] -= x.sum((2, 3)) % pixels
    for dtype in DTYPES[:2]:
        there = x.to(DEVICE, dtype).contiguous(memory_format=layout)
        with espkernels.use_backend("triton"):
            output = inference.global_average(there)
        assert_exact(str(dtype), output.cpu(), reference.global_average(x))


def test_global_average_of_a_slice() -> None:
    x = multiples(1, 3, 8, 6, 10)
    for view in (x[:, 2:7], x[..., ::2], x[:, :, 1:4, 2:5]):
        there = view.to(DEVICE) if DEVICE == "cuda" else view
        with espkernels.use_backend("triton"):
            output = inference.global_average(there)
        # A division in float64 by 60, 30 or 9: half a unit of the last place, and torch's own the same.
        torch.testing.assert_close(output.cpu(), reference.global_average(view), rtol=2**-51, atol=0)


@each_layout
@pytest.mark.parametrize(
    "sizes", [((7, 9), (3, 4)), ((6, 8), (3, 2)), ((5, 5), (1, 1)), ((4, 6), (9, 7)), ((1, 1), (3, 2))], ids=str
)
def test_adaptive_average(sizes: tuple[tuple[int, int], tuple[int, int]], layout: torch.memory_format) -> None:
    before, after = sizes
    x = multiples(3600, 2, 10, *before)  # every window here has a size that divides 3600
    expected = reference.adaptive_average(x, *after)
    for dtype in DTYPES[:2]:
        there = x.to(DEVICE, dtype).contiguous(memory_format=layout)
        with espkernels.use_backend("triton"):
            output = inference.adaptive_average(there, *after)
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_exact(str(dtype), output.cpu(), expected.round())
        assert (expected - expected.round()).abs().max() < 1e-9
