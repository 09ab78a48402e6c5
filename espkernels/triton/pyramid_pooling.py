"""The branches of efficient pyramid pooling and their merge: three launches a branch, one where the size stays.

Every branch ends in its channels of the concatenated map, batch norm and PReLU applied, and the merge reads the
channels that the shuffle would bring together where they are: nothing is concatenated or shuffled.
Bytes, in numbers a pixel of the map of p channels: p read and written twice a branch, of the branch's own size in
between; the merge reads S * p and writes p.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from espkernels.layout import empty_pixels
from espkernels.triton import adaptive_average, resize
from espkernels.triton.checks import check_map, check_tensor, check_vectors
from espkernels.triton.convolution import run as convolve

__all__ = ["pyramid_pooling"]

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]


def pyramid_pooling(
    x: Tensor, weight: Tensor, sizes: Sequence[int], enlarged: int, scale: Tensor, shift: Tensor, slope: Tensor,
    merge_weight: Tensor, merge_shift: Tensor, merge_slope: Tensor,
) -> Tensor:  # fmt: skip
    """x [B, p, H, W], weight [S, p, 3, 3], merge_weight [p, S, 3, 3] -> [B, p, H, W] in channels_last."""
    check_map("x", x)
    channels, height, width = x.shape[1:]
    branches = len(weight)
    check_tensor("weight", weight, x, (branches, channels, 3, 3))
    check_vectors(x, branches * channels, scale=scale, shift=shift, slope=slope)
    check_tensor("merge_weight", merge_weight, x, (channels, branches, 3, 3))
    check_vectors(x, channels, merge_shift=merge_shift, merge_slope=merge_slope)
    if len(sizes) != 2 * branches or min(sizes) < 1:
        raise RuntimeError(f"sizes: got {list(sizes)}, expected a height and a width of each of {branches} branches")
    concatenated = empty_pixels(x, branches * channels, height, width)
    plain = (None, None, None)

    def depthwise(map_: Tensor, b: int, vectors: Vectors, to: Tensor) -> None:
        convolve(map_, weight[b].unsqueeze(1), *vectors, 1, 1, 1, channels, (1, 1), to)

    for b in range(branches):
        mine, size = slice(b * channels, (b + 1) * channels), (sizes[2 * b], sizes[2 * b + 1])
        target, vectors = concatenated[:, mine], (scale[mine], shift[mine], slope[mine])
        if size == (height, width):
            depthwise(x, b, vectors, target)
            continue
        convolved = empty_pixels(x, channels, *size)
        if b < enlarged:
            depthwise(resize.resize(x, *size), b, plain, convolved)
            adaptive_average.run(convolved, *vectors, target)
        else:
            depthwise(adaptive_average.adaptive_average(x, *size), b, plain, convolved)
            resize.run(convolved, None, None, *vectors, target)
    out = empty_pixels(x, channels, height, width)
    # Input j of group g is branch j's channel g.
    convolve(concatenated, merge_weight, None, merge_shift, merge_slope, 1, 1, 1, channels, (1, channels), out)
    return out
