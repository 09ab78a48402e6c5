"""pyramid_pointwise: the EESP unit after its reduction, in one pass."""

from __future__ import annotations

import torch
from arguments import build, cast
from closeness import assert_exact
from evaluation import answers
from operator_tests import OperatorTests, each_dtype, each_layout
from samples import SAMPLES

import espkernels
from espkernels import backends, reference
from espkernels.ops import pack_pyramid_pointwise


def rounds_the_concatenated_map() -> bool:
    """Whether channels_last maps of bfloat16 are multiplied as such: all others keep that map in float32."""
    return backends.library is not None and bool(backends.library.multiplies_bfloat16())


class TestPyramidPointwise(OperatorTests):
    name = "pyramid_pointwise"
    optional = ("pyramid_scale", "pyramid_shift", "pyramid_slope", "scale", "shift", "residual", "slope")
    maps = ("x", "residual")

    def stores(self, value: str, dtype: torch.dtype) -> int:
        # Going back, the concatenated map before and after its PReLU, the gradients of both and of the sums behind
        # the outer epilogue may each be stored.
        if value == "output":
            return 2 if dtype == torch.bfloat16 and rounds_the_concatenated_map() else 1
        return 8

    def operators_needed(self, kinked: bool) -> dict[str, list[str]]:
        # Both convolutions are computed again rather than kept: the second for the sign at the outer PReLU and the
        # gradient of scale, the first for that, for the inner PReLU, and where it is a factor of the gradient.
        inner, outer = ["spatial_pyramid"], ["spatial_pyramid", "group_pointwise"]
        back, forward = ["group_pointwise_backward_input"], outer if kinked else []
        return {
            "x": [*forward, *back, "spatial_pyramid_backward_input"],
            "weight": [*forward, *back, "spatial_pyramid_backward_weight"],
            "pointwise_weight": [*(forward or inner), "group_pointwise_backward_weight"],
            "pyramid_scale": [*(forward or inner), *back],
            "pyramid_shift": [*forward, *back],
            "pyramid_slope": [*forward, *back],
            "scale": outer,
            "shift": forward,
            "residual": forward,
            "slope": forward,
        }


@each_dtype
@each_layout
def test_the_identity_pointwise_gives_the_pyramid(isa: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for sample in SAMPLES[::5]:
        problem, channels = answers("spatial_pyramid", sample), sample.concatenated
        x, weight = (problem.arguments[name].detach().to(dtype) for name in ("x", "weight"))
        identity = torch.ones(channels, 1, dtype=dtype)
        output = espkernels.pyramid_pointwise(
            x.contiguous(memory_format=layout), weight, sample.dilations, identity, channels,
            stride=sample.stride, hff=sample.hff,
        )  # fmt: skip
        assert_exact(str(sample), output, problem.values["output"])


@each_dtype
@each_layout
def test_the_concatenated_map_is_not_rounded(isa: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # 1 + 2^-14 is no half number: a unit that keeps the map in its own type between its two steps returns zero.
    x = torch.ones(1, 2, 2, 2, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.zeros(2, 2, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = torch.tensor([[2.0**-14], [1.0]])
    shift, difference = torch.tensor([1.0, 1, 0, 0], dtype=dtype), torch.tensor([[1.0, 0, -1, 0]], dtype=dtype)
    output = espkernels.pyramid_pointwise(x, weight, (1, 1), difference, 1, pyramid_shift=shift, hff=False)
    rounded = dtype == torch.bfloat16 and layout == torch.channels_last and rounds_the_concatenated_map()
    assert (output == (0 if rounded else 2.0**-14)).all()


@each_dtype
@each_layout
def test_packed_weights(isa: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # A pack knows neither the stride nor hff nor the dilations: it serves them all.
    for sample in SAMPLES[::3]:
        arguments = cast(build("pyramid_pointwise", sample), dtype, layout, requires_grad=False)
        expected = espkernels.pyramid_pointwise(**arguments)
        pyramid = (arguments["pyramid_scale"], arguments["pyramid_shift"], arguments["pyramid_slope"])
        for channels_last in (False, True):  # one of them does not fit and is not used
            packed = pack_pyramid_pointwise(
                arguments["weight"], arguments["pointwise_weight"], sample.groups, *pyramid, channels_last
            )
            assert torch.equal(espkernels.pyramid_pointwise(**arguments, packed=packed), expected), sample


def test_the_unit_is_its_parts(isa: str) -> None:
    for sample in SAMPLES[::7]:
        a = cast(build("pyramid_pointwise", sample), torch.float32, requires_grad=False)
        z = espkernels.spatial_pyramid(a["x"], a["weight"], a["dilations"], a["stride"], a["hff"])
        z = reference.epilogue(z, a["pyramid_scale"], a["pyramid_shift"], None, a["pyramid_slope"])
        parts = espkernels.group_pointwise(
            z, a["pointwise_weight"], a["groups"], a["scale"], a["shift"], a["residual"], a["slope"]
        )
        assert torch.equal(espkernels.pyramid_pointwise(**a), parts)
