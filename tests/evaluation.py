"""Running a function forward and backward, and the right answers to each sample, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property

import torch
from arguments import Arguments, build, gradient
from closeness import keep_from_kinks, magnitude
from samples import Sample
from torch import Tensor

from espkernels import reference

__all__ = ["Answers", "Values", "answers", "evaluate"]

Values = dict[str, Tensor]


def evaluate(function: Callable[..., Tensor], arguments: Arguments, grad: Tensor | None = None) -> Values:
    """The output, and with ``grad`` the gradient of every tensor argument that requires one, by argument name."""
    output = function(**arguments)
    values = {"output": output.detach()}
    if grad is not None:
        leaves = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
        values |= dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad), strict=True))
    return values


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The reference loses more to threads than it gains on maps this small: a hundred times on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Answers:
    """Arguments and a gradient in float64, what the reference makes of them, and the magnitudes behind its sums."""

    def __init__(self, operator: str, arguments: Arguments, grad: Tensor) -> None:
        self.operator = operator
        self.arguments = {n: _leaf(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        self.gradient = grad

    @cached_property
    @_one_thread()
    def values(self) -> Values:
        return evaluate(getattr(reference, self.operator), self.arguments, self.gradient)

    @cached_property
    @_one_thread()
    def magnitudes(self) -> Values:
        absolute = {n: _leaf(v.abs()) if isinstance(v, Tensor) else v for n, v in self.arguments.items()}
        return evaluate(lambda **a: magnitude(self.operator, a), absolute, self.gradient.abs())


# What a float64 number is rounded to before it becomes an argument, so that every type it is tried in holds it.
_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda t: t,
    "reals": lambda t: t.float().double(),
    "halves": lambda t: t.bfloat16().half().double(),
}


@cache
def answers(operator: str, sample: Sample, numbers: str = "integers") -> Answers:
    """The problem of ``sample`` in "integers" (exact in all types), "reals" (in float32) or "halves" (in half)."""
    arguments = build(operator, sample, numbers == "integers")
    if numbers != "integers":
        arguments = keep_from_kinks(operator, arguments)
    arguments = {n: _ROUNDED[numbers](v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with torch.no_grad(), _one_thread():
        grad = gradient(getattr(reference, operator)(**arguments), sample, numbers == "integers")
    return Answers(operator, arguments, _ROUNDED[numbers](grad))
