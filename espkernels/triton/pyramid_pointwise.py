"""The EESP unit after its reduction in one pass: the concatenated map never reaches memory, nor is it rounded."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, out_size
from espkernels.triton.configuration import branches_together, fused_tile, group_tile
from espkernels.triton.epilogue import prelu_affine
from espkernels.triton.launch import compute_type, dense_vector, launch, within
from espkernels.triton.product import multiply_add, way
from espkernels.triton.taps import convolve, moved, place, taps_around
from espkernels.triton.unit_output import Shortcut, finish

__all__ = ["pyramid_pointwise", "run"]


@triton.jit
def all_branches_kernel(
    x,  # [B, d, H, W]
    x_strides,  # of image, channel, row, column
    weight,  # [K, d, 3, 3], dense
    pointwise_weight,  # [N, d], dense: K groups, one a branch
    pyramid_scale,  # [K*d], or None; so the others to slope
    pyramid_shift,
    pyramid_slope,
    scale,  # [N]
    shift,
    residual,  # [B, N, H', W']
    residual_strides,
    slope,
    shortcut,  # of a down-sampler, or None
    out,  # [B, N, H', W']
    out_strides,
    channels,  # d
    outputs,  # N / K
    height,
    width,
    out_height,
    out_width,
    DILATIONS: tl.constexpr,
    STRIDE: tl.constexpr,
    HFF: tl.constexpr,
    INPUTS: tl.constexpr,  # at least d
    OUTPUTS: tl.constexpr,  # of one step
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WAY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """All channels of one tile: each branch is added to the prefix sum in registers, activated, and multiplied at once.

    Bytes: d read and N written a pixel, N more with a residual. Multiply-adds: K * d * (9 + N / K) a pixel.
    """
    row, column, image = place(tl.program_id(0).to(tl.int64), out_height, out_width, ROWS, COLUMNS)
    inside = (row < out_height) & (column < out_width)
    channel = tl.arange(0, INPUTS).to(tl.int64)
    valid = channel < channels
    needed = valid[:, None] & inside[None, :]
    at = x + image * x_strides[0] + channel[:, None] * x_strides[1]
    at += (row * STRIDE * x_strides[2] + column * STRIDE * x_strides[3])[None, :]
    centre = moved(at, needed, row * STRIDE, column * STRIDE, 0, 0, height, width, x_strides[2], x_strides[3], TYPE)
    sum = tl.zeros_like(centre)
    for k in tl.static_range(len(DILATIONS)):
        if k == 0 or DILATIONS[k] != DILATIONS[k - 1]:
            taps = taps_around(
                at, centre, needed, row * STRIDE, column * STRIDE, height, width, x_strides[2], x_strides[3],
                DILATIONS[k], TYPE,
            )  # fmt: skip
        concatenated = k * channels + channel
        branch = convolve(taps, weight + concatenated * 9, valid, TYPE)
        if HFF:
            sum += branch
        else:
            sum = branch
        z = prelu_affine(sum, pyramid_scale, pyramid_shift, pyramid_slope, concatenated, valid, TYPE)
        for first in range(0, outputs, OUTPUTS):
            in_group = first + tl.arange(0, OUTPUTS)
            output = k * outputs + in_group.to(tl.int64)
            w = tl.load(
                pointwise_weight + (output * channels)[:, None] + channel[None, :],
                mask=(in_group < outputs)[:, None] & valid[None, :], other=0,
            )  # fmt: skip
            y = multiply_add(w, z, tl.zeros((OUTPUTS, ROWS * COLUMNS), TYPE), WAY, TYPE)
            finish(
                y, output, in_group < outputs, image, row, column, inside, out, out_strides, TYPE,
                scale=scale, shift=shift, slope=slope, residual=residual,
                residual_strides=residual_strides, shortcut=shortcut,
            )  # fmt: skip


@triton.jit
def one_group_kernel(
    x,  # as above, with any number of groups: pointwise_weight [N, K*d/groups]
    x_strides,
    weight,
    pointwise_weight,
    pyramid_scale,
    pyramid_shift,
    pyramid_slope,
    scale,
    shift,
    residual,
    residual_strides,
    slope,
    shortcut,  # of a down-sampler, or None
    out,
    out_strides,
    channels,  # d
    groups,
    inputs,  # K*d / groups
    outputs,  # N / groups
    height,
    width,
    out_height,
    out_width,
    DILATIONS: tl.constexpr,
    STRIDE: tl.constexpr,
    HFF: tl.constexpr,
    INPUTS: tl.constexpr,  # of one step
    OUTPUTS: tl.constexpr,  # of one program
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WAY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """OUTPUTS channels of one group on one tile; a channel of the concatenated map is the prefix sum it needs, anew.

    For small maps, K times more programs, and for groups that are no branches. Bytes: as above, x from L2 by all groups
    but the first. Multiply-adds: K * d * (9 * (K + 1) / 2 + N / groups) a pixel, and 9 times that first part for each
    further block of OUTPUTS.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(outputs, OUTPUTS)
    in_group = program % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    group = program // blocks % groups
    row, column, image = place(program // blocks // groups, out_height, out_width, ROWS, COLUMNS)
    inside = (row < out_height) & (column < out_width)
    output = group * outputs + in_group
    at = x + image * x_strides[0]
    at += (row * STRIDE * x_strides[2] + column * STRIDE * x_strides[3])[None, :]
    y = tl.zeros((OUTPUTS, ROWS * COLUMNS), TYPE)
    for first in range(0, inputs, INPUTS):
        input = first + tl.arange(0, INPUTS)
        valid = input < inputs
        concatenated = group * inputs + input
        branch = concatenated // channels
        channel = concatenated % channels
        first_branch = (group * inputs + first) // channels
        last_branch = (group * inputs + tl.minimum(first + INPUTS, inputs) - 1) // channels
        here = at + channel[:, None] * x_strides[1]
        sum = tl.zeros((INPUTS, ROWS * COLUMNS), TYPE)
        for k in tl.static_range(len(DILATIONS)):
            if (k <= last_branch) & (HFF or k >= first_branch):
                # Masked, not multiplied by zero: what a channel does not take may be infinite.
                takes = valid & ((branch == k) | ((branch > k) & HFF))
                needed = takes[:, None] & inside[None, :]
                centre = moved(
                    here, needed, row * STRIDE, column * STRIDE, 0, 0, height, width, x_strides[2], x_strides[3], TYPE
                )
                taps = taps_around(
                    here, centre, needed, row * STRIDE, column * STRIDE, height, width, x_strides[2], x_strides[3],
                    DILATIONS[k], TYPE,
                )  # fmt: skip
                sum += convolve(taps, weight + (k * channels + channel) * 9, takes, TYPE)
        z = prelu_affine(sum, pyramid_scale, pyramid_shift, pyramid_slope, concatenated, valid, TYPE)
        w = tl.load(
            pointwise_weight + (output * inputs)[:, None] + input[None, :],
            mask=(in_group < outputs)[:, None] & valid[None, :], other=0,
        )  # fmt: skip
        y = multiply_add(w, z, y, WAY, TYPE)
    finish(
        y, output, in_group < outputs, image, row, column, inside, out, out_strides, TYPE,
        scale=scale, shift=shift, slope=slope, residual=residual, residual_strides=residual_strides, shortcut=shortcut,
    )  # fmt: skip


def pyramid_pointwise(
    x: Tensor, weight: Tensor, dilations: Sequence[int], pointwise_weight: Tensor, groups: int,
    pyramid_scale: Tensor | None, pyramid_shift: Tensor | None, pyramid_slope: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None,
    stride: int, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, d, H, W], weight [K, d, 3, 3], pointwise_weight [N, K*d/groups] -> [B, N, H', W'], formatted as ``x``."""
    out = empty_map(x, pointwise_weight.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride))
    pyramid = (pyramid_scale, pyramid_shift, pyramid_slope)
    run(x, weight, dilations, pointwise_weight, groups, pyramid, scale, shift, residual, slope, stride, hff, None, out)
    return out


def run(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pointwise_weight: Tensor,
    groups: int,
    pyramid: tuple[Tensor | None, Tensor | None, Tensor | None],
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    stride: int,
    hff: bool,
    shortcut: Shortcut | None,
    out: Tensor,
) -> None:
    """Writes the unit to ``out`` [B, N, H', W'], of any strides, with the down-sampler's shortcut if there is one."""
    batch, channels, height, width = x.shape
    branches, size = len(dilations), (out.shape[2], out.shape[3])
    inputs, outputs = branches * channels // groups, out.shape[1] // groups
    how = way(x, outputs, inputs, stored=False)
    together = fused_tile(channels, outputs, *size, how != "sums")
    arguments = (
        x, x.stride(), weight.contiguous(), pointwise_weight.contiguous(), *map(dense_vector, pyramid),
        dense_vector(scale), dense_vector(shift), residual, None if residual is None else residual.stride(),
        dense_vector(slope), shortcut, out, out.stride(), channels,
    )  # fmt: skip
    constants = dict(
        DILATIONS=within(dilations, height, width), STRIDE=within([stride], height, width)[0], HFF=hff, WAY=how,
        TYPE=compute_type(x),
    )  # fmt: skip
    tile, kernel, programs = together, all_branches_kernel, batch
    sizes: tuple[int, ...] = (outputs,)
    if not branches_together(channels, branches, groups, together, *size, batch):
        tile, kernel = group_tile(inputs, outputs, *size, how != "sums"), one_group_kernel
        programs, sizes = batch * groups * -(-outputs // tile.channels), (groups, inputs, outputs)
    programs *= -(-size[0] // tile.rows) * -(-size[1] // tile.columns)
    launch(
        kernel, programs, *arguments, *sizes, height, width, *size, **constants,
        INPUTS=tile.inputs, OUTPUTS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, warps=tile.warps,
    )  # fmt: skip
