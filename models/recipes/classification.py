"""One label an image: ImageNet as in the paper (section 4.1), any folder in its layout, or scikit-learn's digits."""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels.models.count import count
from espkernels.models.data import digits, image_folder
from espkernels.models.data.digits import Digits
from espkernels.models.data.image_folder import ImageFolder
from espkernels.models.data.loading import evaluation_batches, training_batches
from espkernels.models.espnetv2 import espnetv2
from espkernels.models.recipes import schedules
from espkernels.models.recipes.arguments import whole_number
from espkernels.models.recipes.schedules import Schedule
from espkernels.models.recipes.task import Share, Task, check_names, check_positive

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classification"]

# Below this many multiply-adds the released code crops no smaller than a fifth of an image, else a twelfth: small
# networks learn little from small parts.
SMALL_NETWORK = 80e6


class Classification(Task):
    """ESPNetv2 on labelled images, scored by top-1 and top-5 accuracy in percent.

    Args:
        data: "digits", or a folder with train/<class>/ and val/<class>/.
        scale: the network's width.
        size: height and width of its images; None for 224, and 64 for digits.
        batch: images a step, over all processes.
        schedule: "cyclic" (equation 1), "released" (the same as the released code runs it), "steps" or "fixed"; their
            halvings and steps lie at the same share of the epochs as in the paper's 300 and 90.
        rate: the highest rate; None for the paper's 0.5, or 0.1 of "steps" and "fixed".
        workers: processes that read images.
        plain: the layers of plain PyTorch in place of this library's.
        labels: the names of the classes; None for those of the data, which then has to be there.
    """

    name = "classification"
    score = "top1"

    def __init__(
        self,
        data: str,
        scale: float = 1.0,
        size: int | None = None,
        batch: int = 512,
        schedule: str = "cyclic",
        rate: float | None = None,
        workers: int = 2,
        seed: int = 0,
        plain: bool = False,
        labels: Sequence[str] | None = None,
    ) -> None:
        if schedule not in ("cyclic", "released", "steps", "fixed"):
            raise ValueError(f"schedule: got {schedule!r}, expected cyclic, released, steps or fixed")
        check_positive(size=size, batch=batch, rate=rate)
        data = data if data == "digits" else os.path.abspath(data)
        self.given: dict[str, Any] = dict(
            data=data, scale=scale, size=size, batch=batch, schedule=schedule, rate=rate, workers=workers, seed=seed,
            plain=plain,
        )  # fmt: skip
        self.data, self.scale, self.batch, self.workers = data, scale, batch, workers
        self.kind, self.rate, self.seed, self.plain = schedule, rate, seed, plain
        self.size = (64 if data == "digits" else 224) if size is None else size
        self.labels = list(self._scored.classes if labels is None else labels)

    @functools.cached_property
    def training(self) -> Digits | ImageFolder:
        """The training images. Raises FileNotFoundError or ValueError where they are not as they should be."""
        if self.data == "digits":
            return Digits("train", self.size)
        macs = count(self.network(), (self.size, self.size)).macs
        samples = ImageFolder(Path(self.data), "train", self.size, (0.2 if macs < SMALL_NETWORK else 0.08, 1.0))
        check_names("train and val", samples.classes, self.validation.classes)
        return samples

    @functools.cached_property
    def validation(self) -> Digits | ImageFolder:
        """The images that are scored; as :attr:`training`, and ValueError where their classes are not the run's."""
        check_names("the run and val", self.labels, self._scored.classes)
        return self._scored

    @functools.cached_property
    def _scored(self) -> Digits | ImageFolder:
        if self.data == "digits":
            return Digits("val", self.size)
        return ImageFolder(Path(self.data), "val", self.size)

    def prepared(self, image: Image) -> Tensor:
        """Any image as the network takes it, [3, size, size]; of digits, light ones on dark."""
        return (digits if self.data == "digits" else image_folder).of_image(image, self.size)

    def check(self) -> None:
        _ = self.training, self.validation

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", required=True, help="'digits', or a folder with train/<class>/ and val/<class>/")
        parser.add_argument("--scale", type=float, default=1.0, help="the network's width; default 1.0")
        parser.add_argument(
            "--size", type=whole_number(1), help="height and width of an image; default 224, of digits 64"
        )
        parser.add_argument(
            "--batch", type=whole_number(1), default=512, help="images a step, over all processes; default 512"
        )
        parser.add_argument("--schedule", default="cyclic", choices=["cyclic", "released", "steps", "fixed"])
        parser.add_argument("--rate", type=float, help="the highest rate of learning; default: the paper's")
        parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that read images; default 2")

    def options(self) -> dict[str, Any]:
        return self.given | {"labels": self.labels}

    def network(self) -> nn.Module:
        return espnetv2(self.scale, num_classes=len(self.labels), plain=self.plain)

    def schedule(self, epochs: int) -> Schedule:
        stepwise = self.kind in ("fixed", "steps")
        highest = (0.1 if stepwise else 0.5) if self.rate is None else self.rate
        if self.kind == "fixed":
            return schedules.fixed(highest)
        if self.kind == "steps":
            return schedules.steps(highest, every=math.ceil(epochs / 3))
        released = self.kind == "released"
        halved_at = [max(round(at * epochs / 300), 1) for at in schedules.HALVED_AT]
        return schedules.cyclic(highest, highest / 5, halved_at=halved_at, released=released)

    def batches(self, epoch: int, share: Share) -> Iterable[Any]:
        return training_batches(self.training, self.batch, self.seed, epoch, share, self.workers)

    def loss(self, network: nn.Module, batch: Any, device: torch.device) -> Tensor:
        images, labels = batch
        return F.cross_entropy(network(images.to(device)), labels.to(device))

    def evaluate(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        first = fifth = 0
        for images, labels in evaluation_batches(self.validation, min(self.batch, 64), self.workers):
            best = network(images.to(device)).topk(min(5, len(self.labels)), dim=1).indices.cpu()
            hits = best == labels[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.sum())
        return {"top1": 100 * first / len(self.validation), "top5": 100 * fifth / len(self.validation)}
