"""Checks the installed binary on this machine: every operator, instruction set and dtype against the reference.

A source that is right can still be compiled wrongly, for another machine, or for instructions that this one has not.
The problems are small, so all of it takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from espkernels import backends, ops, problem
from espkernels.problem import Problem
from espkernels.watching import Watching

__all__ = ["DTYPES", "Check", "problems", "run"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True)
class Check:
    """One operator on one backend and instruction set in one dtype; ``reason`` says what is wrong, None passes."""

    backend: str
    instruction_set: str
    operator: str
    dtype: torch.dtype
    reason: str | None = None

    def __str__(self) -> str:
        verdict = "pass" if self.reason is None else "FAIL"
        dtype = str(self.dtype).removeprefix("torch.")
        line = f"{verdict}  {self.backend} {self.instruction_set:<11}  {dtype:<8}  {self.operator}"
        return line if self.reason is None else f"{line}: {self.reason}"


@functools.cache
def problems(operator: str) -> list[Problem]:
    """Small problems of one operator: wide enough for every vector length and a tail, both strides, dilation over map.

    Made once, so that each keeps what the reference gave.
    """
    dilations = (1, 2, 3, 4)
    shapes = [((2, 20, 9, 37), 1), ((1, 24, 12, 35), 2), ((1, 70, 3, 2), 1), ((2, 1, 20, 33), 2)]
    if operator == "spatial_pyramid":
        made = [problem.spatial_pyramid(shape, dilations, stride) for shape, stride in shapes]
        return [*made, problem.spatial_pyramid((1, 5, 8, 19), (1, 1, 2), hff=False)]
    if operator == "group_pointwise":
        return [
            problem.group_pointwise((2, 40, 5, 7), 24, 4),
            problem.group_pointwise((1, 68, 3, 13), 68, 2, residual=True, slope=True),
            problem.group_pointwise((1, 6, 9, 33), 6, 3, affine=False),
        ]
    return [
        problem.pyramid_pointwise(shape, dilations, 4 * shape[1], 4, stride, residual=True, slope=True)
        for shape, stride in shapes
    ]


def run() -> Iterator[Check]:
    """Yields a check at a time, those that fail too. Raises RuntimeError where there is no compiled library."""
    library = backends.library
    with backends.use_backend("cpu"):  # raises, with the reason, where it cannot run
        assert library is not None
        for instruction_set in library.available_isas():
            with _instruction_set(instruction_set):
                for operator in problem.OPERATORS:
                    for dtype in DTYPES:
                        yield Check("cpu", instruction_set, operator, dtype, _reason(operator, dtype))


def _reason(operator: str, dtype: torch.dtype) -> str | None:
    function = getattr(ops, operator)
    for one in problems(operator):
        for layout in LAYOUTS:
            try:
                with _Seen(operator) as seen:
                    reason = one.difference(function, dtype, layout, gradients=True)
                if reason is None and not seen.called:
                    # The reference equals itself: a check that it passed would be worth nothing.
                    reason = "the operator of the compiled library did not run"
            except Exception as error:  # a check that cannot run has failed, and the next ones still tell something
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                shape = tuple(one.tensors["x"].shape)
                return f"x {shape} {str(layout).removeprefix('torch.')}, {reason}"
    return None


class _Seen(Watching):
    """Sees whether the registered operator is called inside the block."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.name = f"espkernels::{operator}"
        self.called = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called |= func.name() == self.name
        return func(*args, **(kwargs or {}))


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    library = backends.library
    assert library is not None
    before = library.isa()
    library.set_isa(name)
    try:
        yield
    finally:
        library.set_isa(before)
