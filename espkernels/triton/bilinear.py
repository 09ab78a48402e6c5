"""Bilinear resizing with corners aligned: where an output lies in the input, and the mix of the four around it."""

from __future__ import annotations

import triton
import triton.language as tl

from espkernels.triton.division import divided

__all__ = ["corners", "mixed"]


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
def corners(row, column, height, width, out_height, out_width, row_stride, column_stride, TYPE: tl.constexpr):
    """For outputs (row, column) [P]: the steps from a channel's first pixel to the four around each, then the weights.

    In the order upper left, lower left, upper right, lower right; the weights are of the lower and of the right ones.
    """
    upper, lower, down = between(row, height, out_height, TYPE)
    left, right, across = between(column, width, out_width, TYPE)
    left *= column_stride
    right *= column_stride
    upper *= row_stride
    lower *= row_stride
    return upper + left, lower + left, upper + right, lower + right, down, across


@triton.jit
def mixed(
    first,  # pointers [C] to the first pixels of the channels of an image
    around,  # what corners() gives
    needed,  # [C, P]
    TYPE: tl.constexpr,
):
    """The pixels [C, P] of the resized map. Bytes: four numbers a number, which neighbours find in L1."""
    upper_left = tl.load(first[:, None] + around[0][None, :], mask=needed, other=0).to(TYPE)
    lower_left = tl.load(first[:, None] + around[1][None, :], mask=needed, other=0).to(TYPE)
    upper_right = tl.load(first[:, None] + around[2][None, :], mask=needed, other=0).to(TYPE)
    lower_right = tl.load(first[:, None] + around[3][None, :], mask=needed, other=0).to(TYPE)
    down, across = around[4][None, :], around[5][None, :]
    # Not by differences, of which equal infinities have none.
    left = upper_left * (1 - down) + lower_left * down
    right = upper_right * (1 - down) + lower_right * down
    return left * (1 - across) + right * across
