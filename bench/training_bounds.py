"""What bounds a training step of ours: the operators that take its time, our own and torch's.

A step alone is profiled in a process of its own, ``python -m bench.training_bounds FOLDER WAY MEMORY``, with the
allocator setting of the trainers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.comparison import LAYOUTS
from bench.trainers import ALLOCATOR
from bench.training_step import Step
from espkernels.quantities import duration
from espkernels.replace import replace

__all__ = ["bounds", "sentence"]

STEPS = 5


def bounds(files: Path, way: str, memory: str) -> list[dict[str, Any]]:
    """The operators of a step of the model in ``files`` (:func:`bench.race.saved`), the longest first.

    Each with its calls and seconds a step, and its share. Empty where the process fails, which says why.
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


def _operator(event: str) -> str:
    """The event by its operator: the forward pass of one of ours runs in its autograd node."""
    ours = re.fullmatch(r"GeneratedBackwardFor_espkernels_(\w+)_default", event)
    return ours[1] if ours else event.removeprefix("espkernels::")


def _profiled(files: Path, way: str, memory: str) -> list[dict[str, Any]]:
    layout = LAYOUTS[way]
    model = torch.load(files / "model.pt", weights_only=False).to(memory_format=layout)
    replace(model, memory=memory)
    x = torch.load(files / "input.pt").contiguous(memory_format=layout)
    gradient = files / "gradient.pt"
    given = torch.load(gradient).contiguous(memory_format=layout) if gradient.exists() else None
    step = Step(model, x, given)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    events = [event for event in profiled.key_averages() if event.self_cpu_time_total > 0]
    whole = sum(event.self_cpu_time_total for event in events)
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        # The autograd node of an operator and the call inside it are one call.
        name = _operator(event.key)
        one = found.setdefault(name, {"operator": name, "calls": 0.0, "seconds": 0.0, "share": 0.0})
        one["calls"] = max(one["calls"], event.count / STEPS)
        one["seconds"] += 1e-6 * event.self_cpu_time_total / STEPS
        one["share"] += event.self_cpu_time_total / whole
    return sorted(found.values(), key=lambda one: -one["seconds"])


if __name__ == "__main__":
    print(json.dumps(_profiled(Path(sys.argv[1]), sys.argv[2], sys.argv[3])[:20]))
