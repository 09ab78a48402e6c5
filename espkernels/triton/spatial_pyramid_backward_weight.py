"""Gradient of the spatial pyramid for its weights, in two stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of
from espkernels.triton.configuration import sums_tile
from espkernels.triton.launch import compute_type, launch, tiles, within
from espkernels.triton.normalise import Norm, loaded
from espkernels.triton.partial_sums import add_partials
from espkernels.triton.taps import moved, place_channels, pointers, taps_around, tile_number

__all__ = ["spatial_pyramid_backward_weight"]


@triton.jit
def spatial_pyramid_backward_weight_kernel(
    grad,  # [B, K*d, H', W']
    grad_strides,  # of image, channel, row, column
    x,  # [B, d, H, W]
    x_strides,
    norm,  # of x, or None: x is read as it is
    partials,  # [B * tiles of an image, K, d, 3, 3]
    channels,  # d
    height,  # H
    width,  # W
    out_height,  # H'
    out_width,  # W'
    DILATIONS: tl.constexpr,  # K of them
    STRIDE: tl.constexpr,
    HFF: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The sums of one tile: for tap t of branch k, over its pixels, the gradient of the branch times the moved input.

    The gradient of a branch is the suffix sum of those of the outputs, carried in a register from the last.
    Bytes: K*d' + d read a pixel, and 9*K*d partial sums written a tile. Multiply-adds: those of the forward pass.
    """
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, out_height, out_width, CHANNELS, ROWS, COLUMNS)
    tile = tile_number(program, image, out_height, out_width, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    from_row = row * STRIDE
    from_column = column * STRIDE
    at = pointers(x, x_strides, image, channel, from_row, from_column)
    grad_at = pointers(grad, grad_strides, image, channel, row, column)
    # Where the gradient ends the input is not read either: infinity times zero would be a NaN.
    needed = valid[:, None] & inside[None, :]
    to = partials + tile * len(DILATIONS) * channels * 9 + channel * 9

    numbers = None
    if norm is not None:
        numbers = loaded(norm, channel[:, None], valid[:, None], TYPE)

    centre = moved(at, needed, from_row, from_column, 0, 0, height, width, x_strides[2], x_strides[3], TYPE, numbers)
    suffix = tl.zeros_like(centre)
    for k in tl.static_range(len(DILATIONS) - 1, -1, -1):
        step = tl.full((), k, tl.int64) * channels
        branch = tl.load(grad_at + step * grad_strides[1], mask=needed, other=0).to(TYPE)
        if HFF:
            suffix += branch
        else:
            suffix = branch
        if k == len(DILATIONS) - 1 or DILATIONS[k] != DILATIONS[k + 1]:
            taps = taps_around(
                at, centre, needed, from_row, from_column, height, width, x_strides[2], x_strides[3],
                DILATIONS[k], TYPE, numbers,
            )  # fmt: skip
        for t in tl.static_range(9):
            tl.store(to + step * 9 + t, tl.sum(suffix * taps[t], axis=1), mask=valid)


def spatial_pyramid_backward_weight(
    grad: Tensor, x: Tensor, dilations: Sequence[int], stride: int, hff: bool, norm: Norm | None = None
) -> Tensor:
    """grad [B, K*d, H', W'], x [B, d, H, W], which the pyramid read behind ``norm`` -> [K, d, 3, 3], dense."""
    batch, channels, height, width = x.shape
    size = grad.shape[2], grad.shape[3]
    tile = sums_tile(channels, *size, layout_of(x) == torch.channels_last)
    in_image = tiles(tile, 1, *size)
    grad_weight = x.new_empty((len(dilations), channels, 3, 3))
    type_of_sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = torch.empty((batch * in_image, *grad_weight.shape), dtype=type_of_sums, device=x.device)
    launch(
        spatial_pyramid_backward_weight_kernel, batch * tiles(tile, channels, *size),
        grad, grad.stride(), x, x.stride(), norm, partials, channels, height, width, *size,
        DILATIONS=within(dilations, height, width), STRIDE=within([stride], height, width)[0], HFF=hff,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    add_partials(partials, grad_weight)
    return grad_weight
