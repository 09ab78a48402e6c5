"""What every test shares: instruction sets, poisoned memory, hypothesis without deadlines or luck."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from espkernels import backends

# The same examples each run: a failure is then a change in the code. Slow builds and shared machines have no deadline.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("fixed")


# Files that take minutes, the longest first.
LONG = [
    "test_sanitizers.py", "test_aarch64.py", "test_triton.py", "test_text.py", "test_cuda_emulation.py",
    "test_recipes.py", "test_objects.py", "test_frozen_files.py", "test_cuda_compile.py", "test_label_maps.py",
    "test_bench_training.py",
    "test_paper.py", "test_triton_compiles.py", "test_training.py", "test_peers.py", "test_coco.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files begin first where two processes share them, so that neither waits at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


# One set of kernels, alone and with each way to multiply bfloat16; test_bfloat16_product.py tries what they differ in.
AVX512 = ("avx512", "avx512_bf16", "amx")


def instruction_sets() -> list[str]:
    """Every set of kernels that the library holds and this machine runs; the reference where there is no library."""
    if backends.library is None:
        return ["reference"]
    available = list(backends.library.available_isas())
    return [name for name in available if name not in AVX512[:-1] or name == available[-1]]


@pytest.fixture(scope="session", params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set, the kernels switched to it."""
    if backends.library is None:
        yield request.param
        return
    before = backends.library.isa()
    backends.library.set_isa(request.param)
    assert backends.library.isa() == request.param
    yield request.param
    backends.library.set_isa(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills every freshly allocated tensor with NaN, so that a value never written cannot pass for a right one."""
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    settings.fill_uninitialized_memory = fill


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def same_each_time(threads: None) -> Iterator[None]:
    """The same random numbers for every run of a test, on one thread, since the maps are tiny."""
    torch.set_num_threads(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[str]]:
    """Gives a list in which each call of a module's function puts its name from now on."""

    def watch(module: Any, name: str) -> list[str]:
        calls: list[str] = []
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or original(*a, **k))
        return calls

    return watch


@pytest.fixture
def fused_calls(calls_of: Callable[[Any, str], list[str]]) -> list[str]:
    """A word for each call of a whole unit in training: a unit that ran layer by layer would prove nothing about it."""
    from espkernels import fused_unit

    return calls_of(fused_unit, "eesp_training")
