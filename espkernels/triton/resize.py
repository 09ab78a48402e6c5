"""Bilinear resizing with corners aligned, and the merge of a decoder in the same pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_pixels
from espkernels.triton.bilinear import corners, mixed
from espkernels.triton.checks import check_map, check_size, check_tensor, check_vectors
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.launch import compute_type, dense_vector, launch, tiles
from espkernels.triton.taps import place_channels, pointers
from espkernels.triton.unit_output import finish

__all__ = ["resize", "run"]


@triton.jit
def resize_kernel(
    x,  # [B, C, H, W]
    x_strides,  # of image, channel, row, column
    skip,  # [B, C, H', W'], or None
    skip_strides,
    gate,  # [B, C], before its sigmoid, or None
    gate_strides,  # of image and channel
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
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile of the result. Bytes: the map, the skip connection and the result once each."""
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, out_height, out_width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    needed = valid[:, None] & inside[None, :]
    around = corners(row, column, height, width, out_height, out_width, x_strides[2], x_strides[3], TYPE)
    value = mixed(x + image * x_strides[0] + channel * x_strides[1], around, needed, TYPE)
    if skip is not None:
        at = pointers(skip, skip_strides, image, channel, row, column)
        other = tl.load(at, mask=needed, other=0).to(TYPE)
        if gate is not None:
            gate_at = gate + image * gate_strides[0] + channel * gate_strides[1]
            other *= tl.sigmoid(tl.load(gate_at, mask=valid, other=0).to(TYPE))[:, None]
        value += other
    finish(
        value, channel, valid, image, row, column, inside, out, out_strides, TYPE,
        scale=scale, shift=shift, slope=slope,
    )  # fmt: skip


def resize(
    x: Tensor,
    height: int,
    width: int,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """x [B, C, H, W], skip [B, C, height, width], gate [B, C, 1, 1] -> [B, C, height, width] in channels_last."""
    check_map("x", x)
    check_size(height, width)
    batch, channels = x.shape[:2]
    check_tensor("skip", skip, x, (batch, channels, height, width))
    check_tensor("gate", gate, x, (batch, channels, 1, 1))
    check_vectors(x, channels, scale=scale, shift=shift, slope=slope)
    out = empty_pixels(x, channels, height, width)
    run(x, skip, gate, scale, shift, slope, out)
    return out


def run(
    x: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the resized and merged map to ``out`` [B, C, H', W'], of any strides."""
    batch, channels, height, width = x.shape
    size = out.shape[2], out.shape[3]
    tile = pyramid_tile(channels, *size, True)
    launch(
        resize_kernel, batch * tiles(tile, channels, *size), x, x.stride(),
        skip, None if skip is None else skip.stride(), gate, None if gate is None else gate.stride()[:2],
        dense_vector(scale), dense_vector(shift), dense_vector(slope), out, out.stride(),
        channels, height, width, *size,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
