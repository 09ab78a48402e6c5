"""The whole ESPNetv2: plain torch layers, replaced, frozen; and a training step up to the gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from bench.cases import IMAGES, NETWORKS, fits
from bench.comparison import Comparison, Provider
from bench.layers import Task, network
from bench.memory import peak_of_network
from bench.providers import providers
from bench.selection import DTYPES, Selection, Variant

# Images of a training step, small because ESPNetv2 is meant for small machines.
TRAINING_BATCH = 4


def variants() -> tuple[Variant, ...]:
    threads = torch.get_num_threads()
    return Variant("forward", "float32", threads, False), Variant("full", "float32", threads, False)


def comparisons(selection: Selection) -> Iterator[Comparison]:
    patterns = selection.patterns or (() if selection.full else ("s1-*",))
    for case, scale in NETWORKS.items():
        if patterns and not fits(case, patterns):
            continue
        for variant in selection.variants(variants()):
            if variant.mode == "backward":
                continue  # a training step is timed as a whole
            mode = "forward" if variant.mode == "forward" else "training"
            batch = selection.batch if mode == "forward" else max(selection.batch, TRAINING_BATCH)
            shape = (batch, 3, *IMAGES["224x224"][:2])
            task = Task(functools.partial(network, scale), shape, DTYPES[variant.dtype], mode)
            ours = ("replaced", "frozen") if mode == "forward" else ("replaced",)
            yield Comparison(
                operator="network",
                case=case if batch == 1 else f"{case}-batch{batch}",
                dtype=variant.dtype,
                mode=mode,
                threads=variant.threads,
                providers=providers(variant.compile, ours=ours),
                build=task.build,
                floor=task.floor,
                prepare=task.prepare,
                memory=functools.partial(_memory, scale, shape, mode, variant),
            )


def _memory(scale: float, shape: tuple[int, ...], mode: str, variant: Variant, provider: Provider) -> int | None:
    # The process would compile first, and memory does not depend on the layout.
    if provider.implementation == "compile" or provider.layout != "contiguous" or variant.dtype != "float32":
        return None
    return peak_of_network(scale, shape, mode, variant.threads, provider)


def test_network(comparison: Comparison, provider: Provider, compare: Callable[..., None]) -> None:
    compare(comparison, provider)
