"""3x3 means in steps of 2, with what ends a down-sampler's half of the result in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, layout_of, out_size
from espkernels.triton.checks import check_map
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.division import divided
from espkernels.triton.launch import compute_type, dense_vector, launch, tiles
from espkernels.triton.taps import moved, place_channels, pointers, taps_around
from espkernels.triton.unit_output import Shortcut, finish

__all__ = ["average_pool", "run"]


@triton.jit
def pooled_kernel(
    x,  # [B, M, H, W]
    x_strides,  # of image, channel, row, column
    slope,  # [M], or None
    shortcut,  # of a down-sampler, or None
    out,  # [B, M, H', W']
    out_strides,
    channels,  # M
    height,
    width,
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The 3x3 average of every second pixel, always of nine, plus the shortcut, activated.

    Bytes: 4*M read and M written a pixel of the result; multiply-adds: M * (9 + few).
    """
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, out_height, out_width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    needed = valid[:, None] & inside[None, :]
    at = pointers(x, x_strides, image, channel, 2 * row, 2 * column)
    centre = moved(at, needed, 2 * row, 2 * column, 0, 0, height, width, x_strides[2], x_strides[3], TYPE)
    taps = taps_around(at, centre, needed, 2 * row, 2 * column, height, width, x_strides[2], x_strides[3], 1, TYPE)
    sum = taps[0]
    for t in tl.static_range(1, 9):
        sum += taps[t]
    finish(
        divided(sum, tl.full((), 9, TYPE), TYPE), channel, valid, image, row, column, inside, out, out_strides, TYPE,
        slope=slope, shortcut=shortcut,
    )  # fmt: skip


def average_pool(x: Tensor) -> Tensor:
    """x [B, M, H, W] -> [B, M, H', W'] in the format of ``x``."""
    check_map("x", x)
    out = empty_map(x, x.shape[1], out_size(x.shape[2], 2), out_size(x.shape[3], 2))
    run(x, None, None, out)
    return out


def run(x: Tensor, slope: Tensor | None, shortcut: Shortcut | None, out: Tensor) -> None:
    """Writes the means to ``out`` [B, M, H', W'], of any strides, plus the shortcut and activated where asked."""
    batch, channels, height, width = x.shape
    size = out.shape[2], out.shape[3]
    tile = pyramid_tile(channels, *size, layout_of(x) == torch.channels_last)
    launch(
        pooled_kernel, batch * tiles(tile, channels, *size),
        x, x.stride(), dense_vector(slope), shortcut, out, out.stride(), channels, height, width, *size,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
