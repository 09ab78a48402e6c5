"""group_pointwise: a 1x1 convolution in groups with its epilogue."""

from __future__ import annotations

import pytest
import torch
from arguments import build, cast
from closeness import assert_exact
from operator_tests import OperatorTests, each_dtype, each_layout
from samples import SAMPLES, named
from torch import Tensor

import espkernels
from espkernels import backends, reference
from espkernels.ops import pack_group_pointwise


class TestGroupPointwise(OperatorTests):
    name = "group_pointwise"
    optional = ("scale", "shift", "residual", "slope")
    maps = ("x", "residual")

    def stores(self, value: str, dtype: torch.dtype) -> int:
        # The gradient goes back through the epilogue, and the sums it needs forward again, each possibly stored.
        return 1 if value == "output" else 4

    def operators_needed(self, kinked: bool) -> dict[str, list[str]]:
        # The convolution is computed again rather than kept: a PReLU asks for its sign, the scale's gradient for all.
        forward = ["group_pointwise"] if kinked else []
        return {
            "x": [*forward, "group_pointwise_backward_input"],
            "weight": [*forward, "group_pointwise_backward_weight"],
            "scale": ["group_pointwise"],
            "shift": forward,
            "residual": forward,
            "slope": forward,
        }


@each_dtype
@each_layout
def test_packed_weights(isa: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for sample in SAMPLES[::3]:
        arguments = cast(build("group_pointwise", sample), dtype, layout, requires_grad=False)
        expected = espkernels.group_pointwise(**arguments)
        for channels_last in (False, True):  # one of them does not fit and is not used
            packed = pack_group_pointwise(arguments["weight"], sample.groups, channels_last)
            assert torch.equal(espkernels.group_pointwise(**arguments, packed=packed), expected), sample


def test_packs_that_do_not_fit_are_not_used(isa: str) -> None:
    sample = named("width 17")[0]
    arguments = cast(build("group_pointwise", sample), torch.float32, requires_grad=False)
    weight, groups = arguments["weight"], sample.groups
    right = pack_group_pointwise(weight, groups, False)
    if right is None:
        pytest.skip("the reference packs nothing")
    expected = espkernels.group_pointwise(**arguments)
    unaligned = torch.empty(right.numel() + 1, dtype=torch.uint8)[1:].copy_(right)
    misfits = [
        pack_group_pointwise(2 * weight.double(), groups, False),
        pack_group_pointwise(2 * weight.repeat(2, 1), groups, False),
        pack_group_pointwise(2 * weight, groups * 2, False),
        right[:-1],
        right.float(),
        torch.zeros_like(right),
        torch.empty(0, dtype=torch.uint8),
        unaligned,
    ]
    for packed in misfits:
        assert torch.equal(espkernels.group_pointwise(**arguments, packed=packed), expected)


def test_packs_of_another_instruction_set_are_not_used() -> None:
    if backends.library is None:
        pytest.skip("the compiled library is not built")
    arguments = cast(build("group_pointwise", named("outputs 17 a group")[0]), torch.float32, requires_grad=False)
    before = backends.library.isa()
    try:
        for made in backends.library.available_isas():
            backends.library.set_isa(made)
            packed = pack_group_pointwise(2 * arguments["weight"], arguments["groups"], False)
            for used in backends.library.available_isas():
                backends.library.set_isa(used)
                expected = espkernels.group_pointwise(**arguments)
                same = torch.equal(espkernels.group_pointwise(**arguments, packed=packed), expected)
                assert same == (made != used), (made, used)
    finally:
        backends.library.set_isa(before)


@each_dtype
@each_layout
def test_the_identity(isa: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for groups in (1, 2, 6):
        x = torch.randn(2, 6, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=layout)
        weight = torch.eye(6 // groups, dtype=dtype).repeat(groups, 1)
        assert torch.equal(espkernels.group_pointwise(x, weight, groups), x)


@each_layout
def test_groups_do_not_mix(isa: str, layout: torch.memory_format) -> None:
    x = torch.zeros(1, 12, 3, 5).contiguous(memory_format=layout)
    x[:, 4:8] = 1
    output = espkernels.group_pointwise(x, torch.ones(18, 4), 3)
    assert torch.equal(output.unique(), torch.tensor([0.0, 4.0]))
    assert (output[:, 6:12] == 4).all() and (output[:, :6] == 0).all() and (output[:, 12:] == 0).all()


def half_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_layout
def test_every_half_number_is_read_and_written_right(isa: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # 2^16 numbers, so every bit pattern passes through the kernel's own conversions, both ways.
    x = half_patterns(dtype).view(1, 16, 64, 64).contiguous(memory_format=layout)
    output = espkernels.group_pointwise(x, torch.ones(16, 1, dtype=dtype), 16)
    assert_exact("output", output, x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_layout
def test_float32_sums_are_rounded_to_the_nearest_half(
    isa: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    # Every half number, the ties between neighbours, and the floats next to both; so overflow and subnormals too.
    ends = half_patterns(dtype).float()
    ends = ends[ends.isfinite()].sort().values
    ties = ((ends[1:].double() + ends[:-1].double()) / 2).float()
    numbers = torch.cat([ends, ties, torch.tensor([65520.0, 65519.0, 3.4e38, 2.0**-25, 2.0**-24 * 1.5])])
    infinity = torch.tensor(torch.inf)
    numbers = torch.cat([numbers, numbers.nextafter(infinity), numbers.nextafter(-infinity)])
    numbers = torch.cat([numbers, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    x = torch.zeros(1, 1, 1, 1, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.zeros(numbers.numel(), 1, dtype=dtype)
    output = espkernels.group_pointwise(x, weight, 1, shift=numbers).flatten()
    expected = numbers.to(dtype)
    wrong = ~((output == expected) | (output.isnan() & expected.isnan()))
    assert not wrong.any(), f"{numbers[wrong][:5].tolist()} became {output[wrong][:5].tolist()}"


@each_layout
def test_the_kink(isa: str, layout: torch.memory_format) -> None:
    # At zero the derivative is the slope, as in torch.
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0]).view(1, 1, 1, 4).contiguous(memory_format=layout).requires_grad_()
    slope = torch.tensor([0.25], requires_grad=True)
    output = espkernels.group_pointwise(x, torch.ones(1, 1), 1, slope=slope)
    assert torch.equal(output.flatten(), torch.tensor([-0.5, 0.0, 0.0, 3.0]))
    grad_x, grad_slope = torch.autograd.grad(output.sum(), [x, slope])
    assert torch.equal(grad_x.flatten(), torch.tensor([0.25, 0.25, 0.25, 1.0]))
    assert grad_slope.tolist() == [-2.0]


def test_a_nan_passes_the_prelu(isa: str) -> None:
    x = torch.full((1, 1, 1, 20), torch.nan)
    slope = torch.tensor([0.25])
    assert espkernels.group_pointwise(x, torch.ones(1, 1), 1, slope=slope).isnan().all()


# Inputs, outputs and groups where the outputs of a group fill no vector of some instruction set.
NARROW = [(32, 8, 4), (64, 16, 4), (18, 6, 3), (20, 4, 4), (40, 10, 5), (12, 6, 6), (9, 9, 9), (3, 3, 3), (34, 34, 17)]
NARROW += [(32, 24, 4), (14, 35, 7)]
each_narrow = pytest.mark.parametrize("sizes", NARROW, ids=lambda s: f"{s[0]}-to-{s[1]}-in-{s[2]}")


def narrow(sizes: tuple[int, int, int], pixels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, outputs, groups = sizes
    generator = torch.Generator().manual_seed(3)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    vectors = {"scale": whole(outputs), "shift": whole(outputs), "slope": whole(outputs) / 4}
    vectors = {name: vector.to(dtype if dtype == torch.float64 else torch.float32) for name, vector in vectors.items()}
    maps = {"x": whole(2, inputs, 1, pixels), "residual": whole(2, outputs, 1, pixels)}
    maps = {name: map_.to(dtype).contiguous(memory_format=torch.channels_last) for name, map_ in maps.items()}
    return maps | {"weight": whole(outputs, inputs // groups).to(dtype)} | vectors


@pytest.mark.usefixtures("same_each_time")
@each_narrow
@each_dtype
def test_narrow_groups(isa: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    for pixels in (1, 7, 8, 9, 33):
        arguments = narrow(sizes, pixels, dtype)
        for left_out in ((), ("scale", "shift", "residual", "slope"), ("residual",)):
            given = arguments | dict.fromkeys(left_out)
            doubles = {name: None if value is None else value.double() for name, value in given.items()}
            expected = reference.group_pointwise(groups=sizes[2], **doubles)
            assert_exact(f"{pixels} pixels", espkernels.group_pointwise(groups=sizes[2], **given), expected)
        packed = pack_group_pointwise(arguments["weight"], sizes[2], True)
        output = espkernels.group_pointwise(groups=sizes[2], **arguments)
        assert torch.equal(espkernels.group_pointwise(groups=sizes[2], **arguments, packed=packed), output)


@pytest.mark.usefixtures("same_each_time")
@each_narrow
def test_an_infinity_stays_in_its_group(isa: str, sizes: tuple[int, int, int]) -> None:
    inputs, outputs, groups = sizes
    for value in (torch.inf, torch.nan):
        for group in range(groups):
            x = torch.ones(1, inputs, 3, 5).contiguous(memory_format=torch.channels_last)
            x[0, group * (inputs // groups), 1, 2] = value
            output = espkernels.group_pointwise(x, torch.ones(outputs, inputs // groups), groups)
            bad = torch.zeros(1, outputs, 3, 5, dtype=torch.bool)
            bad[0, group * (outputs // groups) : (group + 1) * (outputs // groups), 1, 2] = True
            assert torch.equal(~output.isfinite(), bad), group


@pytest.mark.usefixtures("same_each_time")
@pytest.mark.parametrize("outputs", [1000, 130, 65, 40, 24, 12, 4, 1])
@each_dtype
@each_layout
def test_few_pixels_and_many_outputs(isa: str, outputs: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # As a classifier has them. The products are cut into blocks of columns, whose widths depend on the number left.
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(-2, 3, (outputs, 1024), generator=generator).to(dtype)
    shift = torch.randint(-2, 3, (outputs,), generator=generator).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    for batch, width in ((1, 1), (2, 1), (7, 1), (1, 3), (2, 3), (8, 1)):
        x = (
            torch.randint(-2, 3, (batch, 1024, 1, width), generator=generator)
            .to(dtype)
            .contiguous(memory_format=layout)
        )
        expected = reference.group_pointwise(x.double(), weight.double(), 1, None, shift.double())
        assert_exact("output", espkernels.group_pointwise(x, weight, 1, shift=shift), expected)
