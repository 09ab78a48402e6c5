"""Maps turned from contiguous to channels_last and back, number by number the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_tests import DTYPES, each_view
from torch import Tensor

from espkernels import backends, inference

pytestmark = pytest.mark.usefixtures("poison", "same_each_time")

SHAPES = [
    (1, 1, 1, 1), (2, 3, 5, 7), (1, 15, 3, 3), (2, 16, 9, 8), (1, 17, 8, 8), (1, 33, 1, 65), (0, 4, 2, 2), (2, 5, 1, 1),
    (1, 1, 9, 9), (3, 64, 14, 14),
]  # fmt: skip


def assert_turned(x: Tensor, channels_last: bool) -> None:
    turned = inference.change_layout(x, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert turned.is_contiguous(memory_format=memory_format) and turned.dtype == x.dtype
    assert torch.equal(turned, x) and (x.numel() == 0 or turned.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_both_ways(isa: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES.values():
        x = torch.randn(shape).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            for channels_last in (True, False):
                assert_turned(x.contiguous(memory_format=layout), channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_number_of_two_bytes(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[~x.isnan()][:63_000].view(1, 50, 42, 30)
    assert torch.equal(inference.change_layout(x, True).contiguous().view(torch.int16), x.view(torch.int16))


@each_view
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    for channels_last in (True, False):
        assert_turned(view(torch.randn(2, 18, 6, 5)), channels_last)


def test_a_map_in_channels_last_is_not_copied() -> None:
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    assert inference.channels_last(x) is x
    assert torch.equal(inference.channels_last(x.contiguous()), x)


def test_gradients() -> None:
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    weight = torch.randn(2, 5, 3, 4)
    (inference.change_layout(x, True) * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)


@pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
def test_wrong_arguments_are_refused() -> None:
    for x in (torch.randn(3, 4, 5), torch.ones(1, 2, 3, 4, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.espkernels.change_layout.default(x, True)
