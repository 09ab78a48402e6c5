"""What SSD does to images and boxes in training: colours, a larger canvas, a part with objects in it, a mirror.

Boxes are corners [G, 4] in shares of the image throughout.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from espkernels.models.boxes import overlaps
from espkernels.models.data.crops import uniform
from espkernels.models.segment import MEAN

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["augmented"]

LARGEST_CANVAS = 4.0
# The least overlap that a part must have with every object; None for the whole image, 0 for any part.
LEAST_OVERLAPS = (None, 0.1, 0.3, 0.7, 0.9, 0.0)
TRIES = 50


def augmented(image: Image, boxes: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Image, Tensor, Tensor]:
    """The image and the objects left on it, at least one where there was one."""
    image = _recoloured(image, generator)
    if uniform(0, 1, generator) < 0.5:
        image, boxes = _on_larger_canvas(image, boxes, generator)
    image, boxes, labels = _part(image, boxes, labels, generator)
    if uniform(0, 1, generator) < 0.5:
        from PIL import ImageOps

        image = ImageOps.mirror(image)
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    return image, boxes, labels


def _recoloured(image: Image, generator: torch.Generator) -> Image:
    """Brightness, contrast, saturation and hue, each in every other image."""
    from PIL import Image, ImageEnhance

    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if uniform(0, 1, generator) < 0.5:
            low, high = (0.875, 1.125) if enhancer is ImageEnhance.Brightness else (0.5, 1.5)
            image = enhancer(image).enhance(uniform(low, high, generator))
    if uniform(0, 1, generator) < 0.5:
        turn = round(uniform(-18, 18, generator) / 360 * 256)
        hue, *others = image.convert("HSV").split()
        turned = Image.fromarray(np.asarray(hue) + np.uint8(turn % 256))
        image = Image.merge("HSV", (turned, *others)).convert("RGB")
    return image


def _on_larger_canvas(image: Image, boxes: Tensor, generator: torch.Generator) -> tuple[Image, Tensor]:
    """Somewhere on a canvas of ImageNet's mean, up to four times as wide and high: small objects to learn from."""
    from PIL import Image

    width, height = image.size
    factor = uniform(1, LARGEST_CANVAS, generator)
    wide, high = int(width * factor), int(height * factor)
    left = int(uniform(0, wide - width + 1, generator))
    top = int(uniform(0, high - height + 1, generator))
    red, green, blue = (round(255 * mean) for mean in MEAN)
    canvas = Image.new("RGB", (wide, high), (red, green, blue))
    canvas.paste(image, (left, top))
    size = boxes.new_tensor([width, height, width, height])
    moved = boxes * size + boxes.new_tensor([left, top, left, top])
    return canvas, moved / boxes.new_tensor([wide, high, wide, high])


def _part(image: Image, boxes: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Image, Tensor, Tensor]:
    """A part that overlaps every object enough; objects whose middle lies outside of it are gone."""
    if len(boxes) == 0:
        return image, boxes, labels
    width, height = image.size
    least = LEAST_OVERLAPS[int(torch.randint(len(LEAST_OVERLAPS), (), generator=generator))]
    if least is None:
        return image, boxes, labels
    for _ in range(TRIES):
        w, h = (uniform(0.3, 1.0, generator) for _ in range(2))
        if not 0.5 <= h * height / (w * width) <= 2:
            continue
        left, top = uniform(0, 1 - w, generator), uniform(0, 1 - h, generator)
        part = boxes.new_tensor([[left, top, left + w, top + h]])
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((middles > part[:, :2]) & (middles < part[:, 2:])).all(dim=1)
        if not inside.any() or overlaps(part, boxes).min() < least:
            continue
        kept = torch.maximum(torch.minimum(boxes[inside], part[:, [2, 3, 2, 3]]), part[:, [0, 1, 0, 1]])
        # Rounding may put a side that was cut off a little outside.
        kept = ((kept - part[:, [0, 1, 0, 1]]) / boxes.new_tensor([w, h, w, h])).clamp(0, 1)
        pixels = (
            math.floor(left * width), math.floor(top * height),
            math.ceil((left + w) * width), math.ceil((top + h) * height),
        )  # fmt: skip
        return image.crop(pixels), kept, labels[inside]
    return image, boxes, labels
