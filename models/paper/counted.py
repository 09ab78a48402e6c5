"""Counts of the networks that the tables are about."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from espkernels.models.count import Count, count

__all__ = ["counted"]


@cache
def counted(build: Callable[..., nn.Module], size: tuple[int, int] | None, *arguments: Any, **options: Any) -> Count:
    """A network's count on images of ``size``, or on one word; built without numbers, which take time and memory."""
    with torch.device("meta"):
        model = build(*arguments, **options)
    return count(model, size) if size else count(model, sample=torch.zeros(1, 1, dtype=torch.int64))
