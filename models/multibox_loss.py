"""The loss of SSD: classes of the objects' priors and of the hardest background, offsets of the objects'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from espkernels.models.matching import BACKGROUND

__all__ = ["hardest_negatives", "multibox_loss"]


def hardest_negatives(losses: Tensor, positive: Tensor, ratio: int) -> Tensor:
    """The background priors [B, P] of the largest ``losses`` [B, P]: in each image ``ratio`` for each ``positive`` one.

    Of equal losses the earlier prior is taken, so that a training repeats itself.
    """
    ranked = losses.masked_fill(positive, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    ranks = torch.empty_like(ranked).scatter_(1, ranked, places)
    return (ranks < ratio * positive.sum(dim=1, keepdim=True)) & ~positive


def multibox_loss(
    confidences: Tensor, locations: Tensor, classes: Tensor, offsets: Tensor, negatives: int = 3
) -> tuple[Tensor, Tensor]:
    """The losses of classes and of offsets, each a sum over priors divided by the number of those with an object.

    Cross-entropy counts for the priors of objects and for ``negatives`` times as many of the background in each image,
    those with the least log-probability of background; smooth L1 counts for the priors of objects. Without objects in
    the batch both are 0.

    Args:
        confidences, locations: [B, P, classes] and [B, P, 4], results of the network.
        classes, offsets: [B, P] and [B, P, 4], stacked results of :func:`espkernels.models.matching.match`.

    Half types are computed in float32. Raises ValueError for shapes that do not fit.
    """
    if classes.shape != confidences.shape[:2] or not offsets.shape == locations.shape == (*classes.shape, 4):
        raise ValueError(
            f"classes, offsets: got shapes {list(classes.shape)} and {list(offsets.shape)}, expected [B, P] and "
            f"[B, P, 4] as of confidences {list(confidences.shape)} and locations {list(locations.shape)}"
        )
    logs = F.log_softmax(confidences.float() if confidences.dtype != torch.float64 else confidences, dim=2)
    positive = classes != BACKGROUND
    with torch.no_grad():
        counted = positive | hardest_negatives(-logs[..., BACKGROUND], positive, negatives)
    objects = positive.sum().clamp(min=1)
    class_loss = F.nll_loss(logs[counted], classes[counted], reduction="sum")
    found, wanted = (t[positive].to(logs.dtype) for t in (locations, offsets))
    offset_loss = F.smooth_l1_loss(found, wanted, reduction="sum")
    return class_loss / objects, offset_loss / objects
