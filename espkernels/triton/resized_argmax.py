"""The class of every pixel: logits resized and compared without the resized map, which for 20 classes is 80 bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.triton.bilinear import corners, mixed
from espkernels.triton.checks import check_map, check_size
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.launch import compute_type, launch, tiles
from espkernels.triton.taps import place

__all__ = ["resized_argmax"]


@triton.jit
def resized_argmax_kernel(
    x,  # [B, C, H, W]
    x_strides,  # of image, channel, row, column
    out,  # [B, H', W'], dense
    channels,
    height,
    width,
    out_height,
    out_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile of the result, class after class. Bytes: the logits read, 1 or 8 written a pixel of the result."""
    row, column, image = place(tl.program_id(0).to(tl.int64), out_height, out_width, ROWS, COLUMNS)
    inside = (row < out_height) & (column < out_width)
    best = tl.zeros((1, ROWS * COLUMNS), TYPE)
    winner = tl.zeros((1, ROWS * COLUMNS), tl.int64)
    around = corners(row, column, height, width, out_height, out_width, x_strides[2], x_strides[3], TYPE)
    first = x + image * x_strides[0] + tl.zeros((1,), tl.int64)
    for c in range(channels):
        value = mixed(first, around, inside[None, :], TYPE)
        # Of equal numbers the first, and NaN before every number: nothing is larger than a NaN that came first.
        larger = (c == 0) | ((value > best) | (value != value)) & (best == best)
        best = tl.where(larger, value, best)
        winner = tl.where(larger, c, winner)
        first += x_strides[1]
    to = out + (image * out_height + row) * out_width + column
    tl.store(to[None, :], winner.to(out.dtype.element_ty), mask=inside[None, :])


def resized_argmax(x: Tensor, height: int, width: int, wide: bool = False) -> Tensor:
    """x [B, C, H, W] -> [B, height, width] uint8, or int64 where ``wide`` or C is above 256."""
    check_map("x", x)
    check_size(height, width)
    batch, channels = x.shape[:2]
    dtype = torch.int64 if wide or channels > 256 else torch.uint8
    out = torch.empty((batch, height, width), dtype=dtype, device=x.device)
    tile = pyramid_tile(1, height, width, True)
    launch(
        resized_argmax_kernel, batch * tiles(tile, 1, height, width),
        x, x.stride(), out, channels, *x.shape[2:], height, width,
        ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    return out
