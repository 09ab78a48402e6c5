"""Frozen models layer by layer, and what was recorded of them: what the tests of replays share."""

from __future__ import annotations

from typing import Any

import torch
from test_freeze import image
from torch import Tensor, nn

from espkernels import replay
from espkernels.replay import Recorded

__all__ = ["layers", "own", "photograph", "stem", "the_plan"]


def stem(stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride, 1), nn.BatchNorm2d(16), nn.PReLU())


def own(model: Any, x: Tensor) -> Tensor:
    """The model's own forward, layer by layer."""
    result: Tensor = type(model).__mro__[2].forward(model, x)
    return result


def layers(model: Any, x: Tensor) -> Tensor:
    """Its own forward with the operations that a recording translates, so that a replay has no other bits."""
    with replay._Watch(x):  # which holds no recording, and refuses what has no kernel
        return own(model, x)


def photograph(*shape: int, channels_last: bool = False) -> Tensor:
    x = image(*shape, dtype=torch.float32)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def the_plan(model: Any) -> Recorded:
    (recorded,) = model.plans.values()
    assert isinstance(recorded, Recorded)
    return recorded
