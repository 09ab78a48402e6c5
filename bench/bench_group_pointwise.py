"""``group_pointwise``: both 1x1 convolutions of the unit, with batch norm, residual and PReLU in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench import providers
from bench.cases import Case, matching
from bench.comparison import Comparison, Provider
from bench.selection import Selection, Variant


def variants(case: Case) -> tuple[Variant, ...]:
    threads = torch.get_num_threads()
    return Variant("forward", "float32", threads, False), Variant("full", "float32", threads, False)


def comparisons(selection: Selection) -> Iterator[Comparison]:
    cases = matching(["s1-224x224-*"])
    yield from providers.comparisons("group_pointwise reduce", providers.reduce, selection, cases, variants)
    yield from providers.comparisons("group_pointwise expand", providers.expand, selection, cases, variants)


def test_group_pointwise(comparison: Comparison, provider: Provider, compare: Callable[..., None]) -> None:
    compare(comparison, provider)
