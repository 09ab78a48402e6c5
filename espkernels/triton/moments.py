"""Mean and variance of a map, taken where the map is made: each tile leaves its own, which are joined in a fixed order.

A tile's squares are taken about its own mean, so that numbers far from zero keep their variance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import vector_dtype

__all__ = ["Moments", "joined", "leave_moments", "room_for_moments"]


class Moments(NamedTuple):
    """Of each tile. Bytes: 12 a channel and tile, where the tile's map has 128 at least.

    Means in float32 would lose of a variance of 1 about 1e4 as much as 1e-4.
    """

    counts: Any  # [tiles], pixels, in the type of sums
    means: Any  # [tiles, C], float64
    squares: Any  # [tiles, C], sums of (number - mean)^2, in the type of sums


def room_for_moments(x: Tensor, tiles: int, channels: int) -> Moments:
    dtype = vector_dtype(x.dtype)
    counts, squares = (torch.empty(size, dtype=dtype, device=x.device) for size in (tiles, (tiles, channels)))
    return Moments(counts, torch.empty((tiles, channels), dtype=torch.float64, device=x.device), squares)


@triton.jit
def leave_moments(
    moments,
    value,  # [C, P], in TYPE
    channel,  # [C]
    valid,  # [C]
    inside,  # [P]
    tile,
    channels,
    TYPE: tl.constexpr,
):
    """Writes the moments of a tile; every program of a tile writes the same count."""
    there = valid[:, None] & inside[None, :]
    count = tl.sum(inside.to(TYPE), axis=0)
    mean = tl.sum(tl.where(there, value, 0), axis=1) / count
    centred = tl.where(there, value - mean[:, None], 0)
    rest = tl.sum(centred, axis=1) / count
    at = tile * channels + channel
    tl.store(moments.counts + tile, count)
    tl.store(moments.means + at, mean.to(tl.float64) + rest.to(tl.float64), mask=valid)
    tl.store(moments.squares + at, tl.sum(centred * centred, axis=1) - count * rest * rest, mask=valid)


@triton.jit
def joined(moments, channel, valid, tiles, channels, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and biased variance [C] of all tiles, in float64: TILES sums in ascending order, which then add up."""
    tile = tl.arange(0, TILES)
    counts = tl.zeros((TILES,), tl.float64)
    means = tl.zeros((TILES, CHANNELS), tl.float64)
    for first in range(0, tiles, TILES):
        number = (first + tile).to(tl.int64)
        needed = number < tiles
        count = tl.load(moments.counts + number, mask=needed, other=0).to(tl.float64)
        at = moments.means + number[:, None] * channels + channel[None, :]
        counts += count
        means += count[:, None] * tl.load(at, mask=needed[:, None] & valid[None, :], other=0)
    pixels = tl.sum(counts, axis=0)
    mean = tl.sum(means, axis=0) / pixels
    squares = tl.zeros((TILES, CHANNELS), tl.float64)
    for first in range(0, tiles, TILES):
        number = (first + tile).to(tl.int64)
        there = (number < tiles)[:, None] & valid[None, :]
        at = number[:, None] * channels + channel[None, :]
        count = tl.load(moments.counts + number, mask=number < tiles, other=0).to(tl.float64)
        away = tl.load(moments.means + at, mask=there, other=0) - mean[None, :]
        squares += tl.load(moments.squares + at, mask=there, other=0).to(tl.float64)
        squares += count[:, None] * away * away
    return mean, tl.sum(squares, axis=0) / pixels
