"""The mean of each channel, in two stages: a program for each of a few parts of an image, whose sums are then added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from espkernels.layout import layout_of, vector_dtype
from espkernels.triton.checks import check_map
from espkernels.triton.configuration import average_tile, gradient_chunks
from espkernels.triton.launch import compute_type, flat_map, launch
from espkernels.triton.partial_sums import add_partials

__all__ = ["global_average"]


@triton.jit
def channel_sums_kernel(
    x,  # [images, C, pixels of all that lie together]
    x_strides,  # of image, channel, pixel
    partials,  # [parts, B, C]
    batch,
    channels,
    pixels,  # of an image of the batch
    parts,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The sums of CHANNELS channels over every parts-th block of PIXELS pixels. Bytes: each number read once."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    part = program // blocks % parts
    image = program // blocks // parts
    valid = channel < channels
    at = x + image * x_strides[0] + channel[:, None] * x_strides[1]
    sums = tl.zeros((CHANNELS, PIXELS), TYPE)
    for first in range(part * PIXELS, pixels, parts * PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        inside = valid[:, None] & (pixel < pixels)[None, :]
        sums += tl.load(at + (pixel * x_strides[2])[None, :], mask=inside, other=0).to(TYPE)
    tl.store(partials + (part * batch + image) * channels + channel, tl.sum(sums, axis=1), mask=valid)


def global_average(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, C, 1, 1], summed in float32 or float64."""
    check_map("x", x)
    batch, channels, height, width = x.shape
    pixels = height * width
    out = x.new_empty((batch, channels, 1, 1))
    layout = layout_of(x)
    flat = flat_map(x, layout)
    # Pixels of a channels_last batch are one image; those of one image of it follow each other.
    strides = (flat.stride(2) * pixels if flat.shape[0] == 1 else flat.stride(0), flat.stride(1), flat.stride(2))
    tile = average_tile(channels, pixels, layout == torch.channels_last)
    blocks = -(-channels // tile.channels)
    parts = gradient_chunks(-(-pixels // tile.pixels), batch * blocks)
    partials = torch.empty((parts, batch, channels), dtype=vector_dtype(x.dtype), device=x.device)
    launch(
        channel_sums_kernel, batch * parts * blocks, flat, strides, partials, batch, channels, pixels, parts,
        CHANNELS=tile.channels, PIXELS=tile.pixels, TYPE=compute_type(x), warps=tile.warps,
    )  # fmt: skip
    add_partials(partials, out, pixels)
    return out
