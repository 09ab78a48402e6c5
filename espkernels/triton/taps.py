"""The core of every depthwise pass: a tile [C channels, P pixels] of a map, moved by the nine taps of one dilation.

A tap is a load at a shifted address, zero outside the map. DRAM sends each pixel once; the other taps find it in L1 or
L2. The centre is the same pixel for every dilation, so it is loaded once for all branches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from espkernels.triton.normalise import normalised

__all__ = ["convolve", "flat_pointers", "moved", "place", "place_channels", "pointers", "taps_around", "tile_number"]


@triton.jit
def place(program, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns [P] of tile ``program`` of a map in int64, and what is left of the number after the tiles.

    P = ROWS * COLUMNS, both powers of two: no division by a size that is not known when compiling.
    """
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = (program // across) % down * ROWS + pixel // COLUMNS
    column = program % across * COLUMNS + pixel % COLUMNS
    return row, column, program // across // down


@triton.jit
def place_channels(program, channels, height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channels [C], image, rows [P] and columns [P] of tile ``program`` of maps [channels, height, width]."""
    row, column, rest = place(program, height, width, ROWS, COLUMNS)
    blocks = tl.cdiv(channels, CHANNELS)
    return rest % blocks * CHANNELS + tl.arange(0, CHANNELS), rest // blocks, row, column


@triton.jit
def tile_number(program, group, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which tile of all groups, say images, ``program`` has: where its sums go. The blocks of channels share it."""
    in_group = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    return group * in_group + program % in_group


@triton.jit
def pointers(map, strides, image, channel, row, column):
    """Where the pixels [C, P] of the channels [C] of one image lie; ``strides`` of image, channel, row, column."""
    at = map + image * strides[0] + channel[:, None] * strides[1]
    return at + (row * strides[2] + column * strides[3])[None, :]


@triton.jit
def flat_pointers(map, strides, image, channel, pixel):
    """The same of maps [images, C, pixels]; ``strides`` of image, channel, pixel."""
    return map + image * strides[0] + channel[:, None] * strides[1] + (pixel * strides[2])[None, :]


@triton.jit
def moved(
    at,  # pointers [C, P] to the pixels (row, column)
    valid,  # [C, 1], which channels there are
    row,  # [P], int64
    column,  # [P], int64
    row_shift,
    column_shift,
    height,
    width,
    row_stride,
    column_stride,
    TYPE: tl.constexpr,
    norm=None,  # numbers [C, 1] of a batch norm and PReLU, through which the map is seen
):
    """The pixels [C, P] at (row + row_shift, column + column_shift) in TYPE, zero outside the map."""
    rows_inside = (row + row_shift >= 0) & (row + row_shift < height)
    columns_inside = (column + column_shift >= 0) & (column + column_shift < width)
    # In int64 before the products: a dilation times a row may be more than 2^31 elements.
    step = tl.full((), row_shift, tl.int64) * row_stride + tl.full((), column_shift, tl.int64) * column_stride
    there = valid & (rows_inside & columns_inside)[None, :]
    pixels = tl.load(at + step, mask=there, other=0).to(TYPE)
    if norm is not None:
        pixels = normalised(pixels, there, norm)
    return pixels


@triton.jit
def taps_around(
    at, centre, valid, row, column, height, width, row_stride, column_stride, DILATION: tl.constexpr,
    TYPE: tl.constexpr, norm=None,
):  # fmt: skip
    """The nine tiles [C, P] that a 3x3 filter of this dilation meets, row by row; arguments as in ``moved``."""
    D: tl.constexpr = DILATION
    return (
        moved(at, valid, row, column, -D, -D, height, width, row_stride, column_stride, TYPE, norm),
        moved(at, valid, row, column, -D, 0, height, width, row_stride, column_stride, TYPE, norm),
        moved(at, valid, row, column, -D, D, height, width, row_stride, column_stride, TYPE, norm),
        moved(at, valid, row, column, 0, -D, height, width, row_stride, column_stride, TYPE, norm),
        centre,
        moved(at, valid, row, column, 0, D, height, width, row_stride, column_stride, TYPE, norm),
        moved(at, valid, row, column, D, -D, height, width, row_stride, column_stride, TYPE, norm),
        moved(at, valid, row, column, D, 0, height, width, row_stride, column_stride, TYPE, norm),
        moved(at, valid, row, column, D, D, height, width, row_stride, column_stride, TYPE, norm),
    )


@triton.jit
def convolve(
    taps,  # nine tiles [C, P]
    weight,  # pointers [C] to the filters' first numbers
    valid,  # [C], which filters there are
    TYPE: tl.constexpr,
):
    """The sum over nine taps of weight x pixel, [C, P]."""
    sum = taps[0] * tl.load(weight, mask=valid, other=0).to(TYPE)[:, None]
    for t in tl.static_range(1, 9):
        sum += taps[t] * tl.load(weight + t, mask=valid, other=0).to(TYPE)[:, None]
    return sum
