"""The operators of inference: whole units with their batch norms folded, and the means around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from arguments import Arguments, build, cast, gradient
from closeness import assert_exact, assert_within_rounding, magnitude, terms
from operator_tests import DTYPES, LAYOUTS, each_layout, each_view
from samples import SAMPLES, SMALL, Sample, named
from torch import Tensor
from torch.utils._pytree import tree_map_only

import espkernels
from espkernels import backends, inference, ops, reference

pytestmark = pytest.mark.usefixtures("poison", "same_each_time")

needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
each_unit = pytest.mark.parametrize("operator", ["eesp", "down_sampler"])

# Batch, channels, height, width of a map whose means are taken.
MAPS = [
    (2, 3, 1, 1), (1, 5, 1, 19), (1, 5, 19, 1), (2, 4, 2, 2), (1, 3, 7, 7), (1, 2, 4, 15), (2, 2, 5, 16),
    (1, 3, 6, 17), (1, 2, 3, 31), (1, 2, 4, 32), (1, 2, 3, 33), (1, 2, 3, 70), (1, 15, 5, 6), (1, 16, 5, 6),
    (1, 17, 5, 6), (1, 33, 8, 8), (1, 65, 4, 4), (0, 3, 4, 5), (1, 1, 6, 6), (2, 1, 9, 64), (1, 24, 40, 41),
]  # fmt: skip
each_map = pytest.mark.parametrize("shape", MAPS, ids=lambda s: "x".join(map(str, s)))

# Cases for what does not depend on the sizes: one at a time of the edges of a pyramid.
UNIT_SAMPLES = [s for s in SAMPLES if not s.name.startswith(("stride", "width")) or s in SMALL]
DOWN_SAMPLES = named(*(f"width {w}" for w in (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65))) + list(SMALL)


def prepared(arguments: Arguments, dtype: torch.dtype, layout: torch.memory_format) -> Arguments:
    """``arguments`` as these operators take them: vectors in float32, or float64 beside float64."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return cast(arguments, dtype, layout, vector_dtype=compute, requires_grad=False)


@cache
def numbers(operator: str, sample: Sample, integers: bool) -> Arguments:
    arguments = build(operator, sample, integers)
    if not integers:
        arguments = {n: v.bfloat16().half().double() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    return arguments


def check_unit(operator: str, arguments: Arguments, given: Arguments, exact: bool) -> None:
    """The operator on ``given`` equals the reference on ``arguments``, where ``exact``, but for the means of a
    down-sampler, else within the rounding of its sums."""
    expected = getattr(reference, operator)(**arguments)
    output = getattr(inference, operator)(**given)
    assert output.dtype == given["x"].dtype
    means = 0 if operator == "eesp" else arguments["x"].shape[1]
    if exact:
        assert_exact(f"{operator}, the unit", output[:, means:], expected[:, means:])
    absolute = {n: v.abs() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    size = magnitude(operator, absolute)
    # Stored on the way: the reduced map, and the shortcut in the result, to which both halves are added.
    stores = 2 if operator == "eesp" else 3
    assert_within_rounding(operator, output, expected, size, terms(operator, arguments, "output", output), stores)


@each_unit
@each_layout
def test_units(isa: str, operator: str, layout: torch.memory_format) -> None:
    for sample in UNIT_SAMPLES if operator == "eesp" else DOWN_SAMPLES:
        for integers in (True, False):
            arguments = numbers(operator, sample, integers)
            # By turns, as in the tests of the parts: types of two bytes differ in how they are read and stored only.
            for dtype in DTYPES.values() if sample in SMALL or integers is False else (torch.float32,):
                given = prepared(arguments, dtype, layout)
                check_unit(operator, arguments, given, exact=integers and dtype.itemsize > 2)


@each_layout
def test_units_without_optional_arguments(isa: str, layout: torch.memory_format) -> None:
    for sample in named("width 17", "channels 17", "stride 2 odd"):
        for left_out in (("residual",), ("slope",), ("residual", "slope")):
            arguments = numbers("eesp", sample, True) | dict.fromkeys(left_out)
            check_unit("eesp", arguments, prepared(arguments, torch.float32, layout), exact=True)
        alone = dict.fromkeys(("image", "shortcut_weight", "shortcut_shift"))
        arguments = numbers("down_sampler", sample, True) | alone
        check_unit("down_sampler", arguments, prepared(arguments, torch.float32, layout), exact=True)


def test_the_residual_of_a_unit_is_its_input(isa: str) -> None:
    sample = Sample("residual", channels=8, outputs=16, height=9, width=11)
    for layout in LAYOUTS.values():
        arguments = numbers("eesp", sample, True)
        given = prepared(arguments, torch.float32, layout)
        check_unit("eesp", arguments | {"residual": arguments["x"]}, given | {"residual": given["x"]}, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_of_a_large_map_are_reduced_as_the_pyramid_needs_them(isa: str, dtype: torch.dtype) -> None:
    sample = Sample("above 2 MiB", channels=16, outputs=32, height=259, width=257, stride=2, batch=1)
    arguments = numbers("eesp", sample, True) | {"residual": None}
    given = prepared(arguments, dtype, torch.channels_last)
    check_unit("eesp", arguments, given, exact=dtype == torch.float32)
    reduced = ops.group_pointwise(
        given["x"], given["reduce_weight"], given["reduce_groups"], None, given["reduce_shift"], None,
        given["reduce_slope"],
    )  # fmt: skip
    assert torch.equal(
        inference.eesp(**given),
        ops.pyramid_pointwise(
            reduced, given["weight"], given["dilations"], given["expand_weight"], given["groups"],
            given["pyramid_scale"], given["pyramid_shift"], given["pyramid_slope"],
            None, given["shift"], None, given["slope"], 2, given["hff"],
        ),
    )  # fmt: skip


@each_view
@each_unit
def test_views_of_units(operator: str, view: Callable[[Tensor], Tensor]) -> None:
    for sample in named("width 17", "channels 17"):
        for name in ("x", "residual" if operator == "eesp" else "image"):
            arguments = numbers(operator, sample, True)
            given = prepared(arguments, torch.float32, torch.contiguous_format)
            given[name] = view(given[name])
            check_unit(operator, arguments | {name: given[name].double()}, given, exact=True)


# --- means ------------------------------------------------------------------------------------------------------------


def check_mean(operator: str, x: Tensor, given: Tensor) -> None:
    """A mean of n numbers is n - 1 additions and a division, so that n bounds its relative error in S, the mean of the
    absolute values; it is exact where the sum is, and n a power of two."""
    function, count = getattr(reference, operator), 9 if operator == "average_pool" else x.shape[2] * x.shape[3]
    output = getattr(inference, operator)(given)
    assert output.dtype == given.dtype
    if count & (count - 1) == 0 and given.dtype != torch.float16:
        assert_exact(operator, output, function(x))
    assert_within_rounding(operator, output, function(x), function(x.abs()), count)


@pytest.mark.parametrize("operator", ["average_pool", "global_average"])
@each_map
@each_layout
def test_means(isa: str, operator: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randint(-8, 9, shape).double()
    for dtype in DTYPES.values():
        check_mean(operator, x, x.to(dtype).contiguous(memory_format=layout))
    if operator == "average_pool":
        # Sums of nines divided by nine are whole: no rounding anywhere.
        nines = (9 * x).float().contiguous(memory_format=layout)
        assert_exact(operator, inference.average_pool(nines), reference.average_pool(9 * x))


@pytest.mark.parametrize("operator", ["average_pool", "global_average"])
@each_view
def test_views_of_means(operator: str, view: Callable[[Tensor], Tensor]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = view(torch.randint(-8, 9, (2, 18, 6, 17)).to(dtype))
        check_mean(operator, x.double(), x)


@each_layout
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=["inf", "nan"])
def test_infinities_reach_only_the_means_they_belong_to(isa: str, value: float, layout: torch.memory_format) -> None:
    x = torch.randn(2, 19, 9, 35)
    x[0, 3, 4, 18] = value
    x = x.contiguous(memory_format=layout)
    for operator in ("average_pool", "global_average"):
        output, expected = getattr(inference, operator)(x), getattr(reference, operator)(x.double())
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isinf(), expected.isinf())


def test_long_means_of_halves_are_summed_in_float32(isa: str) -> None:
    # In bfloat16 a sum of ones stops at 256.
    for layout in LAYOUTS.values():
        x = torch.ones(1, 3, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=layout)
        assert torch.equal(inference.global_average(x), torch.ones(1, 3, 1, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [0.1, 1.0])
def test_means_of_equal_numbers_are_the_number(isa: str, value: float) -> None:
    # Rounded one by one, a quarter of a million sums of 0.1 drift by a thousandth. Here at most 256 are, by 2^-24 each.
    for layout in LAYOUTS.values():
        x = torch.full((1, 9, 512, 512), value).contiguous(memory_format=layout)
        for mean in (inference.global_average(x), inference.adaptive_average(x, 1, 1)):
            torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=256 * 2**-24, atol=0)


@pytest.mark.parametrize("size", [(3, 4), (3, 7), (5, 4)])
def test_sizes_that_stay_mix_no_neighbours(isa: str, size: tuple[int, int]) -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(1, 5, 1, 1)
    x[0, 1, 1, 2] = float("inf")
    expected = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(inference.resize(x, *size), expected, equal_nan=True)


# --- gradients --------------------------------------------------------------------------------------------------------


@each_unit
def test_gradients_of_units(operator: str) -> None:
    # In nines, so that a ninth of each is whole, in both directions.
    for sample in named("width 17", "channels 17"):
        arguments = numbers(operator, sample, True)
        arguments = arguments | {"x": 9 * arguments["x"]}
        maps = [name for name in ("x", "residual", "image") if name in arguments]
        weights = ["reduce_weight", "weight", "expand_weight", "pyramid_scale", "shift", "slope"]
        for wanted in (maps[:1], maps[1:], [*maps, *weights], weights):
            answers = []
            for module in (inference, reference):
                leaves = {name: arguments[name].clone().requires_grad_() for name in wanted}
                output = getattr(module, operator)(**{**arguments, **leaves})
                grad = 9 * gradient(output, sample)
                answers.append(torch.autograd.grad(output, list(leaves.values()), grad))
            for name, actual, expected in zip(wanted, *answers, strict=True):
                assert_exact(f"{name} of {wanted}", actual, expected)


def test_gradients_of_means() -> None:
    for operator in ("average_pool", "global_average"):
        x = torch.randint(-8, 9, (2, 3, 8, 4)).double()
        answers = []
        for module in (inference, reference):
            leaf = x.clone().requires_grad_()
            (getattr(module, operator)(leaf) * 9).sum().backward()
            answers.append(leaf.grad)
        assert torch.equal(*answers)


# --- what torch is told -----------------------------------------------------------------------------------------------


def raw_calls(dtype: torch.dtype, layout: torch.memory_format) -> list[tuple[str, tuple[Any, ...]]]:
    """Each operator of the library by its schema's order of arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for sample in named("stride 2 odd", "one pixel", "batch 0"):
        for operator in ("eesp", "down_sampler"):
            given = prepared(numbers(operator, sample, True), dtype, layout)
            given["dilations"] = list(given["dilations"])
            names = [a.name for a in getattr(torch.ops.espkernels, operator).default._schema.arguments]
            calls.append((operator, tuple(given.get(name) for name in names)))  # no pack
    for shape in ((2, 3, 9, 12), (1, 3, 1, 1), (0, 3, 4, 5), (1, 1, 5, 5)):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        weight, channels = torch.randn(4, shape[1], 3, 3).to(dtype), shape[1]
        calls += [
            ("average_pool", (x,)),
            ("global_average", (x,)),
            ("affine", (x, None, None, x, None)),
            ("change_layout", (x, True)),
            ("change_layout", (x, False)),
            ("concatenate", ([x, x.new_zeros((shape[0], 1, *shape[2:])), x], 1)),
            ("concatenate", ([x, x], 2)),
            ("resized_argmax", (x, 5, 7)),
            ("resized_argmax", (x, 5, 7, True)),
            ("convolution", (x, weight, None, None, 2, 1, 1, 1)),
            ("convolution", (x, torch.randn(channels, 1, 3, 3).to(dtype), None, None, 1, 2, 2, channels)),
        ]
    return calls


@needs_library
@each_layout
def test_opcheck(layout: torch.memory_format) -> None:
    for name, arguments in raw_calls(torch.float32, layout):
        operator = getattr(torch.ops.espkernels, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_library
@each_layout
def test_fakes_promise_the_strides_of_the_kernels(layout: torch.memory_format) -> None:
    for dtype in (torch.float32, torch.float16):
        for name, arguments in raw_calls(dtype, layout):
            operator = getattr(torch.ops.espkernels, name).default
            real = operator(*arguments)
            meta = operator(*tree_map_only(Tensor, lambda a: a.to("meta"), arguments))
            assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype), name


def test_fullgraph() -> None:
    arguments = prepared(numbers("down_sampler", named("width 17")[0], True), torch.float32, torch.channels_last)
    weight = torch.randn(7, 3, 3, 3)
    others = {name: value for name, value in arguments.items() if name not in ("x", "image")}

    def network(x: Tensor, picture: Tensor) -> Tensor:
        image = inference.convolution(inference.average_pool(picture), weight, stride=1, padding=1)[:, :3]
        return inference.global_average(inference.down_sampler(x, image, **others) * 2)

    height, width = arguments["image"].shape[2:]
    picture = torch.randn(arguments["x"].shape[0], 3, 2 * height, 2 * width)
    torch.compiler.reset()
    with torch.no_grad():
        expected = network(arguments["x"], picture)
        assert torch.equal(
            torch.compile(network, fullgraph=True, backend="aot_eager")(arguments["x"], picture), expected
        )


def test_the_reference_backend() -> None:
    for operator in ("eesp", "down_sampler"):
        given = prepared(numbers(operator, named("width 17")[0], False), torch.float64, torch.channels_last)
        with espkernels.use_backend("reference"):
            assert torch.equal(getattr(inference, operator)(**given), getattr(reference, operator)(**given))


# --- wrong arguments --------------------------------------------------------------------------------------------------


@needs_library
@each_unit
def test_wrong_arguments_of_units_are_refused(operator: str) -> None:
    given = prepared(numbers(operator, named("width 17")[0], True), torch.float32, torch.contiguous_format)
    changes: dict[str, Callable[[Tensor], Any]] = {
        "x": lambda t: t[:, 1:], "reduce_weight": lambda t: t[:, 1:], "reduce_shift": lambda t: t[1:],
        "reduce_slope": lambda t: t.double(), "weight": lambda t: t[1:], "pyramid_scale": lambda t: t[1:],
        "pyramid_shift": lambda t: t[None], "pyramid_slope": lambda t: t.half(), "expand_weight": lambda t: t.flatten(),
        "shift": lambda t: t[1:], "slope": lambda t: t[1:], "residual": lambda t: t[..., 1:],
        "image": lambda t: t[..., 1:], "shortcut_weight": lambda t: t[1:], "shortcut_shift": lambda t: None,
    }  # fmt: skip
    for name in [name for name in changes if name in given]:
        with pytest.raises(RuntimeError, match="expected"):
            getattr(inference, operator)(**{**given, name: changes[name](given[name])})
        if name not in ("shift", "slope", "shortcut_shift"):
            with pytest.raises(RuntimeError, match="expected"):
                getattr(inference, operator)(**{**given, name: given[name].to(torch.int32)})
    for change in ({"dilations": []}, {"dilations": [0, 1, 2, 3]}, {"dilations": [1] * 9}, {"groups": 0},
                   {"groups": 5}, {"reduce_groups": 0}, {"reduce_groups": 7}):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected"):
            getattr(inference, operator)(**given | change)
    without = dict.fromkeys({"residual", "image", "shortcut_weight", "shortcut_shift"} & given.keys())
    for x in (given["x"][:, :, :0], given["x"][..., :0]):
        with pytest.raises(RuntimeError, match="expected"):
            getattr(inference, operator)(**given | without | {"x": x})
    if operator == "eesp":
        with pytest.raises(RuntimeError, match="stride: expected at least 1"):
            inference.eesp(**given | {"stride": 0})


@needs_library
def test_wrong_arguments_of_layers_are_refused() -> None:
    convolution = torch.ops.espkernels.convolution.default
    x, weight, vector = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    wrong = [
        (x[0], weight, None, None, 1, 1, 1, 1),
        (x, weight.double(), None, None, 1, 1, 1, 1),
        (x, weight[0], None, None, 1, 1, 1, 1),
        (x, weight[:, :2], None, None, 1, 1, 1, 1),
        (x, weight[:0], None, None, 1, 1, 1, 1),
        (x, weight, vector[1:], None, 1, 1, 1, 1),
        (x, weight, None, vector.double(), 1, 1, 1, 1),
        (x, weight, None, None, 0, 1, 1, 1),
        (x, weight, None, None, 1, -1, 1, 1),
        (x, weight, None, None, 1, 1, 0, 1),
        (x, weight, None, None, 1, 1, 2, 1),
        (x, weight, None, None, 1, 1, 1, 3),
        (x, torch.randn(4, 3, 9, 3), None, None, 1, 1, 1, 1),
        (x, weight, None, None, 1, 2**62, 1, 1),
        (x, weight, None, None, 1, 2**63 - 1, 1, 1),
        (x, torch.randn(3, 1, 3, 3), None, None, 1, 1, 2, 3),
        (torch.randn(1, 3, 0, 6), torch.randn(3, 1, 3, 3), None, None, 1, 1, 1, 3),
        (x[:, :0], weight[:, :0], None, None, 1, 1, 1, 1),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(RuntimeError):
            convolution(*arguments)
    for shape in ((3, 4, 5), (1, 3, 0, 5), (1, 3, 5, 0)):
        for name in ("average_pool", "global_average"):
            with pytest.raises(RuntimeError, match="expected"):
                getattr(torch.ops.espkernels, name).default(torch.randn(shape))
            with pytest.raises(RuntimeError, match="expected a float32"):
                getattr(torch.ops.espkernels, name).default(torch.ones(1, 3, 4, 4, dtype=torch.int32))
