"""What is compared on a GPU: inference of units and networks, and both passes of an operator, each checked first."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import bench.providers as operators
from bench.cases import Case
from bench.comparison import LAYOUTS, WrongResult
from bench.engines import OURS
from bench.floor import operator_floor
from bench.gpu_engines import ENGINES, RACES
from espkernels.problem import Problem

__all__ = ["Gradients", "Inference"]

CHECKED = 2  # images of a batch whose results are compared with float64


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


class Inference:
    """The plain model of ``make`` in eval mode on ``shape`` in ``dtype``.

    Rounding through many layers has no sharp bound, so eager torch in the same dtype is the measure: eight times its
    own error is allowed.
    """

    races: ClassVar = RACES

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.make, self.shape, self.dtype, self.device = make, shape, dtype, device

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.make().eval().to(self.device, self.dtype)

    @functools.cached_property
    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(2)).to(self.device, self.dtype)

    @functools.cached_property
    def exact(self) -> Tensor:
        """The result for the first images, of the weights and the input as they are rounded."""
        result: Tensor = copy.deepcopy(self.model).double()(self.input[:CHECKED].double())
        return result

    @functools.cached_property
    def allowed(self) -> float:
        eager = _error(self.model(self.input[:CHECKED]), self.exact)
        return 8 * max(eager, torch.finfo(self.dtype).eps)

    @torch.no_grad()
    def build(self, name: str) -> Callable[[], Any]:
        """What is timed as engine ``name``; raises :class:`WrongResult`."""
        call = torch.no_grad()(ENGINES[name].opened(copy.deepcopy(self.model), self.input))
        error = _error(call()[:CHECKED], self.exact)
        if not error <= self.allowed:
            raise WrongResult(
                f"{name}: off by {error:.2g} in the root mean square, expected at most {self.allowed:.2g}"
            )
        return call

    @functools.cached_property
    def bytes(self) -> int:
        """One read of the input and one write of the result."""
        with torch.no_grad():
            result = self.model(self.input)
        return int((self.input.numel() + result.numel()) * self.dtype.itemsize)


class Gradients:
    """Forward and backward of one operator of a unit."""

    races: ClassVar = {race: tuple(f"{race} {layout}" for layout in LAYOUTS) for race in ("eager", "compile")}

    def __init__(self, make: Callable[[Case, bool], Problem], case: Case, dtype: torch.dtype, device: str) -> None:
        self.make, self.case, self.dtype, self.device = make, case, dtype, device

    @functools.cached_property
    def problem(self) -> Problem:
        return self.make(self.case, True)

    def build(self, name: str) -> Callable[[], Any]:
        """What is timed as "ours", in channels_last, or as a peer with its layout; raises :class:`WrongResult`."""
        implementation, _, layout_name = name.partition(" ")
        layout, device = LAYOUTS[layout_name or "channels_last"], self.device
        call = operators.function(implementation, self.problem.operator)

        def there(**given: Any) -> Tensor:
            moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()}
            return call(**moved).cpu()

        reason = self.problem.difference(there, self.dtype, layout, gradients=True)
        if reason is not None and implementation == OURS:
            raise WrongResult(f"{name}: {reason}")  # torch's own sums in half types are its own affair
        given = self.problem.cast(self.dtype, layout)
        leaves = {n: v.to(device).requires_grad_() for n, v in given.items()}
        gradient = self.problem.grad_output(self.dtype, layout).to(device)

        def step() -> object:
            output = call(**leaves, **self.problem.options)
            return torch.autograd.grad(output, list(leaves.values()), gradient)

        return step

    @property
    def bytes(self) -> int:
        return operator_floor(self.problem, self.dtype, "full").bytes
