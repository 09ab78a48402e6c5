"""Efficient pyramid pooling in Triton kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from test_pyramid_pooling import arguments, run
from triton_tests import DEVICE, gpu_or_interpreter

import espkernels
from espkernels import inference, reference

pytestmark = gpu_or_interpreter()


@pytest.mark.parametrize("size, channels", [((6, 8), 10), ((7, 5), 3), ((1, 4), 1)], ids=str)
def test_against_the_reference(size: tuple[int, int], channels: int) -> None:
    torch.manual_seed(0)
    tensors, sizes, enlarged = arguments(channels, size, (2.0, 1.5, 1.0, 0.5, 0.1))
    given = [tensor.float() for tensor in tensors]
    exact = run(reference.pyramid_pooling, [t.double() for t in given], sizes, enlarged)
    bound = run(reference.pyramid_pooling, [t.double().abs() for t in given], sizes, enlarged).amax().item()
    with espkernels.use_backend("triton"):
        actual = run(inference.pyramid_pooling, [t.to(DEVICE) for t in given], sizes, enlarged).cpu()
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # The bound of tests/test_pyramid_pooling.py: fewer than 85 roundings.
    assert (actual.double() - exact).abs().max().item() <= 85 * 2**-24 * bound
