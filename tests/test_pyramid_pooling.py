"""The branches of efficient pyramid pooling and their merge, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from operator_tests import DTYPES
from torch import Tensor

import espkernels
from espkernels import backends, inference, reference
from espkernels.models.pyramid_pooling import EfficientPyramidPooling

pytestmark = [
    pytest.mark.usefixtures("poison", "same_each_time"),
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
]

# Even sides average pairs, in twice and in one and a half times the size; odd ones meet windows of three. 33 and 70
# columns go beyond a panel.
SIZES = [(2, 2), (4, 6), (6, 8), (7, 5), (1, 1), (1, 4), (12, 33), (18, 70), (34, 64)]


def arguments(channels: int, size: tuple[int, int], scales: tuple[float, ...]) -> tuple[list[Tensor], list[int], int]:
    block = EfficientPyramidPooling(channels, channels, channels, scales)
    sizes = [side for target in block.target_sizes(*size) for side in target]
    enlarged = sum(scale > 1 for scale in block.scales)
    branches = len(block.scales)
    shapes = [(2, channels, *size), (branches, channels, 3, 3)] + [(branches * channels,)] * 3
    shapes += [(channels, branches, 3, 3), (channels,), (channels,)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes], sizes, enlarged


def run(function, tensors: list[Tensor], sizes: list[int], enlarged: int) -> Tensor:
    x, weight, *rest = tensors
    return function(x, weight, sizes, enlarged, *rest)


@pytest.mark.parametrize("channels", [1, 4, 10, 16, 20, 35])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_against_the_reference(isa: str, size: tuple[int, int], channels: int) -> None:
    for scales in ((2.0, 1.5, 1.0, 0.5, 0.1), (2.0,), (1.5, 0.5)):
        tensors, sizes, enlarged = arguments(channels, size, scales)
        for name, dtype in DTYPES.items():
            vector = torch.float64 if dtype == torch.float64 else torch.float32
            given = [t.to(vector if t.dim() == 1 else dtype) for t in tensors]
            exact = run(reference.pyramid_pooling, [t.double() for t in given], sizes, enlarged)
            bound = run(reference.pyramid_pooling, [t.double().abs() for t in given], sizes, enlarged).amax().item()
            actual = run(inference.pyramid_pooling, given, sizes, enlarged)
            assert actual.is_contiguous(memory_format=torch.channels_last)
            # Magnitudes in place of all numbers bound every sum. A branch rounds what it stores at most four times
            # (resized, convolved, averaged, concatenated), the merge once; sums round in float32 or better, over
            # 9 + 4 and 9 * S terms, two mixes and the epilogues: fewer than 80 steps.
            stored, summed = torch.finfo(dtype).eps / 2, torch.finfo(vector).eps / 2
            error = (actual.double() - exact).abs().max().item()
            assert error <= (5 * stored + 80 * summed) * bound, (name, scales)


def test_threads_change_no_bit(isa: str, threads: None) -> None:
    # Reals: sums of whole numbers would be exact in any order. Rows that strips of two and three threads cut anywhere.
    generator = torch.Generator().manual_seed(0)
    block = EfficientPyramidPooling(24, 8, 8).eval()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x = torch.randn(2, 24, 61, 31, generator=generator.manual_seed(1)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            frozen = espkernels.freeze(block)
            results.append((frozen(x), frozen(x[1:])))
    for whole, second in results:
        assert torch.equal(whole, results[0][0]) and torch.equal(second, whole[1:])


def test_no_channels_are_refused() -> None:
    x, none, weight = torch.empty(1, 0, 4, 4), torch.empty(0), torch.empty(1, 0, 3, 3)
    merge = torch.empty(0, 1, 3, 3)
    with pytest.raises(RuntimeError, match="expected"):
        inference.pyramid_pooling(x, weight, [8, 8], 1, none, none, none, merge, none, none)


def test_an_infinity_reaches_no_further_than_its_windows(isa: str) -> None:
    tensors, sizes, enlarged = arguments(10, (8, 40), (2.0,))
    tensors = [t.float() for t in tensors]
    tensors[0][1, 3, 4, 20] = torch.inf
    exact = run(reference.pyramid_pooling, [t.double() for t in tensors], sizes, enlarged)
    actual = run(inference.pyramid_pooling, tensors, sizes, enlarged)
    assert actual[0].isfinite().all() and actual[1, [0, 1, 2, 4, 5, 6, 7, 8, 9]].isfinite().all()
    # A mix of weight 0 with an infinity is NaN in one order of operations, finite in another: one column more at most.
    far = torch.ones(40, dtype=torch.bool)
    far[20 - 4 : 20 + 5] = False
    assert actual[1, 3][:, far].isfinite().all() and exact[1, 3][:, far].isfinite().all()
