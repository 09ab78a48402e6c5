"""K dilated depthwise 3x3 convolutions of one map, summed hierarchically and concatenated, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, layout_of, out_size
from espkernels.triton.configuration import Tile, pyramid_tile, sums_tile
from espkernels.triton.launch import compute_type, launch, tiles, within
from espkernels.triton.moments import Moments, leave_moments, room_for_moments
from espkernels.triton.normalise import Norm, loaded
from espkernels.triton.taps import convolve, moved, place_channels, pointers, taps_around, tile_number
from espkernels.triton.tuning import run_fastest

__all__ = ["normalised_pyramid", "spatial_pyramid"]


@triton.jit
def spatial_pyramid_kernel(
    x,  # [B, d, H, W]
    x_strides,  # of image, channel, row, column
    weight,  # [K, d, 3, 3], dense
    out,  # [B, K*d, H', W']
    out_strides,
    norm,  # of x, or None: x is read as it is
    moments,  # of out, or None
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
    tile = tile_number(program, image, out_height, out_width, ROWS, COLUMNS)
    numbers = None
    if norm is not None:
        numbers = loaded(norm, channel[:, None], valid[:, None], TYPE)

    centre = moved(
        at, valid[:, None], from_row, from_column, 0, 0, height, width, x_strides[2], x_strides[3], TYPE, numbers
    )
    sum = tl.zeros_like(centre)
    for k in tl.static_range(len(DILATIONS)):
        if k == 0 or DILATIONS[k] != DILATIONS[k - 1]:
            taps = taps_around(
                at, centre, valid[:, None], from_row, from_column, height, width, x_strides[2], x_strides[3],
                DILATIONS[k], TYPE, numbers,
            )  # fmt: skip
        branch = convolve(taps, weight + (k * channels + channel) * 9, valid, TYPE)
        if HFF:
            sum += branch
        else:
            sum = branch
        written = sum.to(out.dtype.element_ty)
        tl.store(to + tl.full((), k, tl.int64) * channels * out_strides[1], written, mask=stored)
        if moments is not None:
            concatenated = k * channels + channel
            leave_moments(moments, written.to(TYPE), concatenated, valid, inside, tile, len(DILATIONS) * channels, TYPE)


def spatial_pyramid(x: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool) -> Tensor:
    """x [B, d, H, W], weight [K, d, 3, 3] -> [B, K*d, H', W'] in the format of ``x``."""
    out = empty_map(x, len(dilations) * x.shape[1], out_size(x.shape[2], stride), out_size(x.shape[3], stride))

    def start(tile: Tile) -> None:
        _run(x, weight, dilations, stride, hff, out, tile, None, None)

    problem = ("spatial_pyramid", x.shape, x.stride(), x.dtype, x.device, tuple(dilations), stride)
    run_fastest(
        problem, pyramid_tile(x.shape[1], out.shape[2], out.shape[3], layout_of(x) == torch.channels_last), start
    )
    return out


def normalised_pyramid(
    x: Tensor, norm: Norm, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool, out: Tensor, measured: bool
) -> Moments | None:
    """Writes the pyramid of x [B, d, H, W] behind ``norm`` to ``out`` [B, K*d, H', W']; its moments if ``measured``."""
    tile = sums_tile(x.shape[1], out.shape[2], out.shape[3], layout_of(x) == torch.channels_last)
    moments = room_for_moments(x, x.shape[0] * tiles(tile, 1, *out.shape[2:]), out.shape[1]) if measured else None
    _run(x, weight, dilations, stride, hff, out, tile, norm, moments)
    return moments


def _run(
    x: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool, out: Tensor, tile: Tile,
    norm: Norm | None, moments: Moments | None,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    size = out.shape[2], out.shape[3]
    launch(
        spatial_pyramid_kernel, batch * tiles(tile, channels, *size),
        x, x.stride(), weight.contiguous(), out, out.stride(), norm, moments, channels, height, width, *size,
        DILATIONS=within(dilations, height, width), STRIDE=within([stride], height, width)[0], HFF=hff,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
