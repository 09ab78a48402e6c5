"""From a detection network's results to boxes on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espkernels.models.box_coding import decode
from espkernels.models.suppression import suppress

__all__ = ["Detections", "detections"]


@dataclass(frozen=True)
class Detections:
    """The objects found on one image: corners [N, 4] in its pixels, scores [N], classes [N] from 1.

    They are ordered by class and within it by falling score.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)


def detections(
    confidences: Tensor,
    locations: Tensor,
    priors: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    least_score: float = 0.01,
    overlap: float = 0.45,
    most: int = 200,
) -> list[Detections]:
    """What a batch of results says is on each image.

    Softmax over the classes; of every class but 0, the background, the boxes that score above ``least_score`` are
    suppressed where they overlap a better one by more than ``overlap``, and at most ``most`` of a class are kept.
    Boxes may reach out of the image, as the network gives them.

    Args:
        confidences, locations: [B, P, classes] and [B, P, 4], results of the network; computed in float32.
        priors: centres [P, 4].
        sizes: (height, width) of each image in pixels, which the boxes are given in.

    Raises ValueError for shapes and numbers of images that do not fit.
    """
    if confidences.shape[:2] != locations.shape[:2] or locations.shape[1:] != priors.shape:
        raise ValueError(
            f"confidences, locations: got shapes {list(confidences.shape)} and {list(locations.shape)}, expected "
            f"[B, P, classes] and [B, P, 4] with P = {len(priors)}, the number of priors"
        )
    if len(sizes) != len(locations):
        raise ValueError(f"sizes: got {len(sizes)}, expected {len(locations)}, one for each image")
    scores = confidences.float().softmax(dim=2)
    boxes = decode(locations.float(), priors.float())
    return [
        _of_one_image(one_scores.T[1:], one_boxes, size, least_score, overlap, most)
        for one_scores, one_boxes, size in zip(scores, boxes, sizes, strict=True)
    ]


def _of_one_image(
    scores: Tensor, boxes: Tensor, size: tuple[int, int], least_score: float, overlap: float, most: int
) -> Detections:
    height, width = size
    kept: list[tuple[Tensor, Tensor]] = []
    for of_class in scores:
        candidates = (of_class > least_score).nonzero().flatten()
        kept_now = candidates[suppress(boxes[candidates], of_class[candidates], overlap, most)]
        kept.append((kept_now, of_class[kept_now]))
    labels = [torch.full_like(indices, label) for label, (indices, _) in enumerate(kept, start=1)]
    return Detections(
        boxes[torch.cat([indices for indices, _ in kept])] * boxes.new_tensor([width, height, width, height]),
        torch.cat([score for _, score in kept]),
        torch.cat(labels),
    )
