"""Bilinear resizing with corners aligned: where an output lies in the input, and the mix of the four around it."""

from __future__ import annotations

import triton
import triton.language as tl

from espkernels.triton.division import divided
from espkernels.triton.taps import pointers

__all__ = ["mixed"]


@triton.jit
def between(i, size, out_size, TYPE: tl.constexpr):
    """Output ``i`` of out_size lies between two inputs of ``size``: both, and the weight of the second.

    In whole numbers up to the division, so that the weight is rounded once.
    """
    steps = tl.maximum(out_size - 1, 1)
    at = tl.minimum(i, out_size - 1) * (size - 1)
    first = at // steps
    weight = divided((at % steps).to(TYPE), tl.full((), steps, TYPE), TYPE)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def mixed(
    x,  # [B, C, H, W]
    x_strides,  # of image, channel, row, column
    image,
    channel,  # [C]
    valid,  # [C]
    row,  # [P], of the result
    column,  # [P]
    inside,  # [P]
    height,
    width,
    out_height,
    out_width,
    TYPE: tl.constexpr,
):
    """The pixels [C, P] of the resized map. Bytes: four numbers a number, which neighbours find in L1."""
    needed = valid[:, None] & inside[None, :]
    upper, lower, down = between(row, height, out_height, TYPE)
    left, right, across = between(column, width, out_width, TYPE)
    upper_left = tl.load(pointers(x, x_strides, image, channel, upper, left), mask=needed, other=0).to(TYPE)
    lower_left = tl.load(pointers(x, x_strides, image, channel, lower, left), mask=needed, other=0).to(TYPE)
    upper_right = tl.load(pointers(x, x_strides, image, channel, upper, right), mask=needed, other=0).to(TYPE)
    lower_right = tl.load(pointers(x, x_strides, image, channel, lower, right), mask=needed, other=0).to(TYPE)
    first = upper_left + (lower_left - upper_left) * down[None, :]
    second = upper_right + (lower_right - upper_right) * down[None, :]
    return first + (second - first) * across[None, :]
