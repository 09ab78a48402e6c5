"""ImageNet's layout: a folder a class, in train/ and in val/."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espkernels.models.data.crops import centre_crop, normalised, random_crop
from espkernels.models.segment import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ENDINGS", "ImageFolder", "of_image"]

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

HOW_TO_GET = (
    "ImageNet is at https://www.image-net.org (an account is needed); its validation images have to be sorted into a "
    "folder a class, as those of training are"
)


class ImageFolder:
    """The images under ``root``/``part``/<class>/, classes in the order of their names.

    A sample is an image [3, size, size], randomly cropped where there is a generator, and the number of its class.

    Raises FileNotFoundError where a folder is missing, and ValueError for one without classes or images.
    """

    def __init__(self, root: Path, part: str, size: int = 224, share: tuple[float, float] = (0.08, 1.0)) -> None:
        folder = root / part
        if not folder.is_dir():
            raise FileNotFoundError(f"data: there is no folder {folder}, expected {part}/<class>/<image>. {HOW_TO_GET}")
        self.size, self.share = size, share
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not self.classes:
            raise ValueError(f"data: {folder} has no folders of classes. {HOW_TO_GET}")
        self.files: list[tuple[Path, int]] = []
        for number, name in enumerate(self.classes):
            found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in ENDINGS)
            if not found:
                raise ValueError(f"data: {folder / name} holds no images ({', '.join(ENDINGS)})")
            self.files += [(path, number) for path in found]

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
        path, label = self.files[index]
        image = read_image(path)
        if generator is None:
            return of_image(image, self.size), label
        return normalised(random_crop(image, self.size, self.share, generator)), label


def of_image(image: Image, size: int) -> Tensor:
    """Any image as the network takes it, [3, size, size]."""
    return normalised(centre_crop(image, size))
