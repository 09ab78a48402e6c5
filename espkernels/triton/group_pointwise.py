"""1x1 convolution in groups with its epilogue; with the weight turned the same kernel is the gradient of its input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map, layout_of
from espkernels.triton.configuration import Tile, pointwise_tile
from espkernels.triton.epilogue import epilogue
from espkernels.triton.launch import compute_type, dense_vector, flat_map, launch
from espkernels.triton.product import multiply_add, way
from espkernels.triton.tuning import run_fastest

__all__ = ["group_pointwise", "group_pointwise_backward_input"]


@triton.jit
def group_pointwise_kernel(
    x,  # [images, M, pixels]
    x_strides,  # of image, channel, pixel
    weight,  # numbers [groups, N/groups, M/groups]
    weight_strides,  # of group, output, input
    scale,  # [N], or None; so shift and slope
    shift,
    residual,  # [images, N, pixels], or None
    residual_strides,
    slope,
    out,  # [images, N, pixels]
    out_strides,
    groups,
    inputs,  # M/groups
    outputs,  # N/groups
    pixels,
    OUTPUTS: tl.constexpr,  # of one program
    INPUTS: tl.constexpr,  # of one step
    PIXELS: tl.constexpr,
    WAY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """OUTPUTS channels of one group at PIXELS pixels. Programs of one block of pixels follow each other: x stays in L2.

    Bytes: M read and N written a pixel, N more with a residual. Multiply-adds: M * N / groups a pixel.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(outputs, OUTPUTS)
    output = program % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    group = program // blocks % groups
    rest = program // blocks // groups
    pixel_blocks = tl.cdiv(pixels, PIXELS)
    pixel = rest % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
    image = rest // pixel_blocks
    inside = pixel < pixels
    valid = output < outputs
    weight_at = weight + group * weight_strides[0] + output * weight_strides[1]
    x_at = x + image * x_strides[0] + pixel * x_strides[2]
    sum = tl.zeros((OUTPUTS, PIXELS), TYPE)
    for first in range(0, inputs, INPUTS):
        input = first + tl.arange(0, INPUTS).to(tl.int64)
        w = tl.load(
            weight_at[:, None] + (input * weight_strides[2])[None, :],
            mask=valid[:, None] & (input < inputs)[None, :], other=0,
        )  # fmt: skip
        v = tl.load(
            x_at[None, :] + ((group * inputs + input) * x_strides[1])[:, None],
            mask=(input < inputs)[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        sum = multiply_add(w, v, sum, WAY, TYPE)
    channel = group * outputs + output
    stored = valid[:, None] & inside[None, :]
    at = residual
    if residual is not None:
        at += image * residual_strides[0] + channel[:, None] * residual_strides[1]
        at += (pixel * residual_strides[2])[None, :]
    sum = epilogue(sum, scale, shift, at, slope, channel, valid, stored, TYPE)
    to = out + image * out_strides[0] + channel[:, None] * out_strides[1] + (pixel * out_strides[2])[None, :]
    tl.store(to, sum.to(out.dtype.element_ty), mask=stored)


def group_pointwise(
    x: Tensor,
    weight: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    """x [B, M, H, W], weight [N, M/groups] -> [B, N, H, W] in the format of ``x``; ``packed`` is for CPUs."""
    out = empty_map(x, weight.shape[0], x.shape[2], x.shape[3])
    strides = weight.shape[0] // groups * weight.stride(0), weight.stride(0), weight.stride(1)
    _run(x, weight, strides, groups, scale, shift, residual, slope, out)
    return out


def group_pointwise_backward_input(grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    """grad [B, N, H, W], weight [N, M/groups] -> [B, M, H, W] in the format of ``grad``."""
    out = empty_map(grad, weight.shape[1] * groups, grad.shape[2], grad.shape[3])
    strides = weight.shape[0] // groups * weight.stride(0), weight.stride(1), weight.stride(0)
    _run(grad, weight, strides, groups, None, None, None, None, out)
    return out


def _run(
    x: Tensor,
    weight: Tensor,
    weight_strides: tuple[int, int, int],
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    out: Tensor,
) -> None:
    layout = layout_of(out)
    flat_x, flat_out = flat_map(x, layout), flat_map(out, layout)
    flat_residual = None if residual is None else flat_map(residual, layout)
    images, channels, pixels = flat_x.shape
    inputs, outputs = channels // groups, out.shape[1] // groups
    how = way(x, outputs, inputs, stored=True)
    vectors = tuple(map(dense_vector, (scale, shift, slope)))

    def start(tile: Tile) -> None:
        launch(
            group_pointwise_kernel, images * groups * -(-outputs // tile.channels) * -(-pixels // tile.pixels),
            flat_x, flat_x.stride(), weight, weight_strides, vectors[0], vectors[1],
            flat_residual, None if flat_residual is None else flat_residual.stride(), vectors[2],
            flat_out, flat_out.stride(), groups, inputs, outputs, pixels,
            OUTPUTS=tile.channels, INPUTS=tile.inputs, PIXELS=tile.pixels, WAY=how, TYPE=compute_type(x),
            warps=tile.warps,
        )  # fmt: skip

    problem = ("group_pointwise", x.shape, x.stride(), x.dtype, x.device, weight.shape, groups, how)
    run_fastest(problem, pointwise_tile(outputs, inputs, pixels, images * groups, how != "sums"), start)
