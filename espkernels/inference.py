"""The operators of inference: whole units with their batch norms folded, and the layers around them in a network.

They take what :mod:`espkernels.freeze` makes of a model and are not differentiable themselves: where a gradient is
wanted, or no kernel runs, the same mathematics runs in plain torch operations or in the differentiable operators of
:mod:`espkernels.ops`. Maps of the result are channels_last unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espkernels import backends, ops, reference

__all__ = ["average_pool", "convolution", "down_sampler", "eesp", "global_average"]


def _runs_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the operator in the library may run: nothing asks for a gradient, and the device has kernels."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return False
    return not backends.runs_reference(x.device)


def eesp(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_groups: int,
    reduce_shift: Tensor,
    reduce_slope: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pyramid_scale: Tensor,
    pyramid_shift: Tensor,
    pyramid_slope: Tensor,
    expand_weight: Tensor,
    groups: int,
    shift: Tensor,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    hff: bool = True,
) -> Tensor:
    """One EESP unit (paper Fig. 1c) with its batch norms folded, in the memory format of ``x``.

    Args:
        x: [B, M, H, W].
        reduce_weight: [d, M/reduce_groups]; reduce_shift, reduce_slope: [d].
        weight, dilations, stride, hff: as in :func:`espkernels.spatial_pyramid`.
        pyramid_scale, pyramid_shift, pyramid_slope: of the concatenated map [K*d].
        expand_weight: [N, K*d/groups]; shift, slope: [N]. Vectors are float32, float64 beside float64.
        residual: [B, N, H', W'], added before the PReLU; ``x`` itself in a unit of stride 1.

    Returns:
        [B, N, H', W'] with H' = (H - 1) // stride + 1.
    """
    arguments = (
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, list(dilations),
        pyramid_scale, pyramid_shift, pyramid_slope, expand_weight, groups, shift, residual, slope, stride, hff,
    )  # fmt: skip
    if _runs_kernel(x, residual):
        return torch.ops.espkernels.eesp.default(*arguments)
    reduced = ops.group_pointwise(x, reduce_weight, reduce_groups, None, reduce_shift, None, reduce_slope)
    return ops.pyramid_pointwise(
        reduced, weight, dilations, expand_weight, groups, pyramid_scale, pyramid_shift, pyramid_slope,
        None, shift, residual, slope, stride, hff,
    )  # fmt: skip


def down_sampler(
    x: Tensor,
    image: Tensor | None,
    reduce_weight: Tensor,
    reduce_groups: int,
    reduce_shift: Tensor,
    reduce_slope: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pyramid_scale: Tensor,
    pyramid_shift: Tensor,
    pyramid_slope: Tensor,
    expand_weight: Tensor,
    groups: int,
    shift: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_shift: Tensor | None,
    slope: Tensor,
    hff: bool = True,
) -> Tensor:
    """The strided unit (paper section 3.2, Fig. 2): ``prelu(concat(average_pool(x), eesp(x)) + shortcut(image))``.

    Args:
        x: [B, M, H, W].
        image: the image pooled to the size of the result and convolved to I channels [B, I, H', W'], or None.
        shortcut_weight: [M+N, I]; shortcut_shift: [M+N]; None without ``image``.
        slope: [M+N]. The others are those of :func:`eesp`.

    Returns:
        [B, M+N, H', W'] with H' = (H - 1) // 2 + 1, in channels_last.
    """
    unit = (
        reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, list(dilations),
        pyramid_scale, pyramid_shift, pyramid_slope, expand_weight, groups, shift,
    )  # fmt: skip
    if _runs_kernel(x, image):
        return torch.ops.espkernels.down_sampler.default(
            x, image, *unit, shortcut_weight, shortcut_shift, slope, hff
        )
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.cat([reference.average_pool(x), eesp(x, *unit, None, None, 2, hff)], dim=1)
    if image is None:
        return reference.epilogue(y, slope=slope.to(y.dtype))
    assert shortcut_weight is not None
    return ops.group_pointwise(image, shortcut_weight, 1, None, shortcut_shift, y, slope)


def convolution(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with its shift and PReLU: [B, M, H, W] -> [B, N, H', W'].

    The kernels are for a few dense input channels (the first convolution of a network) and for depthwise 3x3 filters;
    other convolutions run on torch's own.
    """
    depthwise = groups == x.shape[1] == weight.shape[0] and tuple(weight.shape[2:]) == (3, 3) and padding == dilation
    few = groups == 1 and dilation == 1 and weight[0].numel() <= 256
    if (depthwise or few) and _runs_kernel(x):
        return torch.ops.espkernels.convolution.default(x, weight, shift, slope, stride, padding, dilation, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    shift, slope = (None if v is None else v.to(x.dtype) for v in (shift, slope))
    return reference.convolution(x, weight, shift, slope, stride, padding, dilation, groups)


def average_pool(x: Tensor) -> Tensor:
    """3x3 means in steps of 2, the padding of one row and column counted, in the memory format of ``x``."""
    if _runs_kernel(x):
        return torch.ops.espkernels.average_pool.default(x)
    return reference.average_pool(x)


def global_average(x: Tensor) -> Tensor:
    """The mean of each channel: [B, C, H, W] -> [B, C, 1, 1]; half types are summed in float32."""
    if _runs_kernel(x):
        return torch.ops.espkernels.global_average.default(x)
    return reference.global_average(x)
