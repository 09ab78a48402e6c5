"""Boxes around objects: PASCAL VOC and MS-COCO as in section 4.3 of the paper."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espkernels.models.average_precision import COCO_THRESHOLDS, AveragePrecision
from espkernels.models.classes import VOC
from espkernels.models.data.coco import coco_detection
from espkernels.models.data.loading import evaluation_batches, training_batches
from espkernels.models.data.objects import Objects, Scene
from espkernels.models.data.voc import voc_detection
from espkernels.models.detection import CONFIGURATIONS, espnetv2_detection
from espkernels.models.detections import Detections
from espkernels.models.multibox_loss import multibox_loss
from espkernels.models.priors import prior_boxes
from espkernels.models.recipes import schedules
from espkernels.models.recipes.arguments import whole_number
from espkernels.models.recipes.schedules import Schedule
from espkernels.models.recipes.task import Share, Task, check_names, check_positive

__all__ = ["Detection"]

YEARS = (2007, 2012)


class Detection(Task):
    """The single-shot detector, scored by mean average precision in percent: at an overlap of 0.5 with 11 recalls for
    VOC, over ten overlaps from 0.5 to 0.95 for MS-COCO.

    Args:
        dataset: "voc", trained on trainval of 2007 and, where it is there, 2012, scored on test of 2007; or "coco".
        data: the folder with VOC2007/ and VOC2012/ in it, or with annotations/.
        year: of "coco", 2014 or 2017.
        scale, image_size, batch: the network's width, the side of what it sees, images a step over all processes.
        rate: the base rate of the hybrid schedule.
        configuration: "paper" or "released", that of the network.
        start: a detection network's checkpoint, as one trained on smaller images, or one for classification.
        workers: processes that read images.
        plain: the layers of plain PyTorch in place of this library's.
        labels: the names of the classes; None for those of the data, which then has to be there.
    """

    name = "detection"
    score = "map"

    def __init__(
        self,
        dataset: str,
        data: str,
        year: int = 2017,
        scale: float = 2.0,
        image_size: int = 300,
        batch: int = 32,
        rate: float = 0.005,
        configuration: str = "paper",
        start: str | None = None,
        workers: int = 2,
        seed: int = 0,
        plain: bool = False,
        labels: Sequence[str] | None = None,
    ) -> None:
        if dataset not in ("voc", "coco"):
            raise ValueError(f"dataset: got {dataset!r}, expected voc or coco")
        check_positive(image_size=image_size, batch=batch, rate=rate)
        data = os.path.abspath(data)
        start = None if start is None else os.path.abspath(start)
        self.given: dict[str, Any] = dict(
            dataset=dataset, data=data, year=year, scale=scale, image_size=image_size, batch=batch, rate=rate,
            configuration=configuration, start=start, workers=workers, seed=seed, plain=plain,
        )  # fmt: skip
        self.dataset, self.data, self.year, self.scale = dataset, Path(data), year, scale
        self.image_size, self.batch, self.rate, self.configuration = image_size, batch, rate, configuration
        self.start, self.workers, self.seed, self.plain = start, workers, seed, plain
        self.labels = list(self._scored[1] if labels is None else labels)

    def _scenes(self, part: str) -> tuple[list[Scene], list[str]]:
        """The scenes of "train" or "val" and the names of the classes from 1 on."""
        if self.dataset == "coco":
            return coco_detection(self.data, part, self.year)
        names = list(VOC.names[1:])
        if part == "val":
            return voc_detection(self.data / "VOC2007", ["test"]), names
        there = [year for year in YEARS if year == YEARS[0] or (self.data / f"VOC{year}").is_dir()]
        return [scene for year in there for scene in voc_detection(self.data / f"VOC{year}", ["trainval"])], names

    @functools.cached_property
    def _scored(self) -> tuple[list[Scene], list[str]]:
        return self._scenes("val")

    @functools.cached_property
    def priors(self) -> Tensor:
        """Centres [P, 4] of the network's prior boxes."""
        return prior_boxes(self.image_size, CONFIGURATIONS[self.configuration].ratios)

    @functools.cached_property
    def training(self) -> Objects:
        """The training images; FileNotFoundError says which file is missing, ValueError which classes differ."""
        scenes, names = self._scenes("train")
        check_names("train and val", names, self._scored[1])
        return Objects(scenes, self.image_size, self.priors)

    @functools.cached_property
    def validation(self) -> Objects:
        """The images that are scored."""
        check_names("the run and val", self.labels, self._scored[1])
        return Objects(self._scored[0], self.image_size, self.priors)

    def check(self) -> None:
        _ = self.training, self.validation

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dataset", required=True, choices=["voc", "coco"])
        parser.add_argument(
            "--data", required=True, help="the folder with VOC2007/ and VOC2012/, or annotations/, in it"
        )
        parser.add_argument("--year", type=int, default=2017, choices=[2014, 2017], help="of MS-COCO; default 2017")
        parser.add_argument("--scale", type=float, default=2.0, help="the network's width; default 2.0")
        parser.add_argument("--image-size", type=whole_number(1), default=300, help="the side of an image; default 300")
        parser.add_argument(
            "--batch", type=whole_number(1), default=32, help="images a step, over all processes; default 32"
        )
        parser.add_argument("--rate", type=float, default=0.005, help="the base rate of learning; default 0.005")
        parser.add_argument("--configuration", default="paper", choices=["paper", "released"])
        parser.add_argument("--start", metavar="FILE", help="a checkpoint to start from")
        parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that read images; default 2")

    def options(self) -> dict[str, Any]:
        return self.given | {"labels": self.labels}

    def network(self) -> nn.Module:
        return espnetv2_detection(
            self.scale, len(self.labels) + 1, self.image_size, configuration=self.configuration, plain=self.plain
        )

    def schedule(self, epochs: int) -> Schedule:
        return schedules.hybrid(self.rate, epochs, cyclic_epochs=epochs // 2)

    def optimizer(self, network: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4)

    def batches(self, epoch: int, share: Share) -> Iterable[Any]:
        return training_batches(self.training, self.batch, self.seed, epoch, share, self.workers)

    def loss(self, network: nn.Module, batch: Any, device: torch.device) -> Tensor:
        images, classes, offsets = (one.to(device) for one in batch)
        confidences, locations = network(images)
        return sum(multibox_loss(confidences, locations, classes, offsets), torch.zeros((), device=device))

    def evaluate(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        coco = self.dataset == "coco"
        rule, thresholds = ("coco", COCO_THRESHOLDS) if coco else ("eleven", (0.5,))
        counter = AveragePrecision(len(self.labels), thresholds, rule)
        for images, sizes, indices in evaluation_batches(self.validation, min(self.batch, 16), self.workers):
            # A frozen detector has the network's own method, as its modules do.
            found: list[Detections] = network.detect(images.to(device), sizes.tolist())  # type: ignore[operator]
            for one, index in zip(found, indices.tolist(), strict=True):
                scene = self.validation.scenes[index]
                on_cpu = Detections(one.boxes.cpu(), one.scores.cpu(), one.labels.cpu())
                counter.add(on_cpu, scene.boxes, scene.labels, scene.difficult)
        return {"map": 100 * counter.mean()} | ({"map50": 100 * float(counter.averages()[0].nanmean())} if coco else {})
