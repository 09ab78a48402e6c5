"""One label an image: ImageNet as in the paper (section 4.1), any folder in its layout, or scikit-learn's digits."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels.models.count import count
from espkernels.models.data.digits import Digits
from espkernels.models.data.image_folder import ImageFolder
from espkernels.models.data.loading import evaluation_batches, training_batches
from espkernels.models.espnetv2 import espnetv2
from espkernels.models.recipes import schedules
from espkernels.models.recipes.schedules import Schedule
from espkernels.models.recipes.task import Share, Task

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
    ) -> None:
        if schedule not in ("cyclic", "released", "steps", "fixed"):
            raise ValueError(f"schedule: got {schedule!r}, expected cyclic, released, steps or fixed")
        self.given = dict(
            data=data, scale=scale, size=size, batch=batch, schedule=schedule, rate=rate, workers=workers, seed=seed,
            plain=plain,
        )  # fmt: skip
        self.scale, self.batch, self.workers, self.seed, self.plain = scale, batch, workers, seed, plain
        self.kind, self.rate = schedule, rate
        self.training: Digits | ImageFolder
        self.validation: Digits | ImageFolder
        if data == "digits":
            self.size = size or 64
            self.training, self.validation = Digits("train", self.size), Digits("val", self.size)
        else:
            self.size = size or 224
            self.validation = ImageFolder(Path(data), "val", self.size)
            macs = count(espnetv2(scale, num_classes=len(self.validation.classes)), (self.size, self.size)).macs
            share = (0.2 if macs < SMALL_NETWORK else 0.08, 1.0)
            self.training = ImageFolder(Path(data), "train", self.size, share)
            if self.training.classes != self.validation.classes:
                differing = sorted(set(self.training.classes) ^ set(self.validation.classes))
                raise ValueError(f"data: train and val have other classes, such as {differing[0]}")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", required=True, help="'digits', or a folder with train/<class>/ and val/<class>/")
        parser.add_argument("--scale", type=float, default=1.0, help="the network's width; default 1.0")
        parser.add_argument("--size", type=int, help="height and width of an image; default 224, of digits 64")
        parser.add_argument("--batch", type=int, default=512, help="images a step, over all processes; default 512")
        parser.add_argument("--schedule", default="cyclic", choices=["cyclic", "released", "steps", "fixed"])
        parser.add_argument("--rate", type=float, help="the highest rate of learning; default: the paper's")
        parser.add_argument("--workers", type=int, default=2, help="processes that read images; default 2")

    def options(self) -> dict[str, Any]:
        return dict(self.given)

    def labels(self) -> list[str]:
        """The names of the classes, in the order of the network's outputs."""
        return list(self.validation.classes)

    def network(self) -> nn.Module:
        return espnetv2(self.scale, num_classes=len(self.validation.classes), plain=self.plain)

    def schedule(self, epochs: int) -> Schedule:
        if self.kind == "fixed":
            return schedules.fixed(self.rate or 0.1)
        if self.kind == "steps":
            return schedules.steps(self.rate or 0.1, every=max(epochs // 3, 1))
        released = self.kind == "released"
        highest = self.rate or 0.5
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
            best = network(images.to(device)).topk(min(5, len(self.validation.classes)), dim=1).indices.cpu()
            hits = best == labels[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.sum())
        return {"top1": 100 * first / len(self.validation), "top5": 100 * fifth / len(self.validation)}
