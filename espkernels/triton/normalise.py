"""A batch norm and its PReLU in front of the kernel that reads their map: the normalised map is never stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["Norm", "loaded", "normalised"]


class Norm(NamedTuple):
    """``prelu(map * scale + shift, slope)``, each a vector of the map's channels."""

    scale: Any
    shift: Any
    slope: Any


@triton.jit
def loaded(norm, channel, valid, TYPE: tl.constexpr):
    """The numbers of the channels, in the shape of ``channel``; zero where there is none."""
    scale = tl.load(norm.scale + channel, mask=valid, other=0).to(TYPE)
    shift = tl.load(norm.shift + channel, mask=valid, other=0).to(TYPE)
    return scale, shift, tl.load(norm.slope + channel, mask=valid, other=0).to(TYPE)


@triton.jit
def normalised(value, there, numbers):
    """The normalised and activated pixels, in the type of ``numbers``; zero where there is none, as a padding is."""
    value = value * numbers[0] + numbers[1]
    return tl.where(there, tl.where(value > 0, value, value * numbers[2]), 0)
