"""Several labels an image: the loss and the scores of the paper's experiment on MS-COCO (section 4.1, Fig. 6).

The network is :func:`espkernels.models.espnetv2` with an output for each label, 80 for MS-COCO; an image has a label
where its logit is above 0, a probability above a half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MultiLabelCounter", "MultiLabelScores", "multilabel_loss"]


def multilabel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits [B, C] with 0 and 1 in targets [B, C]: summed over labels, averaged over images.

    The sum is that of the released code, for which the paper's rates of learning are: the mean over everything times C.
    Raises ValueError for shapes that do not fit.
    """
    _check(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)) * logits.shape[1]


@dataclass(frozen=True)
class MultiLabelScores:
    """Precision, recall and F1, class-wise and overall, each from 0 to 1.

    Class-wise ones are means over all classes of what each class has, where a class without a hit counts as 0; so
    ``class_f1`` is no function of the two others. Overall ones come from the hits and misses of all classes together.
    """

    class_precision: float
    class_recall: float
    class_f1: float
    overall_precision: float
    overall_recall: float
    overall_f1: float


class MultiLabelCounter:
    """Counts hits and misses of each label over batches, as whole numbers: the order of batches has no influence.

    ``counts`` [3, C] (int64) are right, wrongly given and missing labels; sum them over processes before
    :meth:`scores`.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Counts a batch: logits [B, C] and 0 or 1 in targets [B, C]. Raises ValueError for shapes that do not fit."""
        _check(logits, targets)
        if logits.shape[1] != self.counts.shape[1]:
            raise ValueError(f"logits: got {logits.shape[1]} labels, expected {self.counts.shape[1]}")
        given, wanted = logits > 0, targets > 0
        found = torch.stack([(given & wanted).sum(0), (given & ~wanted).sum(0), (~given & wanted).sum(0)])
        self.counts += found.to(self.counts.device)

    def scores(self) -> MultiLabelScores:
        """The scores of all that was counted; 0 where there is nothing to divide by."""
        class_wise = [float(share.mean()) for share in _shares(self.counts)]
        overall = [float(share) for share in _shares(self.counts.sum(dim=1))]
        return MultiLabelScores(*class_wise, *overall)


def _shares(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    right, wrong, missing = counts.double()
    return (
        right / (right + wrong).clamp(min=1),
        right / (right + missing).clamp(min=1),
        2 * right / (2 * right + wrong + missing).clamp(min=1),
    )


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"targets: got shape {list(targets.shape)} with logits {list(logits.shape)}, expected both [B, C]"
        )
