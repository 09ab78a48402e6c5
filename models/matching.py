"""Which prior box learns which object: the targets of SSD's training."""

from __future__ import annotations

import torch
from torch import Tensor

from espkernels.models.box_coding import encode
from espkernels.models.boxes import corners, overlaps

__all__ = ["BACKGROUND", "match"]

BACKGROUND = 0


def match(boxes: Tensor, labels: Tensor, priors: Tensor, threshold: float = 0.45) -> tuple[Tensor, Tensor]:
    """The targets of one image: for every prior a class [P] (int64) and the offsets [P, 4] of its object.

    A prior takes the object that it overlaps most, where their intersection over union is at least ``threshold``, else
    the background, class 0. Before that every object takes the prior that it overlaps most, however little; where two
    objects want one prior, the later object has it. P x G overlaps are held at once.

    Args:
        boxes: corners [G, 4] in shares of the image; G may be 0.
        labels: classes [G], from 1.
        priors: centres [P, 4] of :func:`espkernels.models.priors.prior_boxes`.

    Raises ValueError for shapes that do not fit, a label below 1 and a box whose sides are not above 0.
    """
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"boxes: got shape {list(boxes.shape)}, expected [{len(labels)}, 4], one for each label")
    classes = torch.full((len(priors),), BACKGROUND, dtype=torch.int64, device=priors.device)
    if len(boxes) == 0:
        return classes, torch.zeros_like(priors)
    if not (labels > BACKGROUND).all():
        raise ValueError(f"labels: got {int(labels.min())}, expected classes from 1; {BACKGROUND} is the background")
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError("boxes: got one whose right is not above its left, or whose bottom is not above its top")
    overlap = overlaps(boxes.to(priors.dtype), corners(priors))
    best, objects = overlap.max(dim=0)
    # The largest index of an object that wants a prior, the same on every device whatever the order of writing.
    wanted = torch.full_like(objects, -1)
    indices = torch.arange(len(boxes), device=objects.device)
    wanted.scatter_reduce_(0, overlap.argmax(dim=1), indices, "amax")
    objects = torch.where(wanted >= 0, wanted, objects)
    matched = (wanted >= 0) | (best >= threshold)
    classes = torch.where(matched, labels[objects], classes)
    return classes, encode(boxes[objects].to(priors.dtype), priors)
