"""Boxes as tensors: their two forms, and how much two of them overlap.

Corners are (left, top, right, bottom); centres are (x, y, width, height). Either may be in pixels or in shares of the
image's sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centres", "corners", "overlaps"]


def corners(boxes: Tensor) -> Tensor:
    """``boxes`` [..., 4] from centres to corners."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def centres(boxes: Tensor) -> Tensor:
    """``boxes`` [..., 4] from corners to centres."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of every box with every other: corners [N, 4] and [M, 4] -> [N, M].

    It is 0 where neither box has an area.
    """
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    either = _areas(one)[:, None] + _areas(other) - both
    return torch.where(either > 0, both / either, 0)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=-1)
