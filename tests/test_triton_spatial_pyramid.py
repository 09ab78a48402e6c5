"""The Triton kernels of spatial_pyramid and its two gradients against the reference."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_exact
from evaluation import answers
from samples import Sample, named
from triton_tests import DEVICE, LAYOUTS, compare_exactly, compare_within_rounding, gpu_or_interpreter
from views import MAP_VIEWS

import espkernels

pytestmark = gpu_or_interpreter()

EDGES = [
    *named("width 17", "one pixel", "map smaller than the dilation", "dilations unsorted and repeated", "batch 0"),
    *named("stride 2 odd", "stride 3", "stride above the size", "branches 1", "branches 8"),
    Sample("without hff in one row", batch=1, channels=3, height=1, width=5, hff=False),
    *named("channels 20", "channels 33"),
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.mark.parametrize("position", range(len(EDGES)), ids=[str(sample) for sample in EDGES])
def test_exact_on_integers(position: int) -> None:
    # The layouts and types by turns: each edge in one of them, each of them at several edges.
    layout, dtype = list(LAYOUTS.values())[position % 2], (torch.float32, torch.float64)[position // 2 % 2]
    compare_exactly("spatial_pyramid", EDGES[position], dtype, layout)


@pytest.mark.parametrize("sample", named("width 17", "stride 2 odd", "channels 20"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reals_err_by_rounding(sample: Sample, dtype: torch.dtype) -> None:
    compare_within_rounding("spatial_pyramid", sample, dtype, torch.channels_last)


@pytest.mark.parametrize("view", ["slice of channels_last channels", "rows and columns transposed", "expanded map"])
def test_any_strides_are_read_where_they_lie(view: str) -> None:
    problem = answers("spatial_pyramid", named("stride 2 odd")[0])
    a = problem.arguments
    x = MAP_VIEWS[view](a["x"].detach().float())
    expected = espkernels.reference.spatial_pyramid(x.double(), a["weight"], a["dilations"], a["stride"])
    with espkernels.use_backend("triton"):
        there = MAP_VIEWS[view](x.to(DEVICE)) if DEVICE == "cpu" else x.to(DEVICE)
        output = espkernels.spatial_pyramid(there, a["weight"].float().to(DEVICE), a["dilations"], a["stride"])
    assert_exact("output", output.cpu(), expected)


def test_steps_beyond_the_map() -> None:
    x, weight = torch.ones(1, 2, 3, 4, device=DEVICE), torch.ones(2, 2, 3, 3, device=DEVICE)
    with espkernels.use_backend("triton"):
        far = espkernels.spatial_pyramid(x, weight, (1, 2**62), stride=2**62)
        near = espkernels.spatial_pyramid(x, weight, (1, 4), stride=4)
    assert torch.equal(far, near)


@each_layout
def test_weight_gradients_are_the_same_each_time(layout: torch.memory_format) -> None:
    # Several tiles, so that the second stage adds something.
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 24, 40, generator=draw).contiguous(memory_format=layout).to(DEVICE)
    grad = torch.randn(1, 6, 24, 40, generator=draw).to(DEVICE)
    with espkernels.use_backend("triton"):
        sums = [torch.ops.espkernels.spatial_pyramid_backward_weight(grad, x, [1, 2], 1, True) for _ in range(2)]
    assert torch.equal(*sums)
    weight = torch.zeros(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    output = espkernels.reference.spatial_pyramid(x.cpu().double(), weight, (1, 2))
    (expected,) = torch.autograd.grad(output, weight, grad.cpu().double())
    # 960 products of numbers around one: sqrt(960) * 2^-24 is 2e-6 of their size; 1e-3 would be one of them lost.
    torch.testing.assert_close(sums[0].cpu().double(), expected, rtol=0, atol=1e-4)
