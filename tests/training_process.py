"""One of two processes that train together over gloo: ``python training_process.py RANK FOLDER``.

Each takes its half of every batch, once for each way of treating batch norms: their statistics are those of a process
alone unless something is done about it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_runs import batches, pair, train

WORLD = 2
NORMS = ("frozen", "shared", "separate", "synchronised")


class Summed(torch.autograd.Function):
    """The sum over all processes, each of which then has a share in every loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Summed.apply(grad)


class SharedBatchNorm(nn.BatchNorm2d):
    """Statistics over all processes, forward and backward: what nn.SyncBatchNorm does on GPUs, for gloo."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.training and self.momentum is not None and self.running_mean is not None
        assert self.running_var is not None and self.num_batches_tracked is not None
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = Summed.apply(x.sum((0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = Summed.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        assert self.weight is not None and self.bias is not None
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def prepare(model: nn.Module, norms: str) -> nn.Module:
    """``model`` with its batch norms "frozen", "shared" by the processes, "synchronised" by torch, or "separate"."""
    if norms == "synchronised":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for part in model.modules():
        if type(part) is nn.BatchNorm2d:
            if norms == "frozen":
                part.eval()
            elif norms == "shared":
                part.__class__ = SharedBatchNorm
    return model


def main(rank: str, folder: str) -> None:
    torch.set_num_threads(1)
    # A gradient whose strides are not its parameter's costs a copy in every step, and DDP says so.
    warnings.filterwarnings("error", message="Grad strides do not match")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=WORLD)
    for norms in NORMS:
        model = prepare(pair()[1], norms)
        halves = ((x.chunk(WORLD)[int(rank)], y.chunk(WORLD)[int(rank)]) for x, y in batches(5))
        try:
            # A unit of this network is never run, and the strided ones never run their last PReLU.
            losses = train(DistributedDataParallel(model, find_unused_parameters=True), halves)
        except ValueError as reason:
            Path(folder, f"{norms}{rank}.txt").write_text(str(reason))
        else:
            torch.save((losses, model.state_dict()), f"{folder}/{norms}{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
