"""Every CUDA kernel, run on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer: see cuda_emulation/."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from test_sanitizers import MEMORY, sanitizing_compiler
from torch_free_programme import build_emulation, run_emulation

TYPES = ["float32", "float64", "bfloat16", "float16", "tf32"]  # in the order of espk::Type, and a way of float32

# -ffp-contract=off: the whole numbers are exact either way, and the compiler has less to think about.
FLAGS = [*MEMORY, "-ffp-contract=off"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Future[None]]:
    """One run an element type, two at a time."""
    gxx = sanitizing_compiler(FLAGS, tmp_path_factory.mktemp("probe"))
    programme = build_emulation(gxx, FLAGS)
    with ThreadPoolExecutor(2) as pool:
        return [pool.submit(run_emulation, programme, number) for number in range(len(TYPES))]


@pytest.mark.parametrize("number", range(len(TYPES)), ids=TYPES)
def test_kernels_give_the_exact_result(runs: list[Future[None]], number: int) -> None:
    runs[number].result()
