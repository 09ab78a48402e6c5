"""Direct convolution with shift and PReLU: few dense channels, depthwise filters, or many narrow groups.

Each number of the result meets few inputs, too few for matrix units, and the map is read for all of them at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import convolved_size, empty_pixels
from espkernels.triton.checks import check_map, check_size, check_tensor, check_vectors
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.launch import compute_type, dense_vector, launch, tiles
from espkernels.triton.taps import place_channels, pointers
from espkernels.triton.unit_output import finish

__all__ = ["convolution", "run"]


@triton.jit
def convolution_kernel(
    x,  # [B, M, H, W]
    x_strides,  # of image, channel, row, column
    weight,  # [N, M/groups, FILTER_ROWS, FILTER_COLUMNS], dense
    scale,  # [N], or None; so shift and slope
    shift,
    slope,
    out,  # [B, N, H', W']
    out_strides,
    channels,  # N
    outputs,  # N/groups
    inputs,  # M/groups
    group_step,  # channels of x from the first input of a group to that of the next
    input_step,  # and from one input of a group to the next
    stride,
    padding,
    dilation,
    height,
    width,
    out_height,
    out_width,
    FILTER_ROWS: tl.constexpr,
    FILTER_COLUMNS: tl.constexpr,
    DENSE: tl.constexpr,  # one group: all outputs share what is read
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile of the result, input by input and tap by tap; outputs of one group of several read from L1.

    Bytes: M read a pixel of the map and N written one of the result; multiply-adds: N * M / groups * taps.
    """
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, out_height, out_width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < out_height) & (column < out_width)
    from_row = row * stride - padding
    from_column = column * stride - padding
    first, exists = channel // outputs * group_step, valid
    if DENSE:
        first = tl.zeros((1,), tl.int64)
        exists = first == 0
    at = pointers(x, x_strides, image, first, from_row, from_column)
    filter = weight + channel * inputs * (FILTER_ROWS * FILTER_COLUMNS)
    sum = tl.zeros((CHANNELS, ROWS * COLUMNS), TYPE)
    for _ in range(inputs):
        for i in range(FILTER_ROWS):
            down = tl.full((), i, tl.int64) * dilation
            rows_inside = inside & (from_row + down >= 0) & (from_row + down < height)
            for j in tl.static_range(FILTER_COLUMNS):
                right = tl.full((), j, tl.int64) * dilation
                there = rows_inside & (from_column + right >= 0) & (from_column + right < width)
                step = down * x_strides[2] + right * x_strides[3]
                value = tl.load(at + step, mask=exists[:, None] & there[None, :], other=0).to(TYPE)
                w = tl.load(filter + i * FILTER_COLUMNS + j, mask=valid, other=0).to(TYPE)
                sum += value * w[:, None]
        at += tl.full((), input_step, tl.int64) * x_strides[1]
        filter += FILTER_ROWS * FILTER_COLUMNS
    finish(
        sum, channel, valid, image, row, column, inside, out, out_strides, TYPE,
        scale=scale, shift=shift, slope=slope,
    )  # fmt: skip


def convolution(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    slope: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Tensor:
    """x [B, M, H, W], weight [N, M/groups, h, w] -> [B, N, H', W'] in channels_last."""
    check_map("x", x)
    check_map("weight", weight)
    outputs, inputs = weight.shape[:2]
    if groups < 1 or outputs % groups:
        raise RuntimeError(f"groups: got {groups}, expected a divisor of {outputs} channels")
    check_tensor("x", x, weight, (x.shape[0], groups * inputs, *x.shape[2:]))
    check_vectors(x, outputs, shift=shift, slope=slope)
    if min(stride, dilation) < 1 or padding < 0:
        raise RuntimeError(f"stride, padding, dilation: got {stride}, {padding}, {dilation}, expected 1, 0, 1 or more")
    height, width = convolved_size(x, weight, stride, padding, dilation)
    check_size(height, width)
    out = empty_pixels(x, outputs, height, width)
    run(x, weight, None, shift, slope, stride, padding, dilation, groups, (inputs, 1), out)
    return out


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    steps: tuple[int, int],
    out: Tensor,
) -> None:
    """Writes the convolution to ``out`` [B, N, H', W'], of any strides.

    Input j of group g is channel ``g * steps[0] + j * steps[1]`` of ``x``: channels that a shuffle would bring together
    are read where they are.
    """
    outputs, inputs, filter_rows, filter_columns = weight.shape
    height, width = x.shape[2:]
    size = out.shape[2], out.shape[3]
    tile = pyramid_tile(outputs, *size, True)
    launch(
        convolution_kernel, x.shape[0] * tiles(tile, outputs, *size),
        x, x.stride(), weight.contiguous(), dense_vector(scale), dense_vector(shift), dense_vector(slope),
        out, out.stride(), outputs, outputs // groups, inputs, *steps, stride, padding, dilation, height, width, *size,
        FILTER_ROWS=filter_rows, FILTER_COLUMNS=filter_columns, DENSE=groups == 1,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
