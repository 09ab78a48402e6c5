"""Which backend runs, which cannot and why, and which instruction set."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from arguments import build, cast
from operator_tests import calls
from samples import named

import espkernels
from espkernels import backends

OPERATORS = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise")


def operators_run(operator: str) -> list[str]:
    arguments = cast(build(operator, named("width 17")[0]), torch.float32, requires_grad=False)
    with calls() as ran:
        getattr(espkernels, operator)(**arguments)
    return ran.names


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_library_is_built() -> None:
    # Without it every test here would pass on the reference and say nothing about the kernels.
    assert backends.why_not("cpu") is None


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_on_the_cpu_run_our_kernels(operator: str) -> None:
    for name in (None, "cpu"):
        with espkernels.use_backend(name):
            assert operators_run(operator) == [f"espkernels::{operator}"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_runs_torchs_operators_only(operator: str) -> None:
    with espkernels.use_backend("reference"):
        ran = operators_run(operator)
    assert ran
    assert not [name for name in ran if name.startswith("espkernels")]


def test_backends_nest_and_come_back_after_an_error() -> None:
    assert backends.current() is None
    with espkernels.use_backend("cpu"):
        with contextlib.suppress(KeyError), espkernels.use_backend("reference"):
            assert backends.current() == "reference"
            raise KeyError
        assert backends.current() == "cpu"
        with espkernels.use_backend(None):
            assert backends.current() is None
    assert backends.current() is None


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'fpga'.*cpu, cuda, triton, reference"), espkernels.use_backend("fpga"):
        pass
    with pytest.raises(ValueError, match="fpga"):
        backends.why_not("fpga")


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_that_cannot_run_says_why_and_raises_it(name: str) -> None:
    reason = backends.why_not(name)
    if reason is None:
        with espkernels.use_backend(name):
            assert backends.current() == name
    else:
        assert len(reason.split()) > 3
        with pytest.raises(RuntimeError) as raised, espkernels.use_backend(name):
            pass
        assert reason in str(raised.value)
        assert name in str(raised.value)
        assert backends.current() is None


def test_the_reference_always_runs() -> None:
    assert backends.why_not("reference") is None


def test_the_environment_names_a_backend() -> None:
    code = "from espkernels import backends; print(backends.current())"
    for value, expected in (("reference", "reference"), ("cpu", "cpu"), ("", "None")):
        result = in_a_new_process(code, ESPKERNELS_BACKEND=value)
        assert result.stdout.strip() == expected, result.stderr
    result = in_a_new_process(code, ESPKERNELS_BACKEND="abacus")
    assert result.returncode != 0
    assert "abacus" in result.stderr


def test_instruction_sets() -> None:
    assert backends.library is not None
    available = backends.library.available_isas()
    assert "baseline" in available
    assert backends.library.isa() in available
    before = backends.library.isa()
    with pytest.raises(ValueError, match=r"'sse9'.*baseline"):
        backends.library.set_isa("sse9")
    assert backends.library.isa() == before


def test_the_instruction_set_in_use_is_the_best_or_the_one_named() -> None:
    assert backends.library is not None
    available = backends.library.available_isas()
    code = "from espkernels import backends; print(backends.library.isa())"
    result = in_a_new_process(code, ESPKERNELS_ISA="")
    assert result.stdout.strip() == available[-1], result.stderr
    for name in available:
        result = in_a_new_process(code, ESPKERNELS_ISA=name)
        assert result.stdout.strip() == name, result.stderr


def test_a_library_that_does_not_load_leaves_the_reference() -> None:
    code = """
import sys
sys.modules["espkernels._C"] = None
import torch, espkernels
from espkernels import backends
arguments = torch.randn(1, 4, 5, 6), torch.randn(2, 4, 3, 3), (1, 2)
assert torch.equal(espkernels.spatial_pyramid(*arguments), espkernels.reference.spatial_pyramid(*arguments))
print(backends.why_not("cpu"))
"""
    result = in_a_new_process(code)
    assert "espkernels._C" in result.stdout, result.stderr


def test_tensors_elsewhere_are_refused_by_the_cpu_by_name() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), espkernels.use_backend("cpu"):
        x, weight = torch.empty(1, 4, 5, 6, device="cuda"), torch.empty(2, 4, 3, 3, device="cuda")
        with pytest.raises(RuntimeError, match=r"'cpu'.*cuda"):
            espkernels.spatial_pyramid(x, weight, (1, 2))
