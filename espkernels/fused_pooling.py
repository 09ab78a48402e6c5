"""The merge of efficient pyramid pooling on this library's operators, where that is the same thing as its modules.

What :mod:`espkernels.fused_unit` says of hooks and other classes holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from espkernels import backends
from espkernels.checks import MAX_BRANCHES
from espkernels.fused_norm import norm_prelu
from espkernels.fused_unit import convolves, hooked
from espkernels.layout import layout_of

__all__ = ["PyramidPooling", "fits", "merged", "shuffled_convolution"]


class PyramidPooling(Protocol):
    """A module with the parts of efficient pyramid pooling."""

    merge_layer: Any
    merge_types: tuple[type[nn.Module], type[nn.Module]]  # of its shuffle and of what merges


def shuffled_convolution(z: Tensor, weight: Tensor) -> Tensor:
    """A grouped 3x3 convolution behind a channel shuffle, differentiable any number of times; nothing is shuffled.

    Output c of p reads channel c of each of S maps: the sum of S depthwise convolutions, the adjoint of a spatial
    pyramid without HFF. Its gradients are such a pyramid and one of its gradients. Forward and backward go over 6 S
    and 4 of its maps of p channels; with the shuffle, which reads and writes all S both ways, over 10 S and 4.

    Args:
        z: the maps, one behind the other [B, S*p, H, W], on a device with kernels; S at most 8.
        weight: [p, S, 3, 3], of the dtype of ``z``.

    Returns:
        [B, p, H, W] in the memory format of ``z``.
    """
    dilations = [1] * weight.shape[1]
    filters = weight.transpose(0, 1).flip(2, 3)
    return torch.ops.espkernels.spatial_pyramid_backward_input.default(
        z, filters, dilations, 1, False, z.shape[2], z.shape[3]
    )


def fits(block: PyramidPooling, maps: Sequence[Tensor]) -> bool:
    """Whether :func:`merged` does with ``maps`` what the merge layer would do, on kernels of ours.

    Only in channels_last, where a shuffle is a pass over the map and torch's convolution of many groups takes longest.
    """
    layer, first = block.merge_layer, maps[0]
    if backends.runs_reference(first.device) or len(maps) > MAX_BRANCHES or first.numel() == 0:
        return False
    if any(layout_of(map_) != torch.channels_last for map_ in maps) or first.shape[1] == 1:
        return False
    if len(layer) != 4 or (type(layer[1]), type(layer[2])) != block.merge_types:
        return False
    shuffle, merge = layer[1], layer[2]
    convolution = merge.cbr[0]
    if len(merge.cbr) != 3 or hooked(layer, shuffle, merge, merge.cbr):
        return False
    if not convolves(convolution, 3, 1, 1) or getattr(shuffle, "groups", len(maps)) != len(maps):
        return False
    return convolution.groups == convolution.out_channels == first.shape[1] == convolution.in_channels // len(maps)


def merged(block: PyramidPooling, maps: Sequence[Tensor]) -> Tensor:
    """``block.merge_layer(torch.cat(maps, dim=1))``, without its shuffle where :func:`fits` says so."""
    concatenated = torch.cat(list(maps), dim=1)
    if not fits(block, maps):
        result: Tensor = block.merge_layer(concatenated)
        return result
    normalise, _, merge, expand = block.merge_layer
    convolution, norm, act = merge.cbr
    z, weight = normalise(concatenated), convolution.weight
    if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(z.device.type)
        z, weight = z.to(dtype), weight.to(dtype)
    return expand(norm_prelu(norm, act, shuffled_convolution(z, weight)))
