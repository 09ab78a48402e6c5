"""The Triton kernels of group_pointwise and its two gradients against the reference."""

from __future__ import annotations

import pytest
import torch
from samples import Sample, named
from triton_tests import LAYOUTS, compare_exactly, compare_within_rounding, gpu_or_interpreter

pytestmark = gpu_or_interpreter()

# Groups below 16 are sums of products, those of 16 and more tl.dot.
EDGES = named(
    "width 17", "one pixel", "batch 0", "one group", "one output", "one input a group, three outputs",
    "five groups of odd sizes", "outputs 16 a group", "outputs 33 a group", "inputs 129 a group", "channels 20",
    "channels 65",
)  # fmt: skip


@pytest.mark.parametrize("position", range(len(EDGES)), ids=[str(sample) for sample in EDGES])
def test_exact_on_integers(position: int) -> None:
    # The layouts by turns; float64, always sums of products, where those are few.
    sample, layout = EDGES[position], list(LAYOUTS.values())[position % 2]
    compare_exactly("group_pointwise", sample, torch.float32, layout)
    if sample.channels < 6:
        compare_exactly("group_pointwise", sample, torch.float64, layout)


@pytest.mark.parametrize("sample", named("width 17", "channels 20"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reals_err_by_rounding(sample: Sample, dtype: torch.dtype) -> None:
    compare_within_rounding("group_pointwise", sample, dtype, torch.channels_last)
