"""Single layers around the units on this library's operators, where that is the same thing as calling them.

What :mod:`espkernels.fused_unit` says of hooks and other classes holds here too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espkernels import backends, inference, ops
from espkernels.fused_unit import convolves, hooked, is_global_average, is_pointwise, laid_out
from espkernels.layout import is_few, is_narrow, layout_of

__all__ = ["run"]


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; of a map [B, C, H, W], means of whole channels and convolutions in groups are our operators.

    Behind torch's own mean, the gradient of ``x`` is a contiguous map whatever the format of ``x``, and so is its sum
    with those of other readers: all layers in front get it so. Ours is a view of one number a channel.

    Convolutions are those of channels_last in which torch's take longer, gradients included: 1x1 in groups, 3x3 in many
    groups of few channels that are not depthwise, and 3x3 of few channels such as an image's.
    """
    if x.dim() == 4 and x.numel() and not backends.runs_reference(x.device):
        if is_global_average(layer) and not hooked(layer):
            return inference.global_average(x)
        if type(layer) is nn.Conv2d and _reads(layer, x):
            weight, groups, stride = layer.weight, layer.groups, layer.stride[0]
            grouped = 1 < groups < max(layer.in_channels, layer.out_channels)
            if grouped and is_pointwise(layer):
                return ops.group_pointwise(x, laid_out(weight).flatten(1), groups)
            # torch's are faster for less than a vector, and on a GPU nothing was measured.
            few = x.device.type == "cpu" and is_few(weight, 1, groups) and layer.out_channels >= 8
            if (few or (grouped and is_narrow(weight, stride, 1, 1, groups))) and convolves(layer, 3, stride, 1):
                return inference.convolution(x, weight, None, None, stride, 1, 1, groups)
    result: Tensor = layer(x)
    return result


def _reads(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether ``x`` is a map of pixels of its channels and dtype, and no autocast changes that."""
    same = x.shape[1] == layer.in_channels and x.dtype == layer.weight.dtype
    return same and layout_of(x) == torch.channels_last and not torch.is_autocast_enabled(x.device.type)
