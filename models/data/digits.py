"""The handwritten digits inside scikit-learn: 1797 real images of 8x8 pixels that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espkernels.models.data.crops import centre_crop

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Digits", "of_image"]

# scikit-learn's own examples test on the last fifth, which other people wrote.
TRAINING_SHARE = 0.8


class Digits:
    """The first 80 % of the digits for "train", the rest for "val"; a sample is [3, size, size] and its digit.

    With a generator the image is moved by up to an eighth of its size each way. Raises ImportError where scikit-learn
    is missing.
    """

    classes = tuple(map(str, range(10)))

    def __init__(self, part: str, size: int = 64) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("data: the digits come with scikit-learn: pip install 'espkernels[train]'") from error
        digits = load_digits()
        cut = round(len(digits.images) * TRAINING_SHARE)
        chosen = slice(None, cut) if part == "train" else slice(cut, None)
        self.images = torch.from_numpy(digits.images[chosen]).float() / 8 - 1
        self.labels = digits.target[chosen].tolist()
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
        image = F.interpolate(self.images[index][None, None], (self.size, self.size), mode="bilinear")[0]
        if generator is not None:
            reach = self.size // 8
            down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            padded = F.pad(image, (reach, reach, reach, reach), value=-1.0)
            image = padded[:, reach - down :, reach - right :][:, : self.size, : self.size]
        return image.expand(3, -1, -1).contiguous(), self.labels[index]


def of_image(image: Image, size: int) -> Tensor:
    """Any image of a digit, light on dark, as the network takes it: [3, size, size]."""
    grey = centre_crop(image, size).convert("L")
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 127.5 - 1).expand(3, -1, -1).contiguous()
