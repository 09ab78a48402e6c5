"""The gradient between a batch norm and its PReLU, and what the norm needs of it, taken where that gradient is made.

The second stage joins the sums of the tiles in a fixed order and turns them into gradients of the norm's vectors and
the numbers of its own gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import vector_dtype
from espkernels.triton.epilogue import prelu_affine
from espkernels.triton.launch import flat_map

__all__ = ["BehindPrelu", "in_front_of_prelu", "room_for_sums"]


class BehindPrelu(NamedTuple):
    """The norm and PReLU that a gradient must pass on its way to their map."""

    map: Any  # [B, C, H, W]
    strides: Any
    scale: Any  # [C]; so the others
    shift: Any
    slope: Any  # None: there is no PReLU
    mean: Any
    sums: Any = None  # [tiles, 3, C]

    def flat(self, layout: torch.memory_format, sums: Tensor) -> BehindPrelu:
        """The same for a kernel that sees maps as :func:`espkernels.triton.launch.flat_map` makes them."""
        flat = flat_map(self.map, layout)
        return self._replace(map=flat, strides=flat.stride(), sums=sums)


def room_for_sums(x: Tensor, tiles: int, channels: int, numbers: int = 3) -> Tensor:
    """[tiles, numbers, C]. Bytes: 4 a number, channel and tile."""
    return torch.empty((tiles, numbers, channels), dtype=vector_dtype(x.dtype), device=x.device)


@triton.jit
def in_front_of_prelu(
    grad,  # [C, P], in TYPE: behind the PReLU
    at,  # pointers [C, P] to the norm's map
    residual,  # pointers [C, P] to what was added to the normalised map, or None
    behind,
    channel,  # [C]
    valid,  # [C]
    inside,  # [P]
    tile,
    channels,
    TYPE: tl.constexpr,
):
    """The gradient between norm and PReLU. Leaves the tile's sums of it, of it times (map - mean), and of the slope's.

    Bytes: the map once.
    """
    there = valid[:, None] & inside[None, :]
    grad = tl.where(there, grad, 0)
    map = tl.load(at, mask=there, other=0).to(TYPE)
    to = behind.sums + tile * 3 * channels + channel
    if behind.slope is not None:
        value = prelu_affine(map, behind.scale, behind.shift, None, channel, valid, TYPE)
        if residual is not None:
            value += tl.load(residual, mask=there, other=0).to(TYPE)
        tl.store(to + 2 * channels, tl.sum(tl.where(there & (value <= 0), grad * value, 0), axis=1), mask=valid)
        slope = tl.load(behind.slope + channel, mask=valid, other=0).to(TYPE)[:, None]
        grad = tl.where(value > 0, grad, grad * slope)
    mean = tl.load(behind.mean + channel, mask=valid, other=0)
    centred = tl.where(there, map - mean.to(TYPE)[:, None], 0)
    tl.store(to, tl.sum(grad, axis=1), mask=valid)
    tl.store(to + channels, tl.sum(grad * centred, axis=1), mask=valid)
    return grad
