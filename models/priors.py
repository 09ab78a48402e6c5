"""Prior boxes: the boxes from which a detection network's heads count, laid over every pixel of its six maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["MAPS", "boxes_per_location", "map_sizes", "prior_boxes", "ratios_of"]

MAPS = 6
# Pixels between the centres of the first four maps' boxes; the last map has one pixel.
STRIDES = (8, 16, 32, 64)
# The smallest and largest side of a prior, as shares of the image's side.
SMALLEST, LARGEST = 0.1, 1.05


def boxes_per_location(ratios: Sequence[float]) -> int:
    """Two squares, and for each aspect ratio a lying and a standing box."""
    return 2 + 2 * len(ratios)


def ratios_of(boxes: int) -> tuple[float, ...]:
    """SSD's aspect ratios of so many boxes a pixel: 2 for four, 2 and 3 for six."""
    return tuple(float(ratio) for ratio in range(2, 2 + (boxes - 2) // 2))


def map_sizes(image_size: int) -> tuple[int, ...]:
    """The sides of the six maps that a square image gives; 512: 64, 32, 16, 8, 4, 1."""
    sides = [math.ceil(image_size / STRIDES[0])]
    while len(sides) < MAPS - 1:
        sides.append(math.ceil(sides[-1] / 2))
    return (*sides, 1)


@lru_cache(maxsize=16)
def prior_boxes(image_size: int, ratios: tuple[tuple[float, ...], ...]) -> Tensor:
    """Centres [P, 4] of all prior boxes in shares of the image, clipped to [0, 1], in the order of the heads' results.

    That order is map by map, row by row, pixel by pixel; a pixel's boxes are the square of the map's own side, that of
    the geometric mean with the next map's, then for each of ``ratios`` (six tuples, a map each) the lying and the
    standing box. Sides rise evenly from 0.1 to 1.05 of the image's, cut to whole pixels. 512 with two ratios
    everywhere: 32,742 boxes.

    The result is shared: do not write to it. Raises ValueError for a size below 1 and for other than six tuples.
    """
    if image_size < 1:
        raise ValueError(f"image_size: got {image_size}, expected at least 1")
    if len(ratios) != MAPS:
        raise ValueError(f"ratios: got {len(ratios)} tuples, expected {MAPS}, one a map")
    sides = np.linspace(math.ceil(SMALLEST * image_size), math.ceil(LARGEST * image_size), MAPS + 1).astype(np.int64)
    strides = (*STRIDES, 100 if image_size == 300 else 128, image_size)  # 300 is SSD's own, with a stride of its own
    boxes = []
    for index, (size, stride) in enumerate(zip(map_sizes(image_size), strides, strict=True)):
        shapes = _shapes(sides[index] / image_size, sides[index + 1] / image_size, ratios[index])
        centre = (np.arange(size) + 0.5) * (stride / image_size)
        y, x = np.meshgrid(centre, centre, indexing="ij")
        places = np.stack([x, y], axis=-1).reshape(-1, 1, 2)
        whole = np.broadcast_to(shapes, (len(places), *shapes.shape))
        boxes.append(np.concatenate([np.broadcast_to(places, whole.shape), whole], axis=-1).reshape(-1, 4))
    return torch.from_numpy(np.concatenate(boxes).clip(0, 1).astype(np.float32))


def _shapes(side: float, next_side: float, ratios: Sequence[float]) -> np.ndarray:
    """Width and height [N, 2] of one pixel's boxes."""
    between = math.sqrt(side * next_side)
    shapes = [(side, side), (between, between)]
    for ratio in ratios:
        root = math.sqrt(ratio)
        shapes += [(side * root, side / root), (side / root, side * root)]
    return np.array(shapes)
