"""Labelled boxes on a photograph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from espkernels.models.classes import numbered
from espkernels.models.detections import Detections

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_detections"]


def draw_detections(image: Image, found: Detections, names: Sequence[str]) -> Image:
    """A copy of the image with a box for each object, the likeliest on top, and its name and score in percent.

    ``names`` are those of the classes from 1 on.
    """
    from PIL import ImageDraw, ImageFont

    picture = image.convert("RGB")
    draw = ImageDraw.Draw(picture)
    thickness = max(picture.width // 300, 2)
    font = ImageFont.load_default(size=max(picture.width // 45, 11))
    colours = numbered(len(names)).colours
    for i in found.scores.argsort().tolist():
        label = int(found.labels[i]) - 1
        left, top, right, bottom = found.boxes[i].tolist()
        # Boxes may reach out of the image.
        left, right = (min(max(x, 0.0), picture.width - 1.0) for x in (left, right))
        top, bottom = (min(max(y, 0.0), picture.height - 1.0) for y in (top, bottom))
        draw.rectangle((left, top, right, bottom), outline=colours[label], width=thickness)
        text = f"{names[label]} {100 * float(found.scores[i]):.0f}"
        place = draw.textbbox((left, top), text, font=font, anchor="ld" if top > 30 else "la")
        draw.rectangle(place, fill=colours[label])
        bright = sum(colours[label]) > 380
        draw.text((left, top), text, fill="black" if bright else "white", font=font, anchor="ld" if top > 30 else "la")
    return picture
