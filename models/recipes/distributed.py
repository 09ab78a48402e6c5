"""One process or many: what torchrun's environment says, and the process group of the run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from espkernels.models.recipes.task import Share

__all__ = ["from_first", "is_first", "process_group"]


def is_first() -> bool:
    """Whether this is the only process or the first of several, which alone writes."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


@contextmanager
def process_group() -> Iterator[tuple[Share, torch.device]]:
    """This process's share of the work and its device: a GPU of its own where there is one, with nccl, else gloo.

    Without torchrun there is one process and no group.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if ranks == 1:
        yield Share(), device
        return
    # An elastic restart finds the store of the attempt before, with the addresses of processes that are gone.
    store, rank, _ = next(rendezvous("env://"))
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    # The others wait while the first one scores, half an hour of MS-COCO; torch's limits are 10 and 30 minutes.
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo",
        store=PrefixStore(attempt, store),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(days=1),
    )
    try:
        yield Share(torch.distributed.get_rank(), ranks), device
    finally:
        torch.distributed.destroy_process_group()


def from_first(value: object, share: Share) -> object:
    """What the first rank has, on every rank; the others wait for it."""
    if share.ranks == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
