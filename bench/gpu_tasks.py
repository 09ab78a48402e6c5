"""What is compared on a GPU: inference, training of units, and both passes of an operator, each checked first."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import bench.providers as operators
from bench import trainers
from bench.cases import Case
from bench.comparison import LAYOUTS, WrongResult, largest_error
from bench.engines import OURS, Job, Opened
from bench.floor import operator_floor
from bench.gpu_engines import ENGINES, RACES
from espkernels.problem import Problem

__all__ = ["Gradients", "Inference", "Task", "Training"]

CHECKED = 2  # images of a batch whose results are compared with float64


_IN_BOTH_LAYOUTS = {race: tuple(f"{race} {layout}" for layout in LAYOUTS) for race in ("eager", "compile")}


class Inference:
    """The plain model of ``make`` in eval mode on ``shape`` in ``dtype``.

    Rounding through many layers has no sharp bound, so eager torch in the same dtype is the measure: eight times its
    own error is allowed.
    """

    races: ClassVar = RACES
    ours: ClassVar = tuple(name for name in ENGINES if name.startswith(OURS))

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
        eager = largest_error([self.model(self.input[:CHECKED])], [self.exact])
        return 8 * max(eager, torch.finfo(self.dtype).eps)

    def prepare(self) -> None:
        """Computes what results are compared with, which no engine's memory is to count."""
        _ = self.allowed

    @torch.no_grad()
    def build(self, name: str) -> Callable[[], Any]:
        """What is timed as engine ``name``; raises :class:`WrongResult`."""
        call = torch.no_grad()(ENGINES[name].opened(copy.deepcopy(self.model), self.input))
        error = largest_error([call()[:CHECKED]], [self.exact])
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

    races: ClassVar = _IN_BOTH_LAYOUTS
    ours: ClassVar = (OURS,)

    def __init__(self, make: Callable[[Case, bool], Problem], case: Case, dtype: torch.dtype, device: str) -> None:
        self.make, self.case, self.dtype, self.device = make, case, dtype, device

    @functools.cached_property
    def problem(self) -> Problem:
        return self.make(self.case, True)

    def prepare(self) -> None:
        """Computes what results are compared with, which no engine's memory is to count."""
        _ = self.problem.expected

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


class Training:
    """Forward and backward of the plain unit of ``make`` with the statistics of the batch, on ``shape`` in ``dtype``.

    Where rounding turns the sign at a PReLU gradients jump, and which do is chance: the error of eager torch's worst in
    the same dtype, eight times, is what any may have.
    """

    races: ClassVar = _IN_BOTH_LAYOUTS
    ours: ClassVar = tuple(name for name in trainers.ENGINES if name.startswith(OURS))

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.model = make().train().to(device, dtype)
        self._opened: dict[str, Opened] = {}

    @functools.cached_property
    def given(self) -> tuple[Tensor, Tensor]:
        """The input and the gradient of the result."""
        draw = torch.Generator().manual_seed(2)
        x = torch.randn(self.shape, generator=draw).to(self.device, self.dtype)
        with torch.no_grad():
            result = copy.deepcopy(self.model)(x)
        return x, torch.randn(result.shape, generator=draw).to(self.device, self.dtype)

    def _open(self, name: str, dtype: torch.dtype) -> Opened:
        implementation, _, layout = name.rpartition(" ")
        if name.startswith(OURS):
            implementation, layout = name, "channels_last"
        x, gradient = (tensor.to(dtype) for tensor in self.given)
        model = copy.deepcopy(self.model).to(dtype)
        job = Job(model, x, torch.get_num_threads(), layout, Path(), gradient, dtype)
        return trainers.ENGINES[implementation].open(job)

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        return self._open("eager channels_last", torch.float64).results()

    @functools.cached_property
    def allowed(self) -> float:
        eager = largest_error(self._open("eager channels_last", self.dtype).results(), self.exact)
        return 8 * max(eager, torch.finfo(self.dtype).eps)

    def prepare(self) -> None:
        """Computes what results are compared with, which no engine's memory is to count."""
        _ = self.allowed

    def build(self, name: str) -> Callable[[], Any]:
        """What is timed as engine ``name``; raises :class:`WrongResult`."""
        allowed, opened = self.allowed, self._open(name, self.dtype)
        error = largest_error(opened.results(), self.exact)
        if not error <= allowed:
            raise WrongResult(f"{name}: off by {error:.2g} in the root mean square, expected at most {allowed:.2g}")
        self._opened[name] = opened
        return opened.call

    def kept(self, name: str) -> int | None:
        """Bytes that the forward pass of an engine that was built keeps for the backward one."""
        kept = self._opened[name].kept
        return None if kept is None else kept()

    @functools.cached_property
    def bytes(self) -> int:
        """One read of the input and of the result's gradient, one write of the result and of the input's gradient."""
        return int(2 * sum(tensor.numel() for tensor in self.given) * self.dtype.itemsize)


Task = Inference | Gradients | Training
