"""MS-COCO's layout: annotations/instances_<part><year>.json beside <part><year>/ with the images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from espkernels.models.data.crops import normalised, random_crop
from espkernels.models.data.objects import Scene
from espkernels.models.segment import read_image

__all__ = ["ImageLabels", "coco_detection", "coco_labels"]

HOW_TO_GET = "images and annotations of 2014 and 2017 are at https://cocodataset.org/#download"


@dataclass(frozen=True)
class ImageLabels:
    """Images with several labels each: a sample is [3, size, size] and a 0 or 1 for every label [C] (float32).

    With a generator a random part of at least ``least`` of the image is taken, or its mirror; without one all of it.
    """

    files: list[Path]
    labels: list[frozenset[int]]  # of each file
    names: list[str]
    size: int
    least: float

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image = read_image(self.files[index])
        if generator is None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        else:
            image = random_crop(image, self.size, (self.least, 1.0), generator)
        wanted = torch.zeros(len(self.names))
        wanted[list(self.labels[index])] = 1
        return normalised(image), wanted


@dataclass(frozen=True)
class Annotations:
    """What one file of annotations holds, images in its order and categories numbered in the order of their ids."""

    files: list[Path]
    names: list[str]
    objects: list[list[tuple[int, list[float], bool]]]  # of each image: category, corners in pixels, a crowd


def annotations_of(root: Path, part: str, year: int) -> Annotations:
    """The annotations of "train" or "val".

    Raises FileNotFoundError for a missing file and ValueError for annotations that are damaged.
    """
    path = root / "annotations" / f"instances_{part}{year}.json"
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no {path}; {HOW_TO_GET}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted((int(one["id"]), str(one["name"])) for one in content["categories"])
        numbers = {identity: number for number, (identity, _) in enumerate(categories)}
        files = {int(image["id"]): root / f"{part}{year}" / str(image["file_name"]) for image in content["images"]}
        objects: dict[int, list[tuple[int, list[float], bool]]] = {identity: [] for identity in files}
        for one in content["annotations"]:
            left, top, width, height = (float(side) for side in one["bbox"])
            box = [left, top, left + width, top + height]
            of_image = objects[int(one["image_id"])]
            of_image.append((numbers[int(one["category_id"])], box, bool(one.get("iscrowd", 0))))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data: {path} is no annotation of MS-COCO: {error!r}") from error
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"data: there is no {file}, which {path} lists; {HOW_TO_GET}")
    return Annotations(list(files.values()), [name for _, name in categories], list(objects.values()))


def coco_labels(root: Path, part: str, year: int, size: int, least: float = 0.2) -> ImageLabels:
    """Which of the categories are on each image; images without any are there too. Raises as :func:`annotations_of`."""
    found = annotations_of(root, part, year)
    labels = [frozenset(category for category, _, _ in objects) for objects in found.objects]
    return ImageLabels(found.files, labels, found.names, size, least)


def coco_detection(root: Path, part: str, year: int) -> tuple[list[Scene], list[str]]:
    """The images with their objects, and the categories' names; class 1 is the first.

    Raises as :func:`annotations_of`.
    """
    found = annotations_of(root, part, year)
    scenes = [
        Scene(
            file,
            torch.tensor([box for _, box, _ in objects]).view(-1, 4),
            torch.tensor([category + 1 for category, _, _ in objects], dtype=torch.int64),
            torch.tensor([crowd for _, _, crowd in objects], dtype=torch.bool),
        )
        for file, objects in zip(found.files, found.objects, strict=True)
    ]
    return scenes, found.names
