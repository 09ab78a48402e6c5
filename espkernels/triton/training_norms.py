"""The arithmetic of a unit's batch norms between its kernels: a few numbers a channel, in float64, on the device.

The second stage of what the kernels leave: one launch a norm and direction, whose programs take a few channels each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from espkernels.triton.batch_norm_backward import NormGradient
from espkernels.triton.launch import launch
from espkernels.triton.moments import Moments, joined
from espkernels.triton.norm_sums import BehindPrelu
from espkernels.triton.normalise import Norm

__all__ = ["TrainingNorm", "split"]

# Of one program: 16 channels are a sector or two of each tile's row.
TILES, CHANNELS = 64, 16


@triton.jit
def norm_kernel(
    moments,  # or None: mean and variance are there
    weight,  # [C]
    bias,
    mean,  # [C], float64; so the variance
    variance,
    scale,  # [C]
    shift,
    tiles,
    channels,
    EPS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean, variance, scale and shift of CHANNELS channels. Bytes: 8 a channel and tile, twice, from L2."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    if moments is not None:
        m, v = joined(moments, channel, valid, tiles, channels, TILES, CHANNELS)
        tl.store(mean + channel, m, mask=valid)
        tl.store(variance + channel, v, mask=valid)
    else:
        m = tl.load(mean + channel, mask=valid, other=0)
        v = tl.load(variance + channel, mask=valid, other=1)
    factor = tl.load(weight + channel, mask=valid, other=0).to(tl.float64) / tl.sqrt(v + tl.full((), EPS, tl.float64))
    offset = tl.load(bias + channel, mask=valid, other=0).to(tl.float64) - m * factor
    tl.store(scale + channel, factor.to(scale.dtype.element_ty), mask=valid)
    tl.store(shift + channel, offset.to(shift.dtype.element_ty), mask=valid)


@triton.jit
def norm_gradient_kernel(
    sums,  # [tiles, 3, C]: see norm_sums.py
    weight,  # [C]
    mean,  # [C], float64; so the variance
    variance,
    gradient,  # where the numbers of the norm's own gradient go
    grad_weight,  # [C]
    grad_bias,
    grad_slope,  # or None
    tiles,
    channels,
    pixels,
    EPS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of CHANNELS channels: TILES sums in ascending order, which then add up. Bytes: the sums once."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    tile = tl.arange(0, TILES)
    grads = tl.zeros((TILES, CHANNELS), tl.float64)
    centred = tl.zeros((TILES, CHANNELS), tl.float64)
    slopes = tl.zeros((TILES, CHANNELS), tl.float64)
    for first in range(0, tiles, TILES):
        number = (first + tile).to(tl.int64)
        there = (number < tiles)[:, None] & valid[None, :]
        at = sums + number[:, None] * 3 * channels + channel[None, :]
        grads += tl.load(at, mask=there, other=0).to(tl.float64)
        centred += tl.load(at + channels, mask=there, other=0).to(tl.float64)
        if grad_slope is not None:
            slopes += tl.load(at + 2 * channels, mask=there, other=0).to(tl.float64)
    of_bias = tl.sum(grads, axis=0)
    # The kernels took the mean in their own type, which a mean far from zero would show.
    m = tl.load(mean + channel, mask=valid, other=0)
    of_centred = tl.sum(centred, axis=0) + (m.to(sums.dtype.element_ty).to(tl.float64) - m) * of_bias
    squares = tl.load(variance + channel, mask=valid, other=1) + tl.full((), EPS, tl.float64)
    deviation = tl.sqrt(squares)
    tl.store(grad_bias + channel, of_bias.to(grad_bias.dtype.element_ty), mask=valid)
    tl.store(grad_weight + channel, (of_centred / deviation).to(grad_weight.dtype.element_ty), mask=valid)
    if grad_slope is not None:
        tl.store(grad_slope + channel, tl.sum(slopes, axis=0).to(grad_slope.dtype.element_ty), mask=valid)
    of_grad = tl.load(weight + channel, mask=valid, other=0).to(tl.float64) / deviation
    tl.store(gradient.of_grad + channel, of_grad.to(gradient.of_grad.dtype.element_ty), mask=valid)
    if gradient.of_map is not None:
        count = tl.full((), pixels, tl.int64).to(tl.float64)
        of_map = -of_grad * of_centred / (count * squares)
        constant = -of_grad * of_bias / count - of_map * m
        tl.store(gradient.of_map + channel, of_map.to(gradient.of_map.dtype.element_ty), mask=valid)
        tl.store(gradient.constant + channel, constant.to(gradient.constant.dtype.element_ty), mask=valid)


@dataclass(frozen=True)
class TrainingNorm:
    """One batch norm with its PReLU; each vector has a number for each of its channels and lies dense in memory."""

    weight: Tensor
    bias: Tensor
    slope: Tensor | None
    mean: Tensor  # float64; so the variance
    variance: Tensor
    eps: float
    batch_statistics: bool

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        channels = len(self.weight)
        launch(kernel, -(-channels // CHANNELS), *arguments, EPS=self.eps, TILES=TILES, CHANNELS=CHANNELS)

    def normalise(self, moments: Moments | None = None) -> Norm:
        """How the map is read, by the moments of the batch, or where None are given by those known before."""
        scale, shift = self.weight.new_empty((2, len(self.weight))).unbind()
        self._launch(
            norm_kernel, moments, self.weight, self.bias, self.mean, self.variance, scale, shift,
            0 if moments is None else len(moments.counts), len(self.weight),
        )  # fmt: skip
        return Norm(scale, shift, self.slope)

    def behind(self, map: Tensor, norm: Norm) -> BehindPrelu:
        return BehindPrelu(map, map.stride(), norm.scale, norm.shift, self.slope, self.mean)

    def gradient(
        self, sums: Tensor, pixels: int, grad_weight: Tensor, grad_bias: Tensor, grad_slope: Tensor | None
    ) -> NormGradient:
        """Writes the gradients of the vectors; ``pixels`` are those of the batch."""
        tiles, _, channels = sums.shape
        of_grad, of_map, constant = self.weight.new_empty((3, channels)).unbind()
        gradient = NormGradient(of_grad, *((of_map, constant) if self.batch_statistics else (None, None)))
        self._launch(
            norm_gradient_kernel, sums, self.weight, self.mean, self.variance, gradient, grad_weight, grad_bias,
            grad_slope if self.slope is not None else None, tiles, channels, pixels,
        )  # fmt: skip
        return gradient


def split(vector: Tensor, channels: Sequence[int]) -> tuple[Tensor | None, ...]:
    """The vectors of norms that lie behind one another; None for one that ``vector`` does not reach."""
    ends = list(accumulate(channels))
    return tuple(
        vector[end - count : end] if end <= len(vector) else None for count, end in zip(channels, ends, strict=True)
    )
