"""Batches of samples, in an order and with augmentations that the seed and the epoch alone decide."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from espkernels.models.recipes.seeds import seed_of
from espkernels.models.recipes.task import Share

__all__ = ["Samples", "evaluation_batches", "training_batches"]


class Samples(Protocol):
    """A data set. ``sample`` draws what it does to an image from ``generator``; without one nothing is drawn."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator | None) -> Any: ...


class _Epoch(Dataset[Any]):
    """The samples of one epoch; a sample's numbers do not depend on which worker reads it, or when."""

    def __init__(self, samples: Samples, seeds: tuple[int, int] | None) -> None:
        self.samples, self.seeds = samples, seeds

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        generator = None
        if self.seeds is not None:
            generator = torch.Generator().manual_seed(seed_of(*self.seeds, index))
        return self.samples.sample(index, generator)


def training_batches(
    samples: Samples, batch: int, seed: int, epoch: int, share: Share, workers: int = 0
) -> DataLoader[Any]:
    """The epoch's batches of one rank: ``batch`` samples are shared out evenly, and those that fill none are left out.

    Raises ValueError where ``batch`` is no multiple of the ranks or more than there are samples.
    """
    if batch < 1 or batch % share.ranks:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {share.ranks} processes")
    if batch > len(samples):
        raise ValueError(f"batch: got {batch}, expected at most the {len(samples)} samples")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
    whole = order[: len(order) // batch * batch]
    indices = whole[share.rank :: share.ranks].tolist()
    return DataLoader(
        _Epoch(samples, (seed, epoch)), batch // share.ranks, sampler=indices, num_workers=workers, pin_memory=False
    )


def evaluation_batches(samples: Samples, batch: int, workers: int = 0) -> DataLoader[Any]:
    """All samples in their order, as they are."""
    return DataLoader(_Epoch(samples, None), batch, num_workers=workers)
