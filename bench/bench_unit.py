"""The EESP unit: plain torch layers, replaced by this library (inference and training), and frozen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from bench.cases import Case, matching
from bench.comparison import Comparison, Provider
from bench.layers import Task, unit
from bench.providers import providers
from bench.selection import DTYPES, Selection, Variant


def variants(case: Case) -> tuple[Variant, ...]:
    threads = torch.get_num_threads()
    return Variant("forward", "float32", threads, False), Variant("full", "float32", threads, False)


def comparisons(selection: Selection) -> Iterator[Comparison]:
    for case in selection.cases(matching(["s1-224x224-level?"])):
        for variant in selection.variants(variants(case)):
            if variant.mode == "backward":
                continue  # a training step is timed as a whole
            training = variant.mode != "forward"
            shape = (case.batch, case.in_channels, case.height, case.width)
            task = Task(
                functools.partial(unit, case), shape, DTYPES[variant.dtype], "inside" if training else "forward"
            )
            ours = ("replaced", "frozen") if not training else ("replaced",)
            yield Comparison(
                operator="unit",
                case=str(case),
                dtype=variant.dtype,
                mode="training" if training else "forward",
                threads=variant.threads,
                providers=providers(variant.compile, ours=ours),
                build=task.build,
                floor=task.floor,
                prepare=task.prepare,
            )


def test_unit(comparison: Comparison, provider: Provider, compare: Callable[..., None]) -> None:
    compare(comparison, provider)
