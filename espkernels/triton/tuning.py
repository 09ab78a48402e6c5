"""Autotuning, on request: a few tiles beside the chosen one are timed once for each problem, the fastest is kept.

``ESPKERNELS_TRITON_AUTOTUNE=1`` asks for it. Only kernels whose sums do not depend on the tile are tuned: a weight
gradient is the same number in every run, tuned or not. The result is kept for the process, not on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable

from espkernels import backends
from espkernels.triton.configuration import Tile, candidates

__all__ = ["fastest", "run_fastest"]

_kept: dict[Hashable, Tile] = {}


def run_fastest(problem: Hashable, tile: Tile, start: Callable[[Tile], None]) -> None:
    """Starts the kernel of ``problem`` with ``tile``, or with what autotuning found better."""
    if os.environ.get("ESPKERNELS_TRITON_AUTOTUNE") == "1" and not backends.interprets():
        tile = fastest(problem, candidates(tile), start, _milliseconds)
    start(tile)


def fastest(
    problem: Hashable,
    tiles: tuple[Tile, ...],
    start: Callable[[Tile], None],
    milliseconds: Callable[[Callable[[], None]], float],
) -> Tile:
    """The tile with which ``start`` takes the fewest ``milliseconds``; the first call for a ``problem`` measures."""
    if problem not in _kept:
        times = [milliseconds(lambda tile=tile: start(tile)) for tile in tiles]  # type: ignore[misc]
        _kept[problem] = tiles[times.index(min(times))]
    return _kept[problem]


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
    except OutOfResources:  # a tile that does not fit this device loses
        return float("inf")
