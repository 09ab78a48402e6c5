"""Everything that can run an operator: eager torch, torch.compile and this library, on both layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

import espkernels
from bench import eager
from bench.cases import Case
from bench.comparison import LAYOUTS, Comparison, Provider, WrongResult
from bench.floor import Floor, operator_floor, operator_memory
from bench.interleave import Run
from bench.selection import DTYPES, Selection, Variant
from espkernels import backends, problem
from espkernels.problem import Function, Problem

__all__ = ["build", "comparisons", "function", "providers"]

Maker = Callable[[Case, bool], Problem]


def providers(compile: bool, peer: str = "eager", ours: tuple[str, ...] = ("ours",)) -> tuple[Provider, ...]:
    """The providers of a comparison, both layouts of each."""
    names = (peer, "compile", *ours) if compile else (peer, *ours)
    return tuple(Provider(name, layout) for name in names for layout in LAYOUTS)


def function(implementation: str, operator: str) -> Function:
    """The implementation of ``operator``: one signature for all of them."""
    if implementation == "ours":
        if backends.library is None:
            # The reference would run in its place and be timed under our name.
            raise RuntimeError(backends.why_not("cpu"))
        compiled: Function = getattr(espkernels, operator)
        return compiled
    plain: Function = getattr(eager, operator)
    return torch.compile(plain, dynamic=False) if implementation == "compile" else plain


def build(provider: Provider, problem: Problem, dtype: torch.dtype, mode: str) -> Run:
    """Checks the provider's result and, but for "forward", its gradients; then returns what is timed."""
    layout = LAYOUTS[provider.layout]
    call = function(provider.implementation, problem.operator)
    reason = problem.difference(call, dtype, layout, gradients=mode != "forward")
    if reason is not None:
        raise WrongResult(f"{provider}: {reason}")
    tensors = problem.cast(dtype, layout, requires_grad=mode != "forward")
    if mode == "forward":
        return Run(torch.no_grad()(functools.partial(call, **tensors, **problem.options)))
    forward = functools.partial(call, **tensors, **problem.options)
    leaves = list(tensors.values())
    grad_output = problem.grad_output(dtype, layout)

    def backward(output: torch.Tensor) -> object:
        return torch.autograd.grad(output, leaves, grad_output)

    if mode == "backward":
        return Run(backward, before=forward)
    return Run(lambda: backward(forward()))


def comparisons(
    name: str,
    make: Maker,
    selection: Selection,
    cases: tuple[Case, ...],
    variants: Callable[[Case], tuple[Variant, ...]],
) -> Iterator[Comparison]:
    """The comparisons of one operator, called ``name`` in the tables.

    ``make(case, training)`` gives the problem; ``variants(case)`` the default ways to run a case.
    """
    for case in selection.cases(cases):
        for variant in selection.variants(variants(case)):
            training = variant.mode != "forward"
            task = _Task(functools.partial(make, case, training), DTYPES[variant.dtype], variant.mode)
            yield Comparison(
                operator=name,
                case=str(case),
                dtype=variant.dtype,
                mode=variant.mode,
                threads=variant.threads,
                providers=providers(variant.compile),
                build=task.build,
                floor=task.floor,
                memory=task.memory,
                prepare=task.prepare,
            )


class _Task:
    """One way to run a problem, which holds tensors: it is made when needed, and only the last one is alive."""

    alive: ClassVar[tuple[_Task, Problem] | None] = None

    def __init__(self, make: Callable[[], Problem], dtype: torch.dtype, mode: str) -> None:
        self.make, self.dtype, self.mode = make, dtype, mode

    @property
    def problem(self) -> Problem:
        if _Task.alive is None or _Task.alive[0] is not self:
            _Task.alive = self, self.make()
        return _Task.alive[1]

    def prepare(self) -> None:
        _ = self.problem.expected
        if self.mode != "forward":
            _ = self.problem.expected_gradients

    def build(self, provider: Provider) -> Run:
        return build(provider, self.problem, self.dtype, self.mode)

    def floor(self) -> Floor:
        return operator_floor(self.problem, self.dtype, self.mode)

    def memory(self, provider: Provider) -> int:
        return operator_memory(self.problem, self.dtype, self.mode)


def _map(case: Case, channels: int, strided: bool = False) -> tuple[int, int, int, int]:
    height, width = case.output_size if strided else (case.height, case.width)
    return case.batch, channels, height, width


def spatial_pyramid(case: Case, training: bool) -> Problem:
    """The branches and their fusion on the reduced map."""
    return problem.spatial_pyramid(_map(case, case.channels), case.dilations, case.stride)


def reduce(case: Case, training: bool) -> Problem:
    """The first 1x1 convolution: in evaluation with batch norm and PReLU, which training keeps apart."""
    x = _map(case, case.in_channels)
    return problem.group_pointwise(x, case.channels, case.k, affine=not training, slope=not training)


def expand(case: Case, training: bool) -> Problem:
    """The second 1x1 convolution, on the concatenated map, with what ends the unit."""
    last = case.stride == 1 and not training
    x = _map(case, case.out_channels, strided=True)
    return problem.group_pointwise(x, case.out_channels, case.k, affine=not training, residual=last, slope=last)


def pyramid_pointwise(case: Case, training: bool) -> Problem:
    """The unit after its reduction; training here means batch norms whose statistics are frozen."""
    last = case.stride == 1
    x = _map(case, case.channels)
    return problem.pyramid_pointwise(
        x, case.dilations, case.out_channels, case.k, case.stride, residual=last, slope=last
    )
