"""What bounds a training step of ours: the operators that take its time, our own and torch's.

Steps alone are timed in a process of its own, ``python -m bench.training_bounds FOLDER WAY MEMORY``, with the
allocator setting of the trainers. Each operator is timed where torch calls it, below autograd. Not by torch's profiler:
under it operators that make the largest maps took five times as long.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.comparison import LAYOUTS
from bench.trainers import ALLOCATOR
from bench.training_step import Step
from espkernels.quantities import duration
from espkernels.replace import replace

__all__ = ["bounds", "sentence"]

STEPS = 15


def bounds(files: Path, way: str, memory: str) -> list[dict[str, Any]]:
    """The operators of a step of the model in ``files`` (:func:`bench.race.saved`), the longest first.

    Each with its calls and seconds a step, and its share of a step's time; what is left of that is Python and autograd.
    Empty where the process fails, which says why.
    """
    command = [sys.executable, "-m", "bench.training_bounds", str(files), way, memory]
    ran = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True)
    if ran.returncode:
        print(f"training: the step was not profiled: {ran.stderr[-500:]}", file=sys.stderr)
        return []
    found: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def sentence(operators: list[dict[str, Any]], least: float = 0.04) -> str:
    """The operators that take at least that share of the step."""
    return "; ".join(
        f"{one['operator']} {one['share']:.0%} ({one['calls']:.0f} calls, {duration(one['seconds'])})"
        for one in operators
        if one["share"] >= least
    )


class _Operators(TorchDispatchMode):
    """Calls and seconds of every operator that a step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        elapsed = time.perf_counter() - start
        name = func._schema.name.removeprefix("espkernels::")
        self.calls[name] = self.calls.get(name, 0) + 1
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        return result


def _timed(files: Path, way: str, memory: str) -> list[dict[str, Any]]:
    layout = LAYOUTS[way]
    model = torch.load(files / "model.pt", weights_only=False).to(memory_format=layout)
    replace(model, memory=memory)
    x = torch.load(files / "input.pt").contiguous(memory_format=layout)
    gradient = files / "gradient.pt"
    given = torch.load(gradient).contiguous(memory_format=layout) if gradient.exists() else None
    step = Step(model, x, given)
    for _ in range(2):
        step()
    timed = []
    for _ in range(1 + STEPS):
        with _Operators() as operators:
            start = time.perf_counter()
            step()
            timed.append((time.perf_counter() - start, operators))
    del timed[0]  # the first one under a mode of torch's
    found = [
        {
            "operator": name,
            "calls": calls,
            "seconds": statistics.median(operators.seconds[name] for _, operators in timed),
            "share": statistics.median(operators.seconds[name] / whole for whole, operators in timed),
        }
        for name, calls in timed[0][1].calls.items()
    ]
    return sorted(found, key=lambda one: -one["seconds"])


if __name__ == "__main__":
    print(json.dumps(_timed(Path(sys.argv[1]), sys.argv[2], sys.argv[3])[:20]))
