"""One EESP unit for inference, batch norms folded: reduction, pyramid, activation and grouped pointwise convolution.

Bytes, in maps of the unit's own size (N = M channels at stride 1, d = N / K): two launches move 1 read of x, 1 / K
written and 1 / K read of the reduced map, 1 read of the residual and 1 written, 3.5 at K = 4. One launch moves 3, and
2 where the residual is x and still in L2. It holds the reduced map of a whole image in each program, of at most
16 outputs of a branch, so it is for maps of at most 64 pixels, 7 x 7 at the end of the network: 256 pixels in registers
spilled a kilobyte a thread, and a tile of a larger map would have to reduce its halo again, (16 + 8)^2 / 16^2 = 2.25
times the pixels at dilation 4, and read x as often, for half a map of traffic saved. Not measured yet: with many images
and channels the programs' 16 to 64 reductions of one map may take longer than a second launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, out_size
from espkernels.triton.checks import check_tensor, check_unit, check_vectors
from espkernels.triton.configuration import eesp_tile
from espkernels.triton.epilogue import prelu_affine
from espkernels.triton.group_pointwise import group_pointwise
from espkernels.triton.launch import compute_type, dense_vector, launch, within
from espkernels.triton.product import multiply_add, way
from espkernels.triton.pyramid_pointwise import run as run_pyramid_pointwise
from espkernels.triton.unit_output import Shortcut, finish

__all__ = ["eesp", "run"]


@triton.jit
def gathered(
    reduced,  # [C, W*H and more], the whole reduced map
    row,  # [P]
    column,  # [P]
    inside,  # [P]
    row_shift,
    column_shift,
    height,
    width,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,  # P
):
    """The pixels [C, P] of a map in registers at (row + row_shift, column + column_shift), zero outside of it."""
    row = row + row_shift
    column = column + column_shift
    there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = tl.where(there, row * width + column, 0).to(tl.int32)
    pixels = tl.gather(reduced, tl.broadcast_to(index[None, :], (CHANNELS, PIXELS)), axis=1)
    return tl.where(there[None, :], pixels, 0)


@triton.jit
def eesp_kernel(
    x,  # [B, M, H, W]
    x_strides,  # of image, channel, row, column
    reduce_weight,  # [d, M/reduce_groups], dense
    reduce_shift,  # [d]
    reduce_slope,
    weight,  # [K, d, 3, 3], dense
    pointwise_weight,  # [N, d], dense: K groups, one a branch
    pyramid_scale,  # [K*d]
    pyramid_shift,
    pyramid_slope,
    shift,  # [N]
    residual,  # [B, N, H', W'], or None
    residual_strides,
    slope,  # [N], or None
    shortcut,  # of a down-sampler, or None
    out,  # [B, N, H', W']
    out_strides,
    reduce_groups,
    reduce_inputs,  # M / reduce_groups
    reduced_channels,  # d / reduce_groups
    channels,  # d
    outputs,  # N / K
    height,
    width,
    out_height,
    out_width,
    DILATIONS: tl.constexpr,
    STRIDE: tl.constexpr,
    HFF: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of one program
    CHANNELS: tl.constexpr,  # reduced channels of one step
    INPUTS: tl.constexpr,  # of one step of the reduction
    PIXELS: tl.constexpr,  # at least H * W
    OUT_PIXELS: tl.constexpr,  # at least H' * W'
    REDUCE_WAY: tl.constexpr,
    WAY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """OUTPUTS channels of branch k of one image: the reduced map lives in registers, its taps are gathered from there.

    Bytes: see the top of the file; x is read once a program, all but once from L2. Multiply-adds: with b blocks of
    OUTPUTS a branch, b * K times the reduction's M * d / reduce_groups a pixel, b * (K + 1) / 2 times the pyramid's
    9 * K * d, and N * d once.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(outputs, OUTPUTS)
    in_group = program % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    branch = program // blocks % len(DILATIONS)
    image = program // blocks // len(DILATIONS)
    output = branch * outputs + in_group
    valid_output = in_group < outputs
    pixel = tl.arange(0, PIXELS)
    x_at = x + image * x_strides[0]
    x_at += (pixel // width).to(tl.int64) * x_strides[2] + (pixel % width).to(tl.int64) * x_strides[3]
    on_map = pixel < height * width
    out_pixel = tl.arange(0, OUT_PIXELS)
    inside = out_pixel < out_height * out_width
    row = (out_pixel // out_width).to(tl.int64)
    column = (out_pixel % out_width).to(tl.int64)
    y = tl.zeros((OUTPUTS, OUT_PIXELS), TYPE)
    steps_of_group = tl.cdiv(reduced_channels, CHANNELS)
    for step in range(reduce_groups * steps_of_group):
        group = step // steps_of_group
        in_reduced = step % steps_of_group * CHANNELS + tl.arange(0, CHANNELS)
        valid = in_reduced < reduced_channels
        channel = (group * reduced_channels + in_reduced).to(tl.int64)
        reduced = tl.zeros((CHANNELS, PIXELS), TYPE)
        for first in range(0, reduce_inputs, INPUTS):
            input = first + tl.arange(0, INPUTS).to(tl.int64)
            needed = input < reduce_inputs
            w = tl.load(
                reduce_weight + (channel * reduce_inputs)[:, None] + input[None, :],
                mask=valid[:, None] & needed[None, :], other=0,
            )  # fmt: skip
            v = tl.load(
                x_at[None, :] + ((group * reduce_inputs + input) * x_strides[1])[:, None],
                mask=needed[:, None] & on_map[None, :], other=0,
            )  # fmt: skip
            reduced = multiply_add(w, v, reduced, REDUCE_WAY, TYPE)
        reduced = prelu_affine(reduced, None, reduce_shift, reduce_slope, channel, valid, TYPE)
        sum = tl.zeros((CHANNELS, OUT_PIXELS), TYPE)
        # A loop, not unrolled: each gather passes through shared memory, and 9 * K of them took 20 seconds to compile.
        for k in range(0 if HFF else branch, branch + 1):
            dilation = tl.full((), 0, tl.int64)
            for j in tl.static_range(len(DILATIONS)):
                dilation = tl.where(k == j, DILATIONS[j], dilation)
            for t in tl.static_range(9):
                pixels = gathered(
                    reduced, row * STRIDE, column * STRIDE, inside,
                    (t // 3 - 1) * dilation, (t % 3 - 1) * dilation, height, width, CHANNELS, OUT_PIXELS,
                )  # fmt: skip
                tap = tl.load(weight + (k * channels + channel) * 9 + t, mask=valid, other=0).to(TYPE)
                sum += pixels * tap[:, None]
        z = prelu_affine(sum, pyramid_scale, pyramid_shift, pyramid_slope, branch * channels + channel, valid, TYPE)
        w = tl.load(
            pointwise_weight + (output * channels)[:, None] + channel[None, :],
            mask=valid_output[:, None] & valid[None, :], other=0,
        )  # fmt: skip
        y = multiply_add(w, z, y, WAY, TYPE)
    finish(
        y, output, valid_output, image, row, column, inside, out, out_strides, TYPE,
        shift=shift, slope=slope, residual=residual, residual_strides=residual_strides, shortcut=shortcut,
    )  # fmt: skip


def eesp(
    x: Tensor, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor, reduce_slope: Tensor,
    weight: Tensor, dilations: Sequence[int], pyramid_scale: Tensor, pyramid_shift: Tensor, pyramid_slope: Tensor,
    expand_weight: Tensor, groups: int, shift: Tensor, residual: Tensor | None, slope: Tensor | None,
    stride: int, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, M, H, W] -> [B, N, H', W'] in the format of ``x``; ``packed`` is for CPUs."""
    out = empty_map(x, expand_weight.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride))
    run(
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, dilations,
        (pyramid_scale, pyramid_shift, pyramid_slope), expand_weight, groups, shift, residual, slope, stride, hff,
        None, out,
    )  # fmt: skip
    return out


def run(
    x: Tensor, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor, reduce_slope: Tensor,
    weight: Tensor, dilations: Sequence[int], pyramid: tuple[Tensor, Tensor, Tensor], expand_weight: Tensor,
    groups: int, shift: Tensor, residual: Tensor | None, slope: Tensor | None, stride: int, hff: bool,
    shortcut: Shortcut | None, out: Tensor,
) -> None:  # fmt: skip
    """Writes the unit to ``out`` [B, N, H', W'], of any strides, in one launch or two."""
    check_unit(
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, dilations, pyramid, expand_weight, groups,
        shift,
    )  # fmt: skip
    check_tensor("residual", residual, x, out.shape)
    check_vectors(x, out.shape[1], slope=slope)
    batch, _, height, width = x.shape
    channels, branches, size = reduce_weight.shape[0], len(dilations), (out.shape[2], out.shape[3])
    outputs, reduced_channels, reduce_inputs = out.shape[1] // groups, channels // reduce_groups, reduce_weight.shape[1]
    reduce_way = way(x, reduced_channels, reduce_inputs, stored=True)
    how = way(x, outputs, reduced_channels, stored=False)
    tile = eesp_tile(outputs, reduced_channels, reduce_inputs, height * width, how != "sums", reduce_way != "sums")
    if groups != branches or tile is None:
        reduced = group_pointwise(x, reduce_weight, reduce_groups, None, reduce_shift, None, reduce_slope)
        run_pyramid_pointwise(
            reduced, weight, dilations, expand_weight, groups, pyramid, None, shift, residual, slope, stride, hff,
            shortcut, out,
        )  # fmt: skip
        return
    launch(
        eesp_kernel, batch * branches * -(-outputs // tile.outputs),
        x, x.stride(), reduce_weight.contiguous(), dense_vector(reduce_shift), dense_vector(reduce_slope),
        weight.contiguous(), expand_weight.contiguous(), *map(dense_vector, pyramid), dense_vector(shift),
        residual, None if residual is None else residual.stride(), dense_vector(slope),
        shortcut, out, out.stride(),
        reduce_groups, reduce_inputs, reduced_channels, channels, outputs, height, width, *size,
        DILATIONS=within(dilations, height, width), STRIDE=within([stride], height, width)[0], HFF=hff,
        OUTPUTS=tile.outputs, CHANNELS=tile.channels, INPUTS=tile.inputs, PIXELS=tile.pixels,
        OUT_PIXELS=max(16, triton.next_power_of_2(size[0] * size[1])), REDUCE_WAY=reduce_way, WAY=how,
        TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
