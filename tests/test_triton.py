"""Runs the tests of the Triton kernels in Triton's interpreter, in a pytest of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from espkernels import backends

HERE = Path(__file__).resolve().parent
FILES = sorted(
    path.name
    for path in HERE.glob("test_triton_*.py")
    if path.name not in ("test_triton_compiles.py", "test_triton_configuration.py")
)

Run = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Run]]:
    """A pytest for each file, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(interpreted, file) for file in FILES}


def interpreted(file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", str(HERE / file)]
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "ESPKERNELS_BACKEND": "", "PYTEST_ADDOPTS": "",
        # Two of them share the machine, and NumPy's products are tiny.
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(command, cwd=HERE.parent, env=environment, text=True, capture_output=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
@pytest.mark.skipif(backends.interprets(), reason="this is that pytest")
@pytest.mark.skipif(backends.library is None, reason="the compiled library, which holds the schemas, is not built")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, runs: dict[str, Run]) -> None:
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
