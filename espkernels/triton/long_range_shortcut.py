"""The end of a down-sampler in training: pooled beside expanded map, plus the image's shortcut, activated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import empty_pixels
from espkernels.triton.affine import run as run_affine
from espkernels.triton.checks import check_map, check_tensor, check_vectors
from espkernels.triton.configuration import sums_tile
from espkernels.triton.group_pointwise import group_pointwise_backward_input
from espkernels.triton.group_pointwise_backward_weight import group_pointwise_backward_weight
from espkernels.triton.launch import compute_type, launch, tiles
from espkernels.triton.norm_sums import room_for_sums
from espkernels.triton.partial_sums import add_partials
from espkernels.triton.taps import place_channels, pointers, tile_number
from espkernels.triton.unit_output import Shortcut, add_shortcut, shortcut_to

__all__ = ["long_range_shortcut", "long_range_shortcut_backward"]


@triton.jit
def long_range_shortcut_backward_kernel(
    grad,  # [B, C, H, W]
    grad_strides,  # of image, channel, row, column
    x,  # [B, C, H, W], one of the two maps
    x_strides,
    slope,  # [C]
    shortcut,  # of a down-sampler, or None
    grad_x,  # [B, C, H, W]
    grad_x_strides,
    sums,  # [tiles, 2, C]
    channels,
    height,
    width,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The gradient in front of the PReLU of one tile, and its sums for shift and slope.

    Bytes: two maps and the image read, one map written.
    """
    program = tl.program_id(0).to(tl.int64)
    channel, image, row, column = place_channels(program, channels, height, width, CHANNELS, ROWS, COLUMNS)
    valid = channel < channels
    inside = (row < height) & (column < width)
    there = valid[:, None] & inside[None, :]
    tile = tile_number(program, image, height, width, ROWS, COLUMNS)
    value = tl.load(pointers(x, x_strides, image, channel, row, column), mask=there, other=0).to(TYPE)
    value = add_shortcut(value, shortcut, channel, valid, image, row, column, inside, TYPE)
    behind = tl.load(pointers(grad, grad_strides, image, channel, row, column), mask=there, other=0).to(TYPE)
    factor = tl.load(slope + channel, mask=valid, other=0).to(TYPE)[:, None]
    front = tl.where(value > 0, behind, behind * factor)
    tl.store(
        pointers(grad_x, grad_x_strides, image, channel, row, column), front.to(grad_x.dtype.element_ty), mask=there
    )
    to = sums + tile * 2 * channels + channel
    tl.store(to, tl.sum(front, axis=1), mask=valid)
    tl.store(to + channels, tl.sum(tl.where(value > 0, 0, behind * value), axis=1), mask=valid)


def _check(
    pooled: Tensor, expanded: Tensor, image: Tensor | None, weight: Tensor | None, shift: Tensor | None, slope: Tensor
) -> None:
    for name, map in (("pooled", pooled), ("expanded", expanded)):
        check_map(name, map)
        check_tensor(name, map, pooled, (pooled.shape[0], map.shape[1], *pooled.shape[2:]))
    channels = pooled.shape[1] + expanded.shape[1]
    check_vectors(pooled, channels, slope=slope, shift=shift)
    if not (image is None) == (weight is None) == (shift is None):
        raise RuntimeError("image, weight, shift: got some of them, expected all or none")
    if image is not None:
        check_map("image", image)
        check_tensor("image", image, pooled, (pooled.shape[0], image.shape[1], *pooled.shape[2:]))
        check_tensor("weight", weight, pooled, (channels, image.shape[1]))


def _halves(pooled: Tensor, expanded: Tensor) -> tuple[tuple[Tensor, slice], tuple[Tensor, slice]]:
    """Each map, and which channels of the result are its own."""
    channels, both = pooled.shape[1], pooled.shape[1] + expanded.shape[1]
    return (pooled, slice(channels)), (expanded, slice(channels, both))


def long_range_shortcut(
    pooled: Tensor, expanded: Tensor, image: Tensor | None, weight: Tensor | None, shift: Tensor | None, slope: Tensor
) -> Tensor:
    """[B, M, H, W], [B, N, H, W] -> [B, M+N, H, W] in channels_last: see :mod:`espkernels.training_layers`.

    Both maps are written where they belong, so nothing is concatenated. Bytes: each number read and written once.
    """
    _check(pooled, expanded, image, weight, shift, slope)
    out = empty_pixels(pooled, len(slope), *pooled.shape[2:])
    for map, own in _halves(pooled, expanded):
        run_affine(map, None, None, None, slope[own], out[:, own], shortcut_to(own, image, weight, shift))
    return out


def long_range_shortcut_backward(
    grad: Tensor, pooled: Tensor, expanded: Tensor, image: Tensor | None, weight: Tensor | None, shift: Tensor | None,
    slope: Tensor, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the arguments, empty where they are not there; of maps also where they are not ``wanted``.

    The gradient in front of the PReLU is read once more for the image's and once for the weight's, both few channels.
    """
    _check(pooled, expanded, image, weight, shift, slope)
    check_tensor("grad", grad, pooled, (pooled.shape[0], len(slope), *pooled.shape[2:]))
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if weight is not None else None
    fronts, vectors, grad_image = [], [], None
    for map, own in _halves(pooled, expanded):
        added = shortcut_to(own, image, weight, shift)
        front, of_vectors = _in_front(grad[:, own], map, added, slope[own])
        if added is not None and image is not None and grad_weight is not None:
            group_pointwise_backward_weight(front, image, 1, out=grad_weight[own])
            if wanted[2]:
                grad_image = group_pointwise_backward_input(front, added.weight, 1, grad_image)
        fronts.append(front)
        vectors.append(of_vectors)
    grad_shift, grad_slope = torch.cat(vectors, 1)
    nothing, no_numbers = pooled.new_empty(0), slope.new_empty(0)
    return (
        *(front if want else nothing for front, want in zip(fronts, wanted, strict=False)),
        nothing if grad_image is None else grad_image,
        no_numbers if grad_weight is None else grad_weight,
        no_numbers if image is None else grad_shift,
        grad_slope,
    )


def _in_front(grad: Tensor, x: Tensor, added: Shortcut | None, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of one map [B, C, H, W] in channels_last, and of shift and slope [2, C]."""
    batch, channels, height, width = x.shape
    front = empty_pixels(x, channels, height, width)
    tile = sums_tile(channels, height, width, True)
    sums = room_for_sums(x, batch * tiles(tile, 1, height, width), channels, 2)
    launch(
        long_range_shortcut_backward_kernel, batch * tiles(tile, channels, height, width),
        grad, grad.stride(), x, x.stride(), slope.contiguous(), added, front, front.stride(), sums,
        channels, height, width,
        CHANNELS=tile.channels, ROWS=tile.rows, COLUMNS=tile.columns, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    vectors = slope.new_empty((2, channels))
    add_partials(sums, vectors)
    return front, vectors
