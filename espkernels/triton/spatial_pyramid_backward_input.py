"""Gradient of the spatial pyramid for its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, layout_of
from espkernels.triton.configuration import Tile, pyramid_tile, sums_tile
from espkernels.triton.launch import compute_type, launch, leaders, tiles, within
from espkernels.triton.norm_sums import BehindPrelu, in_front_of_prelu, room_for_sums
from espkernels.triton.taps import moved, place, pointers, tile_number
from espkernels.triton.tuning import run_fastest

__all__ = ["normalised_pyramid_backward_input", "spatial_pyramid_backward_input"]


@triton.jit
def spatial_pyramid_backward_input_kernel(
    grad,  # [B, K*d, H', W']
    grad_strides,  # of image, channel, row, column
    weight,  # [K, d, 3, 3], dense
    grad_x,  # [B, d, H, W]
    x_strides,
    behind,  # grad_x is the gradient behind this norm and PReLU, and shall be that between them; or None
    channels,  # d
    height,  # H
    width,  # W
    class_height,  # ceil(H / STRIDE)
    class_width,
    out_height,  # H'
    out_width,  # W'
    DILATIONS: tl.constexpr,  # K of them
    LEADERS: tl.constexpr,  # K: the first branch with the same dilation
    STRIDE: tl.constexpr,
    HFF: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile of one class of input pixels: rows STRIDE*i + a, columns STRIDE*j + b all meet the same taps.

    HFF turns around: branch j feeds outputs j..K, so its gradient is the suffix sum of theirs, carried in a register
    while one tap walks through the outputs from the last. Branches of equal dilation share that walk.
    Bytes: K*d' read and d written a pixel; a number of the gradient is loaded up to 9 * (K + 1) / 2 times, all but the
    first from L1. Multiply-adds: those of the forward pass.
    """
    program = tl.program_id(0).to(tl.int64)
    row, column, rest = place(program, class_height, class_width, ROWS, COLUMNS)
    blocks = tl.cdiv(channels, CHANNELS)
    channel = rest % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pixel_class = rest // blocks
    b = pixel_class % STRIDE
    a = pixel_class // STRIDE % STRIDE
    image = pixel_class // (STRIDE * STRIDE)
    valid = channel < channels
    branch_step = tl.full((), channels, tl.int64) * grad_strides[1]
    at = grad + image * grad_strides[0] + channel[:, None] * grad_strides[1]
    at += (row * grad_strides[2] + column * grad_strides[3])[None, :]
    filter = weight + channel * 9

    sum = tl.zeros((CHANNELS, ROWS * COLUMNS), TYPE)
    for k in tl.static_range(len(DILATIONS)):
        if LEADERS[k] == k:
            for t in tl.static_range(9):
                # The centre is the same pixel for all dilations: the first branch walks it for everyone.
                if t != 4 or k == 0:
                    # Tap (i, j) of output pixel (y, x) read input pixel (STRIDE*y + (i-1)*r, STRIDE*x + (j-1)*r).
                    # A dilation is added before each division, and taken off after it, to divide no negative number.
                    up = a - (t // 3 - 1) * DILATIONS[k] + STRIDE * DILATIONS[k]
                    left = b - (t % 3 - 1) * DILATIONS[k] + STRIDE * DILATIONS[k]
                    if STRIDE == 1 or (up % STRIDE == 0) & (left % STRIDE == 0):
                        row_shift = up // STRIDE - DILATIONS[k]
                        column_shift = left // STRIDE - DILATIONS[k]
                        suffix = tl.zeros_like(sum)
                        for j in tl.static_range(len(DILATIONS) - 1, -1, -1):
                            if t == 4 or LEADERS[j] == k or (HFF and j > k):
                                tile = moved(
                                    at + j * branch_step, valid[:, None], row, column, row_shift, column_shift,
                                    out_height, out_width, grad_strides[2], grad_strides[3], TYPE,
                                )  # fmt: skip
                                if HFF:
                                    suffix += tile
                                else:
                                    suffix = tile
                                if t == 4 or LEADERS[j] == k:
                                    tap = tl.load(filter + j * channels * 9 + t, mask=valid, other=0).to(TYPE)
                                    sum += suffix * tap[:, None]

    row = row * STRIDE + a
    column = column * STRIDE + b
    to = pointers(grad_x, x_strides, image, channel, row, column)
    inside = (row < height) & (column < width)
    if behind is not None:
        tile = tile_number(program, pixel_class, class_height, class_width, ROWS, COLUMNS)
        map_at = pointers(behind.map, behind.strides, image, channel, row, column)
        sum = in_front_of_prelu(sum, map_at, None, behind, channel, valid, inside, tile, channels, TYPE)
    tl.store(to, sum.to(grad_x.dtype.element_ty), mask=valid[:, None] & inside[None, :])


def spatial_pyramid_backward_input(
    grad: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool, height: int, width: int
) -> Tensor:
    """grad [B, K*d, H', W'], weight [K, d, 3, 3] -> [B, d, height, width] in the format of ``grad``."""
    grad_x = empty_map(grad, weight.shape[1], height, width)

    def start(tile: Tile) -> None:
        _run(grad, weight, dilations, stride, hff, grad_x, tile, None)

    problem = ("spatial_pyramid_backward_input", grad.shape, grad.stride(), grad.dtype, grad.device, tuple(dilations))
    size = _class_size(grad_x, stride)
    tile = pyramid_tile(grad_x.shape[1], *size, layout_of(grad) == torch.channels_last)
    run_fastest((*problem, stride, height, width), tile, start)
    return grad_x


def normalised_pyramid_backward_input(
    grad: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool, behind: BehindPrelu, grad_x: Tensor
) -> Tensor:
    """Writes the gradient between the norm and PReLU of the pyramid's input to ``grad_x`` [B, d, H, W].

    Returns the sums for that norm.
    """
    batch, channels, *_ = grad_x.shape
    (stride,) = within([stride], *grad_x.shape[2:])
    size = _class_size(grad_x, stride)
    tile = sums_tile(channels, *size, layout_of(grad) == torch.channels_last)
    sums = room_for_sums(grad, batch * stride * stride * tiles(tile, 1, *size), channels)
    _run(grad, weight, dilations, stride, hff, grad_x, tile, behind._replace(sums=sums))
    return sums


def _class_size(grad_x: Tensor, stride: int) -> tuple[int, int]:
    """Rows and columns of the input pixels that meet the same taps."""
    (stride,) = within([stride], *grad_x.shape[2:])
    return -(-grad_x.shape[2] // stride), -(-grad_x.shape[3] // stride)


def _run(
    grad: Tensor, weight: Tensor, dilations: Sequence[int], stride: int, hff: bool, grad_x: Tensor, tile: Tile,
    behind: BehindPrelu | None,
) -> None:  # fmt: skip
    batch, channels, height, width = grad_x.shape
    dilations, (stride,) = within(dilations, height, width), within([stride], height, width)
    size = _class_size(grad_x, stride)
    launch(
        spatial_pyramid_backward_input_kernel, batch * stride * stride * tiles(tile, channels, *size),
        grad, grad.stride(), weight.contiguous(), grad_x, grad_x.stride(), behind,
        channels, height, width, *size, grad.shape[2], grad.shape[3],
        DILATIONS=dilations, LEADERS=leaders(dilations), STRIDE=stride, HFF=hff,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(grad), warps=tile.warps,
    )  # fmt: skip
