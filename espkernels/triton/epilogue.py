"""``prelu(value * scale + shift + residual, slope)`` on a tile in registers; None leaves a step out."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["epilogue", "prelu_affine"]


@triton.jit
def prelu_affine(
    value,  # [C, P], in TYPE
    scale,  # [channels], or None; so the others
    shift,
    slope,
    channel,  # [C]
    valid,  # [C], which channels there are
    TYPE: tl.constexpr,
):
    """An affine and a PReLU a channel. Costs no bytes but the vectors."""
    if scale is not None:
        value = value * tl.load(scale + channel, mask=valid, other=0).to(TYPE)[:, None]
    if shift is not None:
        value = value + tl.load(shift + channel, mask=valid, other=0).to(TYPE)[:, None]
    if slope is not None:
        value = tl.where(value > 0, value, value * tl.load(slope + channel, mask=valid, other=0).to(TYPE)[:, None])
    return value


@triton.jit
def epilogue(
    value,  # [C, P], in TYPE
    scale,  # [channels], or None; so shift and slope
    shift,
    residual,  # pointers [C, P], or None
    slope,
    channel,  # [C]
    valid,  # [C]
    stored,  # [C, P], which pixels of which channels there are
    TYPE: tl.constexpr,
):
    """An affine, a residual and a PReLU. Bytes: the residual once."""
    value = prelu_affine(value, scale, shift, None, channel, valid, TYPE)
    if residual is not None:
        value = value + tl.load(residual, mask=stored, other=0).to(TYPE)
    return prelu_affine(value, None, None, slope, channel, valid, TYPE)
