"""The class of every pixel of resized logits, against torch's resize and argmax in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_tests import DTYPES, each_layout, each_view
from torch import Tensor

import espkernels
from espkernels import backends, inference, reference

pytestmark = pytest.mark.usefixtures("poison", "same_each_time")

needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")

# Around the lanes of every register and the classes of every data set; 257 is the first that uint8 cannot hold.
CHANNELS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19, 20, 21, 31, 32, 33, 64, 65, 80, 256, 257]

Sizes = tuple[tuple[int, int], tuple[int, int]]

# Sizes before and after, all of whose weights are quarters or none: small whole numbers then mix without rounding.
QUARTERS = [
    ((1, 1), (1, 1)), ((1, 1), (5, 7)), ((2, 3), (5, 9)), ((3, 2), (9, 2)), ((5, 4), (5, 4)), ((4, 9), (7, 33)),
    ((9, 5), (3, 2)), ((3, 18), (5, 69)), ((2, 2), (1, 1)), ((6, 1), (11, 3)),
]  # fmt: skip


def assert_classes(actual: Tensor, expected: Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype) and actual.is_contiguous()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("sizes", QUARTERS, ids=lambda s: f"{s[0][0]}x{s[0][1]}-{s[1][0]}x{s[1][1]}")
@each_layout
def test_classes_and_ties(isa: str, sizes: Sizes, layout: torch.memory_format) -> None:
    before, after = sizes
    for channels in CHANNELS:
        # Few values, so that most pixels have several largest channels.
        x = torch.randint(-2, 3, (2, channels, *before)).double()
        expected = reference.resized_argmax(x, *after)
        for dtype in DTYPES.values():
            given = x.to(dtype).contiguous(memory_format=layout)
            assert_classes(inference.resized_argmax(given, *after), expected)
        assert_classes(inference.resized_argmax(given, *after, wide=True), expected.long())


@pytest.mark.parametrize("size", [(64, 48), (97, 131), (33, 32), (7, 5)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_size_within_rounding(isa: str, size: tuple[int, int]) -> None:
    x = torch.randn(2, 21, 23, 17, dtype=torch.float64).float()
    exact = reference.resize(x.double(), *size)
    chosen = exact.gather(1, inference.resized_argmax(x, *size).long()[:, None])[:, 0]
    # A number is two mixes a + (b - a) w: each rounds w, the difference, and the multiply-add, which a difference of
    # twice the largest number M takes part in: at most 6 u M a mix, and both channels of a comparison may err.
    bound = 2 * 2 * 6 * torch.finfo(torch.float32).eps / 2 * x.abs().max().item()
    assert (chosen >= exact.amax(1) - bound).all()


@needs_library
def test_bits_of_the_resized_map(isa: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1, 20, 32, 24, dtype=dtype)
        for size in ((64, 48), (63, 50), (5, 9)):
            expected = inference.resize(x, *size).argmax(1).to(torch.uint8)
            assert_classes(inference.resized_argmax(x, *size), expected)


def test_the_first_nan_wins(isa: str) -> None:
    for channels in (2, 16, 20, 33):
        x = torch.randint(-2, 3, (1, channels, 6, 9)).double()
        x[0, channels - 1, 1, 2] = x[0, channels // 2, 1, 2] = x[0, channels - 1, 4, 4] = torch.nan
        expected = reference.resized_argmax(x, 11, 17)
        for dtype in DTYPES.values():
            assert_classes(inference.resized_argmax(x.to(dtype), 11, 17), expected)


def test_masked_classes_stay_behind(isa: str) -> None:
    x = torch.randint(-2, 3, (1, 20, 4, 9)).double()
    x[:, [3, 19]] = -torch.inf
    resized = reference.resize(x, 7, 33)
    # Where a weight is 0, its product with an infinity is NaN, and wins: so it does in torch.
    known = ~resized.isnan().any(1)
    assert known.sum() > 50
    for dtype in DTYPES.values():
        assert torch.equal(inference.resize(x.to(dtype), 7, 33).double()[resized.isinf()], resized[resized.isinf()])
        assert_classes(inference.resized_argmax(x.to(dtype), 7, 33)[known], resized.argmax(1)[known].to(torch.uint8))


@each_view
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randint(-2, 3, (2, 18, 6, 5)).float())
    assert_classes(inference.resized_argmax(x, 11, 9), reference.resized_argmax(x.double(), 11, 9))


def test_no_images() -> None:
    assert_classes(inference.resized_argmax(torch.ones(0, 3, 2, 2), 4, 5), torch.empty(0, 4, 5, dtype=torch.uint8))


def test_where_a_gradient_is_wanted() -> None:
    x = torch.randn(1, 5, 3, 4, requires_grad=True)
    assert not inference.resized_argmax(x, 5, 7).requires_grad
    with espkernels.use_backend("reference"):
        assert_classes(inference.resized_argmax(x, 5, 7), reference.resized_argmax(x.detach().double(), 5, 7))


@needs_library
def test_wrong_arguments_are_refused() -> None:
    operator = torch.ops.espkernels.resized_argmax.default
    x = torch.randn(1, 3, 4, 5)
    for wrong in ((x[0], 2, 2), (x, 0, 2), (x, 2, -1), (x[:, :0], 2, 2), (x[:, :, :0], 2, 2), (x.int(), 2, 2)):
        with pytest.raises(RuntimeError, match="expected"):
            operator(*wrong)


@needs_library
@pytest.mark.parametrize("classes", [256, 257])
@torch.no_grad()
def test_the_last_of_256_classes_and_one_more(classes: int) -> None:
    head = torch.nn.Conv2d(3, classes, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    head.bias[-1] = 1  # type: ignore[index]
    frozen = espkernels.freeze(torch.nn.Sequential(head).eval())
    for name in ("cpu", "reference"):
        with backends.use_backend(name):
            found = frozen.classes(torch.randn(1, 3, 4, 5))  # type: ignore[operator]
        assert (found == classes - 1).all() and found.dtype == (torch.uint8 if classes == 256 else torch.int64)
