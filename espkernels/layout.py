"""The memory format of results: the one rule that the kernels, their fake tensors and their doors follow."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["empty_map", "layout_of", "out_size"]


def layout_of(x: Tensor) -> torch.memory_format:
    """The format of the result of a map: that of a dense map, and for others the one whose innermost axis is dense."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B, channels, height, width] for a result of the map ``x``, in its dtype and format."""
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def out_size(size: int, stride: int) -> int:
    """Rows or columns after a stride: H' of H."""
    return (size - 1) // stride + 1
