"""Images with a class for every pixel, and what both go through together in training (section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from espkernels.models.data.crops import normalised, uniform
from espkernels.models.segment import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IGNORED", "LabelMaps"]

# The class of pixels that no loss and no score counts: borders of objects, padding.
IGNORED = 255


@dataclass(frozen=True)
class LabelMaps:
    """Pairs of an image's file and of its map of classes.

    With a generator a sample is an image [3, height, width] and classes [height, width] (int64), mirrored every other
    time, resized by a factor drawn from ``zoom`` so that its logarithm is uniform, and cropped; where the resized image
    ends, black and IGNORED follow. Without one the image is resized to ``size``, and the classes are those of the file.

    ``decode`` turns what the file of a map holds into so many ``classes``; others raise ValueError.
    """

    files: Sequence[tuple[Path, Path]]
    size: tuple[int, int]
    zoom: tuple[float, float]
    decode: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]
    classes: int

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        from PIL import Image

        photograph, map_ = self.files[index]
        image = read_image(photograph)
        numbers = self.decode(_numbers(map_))
        beyond = numbers[(numbers >= self.classes) & (numbers != IGNORED)]
        if beyond.size:
            raise ValueError(f"data: {map_} has class {beyond[0]}, expected 0 to {self.classes - 1} or {IGNORED}")
        classes = Image.fromarray(numbers)
        if classes.size != image.size:
            raise ValueError(f"data: {map_} is {classes.size[0]}x{classes.size[1]}, {photograph} {image.size}")
        height, width = self.size
        if generator is None:
            return normalised(image.resize((width, height), Image.Resampling.BILINEAR)), _tensor(classes)
        factor = math.exp(uniform(math.log(self.zoom[0]), math.log(self.zoom[1]), generator))
        resized = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        mirrored = uniform(0, 1, generator) < 0.5
        left = int(uniform(0, max(resized[0] - width, 0) + 1, generator))
        top = int(uniform(0, max(resized[1] - height, 0) + 1, generator))
        image = image.resize(resized, Image.Resampling.BILINEAR)
        classes = classes.resize(resized, Image.Resampling.NEAREST)
        if mirrored:
            image, classes = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (image, classes))
        # A pasted part and not a crop: Pillow fills what lies outside of a crop with zeros, a class of its own.
        part = (left, top, min(left + width, resized[0]), min(top + height, resized[1]))
        whole, whole_classes = Image.new("RGB", (width, height)), Image.new("L", (width, height), IGNORED)
        whole.paste(image.crop(part))
        whole_classes.paste(classes.crop(part))
        return normalised(whole), _tensor(whole_classes)


def _numbers(path: Path) -> npt.NDArray[np.uint8]:
    """The map's numbers, of a file with a palette its indices; ValueError, naming the file, for anything else."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"it has {image.mode} pixels, expected one number each")
            return np.asarray(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data: {path} cannot be read as a map of classes: {error}") from error


def _tensor(classes: Image) -> Tensor:
    return torch.from_numpy(np.array(classes, dtype=np.int64))
