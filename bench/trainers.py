"""The ways of training that are compared, as engines of :mod:`bench.race`; each takes both layouts.

Peers are the plain layers in eager torch; the same with each unit under activation checkpointing, which keeps only the
input of a unit and runs its forward pass again in the backward one; and torch.compile in its default mode. Ours is
:func:`espkernels.replace`, once for each choice of ``memory`` that it takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import memory
from bench.comparison import LAYOUTS
from bench.engines import OURS, Engine, Job, Opened
from bench.training_step import Step
from espkernels import backends
from espkernels.models import plain
from espkernels.replace import replace

__all__ = ["ALLOCATOR", "ENGINES", "why_not"]

# Freed blocks stay with the process. Otherwise each large map is mapped anew in every step, and the page faults of
# that take longer than the arithmetic.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(10**9), "MALLOC_TRIM_THRESHOLD_": str(10**9)}


def _trainer(prepare: Callable[[nn.Module], nn.Module], repeats: bool = False) -> Engine:
    """``repeats`` demands the same bits of a second step."""

    def opened(job: Job) -> Opened:
        torch.set_num_threads(job.threads)
        layout = LAYOUTS[job.way]
        model = prepare(job.model.to(memory_format=layout))  # type: ignore[call-overload]
        gradient = None if job.gradient is None else job.gradient.contiguous(memory_format=layout)
        step = Step(model, job.input.contiguous(memory_format=layout), gradient)

        def results() -> list[Tensor]:
            found = [tensor.contiguous() for tensor in step.results()]
            if repeats and not all(map(torch.equal, found, step.results())):
                raise RuntimeError("two steps give gradients that are not the same bit for bit")
            return found

        return Opened(step, results, functools.partial(memory.kept, model, step.input))

    return Engine(tuple(LAYOUTS), (), opened)


def _ours(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        replace(model, **options)
        return model

    return prepare


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    model.compile(dynamic=False)
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    strided = {id(part.eesp) for part in model.modules() if isinstance(part, plain.DownSampler)}
    for part in model.modules():
        if isinstance(part, (plain.EESP, plain.DownSampler)) and id(part) not in strided:
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


def _choices() -> dict[str, Engine]:
    """Ours with each choice of what is kept for the backward pass, or as it is where there is no choice."""
    if "memory" not in inspect.signature(replace).parameters:
        return {OURS: _trainer(_ours(), repeats=True)}
    return {f"{OURS} {choice}": _trainer(_ours(memory=choice), repeats=True) for choice in ("save", "recompute")}


ENGINES: dict[str, Engine] = {
    **_choices(),
    "eager": _trainer(lambda model: model),
    "compile": _trainer(_compiled),
    "checkpoint": _trainer(_checkpointed),
}


def why_not(name: str) -> str | None:
    """Why the engine cannot run here, in a sentence; None where it can."""
    return backends.why_not("cpu") if name.startswith(OURS) else None
