"""Non-maximum suppression: of boxes that overlap, the one with the highest score."""

from __future__ import annotations

import torch
from torch import Tensor

from espkernels.models.boxes import overlaps

__all__ = ["suppress"]

# Candidates compared with one another at once: their overlaps in float32 are 256 KiB, which a second-level cache holds.
BLOCK = 256


def suppress(boxes: Tensor, scores: Tensor, threshold: float = 0.45, most: int | None = None) -> Tensor:
    """Indices of the boxes kept, highest score first: each overlaps none kept before it by more than ``threshold``.

    Of equal scores the earlier box comes first, so the result is the same every time and on every device. It ends with
    the box number ``most``. Memory is that of :data:`BLOCK` candidates against those kept, not of all against all.

    Args:
        boxes: corners [N, 4] of one class.
        scores: [N].

    Raises ValueError for shapes that do not fit.
    """
    if boxes.shape != (*scores.shape, 4) or scores.dim() != 1:
        raise ValueError(
            f"boxes, scores: got shapes {list(boxes.shape)} and {list(scores.shape)}, expected [N, 4] and [N]"
        )
    most = len(scores) if most is None else most
    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for block in order.split(BLOCK):
        if len(kept) >= most:
            break
        if len(kept):
            block = block[~(overlaps(boxes[block], boxes[kept]) > threshold).any(dim=1)]
        kept = torch.cat([kept, block[_first_of_each(boxes[block], threshold)]])
    return kept[:most]


def _first_of_each(boxes: Tensor, threshold: float) -> Tensor:
    """Which of ``boxes``, best first, none that is kept before them suppresses.

    Every round settles at least one more box: what was left by boxes that turned out to be suppressed comes back. Few
    boxes hang on long chains, so a handful of rounds over all of them replaces one step for each.
    """
    suppresses = (overlaps(boxes, boxes) > threshold).triu(diagonal=1)
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        now = ~(suppresses & kept[:, None]).any(dim=0)
        if torch.equal(now, kept):
            return kept
        kept = now
