"""The kernels without torch under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from torch_free_programme import build, compiler, kernel_flags, run

from espkernels import backends

MACHINE = platform.machine()

# -Og keeps the vector code and takes a third to a half less time to compile than -O1; -fno-sanitize-recover ends the
# programme at the first finding.
MEMORY = ["-Og", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-O1", "-g1", "-fsanitize=thread"]


def sanitizing_compiler(flags: list[str], folder: Path) -> str:
    """$CXX or g++, where it has the sanitizer's library and this machine lets the sanitizer run."""
    gxx = compiler(os.environ.get("CXX") or "g++")
    source = folder / "probe.cpp"
    source.write_text("int main() {}\n")
    probe = folder / "probe"
    built = subprocess.run([gxx, *flags, str(source), "-o", str(probe)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{gxx} cannot link {' '.join(flags)}: {built.stderr.strip().splitlines()[-1]}")
    ran = subprocess.run([str(probe)], capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"a programme with {' '.join(flags)} does not run here: {ran.stderr.strip()[:200]}")
    return gxx


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_memory_and_undefined_behaviour(name: str, tmp_path: Path) -> None:
    flags = kernel_flags(MACHINE).get(name)
    if flags is None:
        pytest.skip(f"{name} is no instruction set of {MACHINE}")
    if backends.library is None or name not in backends.library.available_isas():
        pytest.skip(f"this machine does not run {name}")
    gxx = sanitizing_compiler(MEMORY, tmp_path)
    run([str(build(f"memory-{name}", gxx, name, [*flags, *MEMORY])), "--huge"], splits=2)


def test_races(tmp_path: Path) -> None:
    # The units of work and how they share memory do not depend on the instruction set.
    gxx = sanitizing_compiler(RACES, tmp_path)
    run([str(build("races", gxx, "baseline", [*kernel_flags(MACHINE)["baseline"], *RACES]))], splits=1)
