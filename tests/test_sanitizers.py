"""Every CPU kernel under the address and undefined-behaviour sanitizers, on buffers of exactly the right size."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import instruction_sets
from tests.torch_free import ROOT, compile_programme, isa_flags, problems_checked

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests")


@pytest.fixture(scope="module")
def sanitizer_runtime(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the compiler or its sanitizer libraries are missing."""
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip(f"no compiler {COMPILER!r} here")
    source = tmp_path_factory.mktemp("probe") / "empty.cpp"
    source.write_text("int main() {}\n")
    done = subprocess.run(
        [*COMPILER.split(), *SANITIZERS, source, "-o", source.with_suffix("")], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"{COMPILER} has no sanitizer libraries here: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in instruction_sets() if name != "reference"])
def test_kernels_under_sanitizers(name: str, sanitizer_runtime: None, tmp_path: Path) -> None:
    flags = [*SANITIZERS, *isa_flags(platform.machine(), name)]
    programme = compile_programme(COMPILER, flags, name, tmp_path)
    assert problems_checked([str(programme)]) == 11 * 8 * 8  # cases x (types x layouts) x comparisons of a case
