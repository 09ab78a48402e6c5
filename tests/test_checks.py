"""Bad input is refused at once, in a sentence that names the argument, what it is and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, zeros

import espkernels
from espkernels import backends

Change = dict[str, Any]


def _arguments(operator: str) -> Change:
    pyramid = {"x": zeros(2, 6, 5, 7), "weight": zeros(4, 6, 3, 3), "dilations": (1, 2, 3, 4)}
    vectors = {name: zeros(8) for name in ("scale", "shift", "slope")}
    if operator == "spatial_pyramid":
        return pyramid
    if operator == "group_pointwise":
        residual = zeros(2, 8, 5, 7)
        return {
            "x": zeros(2, 12, 5, 7),
            "weight": zeros(8, 3),
            "groups": 4,
            "residual": residual,
            **vectors,
        }
    pyramid_vectors = {f"pyramid_{name}": zeros(24) for name in vectors}
    residual = zeros(2, 8, 3, 4)
    pointwise = {"pointwise_weight": zeros(8, 6), "groups": 4, "stride": 2, "residual": residual}
    return {**pyramid, **pointwise, **pyramid_vectors, **vectors}


MAP = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise")
PYRAMID = ("spatial_pyramid", "pyramid_pointwise")
POINTWISE = ("group_pointwise", "pyramid_pointwise")
ALONE = ("group_pointwise",)
UNIT = ("pyramid_pointwise",)

# What is wrong, for which operators, the changed arguments, the error, and what its sentence must hold.
BAD: list[tuple[str, tuple[str, ...], Change, type[Exception], tuple[str, ...]]] = [
    ("x of rank 3", MAP, {"x": zeros(6, 5, 7)}, ValueError, ("x", "[6, 5, 7]")),
    ("x of rank 5", MAP, {"x": zeros(1, 2, 6, 5, 7)}, ValueError, ("x", "[1, 2, 6, 5, 7]")),
    ("x no tensor", MAP, {"x": [[1.0]]}, TypeError, ("x", "list")),
    ("x of integers", MAP, {"x": zeros(2, 6, 5, 7, dtype=torch.int64)}, TypeError, ("x", "int64")),
    ("x complex", MAP, {"x": zeros(2, 6, 5, 7, dtype=torch.complex64)}, TypeError, ("x", "complex64")),
    ("x without channels", MAP, {"x": zeros(2, 0, 5, 7)}, ValueError, ("x", "[2, 0, 5, 7]")),
    ("x without rows", MAP, {"x": zeros(2, 6, 0, 7)}, ValueError, ("x", "[2, 6, 0, 7]")),
    ("x without columns", MAP, {"x": zeros(2, 6, 5, 0)}, ValueError, ("x", "[2, 6, 5, 0]")),
    ("weight of rank 3", PYRAMID, {"weight": zeros(24, 3, 3)}, ValueError, ("weight", "[24, 3, 3]")),
    ("weight 5 by 5", PYRAMID, {"weight": zeros(4, 6, 5, 5)}, ValueError, ("weight", "[4, 6, 5, 5]")),
    ("weight 3 by 1", PYRAMID, {"weight": zeros(4, 6, 3, 1)}, ValueError, ("weight", "[4, 6, 3, 1]")),
    ("weight channels", PYRAMID, {"weight": zeros(4, 5, 3, 3)}, ValueError, ("weight", "[4, 5, 3, 3]", "6")),
    ("weight one channel", PYRAMID, {"weight": zeros(4, 1, 3, 3)}, ValueError, ("weight", "[4, 1, 3, 3]", "6")),
    ("weight no tensor", MAP, {"weight": None}, TypeError, ("weight", "NoneType")),
    ("weight in another dtype", PYRAMID, {"weight": zeros(4, 6, 3, 3).double()}, TypeError, ("weight", "float64")),
    ("weight elsewhere", PYRAMID, {"weight": zeros(4, 6, 3, 3, device="meta")}, ValueError, ("weight", "meta")),
    ("fewer dilations than branches", PYRAMID, {"dilations": (1, 2, 3)}, ValueError, ("dilations", "3", "4")),
    ("more dilations than branches", PYRAMID, {"dilations": (1,) * 5}, ValueError, ("dilations", "5", "4")),
    ("no branches", PYRAMID, {"dilations": (), "weight": zeros(0, 6, 3, 3)}, ValueError, ("dilations", "1 to 8")),
    ("nine branches", PYRAMID, {"dilations": (1,) * 9, "weight": zeros(9, 6, 3, 3)}, ValueError, ("dilations", "9")),
    ("dilation 0", PYRAMID, {"dilations": (1, 0, 3, 4)}, ValueError, ("dilations", "0", "at least 1")),
    ("dilation below 0", PYRAMID, {"dilations": (1, 2, -3, 4)}, ValueError, ("dilations", "-3", "at least 1")),
    ("dilation a fraction", PYRAMID, {"dilations": (1, 2.5, 3, 4)}, TypeError, ("dilations", "2.5")),
    ("dilations one number", PYRAMID, {"dilations": 4}, TypeError, ("dilations", "int")),
    ("stride 0", PYRAMID, {"stride": 0}, ValueError, ("stride", "0", "at least 1")),
    ("stride below 0", PYRAMID, {"stride": -1}, ValueError, ("stride", "-1", "at least 1")),
    ("stride a fraction", PYRAMID, {"stride": 1.5}, TypeError, ("stride", "float")),
    ("stride a pair", PYRAMID, {"stride": (1, 1)}, TypeError, ("stride", "tuple")),
    ("weight of rank 4", ALONE, {"weight": zeros(8, 3, 1, 1)}, ValueError, ("weight", "[8, 3, 1, 1]")),
    ("weight inputs", ALONE, {"weight": zeros(8, 12)}, ValueError, ("weight", "[8, 12]", "3")),
    ("weight without outputs", ALONE, {"weight": zeros(0, 3)}, ValueError, ("weight", "[0, 3]")),
    ("pointwise weight of rank 1", UNIT, {"pointwise_weight": zeros(48)}, ValueError, ("pointwise_weight", "[48]")),
    ("pointwise inputs", UNIT, {"pointwise_weight": zeros(8, 5)}, ValueError, ("pointwise_weight", "[8, 5]", "6")),
    ("pointwise dtype", UNIT, {"pointwise_weight": zeros(8, 6).half()}, TypeError, ("pointwise_weight", "float16")),
    ("groups 0", POINTWISE, {"groups": 0}, ValueError, ("groups", "0")),
    ("groups below 0", POINTWISE, {"groups": -4}, ValueError, ("groups", "-4")),
    ("groups do not divide the inputs", POINTWISE, {"groups": 5}, ValueError, ("groups", "5")),
    ("groups do not divide outputs", ALONE, {"weight": zeros(7, 3)}, ValueError, ("groups", "4", "7")),
    ("groups do not divide outputs", UNIT, {"pointwise_weight": zeros(7, 6)}, ValueError, ("groups", "4", "7")),
    ("groups a fraction", POINTWISE, {"groups": 2.0}, TypeError, ("groups", "float")),
    ("residual channels", POINTWISE, {"residual": zeros(2, 7, 5, 7)}, ValueError, ("residual", "[2, 7, 5, 7]")),
    ("residual that broadcasts", POINTWISE, {"residual": zeros(1, 8, 1, 1)}, ValueError, ("residual", "[1, 8, 1, 1]")),
    ("residual before the stride", UNIT, {"residual": zeros(2, 8, 5, 7)}, ValueError, ("residual", "[2, 8, 3, 4]")),
    ("residual dtype", POINTWISE, {"residual": zeros(2, 8, 3, 4).double()}, TypeError, ("residual", "float64")),
]  # fmt: skip

for _name in ("scale", "shift", "slope"):
    BAD += [
        (f"{_name} too long", POINTWISE, {_name: zeros(9)}, ValueError, (_name, "[9]", "8")),
        (f"{_name} that broadcasts", POINTWISE, {_name: zeros(1)}, ValueError, (_name, "[1]", "8")),
        (f"{_name} of rank 4", POINTWISE, {_name: zeros(1, 8, 1, 1)}, ValueError, (_name, "[1, 8, 1, 1]", "8")),
        (f"{_name} no tensor", POINTWISE, {_name: 0.5}, TypeError, (_name, "float")),
        (f"{_name} of integers", POINTWISE, {_name: zeros(8, dtype=torch.int32)}, TypeError, (_name, "int32")),
        (f"{_name} in double", POINTWISE, {_name: zeros(8).double()}, TypeError, (_name, "float64")),
        (f"{_name} on another device", POINTWISE, {_name: zeros(8, device="meta")}, ValueError, (_name, "meta")),
        (f"pyramid_{_name} too short", UNIT, {f"pyramid_{_name}": zeros(8)}, ValueError, (_name, "[8]", "24")),
    ]

CASES = [
    pytest.param(operator, change, error, words, id=f"{operator}-{name}".replace(" ", "-"))
    for name, operators, change, error, words in BAD
    for operator in operators
]


@pytest.mark.parametrize(("operator", "change", "error", "words"), CASES)
@pytest.mark.parametrize("backend", [None, "reference"], ids=["automatic", "reference"])
def test_bad_input_is_named(
    operator: str, change: Change, error: type[Exception], words: tuple[str, ...], backend: str | None
) -> None:
    function: Callable[..., Tensor] = getattr(espkernels, operator)
    good = _arguments(operator)
    with espkernels.use_backend(backend):
        function(**good)
        with pytest.raises(error) as raised:
            function(**{**good, **change})
    message = str(raised.value)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("operator", MAP)
def test_mixed_dtypes(operator: str) -> None:
    good = _arguments(operator)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=str(dtype)):
            getattr(espkernels, operator)(**{**good, "x": good["x"].to(dtype)})


# --- the operators themselves, without the sentences: whatever they are called with, they stay within memory ----------


def _raw(name: str) -> list[Any]:
    x, grad, weight = zeros(2, 6, 5, 7), zeros(2, 24, 5, 7), zeros(4, 6, 3, 3)
    z, out, pointwise = zeros(2, 12, 5, 7), zeros(2, 8, 5, 7), zeros(8, 3)
    options = [[1, 2, 3, 4], 1, True]
    eight, many = zeros(8), zeros(24)
    raw: dict[str, list[Any]] = {
        "spatial_pyramid": [x, weight, *options],
        "spatial_pyramid_backward_input": [grad, weight, *options, 5, 7],
        "spatial_pyramid_backward_weight": [grad, x, *options],
        "group_pointwise": [z, pointwise, 4, eight, eight, out, eight],
        "group_pointwise_backward_input": [out, pointwise, 4],
        "group_pointwise_backward_weight": [out, z, 4],
        "pyramid_pointwise": [
            x, weight, options[0], zeros(8, 6), 4, many, many, many, eight, eight, out, eight, *options[1:]
        ],
    }  # fmt: skip
    return raw[name]


RAW = (
    "spatial_pyramid",
    "spatial_pyramid_backward_input",
    "spatial_pyramid_backward_weight",
    "group_pointwise",
    "group_pointwise_backward_input",
    "group_pointwise_backward_weight",
    "pyramid_pointwise",
)


# Dimensions that nothing else in the call fixes, as (operator, argument, dimension): any size is right.
FREE = {
    ("spatial_pyramid", 0, 0),
    ("spatial_pyramid", 0, 2),
    ("spatial_pyramid", 0, 3),
    ("spatial_pyramid_backward_input", 0, 0),
    ("group_pointwise_backward_input", 0, 0),
    ("group_pointwise_backward_input", 0, 2),
    ("group_pointwise_backward_input", 0, 3),
    ("group_pointwise_backward_input", 1, 1),
}


@pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
@pytest.mark.parametrize("name", RAW)
def test_raw_operators_refuse_wrong_sizes(name: str) -> None:
    operator, good = getattr(torch.ops.espkernels, name), _raw(name)
    operator(*good)
    for position, value in enumerate(good):
        for what, wrong in _wrong(name, position, value):
            try:
                operator(*good[:position], wrong, *good[position + 1 :])
            except (RuntimeError, ValueError, TypeError):
                continue
            pytest.fail(f"argument {position} {what} was taken")


def _wrong(name: str, position: int, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [(str(number), number) for number in ((0, -1, 2**40 + 1) if value > 1 else (0, -1))]
    if isinstance(value, list):
        lists: tuple[list[int], ...] = ([], value[:-1], [*value, 1], [0, *value[1:]], [-1, *value[1:]])
        return [(str(numbers), numbers) for numbers in lists]
    wrong = [("in double", value.double()), ("of integers", value.int()), ("of one rank more", value.unsqueeze(0))]
    for dim in range(value.dim()):
        if (name, position, dim) not in FREE:
            wrong.append((f"one smaller in {dim}", value.narrow(dim, 0, value.shape[dim] - 1)))
            wrong.append((f"one larger in {dim}", torch.cat([value, value.narrow(dim, 0, 1)], dim)))
    return wrong
