"""Which backend runs, which cannot and why, and which instruction set."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from arguments import build, cast
from evaluation import answers
from operator_tests import calls
from samples import named

import espkernels
from espkernels import backends, gpu

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


@pytest.mark.parametrize("names", [*itertools.product(["reference", "cpu", None], repeat=3)], ids=str)
def test_blocks_of_several_threads_end_in_any_order(names: tuple[str | None, ...]) -> None:
    for order in itertools.permutations(range(3)):
        blocks = [espkernels.use_backend(name) for name in names]
        for block in blocks:
            block.__enter__()
        entered = list(range(3))
        for ends in order:
            assert backends.current() == names[entered[-1]]
            blocks[ends].__exit__(None, None, None)
            entered.remove(ends)
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
    for name in available:
        backends.library.set_isa(name)
        assert backends.library.multiplies_bfloat16() == (name in ("avx512_bf16", "amx"))
    backends.library.set_isa(before)
    with pytest.raises(ValueError, match=r"'sse9'.*baseline"):
        backends.library.set_isa("sse9")
    assert backends.library.isa() == before


def test_the_instruction_set_in_use_is_the_best_or_the_one_named() -> None:
    assert backends.library is not None
    available = backends.library.available_isas()
    code = "from espkernels import backends; print(backends.library.isa())"
    result = in_a_new_process(code, ESPKERNELS_ISA="")
    assert result.stdout.strip() in (available[-1], "avx512"), result.stderr
    assert result.stdout.strip() == available[-1] or available[-1] == "avx512_bf16"  # slower on some machines
    for name in available:
        result = in_a_new_process(code, ESPKERNELS_ISA=name)
        assert result.stdout.strip() == name, result.stderr


def test_a_library_that_does_not_load_leaves_the_reference() -> None:
    code = """
import sys
import textwrap
sys.modules["espkernels._C"] = None
import torch, espkernels
from espkernels import backends
arguments = torch.randn(1, 4, 5, 6), torch.randn(2, 4, 3, 3), (1, 2)
assert torch.equal(espkernels.spatial_pyramid(*arguments), espkernels.reference.spatial_pyramid(*arguments))
network, x = espkernels.models.espnetv2_segmentation(0.5, 5).eval(), torch.randn(1, 3, 32, 32)
with torch.no_grad():
    frozen = espkernels.freeze(network)
    assert torch.allclose(frozen(x), network(x), atol=1e-4 * network(x).abs().max().item())
    assert torch.equal(frozen.classes(x).long(), frozen(x).argmax(1))
try:
    espkernels.freeze(network, tune=x)
except ValueError as error:
    assert "does not load" in str(error), error
else:
    raise AssertionError("tuned without kernels")
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


def test_nothing_of_tritons_is_imported_before_a_gpu_asks() -> None:
    code = """
import sys, torch, espkernels
espkernels.spatial_pyramid(torch.randn(1, 4, 5, 6), torch.randn(2, 4, 3, 3), (1, 2))
print([name for name in sys.modules if name.startswith("espkernels.triton") or name == "triton"])
"""
    result = in_a_new_process(code, TRITON_INTERPRET="")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
def test_the_interpreter_takes_tensors_on_the_cpu_inside_use_backend_only() -> None:
    code = """
import torch, espkernels
from espkernels import backends
assert backends.why_not("triton") is None
arguments = torch.ones(1, 2, 5, 6), torch.ones(2, 2, 3, 3), (1, 2)
def ran():
    import sys
    espkernels.spatial_pyramid(*arguments)
    return "espkernels.triton" in sys.modules
assert not ran()
with espkernels.use_backend("triton"):
    with espkernels.use_backend("cpu"):
        assert not ran()
    assert ran()
print("right")
"""
    result = in_a_new_process(code, TRITON_INTERPRET="1")
    assert result.stdout.strip() == "right", result.stderr


def on_a_gpu(code: str) -> str:
    """Fake tensors on a GPU, for which the library is told that there is a backend."""
    result = in_a_new_process("import torch, espkernels\nfrom espkernels import backends, gpu\n" + code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_first_backend_that_can_serves_a_gpu() -> None:
    asked = """
for default in ("cuda", "triton", "reference"):
    backends._gpu_default = default
    print(backends.gpu_backend("spatial_pyramid"), backends.runs_reference(torch.device("cuda")))
"""
    # No CUDA library is loaded here, so its operators are missing and the next in order serves.
    next_best = "reference" if backends._missing("triton") else "triton"
    assert on_a_gpu(asked).splitlines() == [f"{next_best} False", "triton False", "reference True"]


@pytest.mark.parametrize("name", ["ESPKERNELS_ISA", "ESPKERNELS_BACKEND"])
def test_what_the_environment_misspells_is_said(name: str) -> None:
    result = in_a_new_process("import espkernels", **{name: "foo"})
    assert f"{name} is 'foo', expected one of" in result.stderr or f"{name}: backend: got 'foo'" in result.stderr


def test_a_schema_alone_is_no_kernel() -> None:
    library = torch.library.Library("espkernels_test", "DEF")
    for name in ("named", "written"):
        library.define(f"{name}(Tensor x) -> Tensor")
    library.impl("written", torch.clone, "CUDA")
    assert backends.kernels_for("CUDA", "espkernels_test") == {"written"}
    # As the CUDA C++ library has every schema, and kernels of the operators and whole units alone.
    assert {"spatial_pyramid", "resize"} <= backends.kernels_for("CPU", "espkernels")


def test_layers_train_whole_where_a_kernel_does() -> None:
    asked = """
for default in ("triton", "reference"):
    backends._gpu_default = default
    print([backends.trains_whole("eesp_training", torch.device(name)) for name in ("cuda", "cpu", "meta")])
with espkernels.use_backend("cpu"):
    print(backends.trains_whole("eesp_training", torch.device("cuda")))
"""
    assert on_a_gpu(asked).splitlines() == ["[True, True, False]", "[False, True, False]", "False"]


def test_an_operator_without_a_reference_says_so() -> None:
    with pytest.raises(RuntimeError, match="espkernels::eesp_training has no reference"):
        gpu._reference("eesp_training")


def test_a_gpu_is_not_served_by_the_cpu_by_name() -> None:
    with espkernels.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu'.*GPU"):
        backends.gpu_backend("spatial_pyramid")


@pytest.mark.parametrize("operator", ["spatial_pyramid", "group_pointwise"])
def test_gradients_of_the_reference_are_those_of_autograd(operator: str) -> None:
    # They serve a GPU without kernels; here they are compared on the CPU.
    from espkernels import reference, reference_gradients

    for sample in named("width 17", "stride 2 odd", "without hff", "branches 3"):
        problem = answers(operator, sample)
        a, grad = problem.arguments, problem.gradient
        x, weight = a["x"].detach().requires_grad_(), a["weight"].detach().requires_grad_()
        if operator == "spatial_pyramid":
            options = (a["dilations"], a["stride"], a["hff"])
            output = reference.spatial_pyramid(x, weight, *options)
            sizes: tuple[int, ...] = tuple(x.shape[2:])
        else:
            options, sizes = (a["groups"],), ()
            output = reference.group_pointwise(x, weight, *options)
        expected = torch.autograd.grad(output, [x, weight], grad)
        backward_input = getattr(reference_gradients, f"{operator}_backward_input")
        backward_weight = getattr(reference_gradients, f"{operator}_backward_weight")
        with torch.no_grad():
            assert torch.equal(backward_input(grad, weight, *options, *sizes), expected[0])
            assert torch.equal(backward_weight(grad, x, *options), expected[1])


def test_tf32_is_what_torch_allows_in_each_of_its_ways() -> None:
    code = """
        from espkernels.precision import allows_tf32
        matmul = torch.backends.cuda.matmul
        said = [allows_tf32()]
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            said.append(allows_tf32())
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            said.append(allows_tf32())
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            said.append(allows_tf32())
        print(said)
    """
    assert in_a_new_process("import torch, espkernels\n" + textwrap.dedent(code)).stdout.split("\n")[0] == str(
        [False, True, False, True, False, True, False]
    )
