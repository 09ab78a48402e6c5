"""Batch norm, residual and PReLU of a map that no product makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from closeness import assert_exact, assert_within_rounding
from operator_tests import DTYPES, each_layout, each_view
from torch import Tensor

from espkernels import backends, inference, reference

pytestmark = pytest.mark.usefixtures("poison", "same_each_time")

needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 15, 3, 3), (2, 16, 9, 8), (1, 17, 8, 8), (1, 33, 1, 65), (0, 4, 2, 2)]
NAMES = ("scale", "shift", "residual", "slope")


def whole(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Whole numbers, and slopes of a half: results are exact in every type."""
    x, residual = (torch.randint(-4, 5, shape).double() for _ in range(2))
    scale, shift = (torch.randint(-3, 4, shape[1:2]).double() for _ in range(2))
    return {"x": x, "scale": scale, "shift": shift, "residual": residual, "slope": torch.full_like(scale, 0.5)}


def given(arguments: dict[str, Tensor], dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Tensor]:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    maps = {n: v.to(dtype).contiguous(memory_format=layout) for n, v in arguments.items() if v.dim() == 4}
    return {n: v.to(compute) for n, v in arguments.items()} | maps


@each_layout
def test_every_step_alone_and_together(isa: str, layout: torch.memory_format) -> None:
    for shape, kept in itertools.product(SHAPES, (*((name,) for name in NAMES), NAMES)):
        arguments = {name: value for name, value in whole(shape).items() if name in ("x", *kept)}
        expected = reference.epilogue(**arguments)
        for dtype in DTYPES.values():
            output = inference.affine(**given(arguments, dtype, layout))
            assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
            assert_exact(f"{kept}", output, expected)


def test_real_numbers(isa: str) -> None:
    shape = (2, 21, 13, 9)
    arguments = {name: torch.randn(value.shape).double() for name, value in whole(shape).items()}
    for dtype in (torch.float32, torch.float64):
        exact = {name: value.to(dtype).double() for name, value in arguments.items()}
        size = {name: value.abs() for name, value in exact.items()}
        output = inference.affine(**given(exact, dtype, torch.contiguous_format))
        # Two products and two sums; a PReLU of x is at most (1 + |slope|) |x|.
        bound = reference.epilogue(**size | {"slope": None}) * (1 + size["slope"].view(1, -1, 1, 1))
        assert_within_rounding("affine", output, reference.epilogue(**exact), bound, 4)


def test_infinities_and_nan_stay_where_they_are(isa: str) -> None:
    arguments = whole((1, 19, 4, 5))
    arguments["scale"].fill_(1)
    x = arguments["x"]
    x[0, 3, 2, 2], x[0, 18, 1, 1], x[0, 0, 0, 0] = torch.inf, torch.nan, -torch.inf
    output = inference.affine(**given(arguments, torch.float32, torch.channels_last))
    assert_exact("affine", output, reference.epilogue(**arguments))


@each_view
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    arguments = whole((2, 18, 6, 5))
    for name in ("x", "residual"):
        moved = given(arguments, torch.float32, torch.channels_last)
        moved[name] = view(moved[name])
        assert_exact(name, inference.affine(**moved), reference.epilogue(**{n: v.double() for n, v in moved.items()}))


def test_gradients() -> None:
    arguments = whole((2, 5, 4, 3))
    answers = []
    for function in (inference.affine, reference.epilogue):
        leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
        answers.append(torch.autograd.grad(function(**leaves).sum(), list(leaves.values())))
    for actual, expected in zip(*answers, strict=True):
        assert torch.equal(actual, expected)


@needs_library
def test_wrong_arguments_are_refused() -> None:
    right = given(whole((2, 3, 4, 5)), torch.float32, torch.contiguous_format)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "x": lambda t: t[0], "scale": lambda t: t[1:], "shift": lambda t: t.double(), "slope": lambda t: t[None],
        "residual": lambda t: t[..., 1:],
    }  # fmt: skip
    for name, change in changes.items():
        with pytest.raises(RuntimeError, match="expected"):
            inference.affine(**{**right, name: change(right[name])})
