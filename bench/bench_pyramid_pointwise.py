"""``pyramid_pointwise``: the unit after its reduction in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench import providers
from bench.cases import Case, matching
from bench.comparison import Comparison, Provider
from bench.selection import Selection, Variant


def variants(case: Case) -> tuple[Variant, ...]:
    return (Variant("forward", "float32", torch.get_num_threads(), case.name.startswith("s1-") and case.stride == 1),)


def comparisons(selection: Selection) -> Iterator[Comparison]:
    cases = matching(["s1-224x224-*", "s2-224x224-level[345]"])
    return providers.comparisons("pyramid_pointwise", providers.pyramid_pointwise, selection, cases, variants)


def test_pyramid_pointwise(comparison: Comparison, provider: Provider, compare: Callable[..., None]) -> None:
    compare(comparison, provider)
