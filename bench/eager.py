"""The operators as a network in plain torch runs them: convolution, batch norm in evaluation, addition, PReLU.

:mod:`espkernels.reference` writes the epilogue in single steps to be read; here each step is torch's own fastest
function, so that the comparison is with what a person would really run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from espkernels.reference import spatial_pyramid

__all__ = ["group_pointwise", "pyramid_pointwise", "spatial_pyramid"]


@functools.cache
def _statistics(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of 0 and 1, which leave exactly the affine step; made once, as a network holds them."""
    return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


def _epilogue(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    if scale is not None:
        x = F.batch_norm(x, *_statistics(scale.numel(), scale.dtype, scale.device), scale, shift, eps=0.0)
    if residual is not None:
        x = x + residual
    return x if slope is None else F.prelu(x, slope)


def group_pointwise(
    x: Tensor,
    weight: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """:func:`espkernels.group_pointwise`."""
    return _epilogue(F.conv2d(x, weight[:, :, None, None], groups=groups), scale, shift, residual, slope)


def pyramid_pointwise(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pointwise_weight: Tensor,
    groups: int,
    pyramid_scale: Tensor | None = None,
    pyramid_shift: Tensor | None = None,
    pyramid_slope: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    hff: bool = True,
) -> Tensor:
    """:func:`espkernels.pyramid_pointwise`."""
    z = _epilogue(spatial_pyramid(x, weight, dilations, stride, hff), pyramid_scale, pyramid_shift, None, pyramid_slope)
    return group_pointwise(z, pointwise_weight, groups, scale, shift, residual, slope)
