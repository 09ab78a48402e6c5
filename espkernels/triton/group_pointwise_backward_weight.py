"""Gradient of the grouped 1x1 convolution for its weight, in two stages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.triton.configuration import gradient_chunks, gradient_tile
from espkernels.triton.launch import compute_type, flat_map, launch, product_layout
from espkernels.triton.normalise import Norm, loaded, normalised
from espkernels.triton.partial_sums import add_partials
from espkernels.triton.product import multiply_add, way
from espkernels.triton.taps import flat_pointers

__all__ = ["group_pointwise_backward_weight"]


@triton.jit
def group_pointwise_backward_weight_kernel(
    grad,  # [images, N, pixels]
    grad_strides,  # of image, channel, pixel
    x,  # [images, M, pixels]
    x_strides,
    norm,  # of x, or None: x is read as it is
    partials,  # [chunks, N, M/groups]
    groups,
    inputs,  # M/groups
    outputs,  # N/groups
    pixels,
    steps,  # blocks of pixels of all images
    steps_of_chunk,
    OUTPUTS: tl.constexpr,  # of one program; so the inputs
    INPUTS: tl.constexpr,
    PIXELS: tl.constexpr,  # of one step
    WAY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """OUTPUTS x INPUTS sums over one chunk of the pixels, step by step in their order.

    Bytes: a pixel's M are read N / groups / OUTPUTS times and its N M / groups / INPUTS times, all but once from L2;
    N * M / groups partial sums are written a chunk. Multiply-adds: M * N / groups a pixel.
    """
    program = tl.program_id(0).to(tl.int64)
    input_blocks = tl.cdiv(inputs, INPUTS)
    output_blocks = tl.cdiv(outputs, OUTPUTS)
    input = program % input_blocks * INPUTS + tl.arange(0, INPUTS)
    rest = program // input_blocks
    output = rest % output_blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    rest = rest // output_blocks
    group = rest % groups
    chunk = rest // groups
    valid_output = output < outputs
    valid_input = input < inputs
    pixel_blocks = tl.cdiv(pixels, PIXELS)
    numbers = None
    if norm is not None:
        numbers = loaded(norm, (group * inputs + input)[None, :], valid_input[None, :], TYPE)
    sum = tl.zeros((OUTPUTS, INPUTS), TYPE)
    for step in range(chunk * steps_of_chunk, tl.minimum((chunk + 1) * steps_of_chunk, steps)):
        image = step // pixel_blocks
        pixel = step % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        g_at = flat_pointers(grad, grad_strides, image, group * outputs + output, pixel)
        g = tl.load(g_at, mask=valid_output[:, None] & inside[None, :], other=0)
        needed = inside[:, None] & valid_input[None, :]
        v = tl.load(
            x + image * x_strides[0] + ((group * inputs + input) * x_strides[1])[None, :]
            + (pixel * x_strides[2])[:, None],
            mask=needed, other=0,
        )  # fmt: skip
        if norm is not None:
            v = normalised(v.to(TYPE), needed, numbers).to(x.dtype.element_ty)
        sum = multiply_add(g, v, sum, WAY, TYPE)
    to = partials + ((chunk * groups + group) * outputs + output)[:, None] * inputs + input[None, :]
    tl.store(to, sum, mask=valid_output[:, None] & valid_input[None, :])


def group_pointwise_backward_weight(
    grad: Tensor, x: Tensor, groups: int, norm: Norm | None = None, out: Tensor | None = None
) -> Tensor:
    """grad [B, N, H, W], x [B, M, H, W], which the convolution read behind ``norm`` -> [N, M/groups], dense.

    In ``out`` where it is given, which may be of a wider type than the maps.
    """
    layout = product_layout(x)
    flat_grad, flat_x = flat_map(grad, layout), flat_map(x, layout)
    images, channels, pixels = flat_x.shape
    inputs, outputs = channels // groups, grad.shape[1] // groups
    how = way(x, outputs, inputs, stored=True)
    tile = gradient_tile(outputs, inputs, how != "sums", norm is not None and how != "stored")
    blocks = groups * -(-outputs // tile.channels) * -(-inputs // tile.inputs)
    steps = images * -(-pixels // tile.pixels)
    chunks = gradient_chunks(steps, blocks)
    steps_of_chunk = -(-steps // chunks)
    chunks = -(-steps // max(steps_of_chunk, 1))
    grad_weight = x.new_empty((grad.shape[1], inputs)) if out is None else out
    type_of_sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = torch.empty((chunks, *grad_weight.shape), dtype=type_of_sums, device=x.device)
    launch(
        group_pointwise_backward_weight_kernel, chunks * blocks,
        flat_grad, flat_grad.stride(), flat_x, flat_x.stride(), norm, partials,
        groups, inputs, outputs, pixels, steps, steps_of_chunk,
        OUTPUTS=tile.channels, INPUTS=tile.inputs, PIXELS=tile.pixels, WAY=how, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    add_partials(partials, grad_weight)
    return grad_weight
