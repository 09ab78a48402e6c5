"""spatial_pyramid: K dilated depthwise convolutions, fused hierarchically and concatenated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_exact
from operator_tests import OperatorTests, each_dtype, each_layout
from torch import Tensor

import espkernels


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


class TestSpatialPyramid(OperatorTests):
    name = "spatial_pyramid"

    def operators_needed(self, kinked: bool) -> dict[str, list[str]]:
        return {"x": ["spatial_pyramid_backward_input"], "weight": ["spatial_pyramid_backward_weight"]}


@each_dtype
@each_layout
@pytest.mark.parametrize("hff", [True, False])
@pytest.mark.parametrize(("row", "column"), [(6, 8), (0, 0), (12, 16), (0, 9), (5, 16)])
def test_a_delta_gives_the_weights_back(
    isa: str, dtype: torch.dtype, layout: torch.memory_format, hff: bool, row: int, column: int
) -> None:
    # out[p] = sum_t w[t] x[p + (t - 1) r], so a one at c puts w[t] at c - (t - 1) r.
    dilations, channels, height, width = (1, 4, 2), 5, 13, 17
    x = torch.zeros(1, channels, height, width, dtype=dtype).contiguous(memory_format=layout)
    x[0, :, row, column] = 1
    weight = integers(0, 3, channels, 3, 3)
    expected = torch.zeros(1, 3, channels, height, width, dtype=torch.float64)
    for k, dilation in enumerate(dilations):
        if hff and k:
            expected[:, k] = expected[:, k - 1]
        for i in range(3):
            for j in range(3):
                p, q = row - (i - 1) * dilation, column - (j - 1) * dilation
                if 0 <= p < height and 0 <= q < width:
                    expected[0, k, :, p, q] += weight[k, :, i, j]
    assert_exact("output", espkernels.spatial_pyramid(x, weight.to(dtype), dilations, hff=hff), expected.flatten(1, 2))


@each_layout
def test_a_constant_gives_the_sum_of_the_weights_inside(isa: str, layout: torch.memory_format) -> None:
    dilations, weight = (1, 3, 2), integers(1, 3, 4, 3, 3).float()
    x = torch.full((2, 4, 15, 19), 2.0).contiguous(memory_format=layout)
    inside = espkernels.spatial_pyramid(x, weight, dilations)[:, :, 3:-3, 3:-3]
    expected = 2 * weight.sum((2, 3)).cumsum(0).flatten().view(1, -1, 1, 1).expand(inside.shape)
    assert_exact("inside", inside, expected.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "stride", "dilations"),
    [
        ((1, 20, 161, 167), 1, (1, 2, 3, 4)),
        ((1, 24, 301, 291), 2, (1, 2, 3, 4)),
        ((3, 64, 66, 64), 1, (4, 1, 3, 2)),
        ((1, 24, 160, 150), 1, (1, 40, 3, 20)),
    ],
    ids=["narrow last block", "stride 2", "batch", "large dilations"],
)
def test_results_that_outgrow_the_caches(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], stride: int, dilations: tuple[int, ...]
) -> None:
    """More than 8 MiB, which the CPU stores past its caches."""
    x, weight = integers(10, *shape).to(dtype), integers(11, 4, shape[1], 3, 3).to(dtype)
    branches = [
        F.conv2d(x.double(), w.double().unsqueeze(1), None, stride, dilation, dilation, shape[1])
        for w, dilation in zip(weight, dilations, strict=True)
    ]
    expected = torch.stack(branches, 1).cumsum(1).flatten(1, 2)
    assert expected.numel() * x.element_size() >= 2**23
    x = x.contiguous(memory_format=torch.channels_last)
    assert_exact("output", espkernels.spatial_pyramid(x, weight, dilations, stride), expected)


@each_layout
def test_linear_in_the_map_and_in_the_weight(isa: str, layout: torch.memory_format) -> None:
    a, b = (integers(seed, 2, 6, 7, 18).float().contiguous(memory_format=layout) for seed in (2, 3))
    v, w = (integers(seed, 4, 6, 3, 3).float() for seed in (4, 5))
    pyramid = espkernels.spatial_pyramid
    dilations = (1, 2, 3, 4)
    assert torch.equal(pyramid(2 * a - b, w, dilations), 2 * pyramid(a, w, dilations) - pyramid(b, w, dilations))
    assert torch.equal(pyramid(a, 2 * v - w, dilations), 2 * pyramid(a, v, dilations) - pyramid(a, w, dilations))


def test_one_branch_is_a_depthwise_convolution(isa: str) -> None:
    x, weight = integers(6, 2, 7, 9, 10).float(), integers(7, 1, 7, 3, 3).float()
    for stride in (1, 2):
        expected = F.conv2d(x.double(), weight[0].double().unsqueeze(1), stride=stride, padding=2, dilation=2, groups=7)
        assert_exact("output", espkernels.spatial_pyramid(x, weight, (2,), stride), expected)


def test_hff_is_a_prefix_sum_over_branches(isa: str) -> None:
    x, weight = integers(8, 2, 5, 8, 9).float(), integers(9, 4, 5, 3, 3).float()
    fused = espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4), hff=True)
    branches = espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4), hff=False)
    assert torch.equal(fused.view(2, 4, 5, 8, 9), branches.view(2, 4, 5, 8, 9).cumsum(1))


@each_layout
def test_a_stride_keeps_every_nth_pixel(isa: str, layout: torch.memory_format) -> None:
    x, weight = integers(10, 2, 6, 11, 23).float().contiguous(memory_format=layout), integers(11, 4, 6, 3, 3).float()
    every = espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4))
    for stride in (2, 3, 5):
        assert torch.equal(espkernels.spatial_pyramid(x, weight, (1, 2, 3, 4), stride), every[..., ::stride, ::stride])


@each_layout
def test_steps_beyond_the_map_cost_nothing(isa: str, layout: torch.memory_format) -> None:
    # One output pixel, or a branch of centre taps; no memory or time in proportion to the step.
    x, weight = integers(14, 1, 4, 5, 6).float().contiguous(memory_format=layout), integers(15, 2, 4, 3, 3).float()
    for step in (2**31, 2**40, 2**62):
        dilated = espkernels.spatial_pyramid(x, weight, (1, step))
        assert torch.equal(dilated, espkernels.spatial_pyramid(x, weight, (1, 6)))
        strided = espkernels.spatial_pyramid(x, weight, (1, 2), stride=step)
        assert torch.equal(strided, espkernels.spatial_pyramid(x, weight, (1, 2), stride=6))


def test_dilations_may_be_a_list(isa: str) -> None:
    x, weight = integers(12, 1, 4, 5, 6).float(), integers(13, 2, 4, 3, 3).float()
    assert torch.equal(espkernels.spatial_pyramid(x, weight, [1, 2]), espkernels.spatial_pyramid(x, weight, (1, 2)))
