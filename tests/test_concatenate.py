"""Concatenation has the bits of torch's, along the channels of pixels and along any dimension of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_tests import DTYPES, each_view
from torch import Tensor

from espkernels import backends, inference

pytestmark = pytest.mark.usefixtures("poison", "same_each_time", "threads")

# Sizes of the maps, and the dimension along which they lie behind one another. Rows of one number, of more than a unit
# takes, and of none.
CASES = [
    ([(2, 3, 5, 7), (2, 1, 5, 7)], 1),
    ([(1, 16, 9, 8), (1, 33, 9, 8), (1, 5, 9, 8)], 1),
    ([(2, 20, 1, 1), (2, 3, 1, 1)], 1),
    ([(1, 9000, 3, 2), (1, 4, 3, 2)], 1),
    ([(0, 3, 2, 2), (0, 4, 2, 2)], 1),
    ([(2, 3, 4, 5), (2, 0, 4, 5), (2, 2, 4, 5)], 1),
    ([(2, 3, 4, 5), (1, 3, 4, 5)], 0),
    ([(2, 3, 4, 5), (2, 3, 4, 2)], 3),
    ([(1, 700, 21), (1, 1000, 21), (1, 6, 21)], 1),
    ([(3, 7, 4), (3, 1, 4)], 1),
    ([(5,), (1,), (0,)], 0),
    ([(1, 40_000), (1, 3)], 1),
]


@pytest.mark.parametrize(("shapes", "dim"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_the_bits_of_torch(isa: str, shapes: list[tuple[int, ...]], dim: int) -> None:
    for dtype in DTYPES.values():
        maps = [torch.randn(shape).to(dtype) for shape in shapes]
        expected = torch.cat(maps, dim)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = inference.concatenate(maps, dim)
            assert result.dtype == dtype and torch.equal(result, expected)
            pixels = result.dim() == 4 and dim == 1
            assert result.is_contiguous(memory_format=torch.channels_last if pixels else torch.contiguous_format)


@each_view
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    maps = [view(torch.randn(2, 18, 6, 5)), view(torch.randn(2, 18, 6, 5))]
    for dim in range(4):
        assert torch.equal(inference.concatenate(maps, dim), torch.cat(maps, dim))


def test_gradients() -> None:
    maps = [torch.randn(2, channels, 3, 4, requires_grad=True) for channels in (5, 2)]
    weight = torch.randn(2, 7, 3, 4)
    (inference.concatenate(maps, 1) * weight).sum().backward()
    assert maps[0].grad is not None and torch.equal(maps[0].grad, weight[:, :5])
    assert maps[1].grad is not None and torch.equal(maps[1].grad, weight[:, 5:])


WRONG: dict[str, tuple[list[Tensor], int]] = {
    "dim: expected": ([torch.randn(2, 3)], 2),
    "dtype": ([torch.randn(2, 3), torch.randn(2, 3).double()], 0),
    "number of dimensions": ([torch.randn(2, 3), torch.randn(2, 3, 1)], 0),
    "equal sizes": ([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5)], 1),
}


@pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message: str) -> None:
    maps, dim = WRONG[message]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.espkernels.concatenate.default(maps, dim)
