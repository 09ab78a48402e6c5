"""The memory format of results, and the dtype of vectors beside them: rules that kernels, fakes and doors follow."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["convolved_size", "empty_map", "empty_pixels", "is_few", "is_narrow", "layout_of", "out_size"]
__all__ += ["to_channels_last", "vector_dtype"]


def layout_of(x: Tensor) -> torch.memory_format:
    """The format of the result of a map: that of a dense map, and for others the one whose innermost axis is dense."""
    if x.is_contiguous() or _has_no_format():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def to_channels_last(x: Tensor) -> Tensor:
    """The map ``x`` [B, C, H, W] itself where it is in channels_last or has no format, else a copy."""
    return x if _has_no_format() else x.contiguous(memory_format=torch.channels_last)


def _has_no_format() -> bool:
    """Whether maps may be such as torch.func.vmap makes: asked for channels_last, they raise."""
    return torch._C._are_functorch_transforms_active()


def empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B, channels, height, width] for a result of the map ``x``, in its dtype and format."""
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def empty_pixels(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B, channels, height, width] in channels_last, whatever the format of ``x``, in its dtype."""
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scales, shifts and slopes beside a map of ``dtype``: float32, float64 beside float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def out_size(size: int, stride: int) -> int:
    """Rows or columns after a stride: H' of H."""
    return (size - 1) // stride + 1


def convolved_size(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """Rows and columns of a map [B, M, H, W] behind a convolution with a weight [N, M/groups, h, w]."""
    height, width = (
        (x.shape[i] + 2 * padding - dilation * (weight.shape[i] - 1) - 1) // stride + 1 for i in (2, 3)
    )  # fmt: skip
    return height, width


def is_few(weight: Tensor, dilation: int, groups: int) -> bool:
    """Whether a convolution with ``weight`` is dense, of few input channels: such as the first one of a network."""
    return groups == 1 and dilation == 1 and weight[0].numel() <= 256


def is_narrow(weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> bool:
    """Whether a convolution with ``weight`` keeps the size, is 3x3, and has 8 groups or more of 8 inputs at most."""
    few = groups >= 8 and weight.shape[1] <= 8
    return few and tuple(weight.shape[2:]) == (3, 3) and (stride, padding, dilation) == (1, 1, 1)
