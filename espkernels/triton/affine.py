"""Batch norm, residual, shortcut and PReLU of a map that no product makes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_pixels
from espkernels.triton.checks import check_map, check_tensor, check_vectors
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.launch import compute_type, dense_vector, launch, tiles
from espkernels.triton.taps import place_channels, pointers
from espkernels.triton.unit_output import Shortcut, finish

__all__ = ["affine", "run"]


@triton.jit
def affine_kernel(
    x,  # [B, C, H, W]
    x_strides,  # of image, channel, row, column
    scale,  # [C], or None; so shift and slope
    shift,
    residual,  # [B, C, H, W], or None
    residual_strides,
    slope,
    shortcut,  # of a down-sampler, or None
    out,  # [B, C, H, W]
    out_strides,
    channels,
    height,
    width,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile of the map. Bytes: each number read and written once, the residual read once."""
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, height, width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < height) & (column < width)
    at = pointers(x, x_strides, image, channel, row, column)
    value = tl.load(at, mask=valid[:, None] & inside[None, :], other=0).to(TYPE)
    finish(
        value, channel, valid, image, row, column, inside, out, out_strides, TYPE,
        scale=scale, shift=shift, slope=slope, residual=residual, residual_strides=residual_strides, shortcut=shortcut,
    )  # fmt: skip


def affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None
) -> Tensor:
    """x, residual [B, C, H, W] -> the same in channels_last."""
    check_map("x", x)
    check_tensor("residual", residual, x, x.shape)
    check_vectors(x, x.shape[1], scale=scale, shift=shift, slope=slope)
    out = empty_pixels(x, *x.shape[1:])
    run(x, scale, shift, residual, slope, out)
    return out


def run(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None, out: Tensor,
    shortcut: Shortcut | None = None,
) -> None:  # fmt: skip
    """Writes the map to ``out`` [B, C, H, W], of any strides."""
    batch, channels, height, width = x.shape
    tile = pyramid_tile(channels, height, width, True)
    launch(
        affine_kernel, batch * tiles(tile, channels, height, width),
        x, x.stride(), dense_vector(scale), dense_vector(shift),
        residual, None if residual is None else residual.stride(), dense_vector(slope), shortcut,
        out, out.stride(), channels, height, width,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
