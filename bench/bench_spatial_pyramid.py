"""``spatial_pyramid``: K depthwise convolutions, fused hierarchically and concatenated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench import providers
from bench.cases import DEFAULT, Case
from bench.comparison import Comparison, Provider
from bench.selection import Selection, Variant


def variants(case: Case) -> tuple[Variant, ...]:
    threads = torch.get_num_threads()
    first = case.name.startswith("s1-")
    common = (
        Variant("forward", "float32", threads, True),
        Variant("full", "float32", threads, first and case.stride == 1),
    )
    if not first:
        return common
    return (
        *common,
        Variant("backward", "float32", threads, False),
        Variant("forward", "bfloat16", threads, False),
        Variant("forward", "float32", 1, threads == 1),
    )


def comparisons(selection: Selection) -> Iterator[Comparison]:
    return providers.comparisons("spatial_pyramid", providers.spatial_pyramid, selection, DEFAULT, variants)


def test_spatial_pyramid(comparison: Comparison, provider: Provider, compare: Callable[..., None]) -> None:
    compare(comparison, provider)
