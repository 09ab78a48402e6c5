"""The scores of detection: average precision as PASCAL VOC and MS-COCO define it (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espkernels.models.boxes import inside, overlaps
from espkernels.models.detections import Detections

__all__ = ["COCO_THRESHOLDS", "AveragePrecision"]

COCO_THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))
COCO_MOST = 100
RULES = ("eleven", "area", "coco")


class AveragePrecision:
    """Average precision of each class, over images that are added one by one.

    ``rule`` is "eleven", the mean of the best precision from recalls 0, 0.1 ... 1 on (VOC 2007); "area" under the curve
    of those best precisions (VOC 2010 and later); or "coco", their mean at 101 recalls, where a detection may also take
    its second-best object if the best is taken. ``thresholds`` are the overlaps from which a detection is right.

    Objects that are too hard count neither as found nor as missed, nor do detections of them. Of "coco" these are
    crowds: what lies in one with the overlap's share of its own area is of it, and no more than the best 100 detections
    of an image and class count.
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] = (0.5,), rule: str = "area") -> None:
        if rule not in RULES:
            raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
        self.num_classes, self.thresholds, self.rule = num_classes, tuple(thresholds), rule
        self.objects = torch.zeros(num_classes, dtype=torch.int64)
        # Of each class: scores, and for each threshold 1 for right, 0 for wrong, -1 for neither.
        self.scores: list[list[Tensor]] = [[] for _ in range(num_classes)]
        self.outcomes: list[list[Tensor]] = [[] for _ in range(num_classes)]

    def add(self, found: Detections, boxes: Tensor, labels: Tensor, difficult: Tensor | None = None) -> None:
        """One image: what was found, and corners [G, 4] in the same pixels and classes [G] from 1 of its objects."""
        difficult = torch.zeros(len(labels), dtype=torch.bool) if difficult is None else difficult
        for number in range(self.num_classes):
            mine, theirs = found.labels == number + 1, labels == number + 1
            self.objects[number] += int((theirs & ~difficult).sum())
            scores, order = found.scores[mine].sort(descending=True, stable=True)
            if self.rule == "coco":
                scores, order = scores[:COCO_MOST], order[:COCO_MOST]
            ours, objects, hard = found.boxes[mine][order].double(), boxes[theirs].double(), difficult[theirs]
            overlap = overlaps(ours, objects)
            if self.rule == "coco":
                overlap[:, hard] = inside(ours, objects[hard])
            outcomes = [self._outcomes(overlap, hard, threshold) for threshold in self.thresholds]
            self.scores[number].append(scores)
            self.outcomes[number].append(torch.stack(outcomes))

    def _outcomes(self, overlap: Tensor, difficult: Tensor, threshold: float) -> Tensor:
        """For each detection, best first, whether it is right: ``overlap`` [N, G]."""
        outcomes = torch.zeros(len(overlap), dtype=torch.int64)
        taken = torch.zeros(overlap.shape[1], dtype=torch.bool)
        for i, row in enumerate(overlap if overlap.shape[1] else ()):
            if self.rule == "coco":
                # The best object that is left; one that is too hard only where no other will do.
                row = torch.where(taken & ~difficult, -1.0, row)
                easy = torch.where(difficult, -1.0, row)
                row = easy if easy.max() >= threshold else row
            best = int(row.argmax())
            if row[best] < threshold:
                continue
            if difficult[best]:
                outcomes[i] = -1
            elif not taken[best]:
                outcomes[i] = 1
                taken[best] = True
        return outcomes

    def averages(self) -> Tensor:
        """[thresholds, classes] in float64, NaN for a class without objects."""
        result = torch.full((len(self.thresholds), self.num_classes), torch.nan, dtype=torch.float64)
        for number, objects in enumerate(self.objects.tolist()):
            if objects == 0:
                continue
            scores = torch.cat(self.scores[number])
            order = scores.argsort(descending=True, stable=True)
            for i, outcomes in enumerate(torch.cat(self.outcomes[number], dim=1)[:, order]):
                result[i, number] = self._average(outcomes[outcomes >= 0].double(), objects)
        return result

    def _average(self, right: Tensor, objects: int) -> float:
        """The average precision of one class: ``right`` [N] says of each detection, best first, whether it is."""
        hits = right.cumsum(0)
        recall, precision = hits / objects, hits / torch.arange(1, len(right) + 1)
        best = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
        if self.rule == "area":
            return float((best * right).sum() / objects)
        points = torch.linspace(0, 1, 11 if self.rule == "eleven" else 101, dtype=torch.float64)
        # A recall of 3 / 10 reaches the point 0.3, whichever way the two are rounded.
        places = torch.searchsorted(recall + 1e-12, points)
        return float(torch.cat([best, best.new_zeros(1)])[places].mean())

    def mean(self) -> float:
        """The mean over thresholds and the classes that have objects, 0 where none has."""
        averages = self.averages()
        return float(averages.nanmean()) if not averages.isnan().all() else 0.0
