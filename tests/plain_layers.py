"""A recipe with plain PyTorch layers beside the same one with ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from espkernels.models.recipes import engine
from espkernels.models.recipes.task import Task

__all__ = ["assert_same_way"]


def assert_same_way(task: Callable[[bool], Task], folder: Path, beginning: float, seed: int = 0) -> None:
    """``task(plain)``, of two steps an epoch, has the same losses either way.

    Of the first epoch's loss half is that of the weights they begin with: they agree to ``beginning``, relatively.
    """
    ours, plain = (
        [row["loss"] for row in engine.train(task(plain), folder / str(plain), engine.Settings(2, seed=seed))]
        for plain in (False, True)
    )
    assert plain[0] == pytest.approx(ours[0], rel=beginning)
    assert plain[1] == pytest.approx(ours[1], rel=1e-2)
