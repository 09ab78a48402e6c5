"""The tensors of a sample, for every operator: integers, on which a right kernel is exact, or real numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from samples import Sample
from torch import Tensor

__all__ = ["MAPS", "VECTORS", "Arguments", "build", "cast", "gradient"]

Arguments = dict[str, Any]
Draw = Callable[..., Tensor]

# The per-channel vectors of an epilogue; they may be float32 beside a map of a half type.
VECTORS = (
    "scale", "shift", "slope", "pyramid_scale", "pyramid_shift", "pyramid_slope",
    "reduce_shift", "reduce_slope", "shortcut_shift",
)  # fmt: skip

MAPS = ("x", "residual", "image")


def _generator(sample: Sample, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{sample} {purpose}".encode()))


def _choice(values: tuple[float, ...], generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape, generator=generator)]


def _draw(generator: torch.Generator, integers: bool) -> Draw:
    def draw(kind: str, *shape: int) -> Tensor:
        if not integers:
            if kind == "slope":
                return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.25
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            if kind == "weight":  # so that sums stay near 1 however long, within the range of float16
                return values / math.sqrt(9 if len(shape) == 4 else shape[1])
            return values.clamp(-1, 1) + values.sign() / 2 if kind == "scale" else values
        # Small whole numbers and powers of two: every product and sum below is exact in float32.
        if kind == "scale":
            return _choice((0.5, 1.0, 2.0, -1.0), generator, shape)
        if kind == "slope":
            return _choice((0.25, 0.5, -0.5, 0.0), generator, shape)
        return torch.randint(-2, 3, shape, generator=generator).double()

    return draw


def _spatial_pyramid(sample: Sample, draw: Draw) -> Arguments:
    return {
        "x": draw("map", sample.batch, sample.channels, sample.height, sample.width),
        "weight": draw("weight", len(sample.dilations), sample.channels, 3, 3),
        "dilations": sample.dilations,
        "stride": sample.stride,
        "hff": sample.hff,
    }


def _group_pointwise(sample: Sample, draw: Draw) -> Arguments:
    inputs, outputs = sample.concatenated, sample.outputs
    height, width = sample.output_size
    return {
        "x": draw("map", sample.batch, inputs, height, width),
        "weight": draw("weight", outputs, inputs // sample.groups),
        "groups": sample.groups,
        "scale": draw("scale", outputs),
        "shift": draw("shift", outputs),
        "residual": draw("map", sample.batch, outputs, height, width),
        "slope": draw("slope", outputs),
    }


def _pyramid_pointwise(sample: Sample, draw: Draw) -> Arguments:
    inputs, outputs = sample.concatenated, sample.outputs
    height, width = sample.output_size
    return {
        "x": draw("map", sample.batch, sample.channels, sample.height, sample.width),
        "weight": draw("weight", len(sample.dilations), sample.channels, 3, 3),
        "dilations": sample.dilations,
        "pointwise_weight": draw("weight", outputs, inputs // sample.groups),
        "groups": sample.groups,
        "pyramid_scale": draw("scale", inputs),
        "pyramid_shift": draw("shift", inputs),
        "pyramid_slope": draw("slope", inputs),
        "scale": draw("scale", outputs),
        "shift": draw("shift", outputs),
        "residual": draw("map", sample.batch, outputs, height, width),
        "slope": draw("slope", outputs),
        "stride": sample.stride,
        "hff": sample.hff,
    }


def _unit(sample: Sample, draw: Draw) -> Arguments:
    """What a whole EESP unit and a down-sampler have in common: twice as many channels come in as are reduced to."""
    reduced, concatenated, outputs = sample.channels, sample.concatenated, sample.outputs
    reduce_groups = math.gcd(reduced, 4)
    return {
        "x": draw("map", sample.batch, 2 * reduced, sample.height, sample.width),
        "reduce_weight": draw("weight", reduced, 2 * reduced // reduce_groups),
        "reduce_groups": reduce_groups,
        "reduce_shift": draw("shift", reduced),
        "reduce_slope": draw("slope", reduced),
        "weight": draw("weight", len(sample.dilations), reduced, 3, 3),
        "dilations": sample.dilations,
        "pyramid_scale": draw("scale", concatenated),
        "pyramid_shift": draw("shift", concatenated),
        "pyramid_slope": draw("slope", concatenated),
        "expand_weight": draw("weight", outputs, concatenated // sample.groups),
        "groups": sample.groups,
        "shift": draw("shift", outputs),
        "hff": sample.hff,
    }


def _eesp(sample: Sample, draw: Draw) -> Arguments:
    return {
        **_unit(sample, draw),
        "residual": draw("map", sample.batch, sample.outputs, *sample.output_size),
        "slope": draw("slope", sample.outputs),
        "stride": sample.stride,
    }


def _down_sampler(sample: Sample, draw: Draw) -> Arguments:
    channels = 2 * sample.channels + sample.outputs
    return {
        **_unit(sample, draw),
        "image": draw("map", sample.batch, 3, (sample.height + 1) // 2, (sample.width + 1) // 2),
        "shortcut_weight": draw("weight", channels, 3),
        "shortcut_shift": draw("shift", channels),
        "slope": draw("slope", channels),
    }


_BUILDERS = {
    "spatial_pyramid": _spatial_pyramid,
    "group_pointwise": _group_pointwise,
    "pyramid_pointwise": _pyramid_pointwise,
    "eesp": _eesp,
    "down_sampler": _down_sampler,
}


def build(operator: str, sample: Sample, integers: bool = True) -> Arguments:
    """Keyword arguments of ``operator`` in float64, the same ones for the same sample each time."""
    purpose = f"{operator} {'integers' if integers else 'reals'}"
    return _BUILDERS[operator](sample, _draw(_generator(sample, purpose), integers))


def gradient(output: Tensor, sample: Sample, integers: bool = True) -> Tensor:
    """A gradient for ``output`` in float64."""
    return _draw(_generator(sample, f"gradient {integers}"), integers)("map", *output.shape)


def cast(
    arguments: Arguments,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    vector_dtype: torch.dtype | None = None,
    requires_grad: bool = True,
) -> Arguments:
    """Leaves in ``dtype``, the maps in ``memory_format``, the epilogue's vectors in ``vector_dtype``."""
    result: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.detach().to(vector_dtype or dtype if name in VECTORS else dtype)
            if name in MAPS:
                value = value.contiguous(memory_format=memory_format)
            value = value.requires_grad_(requires_grad)
        result[name] = value
    return result
