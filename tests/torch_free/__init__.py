"""Compiles the kernels of one instruction set with ``main.cpp`` into a programme without torch.

Sources and flags are those of ``setup.py``; only the optimisation and what a test adds differ.
"""

from __future__ import annotations

import functools
import runpy
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent


@functools.cache
def build_facts() -> dict[str, Any]:
    """The names in setup.py, without building anything."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def isa_flags(machine: str, isa: str) -> list[str]:
    flags: list[str] = build_facts()["INSTRUCTION_SETS"][machine][isa]
    return flags


def compile_programme(compiler: str, flags: Sequence[str], isa: str, folder: Path) -> Path:
    """The programme, in ``folder``; fails with the compiler's words. Two compilers run at a time."""
    facts = build_facts()
    common = [flag for flag in facts["FLAGS"] if flag not in ("-O3", "-fPIC")]
    command = [compiler, *common, "-Wno-psabi", *flags, f"-DESPK_ISA={isa}"]

    def compile_one(source: str) -> str:
        object_file = folder / (Path(source).stem + ".o")
        _run([*command, "-c", source, "-o", str(object_file)])
        return str(object_file)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*facts["KERNEL_SOURCES"], "tests/torch_free/main.cpp"]))
    programme = folder / "kernels"
    _run([compiler, *flags, *objects, "-o", str(programme)])
    return programme


def problems_checked(command: Sequence[str]) -> int:
    """Runs the programme; the number of problems it says it checked."""
    words = _run(command).split()
    assert words[1:] == ["problems", "checked"], words
    return int(words[0])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout
