"""The tests that every operator passes; each operator's own file derives from them and adds its closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from arguments import VECTORS, Arguments, build, cast, gradient
from closeness import assert_exact, assert_within_rounding, keep_from_kinks, terms
from evaluation import Answers, answers, evaluate
from samples import SAMPLES, SMALL, Sample, named
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from views import MAP_VIEWS, expanded, interleaved, transposed

import espkernels
from espkernels import backends, reference

__all__ = ["DTYPES", "LAYOUTS", "OperatorTests", "calls"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
each_view = pytest.mark.parametrize("view", MAP_VIEWS.values(), ids=[name.replace(" ", "-") for name in MAP_VIEWS])
each_small = pytest.mark.parametrize("sample", SMALL, ids=str)


class calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def require_gradients(arguments: Arguments) -> Arguments:
    """The same arguments, each tensor a leaf that requires a gradient, in the strides it has."""
    return {n: v.detach().requires_grad_() if isinstance(v, Tensor) else v for n, v in arguments.items()}


@st.composite
def any_sample(draw: st.DrawFn) -> Sample:
    """Problems of any shape, small enough to run in milliseconds."""
    k = draw(st.integers(1, 8))
    channels = draw(st.integers(1, 40))
    groups = draw(st.sampled_from([g for g in range(1, k * channels + 1) if k * channels % g == 0]))
    return Sample(
        name=f"drawn {draw(st.integers(0, 2**16))}",
        batch=draw(st.integers(0, 3)),
        channels=channels,
        height=draw(st.integers(1, 24)),
        width=draw(st.integers(1, 40)),
        dilations=tuple(draw(st.lists(st.integers(1, 12), min_size=k, max_size=k))),
        stride=draw(st.integers(1, 4)),
        hff=draw(st.booleans()),
        groups=groups,
        outputs=groups * draw(st.integers(1, max(1, 64 // groups))),
    )


@pytest.mark.usefixtures("poison")
class OperatorTests:
    """Set ``name``, ``optional`` (arguments that may be None) and ``maps`` (arguments in the layout of a map)."""

    name: str
    optional: tuple[str, ...] = ()
    maps: tuple[str, ...] = ("x",)

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(espkernels, self.name)
        return function

    @property
    def reference(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(reference, self.name)
        return function

    @pytest.fixture(autouse=True)
    def one_thread(self, threads: None) -> None:
        """Small problems gain nothing from threads, and the reference loses much; test_threads.py has the others."""
        torch.set_num_threads(1)

    def check_exact(self, arguments: Arguments, grad: Tensor) -> None:
        """Forward and every gradient of integer ``arguments`` equal the reference in float64."""
        expected = Answers(self.name, cast(arguments, torch.float64), grad.double()).values
        for value, actual in evaluate(self.function, arguments, grad).items():
            if self.is_exact(value, grad.dtype):
                assert_exact(value, actual, expected[value])

    @each_sample
    @each_layout
    def test_exact_on_integers(self, isa: str, sample: Sample, layout: torch.memory_format) -> None:
        problem = answers(self.name, sample)
        for dtype in DTYPES.values():
            arguments = cast(problem.arguments, dtype, layout)
            grad = problem.gradient.to(dtype).contiguous(memory_format=layout)
            values = evaluate(self.function, arguments, grad)
            assert set(values) == set(problem.values)
            for value, actual in values.items():
                assert actual.dtype == dtype, value
                if not self.is_exact(value, dtype):
                    continue
                assert_exact(f"{value} in {dtype}", actual, problem.values[value])

    @each_sample
    def test_error_bound_on_reals(self, isa: str, sample: Sample) -> None:
        for dtype in DTYPES.values():
            problem = answers(self.name, sample, "halves" if dtype.itemsize == 2 else "reals")
            # The layouts by turns: the paths are those of the integer tests, here only the rounding is in question.
            layout = list(LAYOUTS.values())[(len(str(sample)) + list(DTYPES.values()).index(dtype)) % 2]
            arguments = cast(problem.arguments, dtype, layout)
            grad = problem.gradient.to(dtype).contiguous(memory_format=layout)
            for value, actual in evaluate(self.function, arguments, grad).items():
                assert_within_rounding(
                    f"{value} in {dtype}",
                    actual,
                    problem.values[value],
                    problem.magnitudes[value],
                    terms(self.name, arguments, value, problem.gradient),
                    self.stores(value, dtype),
                )

    def stores(self, value: str, dtype: torch.dtype) -> int:
        """How many tensors of the stored type ``value`` passes through, itself included."""
        return 1

    def is_exact(self, value: str, dtype: torch.dtype) -> bool:
        """Whether integers give exact answers: a half type does not hold all of those that are stored on the way."""
        return dtype.itemsize > 2 or self.stores(value, dtype) == 1

    def test_exact_on_any_shape(self) -> None:
        dtypes, layouts = st.sampled_from(list(DTYPES.values())), st.sampled_from(list(LAYOUTS.values()))

        # Inside, so that each operator has its own: hypothesis keeps one record a function.
        @hypothesis.given(sample=any_sample(), dtype=dtypes, layout=layouts)
        def check(sample: Sample, dtype: torch.dtype, layout: torch.memory_format) -> None:
            arguments = cast(build(self.name, sample), dtype, layout)
            grad = gradient(self.function(**arguments), sample).to(dtype)
            self.check_exact(arguments, grad)

        check()

    @each_small
    @each_view
    def test_views(self, sample: Sample, view: Callable[[Tensor], Tensor]) -> None:
        problem = answers(self.name, sample)
        for dtype in (torch.float32, torch.bfloat16):
            for viewed in (*self.maps, "grad"):
                arguments = cast(problem.arguments, dtype, requires_grad=False)
                grad = problem.gradient.to(dtype)
                if viewed == "grad":
                    grad = view(grad)
                else:
                    arguments[viewed] = view(arguments[viewed])
                self.check_exact(require_gradients(arguments), grad)

    @each_small
    def test_strided_weights_and_vectors(self, sample: Sample) -> None:
        problem = answers(self.name, sample)
        for view in (interleaved, transposed, expanded):
            arguments = cast(problem.arguments, torch.float32, requires_grad=False)
            for name, value in arguments.items():
                if isinstance(value, Tensor) and name not in self.maps:
                    arguments[name] = view(value)
            self.check_exact(require_gradients(arguments), problem.gradient.float())

    @each_small
    def test_mixed_layouts(self, sample: Sample) -> None:
        problem = answers(self.name, sample)
        formats = list(LAYOUTS.values())
        for turn in range(4):
            arguments = cast(problem.arguments, torch.float32, requires_grad=False)
            for position, name in enumerate(self.maps):
                arguments[name] = arguments[name].contiguous(memory_format=formats[(turn + position) % 2])
            grad = problem.gradient.float().contiguous(memory_format=formats[turn // 2])
            for value, actual in evaluate(self.function, require_gradients(arguments), grad).items():
                assert_exact(value, actual, problem.values[value])

    @each_small
    def test_sum_backward(self, sample: Sample) -> None:
        # The gradient of a sum is one number, expanded.
        arguments = cast(build(self.name, sample), torch.float32)
        output = self.function(**arguments)
        self.check_exact(arguments, torch.ones((), dtype=output.dtype).expand(output.shape))

    @each_layout
    def test_output_follows_the_layout_of_x(self, layout: torch.memory_format) -> None:
        for sample in SAMPLES:
            arguments = cast(build(self.name, sample), torch.float32, layout, requires_grad=False)
            output = self.function(**arguments)
            x = arguments["x"]
            ambiguous = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            expected = torch.contiguous_format if ambiguous else layout
            assert output.is_contiguous(memory_format=expected), sample

    @each_sample
    @each_layout
    def test_fake_strides(self, sample: Sample, layout: torch.memory_format) -> None:
        arguments = cast(build(self.name, sample), torch.float32, layout)
        self.check_fakes(arguments, sample)

    @each_small
    @each_view
    def test_fake_strides_of_views(self, sample: Sample, view: Callable[[Tensor], Tensor]) -> None:
        for viewed in self.maps:
            arguments = cast(build(self.name, sample), torch.float32, requires_grad=False)
            arguments[viewed] = view(arguments[viewed])
            self.check_fakes(require_gradients(arguments), sample)

    def check_fakes(self, arguments: Arguments, sample: Sample) -> None:
        """What the fake tensors promise, forward and backward, is what the kernels return."""
        grad = torch.ones(self.function(**arguments).shape)
        real = evaluate(self.function, arguments, grad)
        mode = FakeTensorMode()
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        with mode:
            promised = evaluate(self.function, fakes, mode.from_tensor(grad))
        for value, tensor in real.items():
            fake = promised[value]
            assert (fake.shape, fake.dtype) == (tensor.shape, tensor.dtype), value
            # Torch's own operators make these; their fakes are free where a dimension has one element.
            free = value in (*VECTORS, "residual")
            for dim, size in enumerate(tensor.shape):
                if size > 1 or not free:
                    strides = f"{value}: fake strides {fake.stride()}, real {tensor.stride()}"
                    assert fake.stride(dim) == tensor.stride(dim), strides

    @each_small
    def test_weight_gradients_have_the_strides_of_the_weight(self, sample: Sample) -> None:
        for layout in LAYOUTS.values():
            arguments = cast(build(self.name, sample), torch.float32, layout)
            values = evaluate(self.function, arguments, torch.ones(self.function(**arguments).shape))
            for name, value in arguments.items():
                if isinstance(value, Tensor) and name not in self.maps:
                    assert values[name].stride() == value.stride(), name

    @each_small
    def test_meta(self, sample: Sample) -> None:
        arguments = cast(build(self.name, sample), torch.float32, requires_grad=False)
        real = self.function(**arguments)
        meta = self.function(**{n: v.to("meta") if isinstance(v, Tensor) else v for n, v in arguments.items()})
        assert meta.device.type == "meta"
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)

    @each_small
    @each_dtype
    def test_training_and_inference_agree(self, sample: Sample, dtype: torch.dtype) -> None:
        doubles = build(self.name, sample, integers=False)
        training = self.function(**cast(doubles, dtype))
        inference = self.function(**cast(doubles, dtype, requires_grad=False))
        assert torch.equal(training, inference)
        with torch.no_grad():
            assert torch.equal(self.function(**cast(doubles, dtype)), inference)

    def test_float32_vectors_beside_half_maps(self, isa: str) -> None:
        for sample in named("width 17", "channels 17"):
            problem = answers(self.name, sample)
            for dtype in (torch.bfloat16, torch.float16):
                arguments = cast(problem.arguments, dtype, vector_dtype=torch.float32)
                for value, actual in evaluate(self.function, arguments, problem.gradient.to(dtype)).items():
                    assert actual.dtype == (arguments[value] if value in arguments else arguments["x"]).dtype
                    if self.is_exact(value, dtype):
                        assert_exact(f"{value} in {dtype}", actual, problem.values[value])

    @each_layout
    def test_optional_arguments(self, isa: str, layout: torch.memory_format) -> None:
        # One at a time, and all but one.
        for sample in named("width 17", "stride 2 odd", "outputs 17 a group"):
            problem = answers(self.name, sample)
            for name in self.optional:
                for left_out in ([n for n in self.optional if n != name], [name]):
                    arguments = cast(problem.arguments, torch.float32, layout) | dict.fromkeys(left_out)
                    self.check_exact(arguments, problem.gradient.float())

    @each_layout
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
    @each_dtype
    def test_a_bad_pixel_reaches_only_what_it_should(
        self, isa: str, value: float, dtype: torch.dtype, layout: torch.memory_format
    ) -> None:
        # Weights without zeros: zero times infinity is NaN where it is computed and nothing where it is skipped.
        for sample in named("width 17", "stride 2 odd", "channels 17", "branches 5", "outputs 17 a group"):
            doubles = build(self.name, sample, integers=False)
            arguments = cast(doubles, dtype, layout)
            with torch.no_grad():
                arguments["x"][0, -1, sample.output_size[0] // 2, sample.output_size[1] - 1] = value
            expected = self.reference(**cast(arguments, torch.float64))
            output = self.function(**arguments)
            assert torch.equal(output.isfinite(), expected.isfinite())
            assert torch.equal(output.isnan(), expected.isnan())
            grad = gradient(output, sample, integers=False).to(dtype)
            grad[0, 0, -1, 0] = value
            clean = cast(doubles, dtype, layout)
            actual = evaluate(self.function, clean, grad)
            right = evaluate(self.reference, cast(clean, torch.float64), grad.double())
            assert torch.equal(actual["x"].isfinite(), right["x"].isfinite())

    @pytest.mark.parametrize("kinked", [True, False])
    def test_gradients_that_nobody_needs_cost_nothing(self, kinked: bool) -> None:
        if backends.library is None:
            pytest.skip("the compiled library is not built")
        arguments = cast(build(self.name, named("width 17")[0]), torch.float32, requires_grad=False)
        if not kinked:
            arguments |= dict.fromkeys([n for n in self.optional if n.endswith("slope")])
        needed = self.operators_needed(kinked)
        tensors = [n for n, v in arguments.items() if isinstance(v, Tensor)]
        for wanted in tensors:
            assert sorted(self.backward_calls(arguments, [wanted])) == sorted(needed[wanted]), wanted
        together = {name for names in needed.values() for name in names}
        assert sorted(self.backward_calls(arguments, tensors)) == sorted(together)

    def operators_needed(self, kinked: bool) -> dict[str, list[str]]:
        """Our operators that the backward must run for the gradient of each argument alone, with PReLUs or without."""
        raise NotImplementedError  # each operator's tests say

    def backward_calls(self, arguments: Arguments, wanted: list[str]) -> list[str]:
        arguments = arguments | {name: arguments[name].detach().requires_grad_() for name in wanted}
        output = self.function(**arguments)
        with calls() as ran:
            torch.autograd.grad(output, [arguments[name] for name in wanted], torch.ones_like(output))
        return [name.removeprefix("espkernels::") for name in ran.names if name.startswith("espkernels::")]

    def test_no_graph_where_no_gradient_is_needed(self) -> None:
        arguments = cast(build(self.name, named("width 17")[0]), torch.float32, requires_grad=False)
        assert not self.function(**arguments).requires_grad
        with torch.no_grad():
            trainable = cast(build(self.name, named("width 17")[0]), torch.float32)
            assert not self.function(**trainable).requires_grad

    def small_doubles(self, hff: bool, stride: int) -> Arguments:
        sample = Sample(
            "gradcheck", batch=2, channels=2, height=3, width=4, dilations=(2, 1, 3), stride=stride, hff=hff, groups=3,
            outputs=3,
        )  # fmt: skip
        doubles = build(self.name, sample, integers=False)
        return cast(keep_from_kinks(self.name, doubles), torch.float64)

    @pytest.mark.parametrize("hff", [True, False])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_gradcheck(self, hff: bool, stride: int) -> None:
        self.check_derivatives(self.small_doubles(hff, stride), torch.autograd.gradcheck)

    @pytest.mark.parametrize("hff", [True, False])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_gradgradcheck(self, hff: bool, stride: int) -> None:
        self.check_derivatives(self.small_doubles(hff, stride), torch.autograd.gradgradcheck)

    @pytest.mark.parametrize("check", ["gradcheck", "gradgradcheck"])
    def test_derivatives_without_optional_arguments(self, check: str) -> None:
        for name in self.optional:
            for left_out in ([n for n in self.optional if n != name], [name]):
                arguments = self.small_doubles(True, 1) | dict.fromkeys(left_out)
                self.check_derivatives(arguments, getattr(torch.autograd, check))

    def check_derivatives(self, arguments: Arguments, check: Callable[..., bool]) -> None:
        tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}

        def function(*values: Tensor) -> Tensor:
            return self.function(**{**arguments, **dict(zip(tensors, values, strict=True))})

        assert check(function, tuple(tensors.values()), fast_mode=True)

    @each_layout
    def test_autocast(self, layout: torch.memory_format) -> None:
        sample = named("width 17")[0]
        arguments = cast(build(self.name, sample, integers=False), torch.float32, layout)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                output = self.function(**arguments)
            assert output.dtype == dtype
            assert output.stride() == self.function(**arguments).stride()
            halves = cast(arguments, dtype, layout, vector_dtype=torch.float32)
            assert torch.equal(output, self.function(**halves))
            grad = gradient(output, sample, integers=False).to(dtype)
            leaves = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
            gradients = torch.autograd.grad(output, list(leaves.values()), grad)
            same = evaluate(self.function, halves, grad)
            for name, actual in zip(leaves, gradients, strict=True):
                assert actual.dtype == torch.float32, name
                assert torch.equal(actual, same[name].float()), name

    def test_autocast_keeps_float64_and_off_means_off(self) -> None:
        sample = named("width 17")[0]
        arguments = cast(build(self.name, sample), torch.float64, requires_grad=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert self.function(**arguments).dtype == torch.float64
        singles = cast(build(self.name, sample), torch.float32, requires_grad=False)
        with torch.autocast("cpu", enabled=False):
            assert self.function(**singles).dtype == torch.float32
