"""What runs around the units in training on the Triton kernels, against the layers one by one in float64.

The bounds are those of tests/test_eesp_training.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_results import randomised, results, twin
from torch import Tensor, nn
from triton_tests import DEVICE, gpu_or_interpreter

import espkernels
from espkernels import fused_norm, fused_shortcut
from espkernels import nn as fused

pytestmark = gpu_or_interpreter()


def agrees(layer: nn.Module, *inputs: Tensor) -> None:
    torch.manual_seed(0)
    layer = randomised(layer).double()
    expected = results(twin(layer), *inputs)
    with espkernels.use_backend("triton"):
        found = results(layer.to(DEVICE), *(x.to(DEVICE) for x in inputs))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def test_down_sampler_with_its_image() -> None:
    unit = fused.DownSampler(8, 24, k=2, r_lim=5, reinf=True)
    x, image = drawn(2, 8, 7, 6), drawn(2, 3, 14, 12)
    with espkernels.use_backend("triton"):
        assert fused_shortcut.fits(unit.double().to(DEVICE), x.to(DEVICE), image.to(DEVICE))
    agrees(unit.cpu(), x, image)


def test_down_sampler_without_an_image() -> None:
    agrees(fused.DownSampler(4, 12, k=2, r_lim=5, reinf=False), drawn(3, 4, 5, 8))


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_norm_and_prelu(training: bool) -> None:
    block: Any = fused.BR(37).train(training)
    x = drawn(2, 37, 9, 11)
    with espkernels.use_backend("triton"):
        assert fused_norm.fits(block.double().to(DEVICE).bn, block.act, x.to(DEVICE))
    agrees(block.cpu(), x)


def test_gradients_that_nobody_needs() -> None:
    """Of the three maps and three vectors at the end of a down-sampler, one alone."""
    torch.manual_seed(0)
    given = [drawn(2, 5, 3, 4), drawn(2, 6, 3, 4), drawn(2, 2, 3, 4)]
    given += [torch.randn(shape, dtype=torch.float64) for shape in ((11, 2), (11,), (11,))]

    def gradients(alone: range) -> list[Tensor | None]:
        inputs = [t.to(DEVICE).clone().requires_grad_(i in alone) for i, t in enumerate(given)]
        with espkernels.use_backend("triton"):
            result = torch.ops.espkernels.long_range_shortcut(*inputs)
            result.backward(torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result).to(DEVICE))
        return [t.grad for t in inputs]

    whole = gradients(range(6))
    for i in range(6):
        for j, found in enumerate(gradients(range(i, i + 1))):
            expected = whole[j]
            assert expected is not None
            assert found is None if i != j else found is not None and torch.equal(found, expected)
