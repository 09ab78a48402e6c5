"""The gradient in front of the PReLU that ends a unit, which is also the residual's, and the sums for its norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of
from espkernels.triton.configuration import sums_tile
from espkernels.triton.launch import compute_type, launch, tiles
from espkernels.triton.norm_sums import BehindPrelu, in_front_of_prelu, room_for_sums
from espkernels.triton.taps import place_channels, pointers, tile_number

__all__ = ["normalised_output_backward"]


@triton.jit
def normalised_output_backward_kernel(
    grad,  # [B, C, H, W]
    grad_strides,  # of image, channel, row, column
    behind,
    residual,  # [B, C, H, W], or None
    residual_strides,
    grad_x,  # [B, C, H, W], or None: only the sums are wanted
    grad_x_strides,
    channels,
    height,
    width,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile. Bytes: two maps read, three with a residual, and one written."""
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, height, width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < height) & (column < width)
    there = valid[:, None] & inside[None, :]
    tile = tile_number(program, image, height, width, ROWS, COLUMNS)
    value = tl.load(pointers(grad, grad_strides, image, channel, row, column), mask=there, other=0).to(TYPE)
    map_at = pointers(behind.map, behind.strides, image, channel, row, column)
    residual_at = residual
    if residual is not None:
        residual_at = pointers(residual, residual_strides, image, channel, row, column)
    value = in_front_of_prelu(value, map_at, residual_at, behind, channel, valid, inside, tile, channels, TYPE)
    if grad_x is not None:
        to = pointers(grad_x, grad_x_strides, image, channel, row, column)
        tl.store(to, value.to(grad_x.dtype.element_ty), mask=there)


def normalised_output_backward(
    grad: Tensor, behind: BehindPrelu, residual: Tensor | None, grad_x: Tensor | None
) -> Tensor:
    """Writes the gradient in front of the PReLU to ``grad_x`` [B, C, H, W], where given; returns the sums."""
    batch, channels, height, width = grad.shape
    tile = sums_tile(channels, height, width, layout_of(behind.map) == torch.channels_last)
    in_image = tiles(tile, 1, height, width)
    sums = room_for_sums(grad, batch * in_image, channels)
    launch(
        normalised_output_backward_kernel, batch * tiles(tile, channels, height, width),
        grad, grad.stride(), behind._replace(sums=sums), residual, None if residual is None else residual.stride(),
        grad_x, None if grad_x is None else grad_x.stride(), channels, height, width,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(grad), warps=tile.warps,
    )  # fmt: skip
    return sums
