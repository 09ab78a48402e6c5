"""The machine's multiply-add peak: what the floor of a network is counted against.

:mod:`espkernels.probe` multiplies matrices in torch, which is what a library reaches, and on some machines well below
what the registers can do; a floor from it would flatter us. So a few lines of C++ keep every multiply-add unit busy
without touching memory. Without a compiler the matrix product has to do, and ``source`` says so.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from espkernels import backends
from espkernels.probe import probe

__all__ = ["Peak", "peak"]

SOURCE = Path(__file__).with_suffix(".cpp")

# What widens a vector and joins multiply and add, for each instruction set that the library names.
AVX512 = ["-mavx512f"]
FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512_bf16": AVX512, "amx": AVX512}


@dataclass(frozen=True)
class Peak:
    """FLOP/s in float32 with ``threads`` threads (two a multiply-add), how it was found, and torch.mm's beside it."""

    threads: int
    flops: float
    source: str
    matrix_product: float


@functools.cache
def peak(threads: int) -> Peak:
    """The peak with ``threads`` threads; seconds, once a process."""
    product = probe(threads).flops
    measured = _measure(threads)
    if measured is None:
        return Peak(threads, product, "torch.mm: no C++ compiler for the loop of multiply-adds", product)
    if measured < product:
        return Peak(threads, product, "torch.mm: faster than the loop of multiply-adds", product)
    return Peak(threads, measured, "a loop of multiply-adds in registers", product)


def _newest() -> str:
    """The newest instruction set of the library that this machine runs."""
    return "baseline" if backends.library is None else str(backends.library.available_isas()[-1])


def _measure(threads: int) -> float | None:
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/fma_peak"
        command = [*compiler.split(), "-std=c++17", "-O2", "-ffp-contract=fast", "-pthread", *FLAGS[_newest()]]
        try:
            subprocess.run([*command, str(SOURCE), "-o", binary], capture_output=True, check=True)
            done = subprocess.run([binary, str(threads)], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    return float(done.stdout)
