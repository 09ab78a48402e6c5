"""K dilated depthwise 3x3 convolutions of one map, summed hierarchically and concatenated, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, layout_of, out_size
from espkernels.triton.configuration import Tile, pyramid_tile
from espkernels.triton.launch import compute_type, launch, tiles, within
from espkernels.triton.taps import convolve, moved, place_channels, pointers, taps_around
from espkernels.triton.tuning import run_fastest

__all__ = ["spatial_pyramid"]


@triton.jit
def spatial_pyramid_kernel(
    x,  # [B, d, H, W]
    x_strides,  # of image, channel, row, column
    weight,  # [K, d, 3, 3], dense
    out,  # [B, K*d, H', W']
    out_strides,
    channels,  # d
    height,  # H
    width,  # W
    out_height,  # H'
    out_width,  # W'
    DILATIONS: tl.constexpr,  # K of them
    STRIDE: tl.constexpr,
    HFF: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one program
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,  # of sums
):
    """One tile of the map for all K branches, the prefix sum of the branches carried in registers.

    Bytes: d read and K*d' written a pixel (d' for the pixels of the result); the map is loaded 8 times for each run of
    equal dilations and once for the centres, all but the first time from L1. Multiply-adds: 9*K*d for each of those.
    """
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, out_height, out_width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    from_row = tl.where(inside, row * STRIDE, -(1 << 62))  # no tap of a pixel beyond the result is read
    from_column = column * STRIDE
    at = pointers(x, x_strides, image, channel, row * STRIDE, from_column)
    to = pointers(out, out_strides, image, channel, row, column)
    stored = valid[:, None] & inside[None, :]

    centre = moved(at, valid[:, None], from_row, from_column, 0, 0, height, width, x_strides[2], x_strides[3], TYPE)
    sum = tl.zeros_like(centre)
    for k in tl.static_range(len(DILATIONS)):
        if k == 0 or DILATIONS[k] != DILATIONS[k - 1]:
            taps = taps_around(
                at, centre, valid[:, None], from_row, from_column, height, width, x_strides[2], x_strides[3],
                DILATIONS[k], TYPE,
            )  # fmt: skip
        branch = convolve(taps, weight + (k * channels + channel) * 9, valid, TYPE)
        if HFF:
            sum += branch
        else:
            sum = branch
        tl.store(to + tl.full((), k, tl.int64) * channels * out_strides[1], sum.to(out.dtype.element_ty), mask=stored)


def spatial_pyramid(x: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool) -> Tensor:
    """x [B, d, H, W], weight [K, d, 3, 3] -> [B, K*d, H', W'] in the format of ``x``."""
    batch, channels, height, width = x.shape
    out = empty_map(x, len(dilations) * channels, out_size(height, stride), out_size(width, stride))
    size = out.shape[2], out.shape[3]
    dilations, (stride,) = within(dilations, height, width), within([stride], height, width)
    filters = weight.contiguous()

    def start(tile: Tile) -> None:
        launch(
            spatial_pyramid_kernel, batch * tiles(tile, channels, *size),
            x, x.stride(), filters, out, out.stride(), channels, height, width, *size,
            DILATIONS=dilations, STRIDE=stride, HFF=hff, CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns,
            TYPE=compute_type(x), warps=tile.warps,
        )  # fmt: skip

    problem = ("spatial_pyramid", x.shape, x.stride(), x.dtype, x.device, dilations, stride)
    run_fastest(problem, pyramid_tile(channels, *size, layout_of(x) == torch.channels_last), start)
    return out
