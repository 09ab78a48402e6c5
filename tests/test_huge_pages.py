"""Large maps lie in memory that the system was asked to give in huge pages: the flags of their mappings say so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import espkernels
from espkernels import backends, ops

SMAPS = Path("/proc/self/smaps")
TOLD = Path("/sys/kernel/mm/transparent_hugepage").exists() and SMAPS.exists() and "VmFlags" in SMAPS.read_text()

pytestmark = [
    pytest.mark.skipif(backends.library is None, reason="the compiled library is not built"),
    pytest.mark.skipif(not TOLD, reason="the system has no transparent huge pages, or does not tell of them"),
]

IMAGES = torch.ones(3, 64, 256, 256)  # 48 MiB: more than allocators keep for themselves


def flags(address: int) -> list[str]:
    """Those of the mapping that holds an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


def pyramid(x: Tensor) -> Tensor:
    return ops.spatial_pyramid(x, torch.ones(1, 64, 3, 3), (1,))


@torch.no_grad()
def replayed(x: Tensor) -> Tensor:
    """A result that Python allocates; the recording made one image of it."""
    model = espkernels.freeze(espkernels.nn.EESP(64, 64).eval())
    model(x[:1])
    result: Tensor = model(x)
    (recorded,) = model.plans.values()
    assert recorded.plan is not None
    return result


@pytest.mark.parametrize("run", [pyramid, replayed])
def test_large_results_ask_for_huge_pages(run: Callable[[Tensor], Tensor]) -> None:
    result = run(IMAGES)
    assert result.nbytes == IMAGES.nbytes
    assert "hg" in flags(result.data_ptr() + result.nbytes // 2)
