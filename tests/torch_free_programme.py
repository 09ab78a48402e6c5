"""Builds the programme of ``torch_free/`` from the kernel sources and flags in setup.py, for any compiler and flags."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

__all__ = ["build", "compiler", "kernel_flags", "run"]

ROOT = Path(__file__).resolve().parents[1]

NINJA = """\
rule cxx
  command = {compiler} {flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {flags} $in -o $out
"""


@cache
def setup_table() -> dict[str, Any]:
    """The names that setup.py defines, without what it does."""
    script = ROOT / "setup.py"
    if not (script.exists() and (ROOT / "csrc").exists()):
        pytest.skip("the sources are not beside the tests")
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(script))


def kernel_flags(architecture: str) -> dict[str, list[str]]:
    """The compiler's flags for each instruction set of ``architecture``."""
    sets: dict[str, list[str]] = setup_table()["INSTRUCTION_SETS"][architecture]
    return sets


def build(name: str, compiler: str, isa: str, flags: list[str]) -> Path:
    """The programme for instruction set ``isa``, in build/torch_free/``name``; only what changed is compiled again."""
    table = setup_table()
    folder = ROOT / "build" / "torch_free" / name
    folder.mkdir(parents=True, exist_ok=True)
    common = [flag for flag in table["FLAGS"] if flag not in ("-O3", "-fPIC", "-fvisibility=hidden")]
    all_flags = [*common, "-Itests/torch_free", "-Wno-psabi", "-pthread", f"-DESPK_ISA={isa}", *flags]
    text = NINJA.format(compiler=compiler, flags=" ".join(all_flags))
    objects = []
    for source in [*table["KERNEL_SOURCES"], "tests/torch_free/main.cpp"]:
        objects.append(str((folder / Path(source).stem).relative_to(ROOT)) + ".o")
        text += f"build {objects[-1]}: cxx {source}\n"
    programme = folder / "main"
    text += f"build {programme.relative_to(ROOT)}: link {' '.join(objects)}\n"
    ninja_file = folder / "build.ninja"
    # builddir holds ninja's log of what is up to date: one each, so that builds do not mix.
    ninja_file.write_text(f"builddir = {folder.relative_to(ROOT)}\n{text}")
    ninja: str = table["ninja_program"]()
    result = subprocess.run([ninja, "-f", str(ninja_file), "-j", "2"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return programme


def run(command: list[str]) -> None:
    """Runs the programme, which prints what fails and how much it checked; none may be left out."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    cases = (
        (ROOT / "tests" / "torch_free" / "main.cpp").read_text().split("kCases[] = {")[1].split("\n};")[0].count('{"')
    )
    # Six kernels, group_pointwise with six epilogues and transposed, the unit with two; of inference the pyramid with
    # its epilogue, the unit in place, two convolutions, three poolings and the global average; three splits, types x
    # layouts.
    expected = cases * (13 + 8) * 3 * 8
    huge = 8 - result.stdout.count("SKIP") if "--huge" in command else 0
    assert result.stdout.split()[-4:] == [str(expected + huge), "checks,", "0", "failures"], result.stdout
    assert cases > 20


def compiler(name: str) -> str:
    """The path of a compiler; skips the test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path
