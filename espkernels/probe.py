"""This machine's ceilings, measured: what no kernel here can be faster than.

The multiply-add rate is that of a large matrix product in torch, in float32 (MKL or OpenBLAS sgemm) or, for kernels
that multiply it as it is, in bfloat16; the bandwidth that of ``copy_`` between two buffers, once for each size, because
a small map stays in a cache that a large one does not fit.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from espkernels.quantities import amount

__all__ = ["Ceilings", "probe"]

# Bytes of both buffers together: in the second-level cache, in the third or beside it, in memory.
SIZES = (2**19, 2**21, 2**24, 2**28)

# How often each rate is measured, all in turn, and for how many seconds: neighbours of a shared machine can slow one
# stretch of time to half.
ROUNDS, SECONDS = 3, 0.1


@dataclass(frozen=True)
class Ceilings:
    """Rates with ``threads`` threads: FLOP/s in ``dtype``, and bytes/s (read and written) by bytes touched."""

    threads: int
    flops: float
    bandwidth: dict[int, float]
    dtype: str = "float32"

    def moving(self, count: int) -> float:
        """Seconds that moving ``count`` bytes takes at least."""
        fitting = [rate for size, rate in self.bandwidth.items() if size >= count]
        return count / (fitting[0] if fitting else self.bandwidth[max(self.bandwidth)])

    def least_seconds(self, count: int, flops: int) -> float:
        """The time that the slower of the two ceilings allows for ``count`` bytes and ``flops`` operations."""
        return max(self.moving(count), flops / self.flops)

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e9:.0f} GB/s in {amount(n)}" for n, rate in self.bandwidth.items())
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{threads}: {self.flops / 1e9:.0f} GFLOP/s (torch.mm, {self.dtype}); copying {rates}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def probe(threads: int, dtype: torch.dtype = torch.float32) -> Ceilings:
    """The ceilings with ``threads`` threads and products of ``dtype``; two seconds, once a process.

    One of several threads could do the work alone, so more threads never have a lower ceiling.
    """
    found = _measure(threads, dtype)
    if threads == 1:
        return found
    alone = _measure(1, dtype)
    bandwidth = {size: max(rate, alone.bandwidth[size]) for size, rate in found.bandwidth.items()}
    return replace(found, flops=max(found.flops, alone.flops), bandwidth=bandwidth)


@functools.cache
def _measure(threads: int, dtype: torch.dtype) -> Ceilings:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        n = 1024
        a, b, product = (torch.rand(n, n).to(dtype) for _ in range(3))
        calls: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=product)]
        for size in SIZES:
            source, target = torch.zeros(size // 8), torch.zeros(size // 8)
            calls.append(functools.partial(target.copy_, source))
        rounds = [[_best(call) for call in calls] for _ in range(ROUNDS)]
        multiplying, *copying = (min(seconds) for seconds in zip(*rounds, strict=True))
        bandwidth = {size: size / seconds for size, seconds in zip(SIZES, copying, strict=True)}
        return Ceilings(threads, 2 * n**3 / multiplying, bandwidth, str(dtype).removeprefix("torch."))
    finally:
        torch.set_num_threads(before)


def _best(call: Callable[[], object]) -> float:
    """The shortest seconds a call: a ceiling is what the machine does when nothing disturbs it.

    A slow call is made once: a product of bfloat16 takes seconds where the machine multiplies none.
    """
    timer = timeit.Timer(call)
    best = spent = timer.timeit(1)
    while spent < SECONDS:
        calls = max(1, int(1e-3 / best))
        elapsed = timer.timeit(calls)
        best, spent = min(best, elapsed / calls), spent + elapsed
    return best
