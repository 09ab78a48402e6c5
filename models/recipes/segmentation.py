"""A class for every pixel: Cityscapes and PASCAL VOC as in section 4.2 of the paper."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels.models import classes
from espkernels.models.data.cityscapes import CLASS_WEIGHTS, cityscapes
from espkernels.models.data.label_maps import IGNORED, LabelMaps
from espkernels.models.data.loading import evaluation_batches, training_batches
from espkernels.models.data.voc import voc_segmentation
from espkernels.models.mean_iou import ConfusionCounter
from espkernels.models.recipes import schedules
from espkernels.models.recipes.arguments import whole_number
from espkernels.models.recipes.schedules import Schedule
from espkernels.models.recipes.task import Share, Task, check_positive
from espkernels.models.segmentation import espnetv2_segmentation

__all__ = ["Segmentation"]

# Classes that the score is a mean of: Cityscapes' last output stands for none of its nineteen.
SCORED = {"cityscapes": 19, "voc": 21}
# Factors of the photograph's size in training: Cityscapes' are large.
ZOOM = {"cityscapes": (0.35, 1.0), "voc": (0.5, 2.0)}
DECODER_FACTOR = 10.0


class Segmentation(Task):
    """ESPNetv2 for segmentation, scored by the mean intersection over union in percent at the photographs' own size.

    Args:
        dataset: "cityscapes" (20 outputs, weighted classes) or "voc" (21).
        data: its folder.
        scale, size, batch: the network's width, (height, width) of what it sees, images a step over all processes.
        rate: the base rate of the hybrid schedule; the decoder's is ten times as high. The paper's first stage has
            0.007, its second 0.003.
        zoom: the range that training resizes by; None for the released code's. With 512x256 it is 0.25 to 0.5.
        start: a checkpoint to go on from: a segmentation network for the second stage, or a classification network,
            of which levels 1 to 4 are taken.
        frozen_norms: the second stage's: scale and shift of the batch norms stay as they are.
        workers: processes that read images.
        plain: the layers of plain PyTorch in place of this library's.
    """

    name = "segmentation"
    score = "miou"

    def __init__(
        self,
        dataset: str,
        data: str,
        scale: float = 2.0,
        size: Sequence[int] = (256, 512),
        batch: int = 25,
        rate: float = 0.007,
        zoom: Sequence[float] | None = None,
        start: str | None = None,
        frozen_norms: bool = False,
        workers: int = 2,
        seed: int = 0,
        plain: bool = False,
    ) -> None:
        if dataset not in SCORED:
            raise ValueError(f"dataset: got {dataset!r}, expected {' or '.join(SCORED)}")
        check_positive(size=min(size), batch=batch, rate=rate)
        data = os.path.abspath(data)
        start = None if start is None else os.path.abspath(start)
        self.given: dict[str, Any] = dict(
            dataset=dataset, data=data, scale=scale, size=list(size), batch=batch, rate=rate,
            zoom=None if zoom is None else list(zoom), start=start, frozen_norms=frozen_norms, workers=workers,
            seed=seed, plain=plain,
        )  # fmt: skip
        self.dataset, self.scale, self.batch, self.rate, self.plain = dataset, scale, batch, rate, plain
        self.start, self.frozen_norms, self.workers, self.seed = start, frozen_norms, workers, seed
        height, width = size
        low, high = ZOOM[dataset] if zoom is None else zoom
        if not 0 < low <= high:
            raise ValueError(f"zoom: got {low} to {high}, expected two factors above 0, the smaller first")
        self.data, self.size, self.zoom = Path(data), (height, width), (low, high)
        self.class_set = classes.CITYSCAPES if dataset == "cityscapes" else classes.VOC

    @functools.cached_property
    def training(self) -> LabelMaps:
        """The training images; FileNotFoundError says which file is missing."""
        return self._samples("train")

    @functools.cached_property
    def validation(self) -> LabelMaps:
        """The images that are scored."""
        return self._samples("val")

    def _samples(self, part: str) -> LabelMaps:
        read = cityscapes if self.dataset == "cityscapes" else voc_segmentation
        return read(self.data, part, self.size, self.zoom)

    def check(self) -> None:
        _ = self.training, self.validation

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dataset", required=True, choices=SCORED)
        parser.add_argument("--data", required=True, help="the data set's folder")
        parser.add_argument("--scale", type=float, default=2.0, help="the network's width; default 2.0")
        parser.add_argument(
            "--size", type=whole_number(1), nargs=2, default=[256, 512], metavar=("H", "W"), help="default 256 512"
        )
        parser.add_argument(
            "--batch", type=whole_number(1), default=25, help="images a step, over all processes; default 25"
        )
        parser.add_argument("--rate", type=float, default=0.007, help="the base rate of learning; default 0.007")
        parser.add_argument("--zoom", type=float, nargs=2, metavar=("LOW", "HIGH"), help="training resizes by")
        parser.add_argument("--start", metavar="FILE", help="a checkpoint to start from")
        parser.add_argument("--frozen-norms", action="store_true", help="scale and shift of batch norms stay")
        parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that read images; default 2")

    def options(self) -> dict[str, Any]:
        return dict(self.given)

    def network(self) -> nn.Module:
        return espnetv2_segmentation(self.scale, len(self.class_set), plain=self.plain)

    def schedule(self, epochs: int) -> Schedule:
        return schedules.hybrid(self.rate, epochs, cyclic_epochs=epochs // 2)

    def optimizer(self, network: nn.Module, rate: float) -> torch.optim.Optimizer:
        """The decoder learns ten times as fast as levels 1 to 4, which may come from a classification network."""
        if self.frozen_norms:
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        learnt = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in learnt if name.startswith("base_net.")], "factor": 1.0},
            {"params": [p for name, p in learnt if not name.startswith("base_net.")], "factor": DECODER_FACTOR},
        ]
        return torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=4e-5)

    def batches(self, epoch: int, share: Share) -> Iterable[Any]:
        return training_batches(self.training, self.batch, self.seed, epoch, share, self.workers)

    def loss(self, network: nn.Module, batch: Any, device: torch.device) -> Tensor:
        images, labels = batch
        if not (labels != IGNORED).any():
            return 0 * network(images.to(device)).float().sum()  # the mean over no pixel is no number
        weight = torch.tensor(CLASS_WEIGHTS, device=device) if self.dataset == "cityscapes" else None
        logits = network(images.to(device)).float()
        return F.cross_entropy(logits, labels.to(device), weight, ignore_index=IGNORED)

    def evaluate(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        scored = SCORED[self.dataset]
        counter = ConfusionCounter(scored)
        for images, true in evaluation_batches(self.validation, 1, self.workers):
            given = network(images.to(device))[:, :scored].argmax(dim=1, keepdim=True).float()
            counter.add(F.interpolate(given, true.shape[1:], mode="nearest")[:, 0].cpu(), true)
        return {"miou": 100 * counter.mean(), "pixels": 100 * counter.accuracy()}
