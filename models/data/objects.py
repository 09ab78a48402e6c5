"""Images with boxes around objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from espkernels.models.data.crops import normalised
from espkernels.models.data.ssd_augmentation import augmented
from espkernels.models.matching import match
from espkernels.models.segment import read_image

__all__ = ["Objects", "Scene"]


@dataclass(frozen=True)
class Scene:
    """One image's file and its objects: corners [G, 4] in pixels, classes [G] from 1, and which are too hard."""

    file: Path
    boxes: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class Objects:
    """Scenes for a network that sees squares of ``size`` and has ``priors`` [P, 4].

    With a generator a sample is an augmented image [3, size, size] and the targets of every prior, classes [P] and
    offsets [P, 4]; objects that are too hard are not learnt. Without one it is the whole image, its height and width in
    pixels, and its number among the scenes.
    """

    scenes: Sequence[Scene]
    size: int
    priors: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        from PIL import Image

        scene = self.scenes[index]
        image = read_image(scene.file)
        width, height = image.size
        if generator is None:
            resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            return normalised(resized), torch.tensor([height, width]), torch.tensor(index)
        easy = ~scene.difficult
        shares = scene.boxes[easy] / scene.boxes.new_tensor([width, height, width, height])
        image, boxes, labels = augmented(image, shares.clamp(0, 1), scene.labels[easy], generator)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        targets = match(boxes[has_area], labels[has_area], self.priors)
        return normalised(image.resize((self.size, self.size), Image.Resampling.BILINEAR)), *targets
