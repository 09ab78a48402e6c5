"""What bounds a frozen model of ours: its kernels, each with its time, rates and share of the roof."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import espkernels
from espkernels.backends import use_backend
from espkernels.quantities import duration

__all__ = ["bounds", "sentence"]


def bounds(model: nn.Module, x: Tensor, threads: int) -> list[dict[str, Any]]:
    """The kernels of ``freeze(model)`` for one image on so many threads, the one that takes longest first.

    ``roof`` is the time that this machine's measured ceilings allow over the time taken (:func:`espkernels.explain`).
    Empty where the model is not replayed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("cpu"):
            found = espkernels.explain(espkernels.freeze(model), x[:1])
    finally:
        torch.set_num_threads(before)
    if found.refusal:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    for layer in found.rows:
        for row in layer.kernels or (layer,):
            sums = kernels.setdefault(
                row.kernel, dict(kernel=row.kernel, calls=0, seconds=0.0, multiply_adds=0, bytes=0, least=0.0)
            )
            sums["calls"] += 1
            sums["seconds"] += row.seconds
            sums["multiply_adds"] += row.multiply_adds or 0
            sums["bytes"] += row.moved or 0
            sums["least"] += row.least_seconds or 0.0
    for sums in kernels.values():
        sums["share"] = sums["seconds"] / found.seconds
        sums["roof"] = sums.pop("least") / sums["seconds"]
    return sorted(kernels.values(), key=lambda sums: -sums["seconds"])


def sentence(kernels: list[dict[str, Any]], peak: float, least: float = 0.08) -> str:
    """The kernels that take at least that share of the time; ``peak`` in FLOP/s."""
    return "; ".join(
        f"{one['kernel']} {one['share']:.0%} ({one['calls']} calls, {duration(one['seconds'])}, "
        f"{2e-9 * one['multiply_adds'] / one['seconds']:.0f} GFLOP/s, "
        f"{2 * one['multiply_adds'] / one['seconds'] / peak:.0%} of the peak, "
        f"{1e-9 * one['bytes'] / one['seconds']:.0f} GB/s, {one['roof']:.0%} of the roof)"
        for one in kernels
        if one["share"] >= least
    )
