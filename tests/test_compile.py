"""The operators under torch's compilers: opcheck, torch.compile without breaks or recompiles, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from arguments import Arguments, build, cast, gradient
from evaluation import evaluate
from operator_tests import DTYPES, LAYOUTS, each_layout
from samples import Sample, named
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import espkernels
from espkernels import backends

OPERATORS = ("spatial_pyramid", "group_pointwise", "pyramid_pointwise")

each_operator = pytest.mark.parametrize("operator", OPERATORS)
needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")


@pytest.fixture(autouse=True)
def fresh_compiler(threads: None) -> None:
    torch.set_num_threads(1)
    torch.compiler.reset()


# --- opcheck ----------------------------------------------------------------------------------------------------------


def raw_calls(sample: Sample, dtype: torch.dtype, layout: torch.memory_format) -> list[tuple[str, tuple[Any, ...]]]:
    """Every operator of the library with arguments from ``sample``."""
    unit = cast(build("pyramid_pointwise", sample), dtype, layout)
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("scale", "shift", "slope", "pyramid_scale", "pyramid_shift", "pyramid_slope"):
        unit[name] = unit[name].detach().to(vector_dtype).requires_grad_()
    options = (list(sample.dilations), sample.stride, sample.hff)

    def like(tensor: Tensor) -> Tensor:
        return gradient(tensor, sample).to(dtype).contiguous(memory_format=layout).requires_grad_()

    concatenated = like(torch.empty(sample.batch, sample.concatenated, *sample.output_size))
    output = like(unit["residual"])
    x, weight, pointwise = unit["x"], unit["weight"], unit["pointwise_weight"]
    epilogue = (unit["scale"], unit["shift"], unit["residual"], unit["slope"])
    inner = (unit["pyramid_scale"], unit["pyramid_shift"], unit["pyramid_slope"])
    plain = (None, None, None, None)
    return [
        ("spatial_pyramid", (x, weight, *options)),
        ("spatial_pyramid_backward_input", (concatenated, weight, *options, sample.height, sample.width)),
        ("spatial_pyramid_backward_weight", (concatenated, x, *options)),
        ("group_pointwise", (concatenated, pointwise, sample.groups, *epilogue)),
        ("group_pointwise", (concatenated, pointwise, sample.groups, *plain)),
        ("group_pointwise_backward_input", (output, pointwise, sample.groups)),
        ("group_pointwise_backward_weight", (output, concatenated, sample.groups)),
        ("pyramid_pointwise", (x, weight, options[0], pointwise, sample.groups, *inner, *epilogue, *options[1:])),
    ]


@needs_library
@pytest.mark.parametrize("sample", named("two by two", "stride 2 odd", "batch 0"), ids=str)
@each_layout
def test_opcheck(sample: Sample, layout: torch.memory_format) -> None:
    for name, arguments in raw_calls(sample, torch.float32, layout):
        torch.library.opcheck(getattr(torch.ops.espkernels, name).default, arguments)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_opcheck_dtypes(dtype: torch.dtype) -> None:
    # The types differ in the kernel only, so neither autograd nor its tracing again.
    checks = ("test_schema", "test_faketensor")
    for name, arguments in raw_calls(named("without hff")[0], dtype, torch.contiguous_format):
        torch.library.opcheck(getattr(torch.ops.espkernels, name).default, arguments, test_utils=checks)


@needs_library
@pytest.mark.parametrize("sample", named("one pixel", "one column", "width 17", "stride 2 odd", "one output"), ids=str)
@each_layout
def test_raw_fakes_promise_the_strides_of_the_kernels(sample: Sample, layout: torch.memory_format) -> None:
    for name, arguments in raw_calls(sample, torch.float32, layout):
        operator = getattr(torch.ops.espkernels, name).default
        real = operator(*arguments)
        meta = operator(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype), name


# --- torch.compile ----------------------------------------------------------------------------------------------------


def training_step(operator: str) -> Callable[..., Tensor]:
    """The operator between two others, so that the compiler has something to fuse and to lay out."""

    def step(x: Tensor, **others: Any) -> Tensor:
        return getattr(espkernels, operator)(x=x * 2, **others) + 1

    return step


def compare(operator: str, arguments: Arguments, compiled: Callable[..., Tensor]) -> None:
    step = training_step(operator)
    grad = torch.ones_like(step(**arguments))
    expected = evaluate(step, arguments, grad)
    actual = evaluate(compiled, arguments, grad)
    for value, tensor in expected.items():
        assert torch.equal(actual[value], tensor), value
        assert actual[value].stride() == tensor.stride() or 1 in tensor.shape or not tensor.numel(), value


@each_operator
@each_layout
def test_fullgraph(operator: str, layout: torch.memory_format) -> None:
    for sample in named("stride 2 odd", "channels 17"):
        compiled = torch.compile(training_step(operator), fullgraph=True, backend="aot_eager")
        compare(operator, cast(build(operator, sample), torch.float32, layout), compiled)
        torch.compiler.reset()


@each_operator
def test_inductor(operator: str) -> None:
    # The compiler that users have, which chooses layouts itself and checks the fakes' strides as it runs.
    compiled = torch.compile(training_step(operator), fullgraph=True)
    for layout in LAYOUTS.values():
        compare(operator, cast(build(operator, named("width 17")[0]), torch.float32, layout), compiled)


@each_operator
def test_dynamic_shapes_compile_once(operator: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step(operator), fullgraph=True, backend=counter, dynamic=True)
    for batch, height, width in ((2, 9, 11), (3, 12, 7), (5, 33, 18), (4, 6, 64)):
        sample = Sample("dynamic", batch=batch, height=height, width=width, stride=2)
        compare(operator, cast(build(operator, sample), torch.float32), compiled)
    assert counter.frame_count == 1


@each_operator
def test_a_second_size_makes_the_shapes_dynamic(operator: str) -> None:
    # Without being told: the second size compiles again, later ones do not.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step(operator), fullgraph=True, backend=counter)
    for height, width in ((9, 11), (12, 14), (33, 18), (6, 64), (21, 20)):
        arguments = cast(build(operator, Sample("sizes", height=height, width=width)), torch.float32)
        compare(operator, arguments, compiled)
    assert counter.frame_count == 2


@each_operator
def test_autocast_inside_a_compiled_function(operator: str) -> None:
    def step(**arguments: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result: Tensor = getattr(espkernels, operator)(**arguments)
            return result

    arguments = cast(build(operator, named("width 17")[0]), torch.float32)
    grad = torch.ones_like(step(**arguments))
    expected = evaluate(step, arguments, grad)
    actual = evaluate(torch.compile(step, fullgraph=True, backend="aot_eager"), arguments, grad)
    for value, tensor in expected.items():
        assert actual[value].dtype == tensor.dtype
        assert torch.equal(actual[value], tensor), value


# --- export -----------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """One operator with its weights as parameters."""

    def __init__(self, operator: str, arguments: Arguments) -> None:
        super().__init__()
        self.operator = operator
        self.options = {n: v for n, v in arguments.items() if not isinstance(v, Tensor)}
        self.tensors = torch.nn.ParameterDict(
            {n: v.detach() for n, v in arguments.items() if isinstance(v, Tensor) and n not in ("x", "residual")}
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(espkernels, self.operator)(x=x, **self.tensors, **self.options)
        return result


@needs_library
@each_operator
def test_export(operator: str) -> None:
    arguments = cast(build(operator, named("width 17")[0]), torch.float32)
    layer = Layer(operator, arguments)
    sizes = {axis: torch.export.Dim(name, min=2) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    x = torch.randn(2, arguments["x"].shape[1], 9, 11)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({**sizes},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert f"espkernels.{operator}.default" in targets, targets
    for shape in ((2, 9, 11), (3, 6, 20), (5, 31, 2)):
        x = torch.randn(shape[0], arguments["x"].shape[1], *shape[1:])
        assert torch.equal(exported.module()(x), layer(x))


@each_operator
def test_export_of_the_reference_has_torchs_operators_only(operator: str) -> None:
    # What other runtimes convert.
    arguments = cast(build(operator, named("width 17")[0]), torch.float32)
    with espkernels.use_backend("reference"):
        exported = torch.export.export(Layer(operator, arguments), (arguments["x"].detach(),))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "espkernels" in target]
