"""The gradient of a map through the batch norm behind it, once the sums of the whole batch are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of
from espkernels.triton.configuration import pyramid_tile
from espkernels.triton.epilogue import prelu_affine
from espkernels.triton.launch import compute_type, launch, tiles
from espkernels.triton.normalise import Norm
from espkernels.triton.taps import place_channels, pointers

__all__ = ["NormGradient", "batch_norm_backward"]


class NormGradient(NamedTuple):
    """``grad * of_grad + map * of_map + constant``, each a vector of the map's channels.

    The last two are None where the moments are not the batch's: nothing of the map may then reach the gradient.
    """

    of_grad: Any
    of_map: Any
    constant: Any


@triton.jit
def batch_norm_backward_kernel(
    grad,  # [B, C, H, W]
    grad_strides,  # of image, channel, row, column
    x,  # [B, C, H, W]
    x_strides,
    norm,  # with its PReLU, behind which grad is; or None: grad is behind the norm alone
    gradient,
    grad_x,  # [B, C, H, W]
    grad_x_strides,
    channels,
    height,
    width,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """One tile. Bytes: two maps read, one written."""
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, height, width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    there = valid[:, None] & ((row < height) & (column < width))[None, :]
    value = tl.load(pointers(grad, grad_strides, image, channel, row, column), mask=there, other=0).to(TYPE)
    map = tl.load(pointers(x, x_strides, image, channel, row, column), mask=there, other=0).to(TYPE)
    if norm is not None:
        before = prelu_affine(map, norm.scale, norm.shift, None, channel, valid, TYPE)
        slope = tl.load(norm.slope + channel, mask=valid, other=0).to(TYPE)[:, None]
        value = tl.where(before > 0, value, value * slope)
    value *= tl.load(gradient.of_grad + channel, mask=valid, other=0).to(TYPE)[:, None]
    if gradient.of_map is not None:
        value += map * tl.load(gradient.of_map + channel, mask=valid, other=0).to(TYPE)[:, None]
        value += tl.load(gradient.constant + channel, mask=valid, other=0).to(TYPE)[:, None]
    to = pointers(grad_x, grad_x_strides, image, channel, row, column)
    tl.store(to, value.to(grad_x.dtype.element_ty), mask=there)


def batch_norm_backward(grad: Tensor, x: Tensor, norm: Norm | None, gradient: NormGradient, grad_x: Tensor) -> None:
    """Writes the gradient for x [B, C, H, W] to ``grad_x``, which may be ``grad``."""
    batch, channels, height, width = x.shape
    tile = pyramid_tile(channels, height, width, layout_of(x) == torch.channels_last)
    launch(
        batch_norm_backward_kernel, batch * tiles(tile, channels, height, width),
        grad, grad.stride(), x, x.stride(), norm, gradient, grad_x, grad_x.stride(), channels, height, width,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
