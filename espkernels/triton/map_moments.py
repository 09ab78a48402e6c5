"""Mean and variance of a map that no kernel of this library makes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of
from espkernels.triton.configuration import sums_tile
from espkernels.triton.launch import compute_type, launch, tiles
from espkernels.triton.moments import Moments, leave_moments, room_for_moments
from espkernels.triton.taps import place_channels, pointers, tile_number

__all__ = ["map_moments"]


@triton.jit
def map_moments_kernel(
    x,  # [B, C, H, W]
    x_strides,  # of image, channel, row, column
    moments,
    channels,
    height,
    width,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile. Bytes: each number read once."""
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, height, width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < height) & (column < width)
    at = pointers(x, x_strides, image, channel, row, column)
    value = tl.load(at, mask=valid[:, None] & inside[None, :], other=0).to(TYPE)
    tile = tile_number(program, image, height, width, ROWS, COLUMNS)
    leave_moments(moments, value, channel, valid, inside, tile, channels, TYPE)


def map_moments(x: Tensor) -> Moments:
    """Those of the channels of x [B, C, H, W], tile by tile."""
    batch, channels, height, width = x.shape
    tile = sums_tile(channels, height, width, layout_of(x) == torch.channels_last)
    moments = room_for_moments(x, batch * tiles(tile, 1, height, width), channels)
    launch(
        map_moments_kernel, batch * tiles(tile, channels, height, width),
        x, x.stride(), moments, channels, height, width,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    return moments
