"""The one place where a kernel is started, and what every launch needs to know of its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of
from espkernels.triton.configuration import Tile

__all__ = ["compute_type", "dense_vector", "flat_map", "launch", "leaders", "product_layout", "tiles", "within"]


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Runs ``programs`` programs of ``kernel`` on the device of its first tensor; none where there are none."""
    if programs == 0:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, **constants)


def compute_type(x: Tensor) -> Any:
    """The type of sums: float64 for float64, float32 for all others."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dense_vector(vector: Tensor | None) -> Tensor | None:
    """One number a channel without gaps, as every kernel reads its vectors; a copy only where it has some."""
    return None if vector is None else vector.contiguous()


def product_layout(x: Tensor) -> torch.memory_format:
    """The format to read a map in for products of pixels: a classifier's images, of one pixel, are one run of them."""
    return torch.channels_last if x.shape[2] * x.shape[3] == 1 else layout_of(x)


def flat_map(x: Tensor, layout: torch.memory_format) -> Tensor:
    """A map [B, C, H, W] as [images, C, pixels] for kernels to which a pixel is a pixel.

    A view wherever the pixels lie at equal steps, so for every dense map; channels_last ones become one image. Any
    other map is copied in ``layout``, as on the CPU.
    """
    batch, channels, height, width = x.shape
    if layout == torch.channels_last:
        pixels = x.permute(1, 0, 2, 3)
        try:
            return pixels.view(1, channels, batch * height * width)
        except RuntimeError:
            return x.contiguous(memory_format=layout).permute(1, 0, 2, 3).view(1, channels, batch * height * width)
    try:
        return x.view(batch, channels, height * width)
    except RuntimeError:
        return x.contiguous().view(batch, channels, height * width)


def within(steps: Sequence[int], height: int, width: int) -> tuple[int, ...]:
    """Dilations or strides cut to the size of the map: beyond it none reaches a pixel, and sums with it stay small."""
    return tuple(min(step, max(height, width)) for step in steps)


def leaders(dilations: Sequence[int]) -> tuple[int, ...]:
    """For each branch the first branch with the same dilation: those share the pixels that they read."""
    return tuple(list(dilations).index(dilation) for dilation in dilations)


def tiles(tile: Tile, channels: int, height: int, width: int) -> int:
    """How many tiles cover a map [channels, height, width]."""
    return -(-channels // tile.channels) * -(-height // tile.rows) * -(-width // tile.columns)
