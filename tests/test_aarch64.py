"""The kernels compiled for aarch64 with NEON, run under emulation: right results, nothing said about speed."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from tests.torch_free import ROOT, compile_programme, isa_flags, problems_checked

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests"),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs the aarch64 kernels themselves"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed (g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed (qemu-user)"),
]


@pytest.mark.slow
def test_kernels_under_emulation(tmp_path: Path) -> None:
    programme = compile_programme(COMPILER, ["-static", "-O2", *isa_flags("aarch64", "baseline")], "baseline", tmp_path)
    assert problems_checked([EMULATOR, str(programme)]) == 11 * 8 * 8
