"""Whole EESP units in training: forward in four passes over maps, backward in ten, norms between them on the device.

Bytes of a stride-1 unit at K = 4, in maps of its own size: forward 7.5 as on the CPU, 1.25 for the reduction, 1.25 for
the pyramid, 2 for the expansion and 3 for its norm, residual and PReLU. Backward 22: 4 in front of the last PReLU,
3 each through the norms of the expansion and the pyramid, 3 and 2 for the expansion's two gradients, 1.5 and 1.25 for
the pyramid's, 0.75 through the reduction's norm, 2.25 and 1.25 for the reduction's. Eager moves about 20 and 45. A
gradient is sent through its norm by a pass of its own, because the pyramid's gradient reads each number up to 22 times
and would send it through as often.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espkernels.layout import empty_pixels, out_size
from espkernels.triton.affine import run as run_affine
from espkernels.triton.batch_norm_backward import batch_norm_backward
from espkernels.triton.checks import check_map, check_tensor, check_vectors
from espkernels.triton.group_pointwise import (
    group_pointwise_backward_input,
    normalised_pointwise,
    normalised_pointwise_backward_input,
)
from espkernels.triton.group_pointwise_backward_weight import group_pointwise_backward_weight
from espkernels.triton.normalised_output_backward import normalised_output_backward
from espkernels.triton.spatial_pyramid import normalised_pyramid
from espkernels.triton.spatial_pyramid_backward_input import normalised_pyramid_backward_input
from espkernels.triton.spatial_pyramid_backward_weight import spatial_pyramid_backward_weight
from espkernels.triton.training_norms import TrainingNorm, split

__all__ = ["eesp_training", "eesp_training_backward"]


class _Unit:
    """What both directions take, checked and dense, with the three norms in place."""

    def __init__(
        self, x: Tensor, reduce_weight: Tensor, reduce_groups: int, weight: Tensor, dilations: Sequence[int],
        expand_weight: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, slope: Tensor,
        statistics: Tensor, eps: Sequence[float], batch_statistics: Sequence[bool], stride: int,
    ) -> None:  # fmt: skip
        check_map("x", x)
        branches, self.channels, self.outputs = len(dilations), reduce_weight.shape[0], expand_weight.shape[0]
        self.concatenated = branches * self.channels
        norms = (self.channels, self.concatenated, self.outputs)
        check_tensor("reduce_weight", reduce_weight, x, (self.channels, x.shape[1] // reduce_groups))
        check_tensor("weight", weight, x, (branches, self.channels, 3, 3))
        check_tensor("expand_weight", expand_weight, x, (self.outputs, self.concatenated // groups))
        check_vectors(x, sum(norms), norm_weight=norm_weight, norm_bias=norm_bias)
        check_vectors(x, sum(norms) if len(slope) == sum(norms) else sum(norms[:2]), slope=slope)
        check_tensor("statistics", statistics, x, (2, sum(norms)))
        self.out_shape = (x.shape[0], self.outputs, out_size(x.shape[2], stride), out_size(x.shape[3], stride))
        self.pixels = x.shape[0] * x.shape[2] * x.shape[3]
        self.out_pixels = self.out_shape[0] * self.out_shape[2] * self.out_shape[3]
        self.sizes = norms
        parts = (split(each.contiguous(), norms) for each in (norm_weight, norm_bias, slope, *statistics))
        of_each = zip(*parts, eps, batch_statistics, strict=True)
        self.reduce, self.pyramid, self.expand = (TrainingNorm(*of_one) for of_one in of_each)

    def map(self, x: Tensor, channels: int, strided: bool = True) -> Tensor:
        return empty_pixels(x, channels, *(self.out_shape[2:] if strided else x.shape[2:]))


def eesp_training(
    x: Tensor, reduce_weight: Tensor, reduce_groups: int, weight: Tensor, dilations: Sequence[int],
    expand_weight: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, slope: Tensor,
    running_mean: Tensor | None, running_variance: Tensor | None, eps: Sequence[float],
    batch_statistics: Sequence[bool], stride: int, hff: bool, residual: bool, save_concatenated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Result, reduced, concatenated (or nothing) and expanded map, statistics: see :mod:`espkernels.training`."""
    statistics = torch.empty((2, len(norm_weight)), dtype=torch.float64, device=x.device)
    u = _Unit(
        x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias, slope,
        statistics, eps, batch_statistics, stride,
    )  # fmt: skip
    if running_mean is not None and running_variance is not None:
        check_vectors(x, len(norm_weight), running_mean=running_mean, running_variance=running_variance)
        torch.stack((running_mean, running_variance), out=statistics)
    elif not all(batch_statistics):
        raise RuntimeError("running_mean, running_variance: got None, expected both")
    if residual and x.shape != u.out_shape:
        raise RuntimeError(f"residual: expected a result of the shape of x {list(x.shape)}, got {list(u.out_shape)}")

    x = x.contiguous(memory_format=torch.channels_last)
    reduced, concatenated = u.map(x, u.channels, strided=False), u.map(x, u.concatenated)
    expanded, result = u.map(x, u.outputs), u.map(x, u.outputs)
    moments = normalised_pointwise(x, None, reduce_weight, reduce_groups, reduced, u.reduce.batch_statistics)
    norm = u.reduce.normalise(moments)
    measured = u.pyramid.batch_statistics
    moments = normalised_pyramid(reduced, norm, weight, dilations, stride, hff, concatenated, measured)
    norm = u.pyramid.normalise(moments)
    moments = normalised_pointwise(concatenated, norm, expand_weight, groups, expanded, u.expand.batch_statistics)
    norm = u.expand.normalise(moments)
    run_affine(expanded, norm.scale, norm.shift, x if residual else None, norm.slope, result)
    return result, reduced, concatenated if save_concatenated else x.new_empty(0), expanded, statistics


def eesp_training_backward(
    grad: Tensor, x: Tensor, reduced: Tensor, concatenated: Tensor, expanded: Tensor, statistics: Tensor,
    reduce_weight: Tensor, reduce_groups: int, weight: Tensor, dilations: Sequence[int], expand_weight: Tensor,
    groups: int, norm_weight: Tensor, norm_bias: Tensor, slope: Tensor, eps: Sequence[float],
    batch_statistics: Sequence[bool], stride: int, hff: bool, residual: bool, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, the three weights, norm_weight, norm_bias and slope; empty where not ``wanted``."""
    u = _Unit(
        x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias, slope,
        statistics, eps, batch_statistics, stride,
    )  # fmt: skip
    for name, map, shape in (
        ("grad", grad, u.out_shape), ("expanded", expanded, u.out_shape),
        ("reduced", reduced, (x.shape[0], u.channels, *x.shape[2:])),
    ):  # fmt: skip
        check_tensor(name, map, x, shape)
    x, grad = (map.contiguous(memory_format=torch.channels_last) for map in (x, grad))
    wants_x, wants_reduce, wants_weight, wants_expand, *wants_vectors = wanted
    vectors = any(wants_vectors)
    into_reduced = wants_x or wants_reduce
    grad_x = grad_reduce = grad_weight = grad_expand = x.new_empty(0)
    grads = [torch.empty_like(of, memory_format=torch.contiguous_format) for of in (norm_weight, norm_bias, slope)]
    of_reduce, of_pyramid, of_expand = zip(*(split(each, u.sizes) for each in grads), strict=True)

    has_prelu = u.expand.slope is not None
    front = u.map(x, u.outputs) if has_prelu else grad
    expand_norm = u.expand.normalise()
    behind = u.expand.behind(expanded, expand_norm)
    sums = normalised_output_backward(grad, behind, x if residual else None, front if has_prelu else None)
    gradient = u.expand.gradient(sums, u.out_pixels, *of_expand)
    grad_expanded = u.map(x, u.outputs)
    batch_norm_backward(front, expanded, None, gradient, grad_expanded)

    reduce_norm, pyramid_norm = u.reduce.normalise(), u.pyramid.normalise()
    if concatenated.numel() == 0:
        concatenated = u.map(x, u.concatenated)
        normalised_pyramid(reduced, reduce_norm, weight, dilations, stride, hff, concatenated, measured=False)
    if wants_expand:
        grad_expand = group_pointwise_backward_weight(grad_expanded, concatenated, groups, pyramid_norm)
    if into_reduced or wants_weight or vectors:
        grad_concatenated = u.map(x, u.concatenated)
        behind = u.pyramid.behind(concatenated, pyramid_norm)
        sums = normalised_pointwise_backward_input(grad_expanded, expand_weight, groups, behind, grad_concatenated)
        gradient = u.pyramid.gradient(sums, u.out_pixels, *of_pyramid)
        batch_norm_backward(grad_concatenated, concatenated, None, gradient, grad_concatenated)
        if wants_weight:
            grad_weight = spatial_pyramid_backward_weight(
                grad_concatenated, reduced, dilations, stride, hff, reduce_norm
            )
        if into_reduced or vectors:
            grad_reduced = u.map(x, u.channels, strided=False)
            behind = u.reduce.behind(reduced, reduce_norm)
            sums = normalised_pyramid_backward_input(
                grad_concatenated, weight, dilations, stride, hff, behind, grad_reduced
            )
            gradient = u.reduce.gradient(sums, u.pixels, *of_reduce)
            if into_reduced:
                batch_norm_backward(grad_reduced, reduced, None, gradient, grad_reduced)
            if wants_reduce:
                grad_reduce = group_pointwise_backward_weight(grad_reduced, x, reduce_groups)
            if wants_x:
                added = front if residual else None
                grad_x = group_pointwise_backward_input(grad_reduced, reduce_weight, reduce_groups, added)
    empty = norm_weight.new_empty(0)
    return grad_x, grad_reduce, grad_weight, grad_expand, *(grads if vectors else (empty, empty, empty))
