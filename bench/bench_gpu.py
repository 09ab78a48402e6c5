"""The comparison on a GPU, as a test: ``pytest -m gpu tests bench``."""

from __future__ import annotations

import pytest
import torch

from bench import gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_units_operators_and_networks() -> None:
    assert gpu.main([]) == 0
