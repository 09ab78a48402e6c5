"""Tensors that do not fit each other are refused before a Triton kernel could read beyond one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_triton_eesp import UNITS, arguments, sent, slope, whole
from torch import Tensor
from triton_tests import DEVICE, gpu_or_interpreter

import espkernels

pytestmark = gpu_or_interpreter()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1]


X = (2, 6, 4, 5)
CALLS: dict[str, tuple[str, list[Any]]] = {
    "affine": ("affine", [X, (6,), (6,), X, (6,)]),
    "convolution": ("convolution", [X, (8, 3, 3, 3), (8,), (8,), 1, 1, 1, 2]),
    "resize": ("resize", [X, 7, 9, (2, 6, 7, 9), (2, 6, 1, 1), (6,), (6,), (6,)]),
    "pyramid_pooling": (
        "pyramid_pooling",
        [X, (2, 6, 3, 3), [8, 10, 5, 5], 1, (12,), (12,), (12,), (6, 2, 3, 3), (6,), (6,)],
    ),
}


def test_each_tensor_of_the_layers_around() -> None:
    for operator, given in CALLS.values():
        right = [ones(*a) if isinstance(a, tuple) else a for a in given]
        function: Callable[..., Tensor] = getattr(torch.ops.espkernels, operator)
        with espkernels.use_backend("triton"):
            function(*right)
            for place, argument in enumerate(right):
                if place > 0 and isinstance(argument, Tensor):
                    with pytest.raises(RuntimeError, match=r"got .*, expected"):
                        function(*right[:place], shorter(argument), *right[place + 1 :])
            with pytest.raises(RuntimeError, match="expected"):
                function(right[0][0], *right[1:])


@pytest.mark.parametrize(
    "operator, given",
    [
        ("resize", [X, 0, 3]),
        ("resized_argmax", [X, 3, 0]),
        ("adaptive_average", [X, -1, 3]),
        ("average_pool", [(2, 6, 4)]),
        ("global_average", [(2, 6, 0, 4)]),
        ("convolution", [X, (8, 3, 9, 9), None, None, 1, 1, 1, 2]),
        ("convolution", [X, (8, 3, 3, 3), None, None, 0, 1, 1, 2]),
        ("convolution", [X, (8, 2, 3, 3), None, None, 1, 1, 1, 3]),
        ("pyramid_pooling", [X, (2, 6, 3, 3), [8, 10, 5], 1, (12,), (12,), (12,), (6, 2, 3, 3), (6,), (6,)]),
    ],
)
def test_sizes(operator: str, given: list[Any]) -> None:
    arguments = [ones(*a) if isinstance(a, tuple) else a for a in given]
    with espkernels.use_backend("triton"), pytest.raises(RuntimeError, match=r"got .*, expected"):
        getattr(torch.ops.espkernels, operator)(*arguments)


def test_each_tensor_of_a_unit() -> None:
    from espkernels.triton.down_sampler import down_sampler

    draw, unit = torch.Generator().manual_seed(0), UNITS["no image"]
    both, size = unit.inputs + unit.outputs, (3, 3)
    shortcut = (whole(draw, both, 3), whole(draw, both), slope(draw, both))
    x, image = whole(draw, 2, unit.inputs, 5, 5), whole(draw, 2, 3, *size)
    right = sent((x, image, *arguments(unit, draw), *shortcut), torch.float32)
    down_sampler(*right, True)
    for place, argument in enumerate(right):
        if place > 0 and isinstance(argument, Tensor):
            with pytest.raises(RuntimeError, match=r"got .*, expected"):
                down_sampler(*right[:place], shorter(argument), *right[place + 1 :], True)
