"""The strided unit for inference: pooled input beside a strided EESP unit, plus the long-range shortcut, activated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of, out_size
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.eesp import run as run_eesp
from espkernels.triton.launch import Shortcut, compute_type, dense_vector, launch, tiles
from espkernels.triton.taps import moved, place, taps_around
from espkernels.triton.unit_output import finish

__all__ = ["down_sampler"]


@triton.jit
def pooled_kernel(
    x,  # [B, M, H, W]
    x_strides,  # of image, channel, row, column
    slope,  # [M]
    picture,  # [B, few, H', W'], or None
    picture_strides,
    picture_channels,
    shortcut_weight,  # [M, few]
    shortcut_shift,  # [M]
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
    row, column, rest = place(tl.program_id(0).to(tl.int64), out_height, out_width, ROWS, COLUMNS)
    blocks = tl.cdiv(channels, CHANNELS)
    channel = rest % blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = rest // blocks
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    needed = valid[:, None] & inside[None, :]
    at = x + image * x_strides[0] + channel[:, None] * x_strides[1]
    at += (2 * row * x_strides[2] + 2 * column * x_strides[3])[None, :]
    centre = moved(at, needed, 2 * row, 2 * column, 0, 0, height, width, x_strides[2], x_strides[3], TYPE)
    taps = taps_around(at, centre, needed, 2 * row, 2 * column, height, width, x_strides[2], x_strides[3], 1, TYPE)
    sum = taps[0]
    for t in tl.static_range(1, 9):
        sum += taps[t]
    finish(
        sum / 9, channel, valid, image, row, column, inside, None, None, None, None, slope,
        picture, picture_strides, picture_channels, shortcut_weight, shortcut_shift, out, out_strides, TYPE,
    )  # fmt: skip


def down_sampler(
    x: Tensor, image: Tensor | None, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor,
    reduce_slope: Tensor, weight: Tensor, dilations: Sequence[int], pyramid_scale: Tensor, pyramid_shift: Tensor,
    pyramid_slope: Tensor, expand_weight: Tensor, groups: int, shift: Tensor, shortcut_weight: Tensor | None,
    shortcut_shift: Tensor | None, slope: Tensor, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, M, H, W], image [B, few, H', W'] -> [B, M+N, H', W'] in the format of ``x``; ``packed`` is for CPUs.

    Both halves write to their channels of the result, so nothing is concatenated. Bytes: x is read twice, the second
    time from L2 where it fits; each number of the result is written once and the image read with it.
    """
    batch, channels, height, width = x.shape
    size = out_size(height, 2), out_size(width, 2)
    shape = (batch, channels + expand_weight.shape[0], *size)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pooled, expanded = out[:, :channels], out[:, channels:]

    def shortcut(first: int, last: int | None) -> Shortcut:
        if image is None or shortcut_weight is None:
            return Shortcut()
        shifts = shortcut_weight.new_zeros(shape[1]) if shortcut_shift is None else shortcut_shift
        weights = shortcut_weight[first:last].contiguous()
        return Shortcut(image, image.stride(), image.shape[1], weights, shifts[first:last].contiguous())

    tile = pyramid_tile(channels, *size, layout_of(x) == torch.channels_last)
    launch(
        pooled_kernel, batch * tiles(tile, channels, *size),
        x, x.stride(), dense_vector(slope[:channels]), *shortcut(0, channels), pooled, pooled.stride(),
        channels, height, width, *size,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    run_eesp(
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, dilations,
        (pyramid_scale, pyramid_shift, pyramid_slope), expand_weight, groups, shift, None, slope[channels:], 2, hff,
        shortcut(channels, None), expanded,
    )  # fmt: skip
    return out
