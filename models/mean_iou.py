"""The score of segmentation: intersection over union of each class (paper section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ConfusionCounter"]


class ConfusionCounter:
    """Counts over images which class each pixel was given, as whole numbers: the order of images has no influence.

    ``counts`` [C, C] (int64), a row a true class; sum them over processes before :meth:`ious`.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, given: Tensor, true: Tensor) -> None:
        """Counts maps of one shape; pixels whose true class is none of 0 to C - 1, such as 255, do not count.

        Raises ValueError for shapes that differ and for a given class that there is not.
        """
        classes = len(self.counts)
        if given.shape != true.shape:
            raise ValueError(f"given: got shape {list(given.shape)}, expected {list(true.shape)}")
        counted = (true >= 0) & (true < classes)
        pairs = true[counted].long() * classes + given[counted].long()
        if pairs.numel() and not (int(given[counted].min()) >= 0 and int(given[counted].max()) < classes):
            raise ValueError(f"given: got a class of {int(given[counted].max())}, expected 0 to {classes - 1}")
        self.counts += pairs.cpu().bincount(minlength=classes**2).view(classes, classes)

    def ious(self) -> Tensor:
        """Intersection over union of each class [C] in float64, NaN for one that is neither given nor true anywhere."""
        right = self.counts.diagonal().double()
        return right / (self.counts.sum(0) + self.counts.sum(1) - right)

    def mean(self) -> float:
        """The mean over the classes that occur, 0 where none does."""
        ious = self.ious()
        return float(ious.nanmean()) if not ious.isnan().all() else 0.0

    def accuracy(self) -> float:
        """The share of pixels that were given their class."""
        return float(self.counts.diagonal().sum() / self.counts.sum().clamp(min=1))
