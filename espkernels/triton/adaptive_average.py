"""Means over windows that share a map out evenly: output i of n takes the inputs from floor(i * size / n) on."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_pixels
from espkernels.triton.checks import check_map, check_size
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.division import divided
from espkernels.triton.launch import compute_type, dense_vector, launch, tiles
from espkernels.triton.taps import place_channels, pointers
from espkernels.triton.unit_output import finish

__all__ = ["adaptive_average", "run"]


@triton.jit
def adaptive_average_kernel(
    x,  # [B, C, H, W]
    x_strides,  # of image, channel, row, column
    scale,  # [C], or None; so shift and slope
    shift,
    slope,
    out,  # [B, C, H', W']
    out_strides,
    channels,
    height,
    width,
    out_height,
    out_width,
    most_rows,  # of a window
    most_columns,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile of the result, its windows walked together.

    Bytes: the map read once, or where windows overlap twice, and the result written once.
    """
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, out_height, out_width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    first_row = row * height // out_height
    first_column = column * width // out_width
    rows = tl.cdiv((row + 1) * height, out_height) - first_row
    columns = tl.cdiv((column + 1) * width, out_width) - first_column
    at = pointers(x, x_strides, image, channel, first_row, first_column)
    sum = tl.zeros((CHANNELS, ROWS * COLUMNS), TYPE)
    for i in range(most_rows):
        for j in range(most_columns):
            there = inside & (i < rows) & (j < columns)
            step = tl.full((), i, tl.int64) * x_strides[2] + tl.full((), j, tl.int64) * x_strides[3]
            sum += tl.load(at + step, mask=valid[:, None] & there[None, :], other=0).to(TYPE)
    mean = divided(sum, (rows * columns).to(TYPE)[None, :], TYPE)
    finish(
        mean, channel, valid, image, row, column, inside, out, out_strides, TYPE,
        scale=scale, shift=shift, slope=slope,
    )  # fmt: skip


def adaptive_average(x: Tensor, height: int, width: int) -> Tensor:
    """x [B, C, H, W] -> [B, C, height, width] in channels_last."""
    check_map("x", x)
    check_size(height, width)
    out = empty_pixels(x, x.shape[1], height, width)
    run(x, None, None, None, out)
    return out


def run(x: Tensor, scale: Tensor | None, shift: Tensor | None, slope: Tensor | None, out: Tensor) -> None:
    """Writes the means to ``out`` [B, C, H', W'], of any strides, with an affine and a PReLU where given."""
    batch, channels, *given = x.shape
    size = out.shape[2], out.shape[3]
    tile = pyramid_tile(channels, *size, True)
    most = [_widest_window(before, after) for before, after in zip(given, size, strict=True)]
    launch(
        adaptive_average_kernel, batch * tiles(tile, channels, *size),
        x, x.stride(), dense_vector(scale), dense_vector(shift), dense_vector(slope), out, out.stride(),
        channels, *given, *size, *most,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip


def _widest_window(size: int, windows: int) -> int:
    """A window that begins within a pixel ends within one too, so that it takes one more, unless all are whole."""
    return size // windows if size % windows == 0 else -(-size // windows) + 1
