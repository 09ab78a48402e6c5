"""The small cases of the CUDA operators under compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from samples import named
from test_cuda import REASON

HERE = Path(__file__).resolve().parent
TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(not Path(TOOL).exists(), reason="there is no compute-sanitizer here (it comes with CUDA)"),
]

# Edges of tiles, of the map and of groups; the tool slows a kernel down a hundredfold.
SAMPLES = named("width 17", "one pixel", "stride 2 odd", "channels 33")
OPERATORS = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise", "eesp")
UNITS = ("recomputed", "strided", "odd-channels", "eight-branches")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_cases(tool: str) -> None:
    names = [f"{operator}[{sample}]" for operator in OPERATORS for sample in SAMPLES]
    names += [f"eesp_training[{unit}]" for unit in UNITS]
    tests = [f"{HERE / 'test_cuda.py'}::test_{name}" for name in names]
    command = [TOOL, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "pytest", "-q", "-x", *tests]
    # Each tensor in an allocation of its own, so that what lies beyond it belongs to nobody.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, text=True, capture_output=True, timeout=240)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device or its driver here")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(tests)} passed" in done.stdout, done.stdout[-2000:]
