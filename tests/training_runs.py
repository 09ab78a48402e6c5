"""Somebody's network, eager and replaced, on the same batches: what training it gives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from somebody import Network
from torch import Tensor, nn

from espkernels.replace import replace

__all__ = ["batches", "flat", "pair", "train"]


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The same network twice: in plain torch modules, and with its layers replaced."""
    eager = Network().to(dtype)
    ours = copy.deepcopy(eager)
    assert replace(ours).replaced
    return eager, ours


def batches(count: int, size: int = 4, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [size, 3, 32, 32], exact in float32, and a class for each pixel of the result."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(5, (size, 4, 4), generator=generator),
        )


def train(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer | None = None
) -> Tensor:
    """The losses of one step of ``optimizer`` (by default SGD with momentum) on each batch, in float64."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    dtype = next(model.parameters()).dtype
    losses = []
    for images, labels in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(dtype)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def flat(model: nn.Module) -> Tensor:
    """Every parameter and floating buffer of ``model``, in float64."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values() if t.is_floating_point()])
