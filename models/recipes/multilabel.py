"""Several labels an image: MS-COCO as in section 4.1 of the paper (Fig. 6)."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espkernels.models.data.coco import ImageLabels, coco_labels
from espkernels.models.data.loading import evaluation_batches, training_batches
from espkernels.models.espnetv2 import espnetv2
from espkernels.models.multilabel import MultiLabelCounter, multilabel_loss
from espkernels.models.recipes import schedules
from espkernels.models.recipes.arguments import whole_number
from espkernels.models.recipes.schedules import Schedule
from espkernels.models.recipes.task import Share, Task, check_names, check_positive

__all__ = ["MultiLabel"]

# Of the paper's 100 epochs.
HALVED_AT = (50, 80)


class MultiLabel(Task):
    """ESPNetv2 on MS-COCO's images, scored by overall and class-wise F1 in percent.

    Args:
        data: the folder with annotations/, train<year>/ and val<year>/.
        year: 2014, the paper's, or 2017.
        scale, size, batch: the network's width, its images' height and width, images a step over all processes.
        rate: the highest of equation 1; the lowest is a fifth of it.
        start: a checkpoint for classification, of which all but the classifier is taken.
        workers: processes that read images.
        plain: the layers of plain PyTorch in place of this library's.
        labels: the names of the labels; None for those of the data, which then has to be there.
    """

    name = "multilabel"
    score = "overall_f1"
    starts_with_backbone = True

    def __init__(
        self,
        data: str,
        year: int = 2014,
        scale: float = 2.0,
        size: int = 224,
        batch: int = 64,
        rate: float = 0.005,
        start: str | None = None,
        workers: int = 2,
        seed: int = 0,
        plain: bool = False,
        labels: Sequence[str] | None = None,
    ) -> None:
        check_positive(size=size, batch=batch, rate=rate)
        data = os.path.abspath(data)
        start = None if start is None else os.path.abspath(start)
        self.given: dict[str, Any] = dict(
            data=data, year=year, scale=scale, size=size, batch=batch, rate=rate, start=start, workers=workers,
            seed=seed, plain=plain,
        )  # fmt: skip
        self.data, self.year, self.scale, self.size, self.batch = Path(data), year, scale, size, batch
        self.rate, self.start, self.workers, self.seed, self.plain = rate, start, workers, seed, plain
        self.labels = list(self._scored.names if labels is None else labels)

    @functools.cached_property
    def training(self) -> ImageLabels:
        """The training images; FileNotFoundError says which file is missing."""
        samples = coco_labels(self.data, "train", self.year, self.size)
        check_names("train and val", samples.names, self.validation.names)
        return samples

    @functools.cached_property
    def validation(self) -> ImageLabels:
        """The images that are scored; ValueError where they have other labels than the run."""
        check_names("the run and val", self.labels, self._scored.names)
        return self._scored

    @functools.cached_property
    def _scored(self) -> ImageLabels:
        return coco_labels(self.data, "val", self.year, self.size)

    def check(self) -> None:
        _ = self.training, self.validation

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", required=True, help="the folder with annotations/, train<year>/ and val<year>/")
        parser.add_argument("--year", type=int, default=2014, choices=[2014, 2017], help="default 2014")
        parser.add_argument("--scale", type=float, default=2.0, help="the network's width; default 2.0")
        parser.add_argument(
            "--size", type=whole_number(1), default=224, help="height and width of an image; default 224"
        )
        parser.add_argument(
            "--batch", type=whole_number(1), default=64, help="images a step, over all processes; default 64"
        )
        parser.add_argument("--rate", type=float, default=0.005, help="the highest rate of learning; default 0.005")
        parser.add_argument("--start", metavar="FILE", help="a checkpoint for classification to start from")
        parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that read images; default 2")

    def options(self) -> dict[str, Any]:
        return self.given | {"labels": self.labels}

    def network(self) -> nn.Module:
        return espnetv2(self.scale, num_classes=len(self.labels), plain=self.plain)

    def schedule(self, epochs: int) -> Schedule:
        halved_at = [max(round(at * epochs / 100), 1) for at in HALVED_AT]
        return schedules.cyclic(self.rate, self.rate / 5, halved_at=halved_at)

    def batches(self, epoch: int, share: Share) -> Iterable[Any]:
        return training_batches(self.training, self.batch, self.seed, epoch, share, self.workers)

    def loss(self, network: nn.Module, batch: Any, device: torch.device) -> Tensor:
        images, wanted = batch
        return multilabel_loss(network(images.to(device)), wanted.to(device))

    def evaluate(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        counter = MultiLabelCounter(len(self.labels))
        for images, wanted in evaluation_batches(self.validation, self.batch, self.workers):
            counter.add(network(images.to(device)).cpu(), wanted)
        found = counter.scores()
        return {"overall_f1": 100 * found.overall_f1, "class_f1": 100 * found.class_f1}
