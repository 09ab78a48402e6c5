"""What the engine asks of a task: a network, batches, a loss and scores.

A task knows nothing of checkpoints and of other processes; the engine knows nothing of images and words.
"""

from __future__ import annotations

import argparse
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espkernels.models.recipes.schedules import Schedule

__all__ = ["TASKS", "Share", "Task", "check_names", "check_positive", "task_class"]

# Each is imported when it is asked for; the sentence is its line in the help.
TASKS = {
    "classification": ("espkernels.models.recipes.classification:Classification", "one label an image"),
    "multilabel": ("espkernels.models.recipes.multilabel:MultiLabel", "several labels an image"),
    "detection": ("espkernels.models.recipes.detection:Detection", "boxes around objects"),
    "segmentation": ("espkernels.models.recipes.segmentation:Segmentation", "a class for every pixel"),
    "language": ("espkernels.models.recipes.language:Language", "the next word, or character, of a text"),
}


class Share:
    """The part of an epoch's work that one process of several has."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: got {rank} of {ranks}, expected 0 to {ranks - 1}")
        self.rank, self.ranks = rank, ranks


class Task(ABC):
    """One of the paper's experiments, built from plain options that a run's folder keeps.

    Everything is a function of the options, the seed among them, and of the epoch: an epoch that is run again after an
    interruption sees the same batches.
    """

    name: ClassVar[str]
    # The key of what evaluate() returns that says which weights are best, and which way.
    score: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    # What the gradient of all parameters together is cut down to, or None.
    longest_gradient: ClassVar[float | None] = None
    # The checkpoint that training starts from, or None, and whether its backbone alone is taken in any case.
    start: str | None = None
    starts_with_backbone: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """The task's own options; their names are those of the constructor's arguments."""

    @abstractmethod
    def check(self) -> None:
        """Raises what is wrong with the data, so that it is said before a folder is written."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, in what JSON holds."""

    @abstractmethod
    def network(self) -> nn.Module:
        """A new network, with weights drawn from torch's generator."""

    @abstractmethod
    def schedule(self, epochs: int) -> Schedule:
        """The rate of learning of each epoch."""

    @abstractmethod
    def batches(self, epoch: int, share: Share) -> Iterable[Any]:
        """The training batches of an epoch, as many on every rank; ``len()`` gives their number."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any, device: torch.device) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def evaluate(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """The scores of a network in evaluation mode."""

    def averages(self, rows: Sequence[Mapping[str, float]]) -> bool:
        """Whether, after epochs with these ``rows``, the mean of all later steps' weights is kept and judged."""
        return False

    def optimizer(self, network: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Stochastic gradient descent as in the released code: momentum 0.9, weight decay 4e-5 on everything.

        A group of parameters may have a ``factor`` of its own that the schedule's rate is multiplied by.
        """
        return torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=4e-5)


def check_positive(**options: float | None) -> None:
    """Raises ValueError for the first of the options that is not above 0; None stands for a default."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")


def check_names(whose: str, names: Sequence[str], others: Sequence[str]) -> None:
    """Raises ValueError where the classes of ``whose``, two of a kind, differ: classes are numbered by their names."""
    if list(names) != list(others):
        differing = sorted(set(names) ^ set(others))
        raise ValueError(f"data: {whose} have other classes, such as {differing[0] if differing else 'their order'}")


def task_class(name: str) -> type[Task]:
    """The class of the task ``name``; ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    module, attribute = TASKS[name][0].split(":")
    found: type[Task] = getattr(importlib.import_module(module), attribute)
    return found
