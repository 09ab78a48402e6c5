"""PASCAL VOC's layout: JPEGImages/, SegmentationClass/, Annotations/ and the lists in ImageSets/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import torch

from espkernels.models.classes import VOC
from espkernels.models.data.label_maps import LabelMaps
from espkernels.models.data.objects import Scene

__all__ = ["voc_detection", "voc_segmentation"]

HOW_TO_GET = "VOCtrainval_11-May-2012.tar is at http://host.robots.ox.ac.uk/pascal/VOC/voc2012"


def voc_segmentation(root: Path, part: str, size: tuple[int, int], zoom: tuple[float, float]) -> LabelMaps:
    """The images of "train" or "val" with a class for every pixel, from ``root``, the folder with JPEGImages in it.

    Training takes the extra annotations where they lie beside (SegmentationClassAug/ and
    ImageSets/Segmentation/train_aug.txt). Raises FileNotFoundError where a list, an image or a map is missing.
    """
    lists = root / "ImageSets" / "Segmentation"
    extra = root / "SegmentationClassAug"
    is_extra = part == "train" and extra.is_dir() and (lists / "train_aug.txt").is_file()
    maps, names = (extra, lists / "train_aug.txt") if is_extra else (root / "SegmentationClass", lists / f"{part}.txt")
    files = _pairs(root, names, maps, ".png")
    if not files:
        raise ValueError(f"data: {names} lists no image")
    return LabelMaps(files, size, zoom, _as_they_are, len(VOC))


def _as_they_are(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return numbers


def _pairs(root: Path, names: Path, folder: Path, ending: str) -> list[tuple[Path, Path]]:
    """Each image of the list ``names`` and the file in ``folder`` that belongs to it, all of which are there."""
    if not names.is_file():
        raise FileNotFoundError(f"data: there is no {names}. {HOW_TO_GET}")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", folder / f"{name}{ending}") for name in names.read_text().split()]
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise FileNotFoundError(f"data: there is no {path}, which {names} lists. {HOW_TO_GET}")
    return pairs


def voc_detection(root: Path, lists: Sequence[str]) -> list[Scene]:
    """The images of ``lists``, such as "trainval", with their objects, from the folder with Annotations in it.

    Raises FileNotFoundError for a missing file and ValueError for an annotation that is damaged.
    """
    scenes: list[Scene] = []
    for part in lists:
        names = root / "ImageSets" / "Main" / f"{part}.txt"
        scenes += [_scene(*pair) for pair in _pairs(root, names, root / "Annotations", ".xml")]
    if not scenes:
        raise ValueError(f"data: the lists {', '.join(lists)} of {root} name no image")
    return scenes


def _scene(image: Path, annotation: Path) -> Scene:
    boxes, labels, difficult = [], [], []
    try:
        for thing in ElementTree.parse(annotation).getroot().iter("object"):
            labels.append(VOC.names.index(thing.findtext("name", "")))
            sides = [float(thing.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            # Pixels count from 1, and the last one belongs to the box.
            boxes.append([sides[0] - 1, sides[1] - 1, sides[2], sides[3]])
            difficult.append(thing.findtext("difficult", "0").strip() == "1")
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"data: {annotation} is no annotation of PASCAL VOC: {error}") from error
    return Scene(
        image, torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.int64), torch.tensor(difficult).bool()
    )
