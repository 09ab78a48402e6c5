"""Boxes as offsets from prior boxes: what the detection network's heads learn (SSD, the paper's reference [26])."""

from __future__ import annotations

import torch
from torch import Tensor

from espkernels.models.boxes import centres, corners

__all__ = ["decode", "encode"]

# Offsets are divided by these, so that they vary about as much as the losses of classes do.
CENTRE_VARIANCE = 0.1
SIZE_VARIANCE = 0.2


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """The offsets [..., 4] of ``boxes`` (corners) from ``priors`` (centres), both [..., 4] in the same unit.

    Distance of the centres in sides of the prior over 0.1, logarithm of the ratio of sides over 0.2. Sides must be
    above 0.
    """
    boxes = centres(boxes)
    offset = (boxes[..., :2] - priors[..., :2]) / priors[..., 2:] / CENTRE_VARIANCE
    return torch.cat([offset, (boxes[..., 2:] / priors[..., 2:]).log() / SIZE_VARIANCE], dim=-1)


def decode(locations: Tensor, priors: Tensor) -> Tensor:
    """The boxes (corners) [..., 4] whose offsets from ``priors`` (centres) are ``locations``: undoes :func:`encode`."""
    middle = locations[..., :2] * CENTRE_VARIANCE * priors[..., 2:] + priors[..., :2]
    return corners(torch.cat([middle, (locations[..., 2:] * SIZE_VARIANCE).exp() * priors[..., 2:]], dim=-1))
