"""What ends a unit while it is in registers: the long-range shortcut of a down-sampler, the epilogue, the store."""

from __future__ import annotations

import triton
import triton.language as tl

from espkernels.triton.epilogue import epilogue, prelu_affine
from espkernels.triton.taps import pointers

__all__ = ["add_shortcut", "finish"]


@triton.jit
def add_shortcut(
    value,  # [C, P], in TYPE
    image,  # pointers [P] to the first channel of the pooled image, or None: then the value stays
    image_channel,  # the step to the next channel
    image_channels,
    weight,  # [channels, image_channels], dense
    shift,  # [channels]
    channel,  # [C]
    valid,  # [C]
    inside,  # [P]
    TYPE: tl.constexpr,
):
    """value + weight image + shift. Bytes: image_channels a pixel; multiply-adds: image_channels a number."""
    if image is not None:
        value = value + tl.load(shift + channel, mask=valid, other=0).to(TYPE)[:, None]
        for j in range(image_channels):
            step = tl.full((), 1, tl.int64) * j * image_channel
            pixel = tl.load(image + step, mask=inside, other=0).to(TYPE)
            w = tl.load(weight + channel * image_channels + j, mask=valid, other=0).to(TYPE)
            value += w[:, None] * pixel[None, :]
    return value


@triton.jit
def finish(
    sum,  # [C, P], in TYPE
    output,  # [C], channels of out
    valid,  # [C]
    image,
    row,  # [P]
    column,  # [P]
    inside,  # [P]
    shift,  # [N]; of the others any may be None
    scale,
    residual,
    residual_strides,
    slope,
    picture,  # [B, few, H', W'], the pooled image of a down-sampler
    picture_strides,
    picture_channels,
    shortcut_weight,  # [N, few]
    shortcut_shift,  # [N]
    out,  # [B, N, H', W']
    out_strides,
    TYPE: tl.constexpr,
):
    """Shortcut and epilogue of OUTPUTS channels, and their store."""
    stored = valid[:, None] & inside[None, :]
    pixels = picture
    step = 0
    if picture is not None:
        pixels += image * picture_strides[0] + row * picture_strides[2] + column * picture_strides[3]
        step = picture_strides[1]
    sum = prelu_affine(sum, scale, shift, None, output, valid, TYPE)
    sum = add_shortcut(
        sum, pixels, step, picture_channels, shortcut_weight, shortcut_shift, output, valid, inside, TYPE
    )
    at = residual
    if residual is not None:
        at = pointers(residual, residual_strides, image, output, row, column)
    sum = epilogue(sum, None, None, at, slope, output, valid, stored, TYPE)
    to = pointers(out, out_strides, image, output, row, column)
    tl.store(to, sum.to(out.dtype.element_ty), mask=stored)
