"""What ends a unit while it is in registers: the long-range shortcut of a down-sampler, the epilogue, the store."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from espkernels.triton.epilogue import epilogue, prelu_affine
from espkernels.triton.taps import pointers

__all__ = ["Shortcut", "add_shortcut", "finish", "shortcut_to"]


class Shortcut(NamedTuple):
    """The pooled image of a down-sampler and its 1x1 convolution to the channels of one kernel's result."""

    image: Any  # [B, few, H', W']
    strides: Any  # of image, channel, row, column
    channels: Any  # few
    weight: Any  # [channels of the result, few], dense
    shift: Any  # [channels of the result]


def shortcut_to(own: slice, image: Tensor | None, weight: Tensor | None, shift: Tensor | None) -> Shortcut | None:
    """The part of a shortcut [B, few, H', W'], [N, few], [N] for the channels ``own``; None without an image."""
    if image is None or weight is None:
        return None
    shifts = weight.new_zeros(len(weight)) if shift is None else shift
    return Shortcut(image, image.stride(), image.shape[1], weight[own].contiguous(), shifts[own].contiguous())


@triton.jit
def add_shortcut(
    value,  # [C, P], in TYPE
    shortcut,  # or None: then the value stays
    channel,  # [C]
    valid,  # [C]
    image,
    row,  # [P]
    column,  # [P]
    inside,  # [P]
    TYPE: tl.constexpr,
):
    """value + weight image + shift. Bytes: the image's few channels a pixel; as many multiply-adds a number."""
    if shortcut is not None:
        at = shortcut.image + image * shortcut.strides[0] + row * shortcut.strides[2] + column * shortcut.strides[3]
        value = value + tl.load(shortcut.shift + channel, mask=valid, other=0).to(TYPE)[:, None]
        for j in range(shortcut.channels):
            step = tl.full((), 1, tl.int64) * j * shortcut.strides[1]
            pixel = tl.load(at + step, mask=inside, other=0).to(TYPE)
            w = tl.load(shortcut.weight + channel * shortcut.channels + j, mask=valid, other=0).to(TYPE)
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
    out,  # [B, N, H', W']
    out_strides,
    TYPE: tl.constexpr,
    scale=None,  # [N]; so shift and slope
    shift=None,
    slope=None,
    residual=None,  # [B, N, H', W']
    residual_strides=None,
    shortcut=None,
):
    """Shortcut and epilogue of OUTPUTS channels, and their store."""
    stored = valid[:, None] & inside[None, :]
    sum = prelu_affine(sum, scale, shift, None, output, valid, TYPE)
    sum = add_shortcut(sum, shortcut, output, valid, image, row, column, inside, TYPE)
    at = residual
    if residual is not None:
        at = pointers(residual, residual_strides, image, output, row, column)
    sum = epilogue(sum, None, None, at, slope, output, valid, stored, TYPE)
    to = pointers(out, out_strides, image, output, row, column)
    tl.store(to, sum.to(out.dtype.element_ty), mask=stored)
