"""Autotuning, on request: a few tiles beside the chosen one are timed once for each problem, the fastest is kept.

``ESPKERNELS_TRITON_AUTOTUNE=1`` asks for it. Only kernels whose sums do not depend on the tile are tuned: a weight
gradient is the same number in every run, tuned or not. What was found is kept on disk, a file for each kind of device
and version of Triton and of this library, in ``ESPKERNELS_CACHE``, else in ``espkernels`` of the user's cache folder.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from espkernels import backends
from espkernels.triton.configuration import Tile, candidates

__all__ = ["fastest", "run_fastest"]

_kept: dict[Hashable, Tile] = {}


def run_fastest(problem: Hashable, tile: Tile, start: Callable[[Tile], None]) -> None:
    """Starts the kernel of ``problem`` with ``tile``, or with what autotuning found better."""
    if os.environ.get("ESPKERNELS_TRITON_AUTOTUNE") == "1" and not backends.interprets():
        tile = fastest(problem, candidates(tile), start, _milliseconds, _file)
    start(tile)


def fastest(
    problem: Hashable,
    tiles: tuple[Tile, ...],
    start: Callable[[Tile], None],
    milliseconds: Callable[[Callable[[], None]], float],
    kept_in: Callable[[], Path],
) -> Tile:
    """The tile with which ``start`` takes the fewest ``milliseconds``, once measured known from the file ``kept_in``.

    Every launch asks: the file is looked for in the first call for a ``problem`` alone.
    """
    if problem not in _kept:
        name, file = str(problem), kept_in()
        before = _read(file).get(name)
        known = next((tile for tile in tiles if asdict(tile) == before), None)
        if known is None:
            times = [milliseconds(lambda tile=tile: start(tile)) for tile in tiles]  # type: ignore[misc]
            known = tiles[times.index(min(times))]
            # Read again: another process may have measured something meanwhile.
            _write(file, _read(file) | {name: asdict(known)})
        _kept[problem] = known
    return _kept[problem]


def _read(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, found: dict[str, Any]) -> None:
    """Replaces the file as a whole. Where that cannot be, the process alone knows what was found."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(found, new, indent=1)
        os.replace(new.name, file)
    except OSError:
        return


def _file() -> Path:
    import triton

    from espkernels import __version__

    folder = os.environ.get("ESPKERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "espkernels")
    name = f"{torch.cuda.get_device_name()} triton {triton.__version__} espkernels {__version__}"
    return Path(folder).expanduser() / f"tiles-{re.sub('[^A-Za-z0-9.]+', '-', name)}.json"


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
    except OutOfResources:  # a tile that does not fit this device loses
        return float("inf")
