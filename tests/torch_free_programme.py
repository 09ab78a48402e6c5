"""Builds the programmes that run kernels without torch, from the sources and flags in setup.py."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

__all__ = ["build", "build_bfloat16_product", "build_emulation", "compiler", "kernel_flags", "run", "run_emulation"]
__all__ += ["setup_table"]

ROOT = Path(__file__).resolve().parents[1]

NINJA = """\
flags = {flags}

rule cxx
  command = {compiler} $flags -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule precompile
  command = {compiler} $flags -MD -MF $out.d -x c++-header -include $in /dev/null -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {flags} $in -o $out
"""

# Compiled without sanitizers: what it does to know the right results would take longer than the kernels.
MAIN = "tests/torch_free/main.cpp"

# What tells the tests what the kernels are compiled with.
SANITIZERS = {"-fsanitize=address,undefined": "-DSANITIZES_MEMORY", "-fsanitize=thread": "-DSANITIZES_THREADS"}


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
    all_flags = [*common_flags(), "-Wno-psabi", "-pthread", f"-DESPK_ISA={isa}", "-DESPK_FAR_BYTES=4096", *flags]
    return compile_programme(name, compiler, all_flags, [*table["KERNEL_SOURCES"], MAIN])


def build_bfloat16_product(compiler: str, isa: str, flags: list[str]) -> Path:
    """The programme that tries the product of bfloat16 pairs for instruction set ``isa``."""
    sources = [*setup_table()["BFLOAT16_SOURCES"], "tests/torch_free/bfloat16_product.cpp"]
    checks = ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-psabi", f"-DESPK_ISA={isa}"]
    return compile_programme(isa, compiler, [*common_flags(), *flags, *checks], sources)


def build_emulation(compiler: str, flags: list[str]) -> Path:
    """The programme that runs every CUDA kernel on the CPU, in build/torch_free/cuda."""
    emulation = ["-Itests/cuda_emulation", "-Wno-unknown-pragmas", "-DESPK_GRID_LIMIT=emulation::grid_limit"]
    emulation += ["-DESPK_ENOUGH_BLOCKS=emulation::enough_blocks"]
    sources = [*setup_table()["CUDA_SOURCES"], "tests/cuda_emulation/main.cpp"]
    return compile_programme("cuda", compiler, [*common_flags(), *emulation, *flags], sources)


def common_flags() -> list[str]:
    left_out = ("-fPIC", "-fvisibility=hidden")
    return [*(flag for flag in setup_table()["FLAGS"] if flag not in left_out), "-Itests/torch_free"]


def compile_programme(name: str, compiler: str, flags: list[str], sources: list[str]) -> Path:
    folder = ROOT / "build" / "torch_free" / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*flags, *(SANITIZERS[flag] for flag in flags if flag in SANITIZERS)]
    own_flags = " ".join([*(flag for flag in flags if "sanitize" not in flag and not flag.startswith("-O")), "-O2"])
    text = NINJA.format(compiler=compiler, flags=" ".join(flags))
    here, objects, header = folder.relative_to(ROOT), [], setup_table()["PRECOMPILED"]
    text += f"build {here}/{header}.gch: precompile csrc/{header}\n"
    for source in sources:
        objects.append(str(here / Path(source).with_suffix(".o").as_posix().replace("/", "_")))
        if source in setup_table()["KERNEL_SOURCES"]:
            text += f"build {objects[-1]}: cxx {source} | {here}/{header}.gch\n"
            text += f"  flags = -iquote {here} -include {header} $flags\n"
        else:
            text += f"build {objects[-1]}: cxx {source}\n"
        if source == MAIN:
            text += f"  flags = {own_flags}\n"
    programme = folder / "main"
    text += f"build {here}/main: link {' '.join(objects)}\n"
    ninja_file = folder / "build.ninja"
    # builddir holds ninja's log of what is up to date: one each, so that builds do not mix.
    ninja_file.write_text(f"builddir = {here}\n{text}")
    ninja: str = setup_table()["ninja_program"]()
    result = subprocess.run([ninja, "-f", str(ninja_file), "-j", "2"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return programme


def run(command: list[str], splits: int = 3) -> None:
    """Runs the programme, which prints what fails and how much it checked; none may be left out.

    ``splits`` are the ways in which it cuts the work of a kernel (kSplits in tests/torch_free/check.h).
    """
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    cases = cases_text().count('{"')
    # Six kernels, group_pointwise with six epilogues and transposed, the unit with two; of inference the pyramid with
    # its epilogue, the unit in place, two convolutions, three poolings, the global average, an affine, a change of
    # layout, a concatenation and class maps of both types; of the decoder a mean, a resizing, a depthwise and a grouped
    # convolution and a pyramid pooling; splits, types x layouts. In one layout two kernels take a shortcut, and a unit
    # reduces its rows. Training: twenty-one results with seven pairs or triples of sums, in one layout, and not for an
    # empty batch. Five recurrent layers with four results and three.
    expected = 5 * 7 * splits * 4 + cases * ((13 + 13 + 5) * splits * 8 + 3 * splits * 4)
    expected += (cases - 1) * (21 * splits + 3 * 2 + 4 * 3) * 4
    huge = 8 - result.stdout.count("SKIP") if "--huge" in command else 0
    assert result.stdout.split()[-4:] == [str(expected + huge), "checks,", "0", "failures"], result.stdout
    assert cases > 20


def run_emulation(programme: Path, number: int) -> None:
    """Runs the emulation for element type ``number`` (tests/cuda_emulation/main.cpp); no check may be left out."""
    result = subprocess.run([str(programme), str(number)], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    # One large case is the CPU's. Six kernels, group_pointwise with six epilogues and transposed, the unit with two,
    # the whole unit; a strided case is a down-sampler too, with an image and without. Two layouts; three settings, by
    # turns for two of the types.
    cases, strided = cases_text().count('{"') - 1, len(re.findall(r"\}, 2, (?:true|false)", cases_text()))
    assert cases > 20 and strided > 3
    # Of training a whole unit each, in one layout.
    units = (ROOT / "tests" / "cuda_emulation" / "training.h").read_text().split("kUnits[] = {")[1].split("\n};")[0]
    expected = ((cases * 14 + strided * 2) * 2 + units.count('{{"')) * (1 if number in (1, 3) else 3)
    assert result.stdout.split()[-4:] == [str(expected), "checks,", "0", "failures"], result.stdout


def cases_text() -> str:
    """The table of cases that all programmes share."""
    return (ROOT / "tests" / "torch_free" / "cases.h").read_text().split("kCases[] = {")[1].split("\n};")[0]


def compiler(name: str) -> str:
    """The path of a compiler; skips the test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path
