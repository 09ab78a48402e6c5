"""Cityscapes' layout: leftImg8bit/<part>/<city>/ beside gtFine/<part>/<city>/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from espkernels.models.data.label_maps import IGNORED, LabelMaps

__all__ = ["CLASS_WEIGHTS", "cityscapes"]

HOW_TO_GET = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip are at https://www.cityscapes-dataset.com"
# The label ids of train ids 0 to 18; all others are no part of the benchmark.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Those of the released code for its 20 outputs; the last stands for none of the classes.
CLASS_WEIGHTS = (
    2.8149, 6.9850, 3.7890, 9.9428, 9.7702, 9.5111, 10.3114, 10.0265, 4.6323, 9.5608, 7.8698, 9.5169, 10.3737, 6.6616,
    10.2605, 10.2879, 10.2898, 10.4054, 10.1381, 0.0,
)  # fmt: skip

_TRAIN_IDS = np.full(256, IGNORED, dtype=np.uint8)
_TRAIN_IDS[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))


def train_ids(label_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Label ids as train ids; those outside the benchmark are IGNORED."""
    return _TRAIN_IDS[label_ids]


def cityscapes(root: Path, part: str, size: tuple[int, int], zoom: tuple[float, float]) -> LabelMaps:
    """The frames of "train" or "val" with their fine annotations.

    Raises FileNotFoundError where a folder or an annotation is missing.
    """
    images = root / "leftImg8bit" / part
    if not images.is_dir():
        raise FileNotFoundError(f"data: there is no folder {images}. {HOW_TO_GET}")
    files = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        map_ = root / "gtFine" / part / image.parent.name / name
        if not map_.is_file():
            raise FileNotFoundError(f"data: there is no {map_} for {image}. {HOW_TO_GET}")
        files.append((image, map_))
    if not files:
        raise FileNotFoundError(f"data: {images} has no <city>/*_leftImg8bit.png. {HOW_TO_GET}")
    return LabelMaps(files, size, zoom, train_ids, len(LABEL_IDS))
