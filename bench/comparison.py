"""One row group of the benchmark: the providers of one problem, checked, then timed in turn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.floor import Floor
from bench.interleave import Samples, Timed, interleave
from espkernels import backends

__all__ = [
    "LAYOUTS",
    "PEERS",
    "Comparison",
    "Outcome",
    "Provider",
    "WrongResult",
    "largest_error",
    "measure",
    "require_kernels",
]

# What others run; everything else is ours.
PEERS = ("eager", "compile")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class WrongResult(AssertionError):
    """A provider's result differs from the float64 reference; it is not timed."""


def largest_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of any of the tensors, each in the root mean square of its numbers.

    Not that of all together: the gradient of one bias can hold 99 % of what those of a network sum to.
    """

    def error(result: Tensor, right: Tensor) -> float:
        off, size = (result.double() - right).norm().item(), right.norm().item()
        return off / size if size else math.inf if off else 0.0

    errors = [error(*pair) for pair in zip(results, exact, strict=True)]
    # max() would lose a NaN that comes second.
    return sum(errors) if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class Provider:
    """One implementation on inputs of one layout."""

    implementation: str
    layout: str

    def __str__(self) -> str:
        return f"{self.implementation}-{self.layout}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is compared and how it is built.

    ``build`` returns what is timed for a provider after checking its result; it raises :class:`WrongResult`. ``floor``
    is the least that the problem must move and compute. ``memory`` gives the bytes a provider needs, where known.
    ``prepare`` computes, before all, what results are compared with; ``seconds`` is that of :func:`interleave`.
    """

    operator: str
    case: str
    dtype: str
    mode: str
    threads: int
    providers: tuple[Provider, ...]
    build: Callable[[Provider], Timed]
    floor: Callable[[], Floor]
    memory: Callable[[Provider], int | None] = field(default=lambda provider: None)
    prepare: Callable[[], object] = field(default=lambda: None)
    seconds: float = 0.4

    def __str__(self) -> str:
        plural = "s" if self.threads != 1 else ""
        return f"{self.operator} {self.case} {self.mode} {self.dtype} {self.threads} thread{plural}"


@dataclass(frozen=True)
class Outcome:
    """The samples of the providers that are right, and what is wrong with the others."""

    samples: Samples
    refused: dict[str, Exception]
    floor: Floor
    memory: dict[str, int | None]


@functools.lru_cache(maxsize=1)
def measure(comparison: Comparison) -> Outcome:
    """Builds and checks every provider, then times them in turn. The last outcome is kept for the other providers."""
    threads = torch.get_num_threads()
    torch.compiler.reset()
    runs: dict[str, Timed] = {}
    refused: dict[str, Exception] = {}
    memory: dict[str, int | None] = {}
    try:
        # In float64 torch convolves channel by channel: threads would wait for one another more than they work.
        torch.set_num_threads(1)
        comparison.prepare()
        floor = comparison.floor()
        torch.set_num_threads(comparison.threads)
        for provider in comparison.providers:
            try:
                runs[str(provider)] = comparison.build(provider)
                memory[str(provider)] = comparison.memory(provider)
            except Exception as error:  # each provider's own test raises it; the others are still compared
                refused[str(provider)] = error
        return Outcome(interleave(runs, comparison.seconds), refused, floor, memory)
    finally:
        torch.set_num_threads(threads)


def require_kernels() -> None:
    """Refuses to time the reference under this library's name.

    Raises:
        SystemExit: it is the backend that the environment asks for.
    """
    if backends.current() == "reference":
        raise SystemExit("ESPKERNELS_BACKEND: got 'reference', expected none or one with kernels of ours to time")
