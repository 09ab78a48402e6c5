"""The CUDA operators on a real device, against the reference in float64: what the emulation cannot show."""

from __future__ import annotations

import itertools
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from arguments import Arguments, build, cast, gradient
from closeness import assert_exact
from evaluation import Answers
from samples import SAMPLES, Sample
from torch import Tensor

import espkernels
from espkernels import reference


def why_not() -> str | None:
    """Why the operators cannot run here; loads their library where it is."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    files = list(Path(espkernels.__file__).parent.glob(f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"))
    if not files:
        return "espkernels/_C_cuda is not built (ESPKERNELS_BUILD_CUDA=1)"
    torch.ops.load_library(str(files[-1]))
    return None


REASON = why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

ops: Any = torch.ops.espkernels_cuda
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# All in one test a sample: where there is no device, thousands of skips would say no more than hundreds.
KINDS = list(itertools.product(DTYPES, LAYOUTS))

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def compute(dtype: torch.dtype) -> torch.dtype:
    """The type of the sums and of the epilogues' vectors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(arguments: Arguments, dtype: torch.dtype, layout: torch.memory_format) -> Arguments:
    """``arguments`` as the operators take them, in the order in which they were built."""
    there = cast(arguments, dtype, layout, compute(dtype), requires_grad=False)
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in there.items()}


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 ``value`` as a map of ``dtype`` holds it: between its products a unit keeps numbers of that type."""
    return value.to(dtype).double()


@each_sample
def test_spatial_pyramid(sample: Sample) -> None:
    for dtype, layout in KINDS:
        arguments = build("spatial_pyramid", sample)
        grad = gradient(reference.spatial_pyramid(**arguments), sample)
        expected = Answers("spatial_pyramid", arguments, grad).values
        x, weight, *options = on_device(arguments, dtype, layout).values()
        grad = grad.to("cuda", dtype, memory_format=layout)

        out = ops.spatial_pyramid(x, weight, *options)
        assert_exact("output", out.cpu(), expected["output"])
        assert_exact("x", ops.spatial_pyramid_backward_input(grad, weight, *options, *x.shape[2:]).cpu(), expected["x"])
        assert_exact("weight", ops.spatial_pyramid_backward_weight(grad, x, *options).cpu(), expected["weight"])


@each_sample
def test_group_pointwise(sample: Sample) -> None:
    for dtype, layout in KINDS:
        arguments = build("group_pointwise", sample)
        there = on_device(arguments, dtype, layout)
        assert_exact("output", ops.group_pointwise(*there.values()).cpu(), reference.group_pointwise(**arguments))

        plain = {name: arguments[name] for name in ("x", "weight", "groups")}
        grad = gradient(reference.group_pointwise(**plain), sample)
        expected = Answers("group_pointwise", plain, grad).values
        x, weight, groups = (there[name] for name in plain)
        grad = grad.to("cuda", dtype, memory_format=layout)
        assert_exact("x", ops.group_pointwise_backward_input(grad, weight, groups).cpu(), expected["x"])
        assert_exact("weight", ops.group_pointwise_backward_weight(grad, x, groups).cpu(), expected["weight"])


def expected_unit(arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """pyramid_pointwise in float64, its concatenated map rounded as the kernel keeps it."""
    a = arguments
    z = reference.epilogue(
        reference.spatial_pyramid(a["x"], a["weight"], a["dilations"], a["stride"], a["hff"]),
        a["pyramid_scale"], a["pyramid_shift"], None, a["pyramid_slope"],
    )  # fmt: skip
    last = (a["scale"], a["shift"], a["residual"], a["slope"])
    return reference.group_pointwise(stored(z, dtype), a["pointwise_weight"], a["groups"], *last)


@each_sample
def test_pyramid_pointwise(sample: Sample) -> None:
    for dtype, layout in KINDS:
        arguments = build("pyramid_pointwise", sample)
        out = ops.pyramid_pointwise(*on_device(arguments, dtype, layout).values())
        assert_exact("output", out.cpu(), expected_unit(arguments, dtype))


def reduction(sample: Sample) -> Arguments:
    """A reduction to the channels of ``sample`` from six a group, in front of its pyramid_pointwise."""
    groups = 1 if sample.channels % 2 else 2
    generator = torch.Generator().manual_seed(sample.channels)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).double()

    return {
        # Multiples of nine have whole means.
        "x": 9 * integers(sample.batch, 6 * groups, sample.height, sample.width),
        "reduce_weight": integers(sample.channels, 6),
        "reduce_groups": groups,
        "reduce_shift": integers(sample.channels),
        "reduce_slope": integers(sample.channels),
    }


def unit_problem(sample: Sample, dtype: torch.dtype) -> tuple[Arguments, list[Any], Tensor]:
    """The reduction, the arguments behind it as the schema has them, and the unit before residual and PReLU."""
    first, rest = reduction(sample), build("pyramid_pointwise", sample)
    names = (
        "weight",
        "dilations",
        "pyramid_scale",
        "pyramid_shift",
        "pyramid_slope",
        "pointwise_weight",
        "groups",
        "shift",
    )
    reduced = reference.group_pointwise(
        first["x"],
        first["reduce_weight"],
        first["reduce_groups"],
        None,
        first["reduce_shift"],
        None,
        first["reduce_slope"],
    )
    problem = rest | {"x": stored(reduced, dtype), "scale": None, "slope": None}
    return first, [rest[name] for name in names], expected_unit(problem, dtype) - rest["residual"]


def moved(values: list[Any], dtype: torch.dtype, layout: torch.memory_format) -> list[Any]:
    """Maps and weights in ``dtype``, vectors in the type of the sums, all on the device."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to("cuda", compute(dtype) if value.dim() == 1 else dtype)
        return value.contiguous(memory_format=layout) if value.dim() == 4 else value

    return [move(value) for value in values]


@each_sample
def test_eesp(sample: Sample) -> None:
    for dtype, layout in KINDS:
        first, rest, expected = unit_problem(sample, dtype)
        residual = gradient(expected, sample)
        slope = torch.full((sample.outputs,), 0.5, dtype=torch.float64)
        values = [*first.values(), *rest, residual, slope, sample.stride, sample.hff]
        out = ops.eesp(*moved(values, dtype, layout))
        assert_exact("output", out.cpu(), reference.epilogue(expected, None, None, residual, slope))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.stride == 2], ids=str)
@pytest.mark.parametrize("with_image", [False, True])
def test_down_sampler(sample: Sample, with_image: bool) -> None:
    for dtype in DTYPES:
        first, rest, unit = unit_problem(sample, dtype)
        x = first.pop("x")
        channels = x.shape[1] + sample.outputs
        slope = torch.full((channels,), 0.5, dtype=torch.float64)
        pooled = torch.nn.functional.avg_pool2d(x, 3, stride=2, padding=1)
        expected = torch.cat([pooled, unit], dim=1)
        image = shortcut_weight = shortcut_shift = None
        if with_image:
            image = torch.ones(sample.batch, 3, *sample.output_size, dtype=torch.float64)
            shortcut_weight = torch.arange(3.0 * channels, dtype=torch.float64).view(channels, 3) % 5 - 2
            shortcut_shift = torch.arange(channels, dtype=torch.float64) % 3
            expected = expected + reference.group_pointwise(image, shortcut_weight, 1, None, shortcut_shift)
        values = [x, image, *first.values(), *rest, shortcut_weight, shortcut_shift, slope, sample.hff]
        out = ops.down_sampler(*moved(values, dtype, torch.channels_last))
        # The pooled half is rounded in the type of the sums, where a ninth of nine is exact.
        assert_exact("output", out.cpu(), reference.epilogue(expected, slope=slope))
        assert out.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Trained:
    """A whole unit in training, as the operator takes it."""

    name: str
    batch: int
    size: tuple[int, int]
    inputs: int
    reduce_groups: int
    channels: int
    dilations: tuple[int, ...]
    outputs: int
    groups: int
    stride: int = 1
    hff: bool = True
    residual: bool = False
    has_prelu: bool = True
    saves: bool = True
    batch_statistics: tuple[bool, bool, bool] = (True, True, True)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def arguments(self) -> list[Any]:
        """Those of the forward pass in float64, on the CPU; vectors and weights that float32 holds."""
        draw = torch.Generator().manual_seed(self.channels)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).bfloat16().double()

        concatenated = len(self.dilations) * self.channels
        inner = self.channels + concatenated
        slopes = inner + (self.outputs if self.has_prelu else 0)
        running = None if all(self.batch_statistics) else numbers(inner + self.outputs)
        return [
            numbers(self.batch, self.inputs, *self.size).contiguous(memory_format=torch.channels_last),
            numbers(self.channels, self.inputs // self.reduce_groups), self.reduce_groups,
            numbers(len(self.dilations), self.channels, 3, 3), list(self.dilations),
            numbers(self.outputs, concatenated // self.groups), self.groups,
            1 + numbers(inner + self.outputs) / 4, numbers(inner + self.outputs) / 4, numbers(slopes) / 4,
            running, None if running is None else running.square() + 1, [1e-5, 1e-4, 1e-3],
            list(self.batch_statistics), self.stride, self.hff, self.residual, self.saves,
        ]  # fmt: skip


RESIDUAL = Trained("residual", 3, (17, 20), 64, 4, 16, (1, 2, 3, 4), 64, 4, residual=True)
TRAINED = [
    RESIDUAL,
    replace(RESIDUAL, name="recomputed", saves=False),
    replace(RESIDUAL, name="running", batch_statistics=(False, False, False)),
    replace(RESIDUAL, name="some running", batch_statistics=(False, True, False), has_prelu=False),
    replace(RESIDUAL, name="many blocks", batch=8, size=(113, 97)),
    Trained("strided", 2, (31, 28), 32, 4, 24, (1, 2, 3, 4), 96, 4, stride=2, has_prelu=False),
    Trained("odd channels", 2, (9, 14), 5, 1, 7, (1, 2, 3), 35, 7, hff=False),
    Trained("eight branches", 2, (12, 9), 8, 2, 12, (1, 2, 3, 4, 5, 6, 7, 20), 96, 8),
    Trained("wide groups", 2, (14, 14), 160, 1, 80, (1, 1, 2), 160, 1, residual=True, saves=False),
    Trained("stride 3", 2, (20, 11), 12, 3, 6, (1, 5), 30, 2, stride=3),
]


def trained_on_device(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments as the operator takes them: vectors in the type of the sums, running statistics in float64."""
    there = moved(arguments, dtype, torch.channels_last)
    for i in (10, 11):
        there[i] = None if arguments[i] is None else arguments[i].cuda()
    return there


def unit_gradients(library: Any, arguments: list[Any], outputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """All gradients of what the forward pass gave."""
    x, *weights = arguments[:7]
    kept, vectors, options = outputs[1:], arguments[7:10], arguments[12:17]
    found: tuple[Tensor, ...] = library.eesp_training_backward(grad, x, *kept, *weights, *vectors, *options, [True] * 7)
    return found


def everything(library: Any, arguments: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    """What both operators give."""
    outputs = library.eesp_training(*arguments)
    return (*outputs, *unit_gradients(library, arguments, outputs, grad))


def errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(found, truth, strict=True)
    return [float((f.cpu().double() - t).norm() / t.norm().clamp_min(1e-30)) for f, t in pairs if t.numel()]


@pytest.mark.parametrize("unit", TRAINED, ids=str)
def test_eesp_training(unit: Trained) -> None:
    """Against the operator of the CPU in float64.

    Where rounding chooses the side of a PReLU gradients jump, and their error is the square root of the rounding's. In
    a half type the worst of the CPU's own errors is the measure.
    """
    arguments = unit.arguments()
    sizes = (unit.batch, unit.outputs, *((size - 1) // unit.stride + 1 for size in unit.size))
    grad = torch.linspace(-1, 1, math.prod(sizes), dtype=torch.float64).reshape(sizes).cos()
    truth = everything(torch.ops.espkernels, arguments, grad)
    for dtype in DTYPES:
        there = grad.to("cuda", dtype, memory_format=torch.channels_last)
        found = everything(ops, trained_on_device(arguments, dtype), there)
        for i, (ours, right) in enumerate(zip(found, truth, strict=True)):
            assert ours.shape == right.shape and (ours.dim() != 4 or i == 7 or ours.stride() == right.stride()), i
        bound = {torch.float64: 1e-10, torch.float32: 1e-3}.get(dtype)
        if bound is None:
            here = [
                value.cpu() if isinstance(value, Tensor) else value for value in trained_on_device(arguments, dtype)
            ]
            bound = 2 * max(errors(everything(torch.ops.espkernels, here, there.cpu()), truth))
        assert max(errors(found, truth)) <= bound, (dtype, errors(found, truth))


def test_moments_far_from_zero() -> None:
    arguments = RESIDUAL.arguments()
    arguments[0] = arguments[0] + 1e4
    arguments[1] = torch.eye(16).double()  # a channel of x for each
    for dtype in (torch.float32, torch.float64):
        _, reduced, concatenated, expanded, statistics = ops.eesp_training(*trained_on_device(arguments, dtype))
        first = 0
        for stored in (reduced, concatenated, expanded):
            double = stored.double().transpose(0, 1).flatten(1)
            mean, variance = statistics[:, first : first + double.shape[0]]
            # Some sums of hundreds of numbers in float32, around one of them.
            torch.testing.assert_close(mean, double.mean(1), rtol=4e-6, atol=4e-6)
            torch.testing.assert_close(variance, double.var(1, correction=0), rtol=1e-5, atol=0)
            first += double.shape[0]


def test_training_is_the_same_each_time_and_in_a_graph() -> None:
    unit = replace(RESIDUAL, batch=8, size=(56, 56))
    there = trained_on_device(unit.arguments(), torch.bfloat16)

    grad = torch.randn(8, 64, 56, 56, device="cuda").bfloat16()

    def step() -> tuple[Tensor, ...]:
        return everything(ops, there, grad)

    once = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, once, strict=True))


def layer(batch: int = 2) -> Sample:
    """A unit of the network's fourth level."""
    return Sample("layer", batch, 32, 28, 28, (1, 1, 2, 3), outputs=128)


def test_graph_on_a_stream_of_its_own() -> None:
    first, rest, expected = unit_problem(layer(), torch.bfloat16)
    values = moved([*first.values(), *rest, None, None, 1, True], torch.bfloat16, torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.eesp(*values)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = ops.eesp(*values)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_exact("output", out.cpu(), expected)


@pytest.mark.parametrize("operator", ["spatial_pyramid_backward_weight", "group_pointwise_backward_weight"])
def test_weight_gradients_are_the_same_each_time(operator: str) -> None:
    sample = layer(8)
    maps: dict[str, Callable[[], Tensor]] = {
        "reduced": lambda: torch.randn(8, 32, 28, 28, device="cuda"),
        "wide": lambda: torch.randn(8, 128, 28, 28, device="cuda"),
    }
    if operator.startswith("spatial"):
        arguments = (maps["wide"](), maps["reduced"](), sample.dilations, 1, True)
    else:
        arguments = (maps["wide"](), maps["wide"](), 4)
    once = getattr(ops, operator)(*arguments)
    for _ in range(10):
        assert torch.equal(getattr(ops, operator)(*arguments), once)


def test_tf32_where_torch_allows_it() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 64, 9, 16, generator=draw), torch.randn(32, 64, generator=draw)
    exact = reference.group_pointwise(x.double(), weight.double(), 1)
    # The sum of absolute products, each off by two factors of eleven digits, or of float32's twenty-four.
    size = reference.group_pointwise(x.double().abs(), weight.double().abs(), 1)
    found = {}
    for allowed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
            with espkernels.use_backend("cuda"):
                found[allowed] = espkernels.group_pointwise(x.cuda(), weight.cuda(), 1).cpu().double()
    assert ((found[False] - exact).abs() <= 66 * 2**-24 * size).all()
    assert ((found[True] - exact).abs() <= (2 * 2**-11 + 66 * 2**-24) * size).all()
    assert not torch.equal(found[True], found[False])


def test_tensors_of_two_devices() -> None:
    with pytest.raises(RuntimeError, match="expected CUDA tensors of one dtype"):
        ops.group_pointwise(torch.ones(1, 4, 2, 2, device="cuda"), torch.ones(4, 4), 1, None, None, None, None)


def test_a_frozen_network_in_a_graph() -> None:
    network = espkernels.models.espnetv2_segmentation(0.5, 5).eval().cuda()
    frozen: Any = espkernels.freeze(network, graph=True)
    plain: Any = espkernels.freeze(network)
    with torch.no_grad():
        for size in ((64, 96), (32, 48)):
            images = [torch.randn(2, 3, *size, device="cuda") for _ in range(3)]
            results = [frozen(x) for x in images]
            for x, result in zip(images, results, strict=True):
                assert torch.equal(result, plain(x))
                assert torch.equal(frozen.classes(x), plain(x).argmax(1).to(torch.uint8))
        assert len(frozen.graphs) == 4
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            elsewhere = frozen(images[0])
        here = frozen(images[1])
        torch.cuda.synchronize()
        assert torch.equal(elsewhere, plain(images[0])) and torch.equal(here, plain(images[1]))
