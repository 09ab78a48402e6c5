"""1x1 convolution in groups with its epilogue; with the weight turned the same kernel is the gradient of its input.

In training a batch norm stands in front of it (csrc/cpu/normalised_pointwise.cpp is the CPU's) and another behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_map
from espkernels.triton.configuration import Tile, pointwise_tile
from espkernels.triton.epilogue import epilogue
from espkernels.triton.launch import compute_type, dense_vector, flat_map, launch, product_layout
from espkernels.triton.moments import Moments, leave_moments, room_for_moments
from espkernels.triton.norm_sums import BehindPrelu, in_front_of_prelu, room_for_sums
from espkernels.triton.normalise import Norm, loaded, normalised
from espkernels.triton.product import multiply_add, way
from espkernels.triton.taps import flat_pointers
from espkernels.triton.tuning import run_fastest

__all__ = [
    "group_pointwise",
    "group_pointwise_backward_input",
    "normalised_pointwise",
    "normalised_pointwise_backward_input",
]


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
    norm,  # of x, or None: x is read as it is
    moments,  # of out, a tile a block of pixels, or None
    behind,  # out is the gradient behind this norm and PReLU, and shall be that between them; or None
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

    Bytes: M read and N written a pixel, N more with a residual or behind a norm. Multiply-adds: M * N / groups a pixel.
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
    sum = tl.zeros((OUTPUTS, PIXELS), TYPE)
    for first in range(0, inputs, INPUTS):
        input = first + tl.arange(0, INPUTS).to(tl.int64)
        w = tl.load(
            weight_at[:, None] + (input * weight_strides[2])[None, :],
            mask=valid[:, None] & (input < inputs)[None, :], other=0,
        )  # fmt: skip
        needed = (input < inputs)[:, None] & inside[None, :]
        of_x = group * inputs + input
        v = tl.load(flat_pointers(x, x_strides, image, of_x, pixel), mask=needed, other=0)
        if norm is not None:
            numbers = loaded(norm, of_x[:, None], (input < inputs)[:, None], TYPE)
            v = normalised(v.to(TYPE), needed, numbers).to(x.dtype.element_ty)
        sum = multiply_add(w, v, sum, WAY, TYPE)
    channel = group * outputs + output
    stored = valid[:, None] & inside[None, :]
    at = residual
    if residual is not None:
        at = flat_pointers(residual, residual_strides, image, channel, pixel)
    sum = epilogue(sum, scale, shift, at, slope, channel, valid, stored, TYPE)
    if behind is not None:
        at = flat_pointers(behind.map, behind.strides, image, channel, pixel)
        sum = in_front_of_prelu(sum, at, None, behind, channel, valid, inside, rest, groups * outputs, TYPE)
    written = sum.to(out.dtype.element_ty)
    tl.store(flat_pointers(out, out_strides, image, channel, pixel), written, mask=stored)
    if moments is not None:
        leave_moments(moments, written.to(TYPE), channel, valid, inside, rest, groups * outputs, TYPE)


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
    _run(x, weight, _straight(weight, groups), groups, scale, shift, residual, slope, out)
    return out


def group_pointwise_backward_input(grad: Tensor, weight: Tensor, groups: int, residual: Tensor | None = None) -> Tensor:
    """grad [B, N, H, W], weight [N, M/groups] -> [B, M, H, W] in the format of ``grad``, ``residual`` added."""
    out = empty_map(grad, weight.shape[1] * groups, grad.shape[2], grad.shape[3])
    _run(grad, weight, _turned(weight, groups), groups, None, None, residual, None, out)
    return out


def normalised_pointwise(
    x: Tensor, norm: Norm | None, weight: Tensor, groups: int, out: Tensor, measured: bool
) -> Moments | None:
    """Writes the convolution of x [B, M, H, W] behind ``norm`` to ``out`` [B, N, H, W]; its moments if ``measured``."""
    problem = _Problem(x, weight.shape[0], groups, out)
    moments = room_for_moments(x, problem.tiles(), weight.shape[0]) if measured else None
    problem.launch(weight, _straight(weight, groups), problem.tile, norm=norm, moments=moments)
    return moments


def normalised_pointwise_backward_input(
    grad: Tensor, weight: Tensor, groups: int, behind: BehindPrelu, grad_x: Tensor
) -> Tensor:
    """Writes the gradient between the norm and PReLU of a convolution's input to ``grad_x`` [B, M, H, W].

    Returns the sums for that norm.
    """
    problem = _Problem(grad, weight.shape[1] * groups, groups, grad_x)
    sums = room_for_sums(grad, problem.tiles(), grad_x.shape[1])
    problem.launch(weight, _turned(weight, groups), problem.tile, behind=behind.flat(problem.layout, sums))
    return sums


def _straight(weight: Tensor, groups: int) -> tuple[int, int, int]:
    """Steps from group to group, output to output and input to input of a weight [N, M/groups]."""
    return weight.shape[0] // groups * weight.stride(0), weight.stride(0), weight.stride(1)


def _turned(weight: Tensor, groups: int) -> tuple[int, int, int]:
    """The same for its gradient, whose outputs are the convolution's inputs."""
    group, output, input = _straight(weight, groups)
    return group, input, output


class _Problem:
    """The maps of one call as the kernel sees them, and its tile."""

    def __init__(self, x: Tensor, channels: int, groups: int, out: Tensor) -> None:
        self.layout, self.groups = product_layout(out), groups
        self.x, self.out = flat_map(x, self.layout), flat_map(out, self.layout)
        self.images, inputs, self.pixels = self.x.shape
        self.inputs, self.outputs = inputs // groups, channels // groups
        self.way = way(x, self.outputs, self.inputs, stored=True)
        self.tile = pointwise_tile(self.outputs, self.inputs, self.pixels, self.images * groups, self.way != "sums")

    def tiles(self) -> int:
        """Blocks of pixels."""
        return self.images * -(-self.pixels // self.tile.pixels)

    def launch(
        self,
        weight: Tensor,
        weight_strides: tuple[int, int, int],  # of group, output, input
        tile: Tile,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        slope: Tensor | None = None,
        norm: Norm | None = None,
        moments: Moments | None = None,
        behind: BehindPrelu | None = None,
    ) -> None:
        flat_residual = None if residual is None else flat_map(residual, self.layout)
        blocks = self.groups * -(-self.outputs // tile.channels) * -(-self.pixels // tile.pixels)
        launch(
            group_pointwise_kernel, self.images * blocks, self.x, self.x.stride(), weight, weight_strides,
            dense_vector(scale), dense_vector(shift),
            flat_residual, None if flat_residual is None else flat_residual.stride(), dense_vector(slope),
            self.out, self.out.stride(), norm, moments, behind, self.groups, self.inputs, self.outputs, self.pixels,
            OUTPUTS=tile.channels, INPUTS=tile.inputs, PIXELS=tile.pixels, WAY=self.way, TYPE=compute_type(self.x),
            warps=tile.warps,
        )  # fmt: skip


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
    problem = _Problem(x, out.shape[1], groups, out)

    def start(tile: Tile) -> None:
        problem.launch(weight, weight_strides, tile, scale, shift, residual, slope)

    key = ("group_pointwise", x.shape, x.stride(), x.dtype, x.device, weight.shape, groups, problem.way)
    run_fastest(key, problem.tile, start)
