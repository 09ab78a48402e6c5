"""What ImageNet's photographs go through: a random crop and flip in training, a centre crop else (section 4.1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from espkernels.models.segment import MEAN, STD

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["centre_crop", "normalised", "random_crop", "uniform"]

ASPECTS = (3 / 4, 4 / 3)


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A number between ``low`` and ``high``."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def random_crop(image: Image, size: int, share: tuple[float, float], generator: torch.Generator) -> Image:
    """A part of the image, of a ``share`` of its area and sides of 3:4 to 4:3, resized to a square; or its mirror.

    Where ten draws do not fit into the image, its largest centred part of such a ratio is taken.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * uniform(*share, generator)
        aspect = math.exp(uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1]), generator))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(uniform(0, width - w + 1, generator))
            top = int(uniform(0, height - h + 1, generator))
            break
    else:
        aspect = min(max(width / height, ASPECTS[0]), ASPECTS[1])
        w, h = min(width, max(round(height * aspect), 1)), min(height, max(round(width / aspect), 1))
        left, top = (width - w) // 2, (height - h) // 2
    cropped = image.resize((size, size), _bilinear(), (left, top, left + w, top + h))
    if uniform(0, 1, generator) < 0.5:
        from PIL import ImageOps

        cropped = ImageOps.mirror(cropped)
    return cropped


def centre_crop(image: Image, size: int) -> Image:
    """The middle of the image resized so that its shorter side is 8/7 of ``size``: 256 for 224."""
    width, height = image.size
    scale = round(size * 8 / 7) / min(width, height)
    side = size / scale
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), _bilinear(), (left, top, left + side, top + side))


def normalised(image: Image) -> Tensor:
    """[3, H, W] float32: RGB from 0 to 1, less ImageNet's mean, over its deviation."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()


def _bilinear() -> Any:
    from PIL import Image

    return Image.Resampling.BILINEAR
