"""Times several implementations of one thing in turn, so that a busy machine is as busy for each of them.

Every round takes one sample of each, starting with another one each time; a speed-up is the median over the rounds of
the ratio within a round. Buffers are the same in every call: what fits the caches is timed in the caches, as between
the layers of a network.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Run", "Samples", "Timed", "interleave"]


class Timed(Protocol):
    """Whatever can say how long it takes, here or in another process."""

    def time(self, calls: int) -> float:
        """Seconds that ``calls`` calls take."""


@dataclass(frozen=True)
class Run:
    """What is timed: ``call()``, or ``call(before())`` with only the call timed."""

    call: Callable[..., object]
    before: Callable[[], Any] | None = None

    def time(self, calls: int) -> float:
        """Seconds that ``calls`` calls take."""
        clock, call, before = time.perf_counter, self.call, self.before
        if before is None:
            start = clock()
            for _ in range(calls):
                call()
            return clock() - start
        total = 0.0
        for _ in range(calls):
            argument = before()
            start = clock()
            call(argument)
            total += clock() - start
        return total


@dataclass(frozen=True)
class Samples:
    """Seconds a call for every round, by provider, and how many calls each sample averages."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]

    def median(self, provider: str) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds[provider])

    def speedup(self, provider: str, over: str) -> float:
        """How many times faster ``provider`` is than ``over``: the median of the ratios of each round."""
        pairs = zip(self.seconds[over], self.seconds[provider], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def interleave(
    runs: Mapping[str, Timed], seconds: float = 0.4, sample: float = 2e-3, rounds: tuple[int, int] = (5, 41)
) -> Samples:
    """Samples of every run, one of each in every round.

    A sample has as many calls as take ``sample`` seconds; there are as many rounds as fit ``seconds``, within
    ``rounds``.
    """
    if not runs:
        return Samples({}, {})
    with _no_collection():
        calls = {name: _calls(run, sample) for name, run in runs.items()}
        start = time.perf_counter()
        for name, run in runs.items():
            run.time(calls[name])
        once = time.perf_counter() - start
        count = max(rounds[0], min(rounds[1], int(seconds / once)))
        taken: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for i in range(count):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(runs[name].time(calls[name]) / calls[name])
    return Samples(taken, calls)


def _calls(run: Timed, sample: float) -> int:
    run.time(1)
    calls = 1
    while (elapsed := run.time(calls)) < sample:
        calls = max(calls + 1, min(calls * 4, int(calls * sample / max(elapsed, 1e-9) * 1.1)))
    return calls


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
