"""Every CUDA kernel, run on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer: see cuda_emulation/."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_sanitizers import MEMORY, sanitizing_compiler
from torch_free_programme import build_emulation, run_emulation

# -ffp-contract=off: the whole numbers are exact either way, and the compiler has less to think about.
FLAGS = [*MEMORY, "-ffp-contract=off"]


@pytest.fixture(scope="module")
def programme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gxx = sanitizing_compiler(FLAGS, tmp_path_factory.mktemp("probe"))
    return build_emulation(gxx, FLAGS)


@pytest.mark.parametrize("number", range(4), ids=["float32", "float64", "bfloat16", "float16"])
def test_kernels_give_the_exact_result(programme: Path, number: int) -> None:
    run_emulation(programme, number)
