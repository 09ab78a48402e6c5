"""Boxes as tensors: their two forms, and how much two of them overlap.

Corners are (left, top, right, bottom); centres are (x, y, width, height). Either may be in pixels or in shares of the
image's sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centres", "corners", "inside", "overlaps"]


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
    both = _intersections(one, other)
    either = _areas(one)[:, None] + _areas(other) - both
    return torch.where(either > 0, both / either, 0)


def inside(one: Tensor, other: Tensor) -> Tensor:
    """The share of every box's own area that lies in every other: corners [N, 4] and [M, 4] -> [N, M], 0 of none."""
    areas = _areas(one)[:, None]
    return torch.where(areas > 0, _intersections(one, other) / areas, 0)


def _intersections(one: Tensor, other: Tensor) -> Tensor:
    # One number a pair in every step: a last dimension of two, and a product over it, would take several times as long.
    both = torch.ones((), dtype=one.dtype, device=one.device)
    for low, high in ((0, 2), (1, 3)):
        start = torch.maximum(one[:, low, None], other[:, low])
        both = both * (torch.minimum(one[:, high, None], other[:, high]) - start).clamp_(min=0)
    return both


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)
