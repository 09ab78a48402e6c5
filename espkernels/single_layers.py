"""Single layers around the units on this library's operators, where that is the same thing as calling them.

What :mod:`espkernels.fused_unit` says of hooks and other classes holds here too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espkernels import backends, inference
from espkernels.fused_unit import convolves, hooked, is_global_average
from espkernels.layout import is_narrow, layout_of

__all__ = ["run"]


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; of a map [B, C, H, W], means of whole channels and convolutions in many groups are our operators.

    Behind torch's own mean, the gradient of ``x`` is a contiguous map whatever the format of ``x``, and so is its sum
    with those of other readers: all layers in front get it so. Ours is a view of one number a channel.
    """
    if x.dim() == 4 and x.numel() and not backends.runs_reference(x.device):
        if is_global_average(layer) and not hooked(layer):
            return inference.global_average(x)
        if _is_narrow_convolution(layer, x):
            return inference.convolution(x, layer.weight, None, None, 1, 1, 1, layer.groups)  # type: ignore[arg-type]
    result: Tensor = layer(x)
    return result


def _is_narrow_convolution(layer: nn.Module, x: Tensor) -> bool:
    """Whether ``layer`` is a 3x3 convolution in many groups of few channels, and ``x`` what its kernels read.

    Not a depthwise one: with gradients torch's takes as long.
    """
    if not convolves(layer, 3, 1, 1) or not is_narrow(layer.weight, 1, 1, 1, layer.groups):  # type: ignore[arg-type]
        return False
    if layer.in_channels == layer.out_channels == layer.groups:
        return False
    same = x.shape[1] == layer.in_channels and x.dtype == layer.weight.dtype
    return same and layout_of(x) == torch.channels_last and not torch.is_autocast_enabled(x.device.type)
