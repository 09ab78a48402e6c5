"""The gradients of :mod:`espkernels.reference` as functions of their own, in plain torch operations.

What runs where an operator's gradient is asked for by name and no kernel can; autograd derives the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "group_pointwise_backward_input",
    "group_pointwise_backward_weight",
    "spatial_pyramid_backward_input",
    "spatial_pyramid_backward_weight",
]


def spatial_pyramid_backward_input(
    grad: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool, height: int, width: int
) -> Tensor:
    """grad [B, K*d, H', W'], weight [K, d, 3, 3] -> [B, d, height, width]."""
    x = grad.new_empty((grad.shape[0], weight.shape[1], height, width))
    gradients = [
        _convolution_backward(one, x, weight[k, :, None], stride, dilation, x.shape[1], input=True)
        for k, (one, dilation) in enumerate(zip(_of_branches(grad, len(dilations), hff), dilations, strict=True))
    ]
    return torch.stack(gradients).sum(0)


def spatial_pyramid_backward_weight(
    grad: Tensor, x: Tensor, dilations: Sequence[int], stride: int, hff: bool
) -> Tensor:
    """grad [B, K*d, H', W'], x [B, d, H, W] -> [K, d, 3, 3]."""
    weight = x.new_empty((x.shape[1], 1, 3, 3))
    gradients = [
        _convolution_backward(one, x, weight, stride, dilation, x.shape[1], input=False)[:, 0]
        for one, dilation in zip(_of_branches(grad, len(dilations), hff), dilations, strict=True)
    ]
    return torch.stack(gradients)


def group_pointwise_backward_input(grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    """grad [B, N, H, W], weight [N, M/groups] -> [B, M, H, W]."""
    x = grad.new_empty((grad.shape[0], weight.shape[1] * groups, *grad.shape[2:]))
    return _convolution_backward(grad, x, weight[:, :, None, None], 1, 0, groups, input=True)


def group_pointwise_backward_weight(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    """grad [B, N, H, W], x [B, M, H, W] -> [N, M/groups]."""
    weight = x.new_empty((grad.shape[1], x.shape[1] // groups, 1, 1))
    return _convolution_backward(grad, x, weight, 1, 0, groups, input=False)[:, :, 0, 0]


def _of_branches(grad: Tensor, branches: int, hff: bool) -> tuple[Tensor, ...]:
    """The gradients of the branches [B, d, H', W']: with HFF the suffix sums of those of the outputs."""
    parts = grad.unflatten(1, (branches, -1))
    return (parts.flip(1).cumsum(1).flip(1) if hff else parts).unbind(1)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int, *, input: bool
) -> Tensor:
    """One gradient of the convolution of ``x``, padded by its dilation; a 1x1 convolution has dilation 0."""
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [dilation] * 2, [max(dilation, 1)] * 2, False, [0, 0], groups,
        [input, not input, False],
    )  # fmt: skip
    return gradients[0 if input else 1]
