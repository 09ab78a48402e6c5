"""The kernels compile for aarch64 and give the right numbers there, under an emulator."""

from __future__ import annotations

import platform

import pytest
from torch_free_programme import build, compiler, kernel_flags, run

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user


def test_aarch64() -> None:
    if platform.machine() == "aarch64":
        pytest.skip("this is an aarch64 machine: every other test runs the kernels")
    gxx, emulator = compiler("aarch64-linux-gnu-g++"), compiler("qemu-aarch64")
    flags = [*kernel_flags("aarch64")["baseline"], "-O2", "-static", "-DEMULATED"]
    run([emulator, str(build("aarch64", gxx, "baseline", flags))], splits=1)
