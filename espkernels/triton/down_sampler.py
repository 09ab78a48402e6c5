"""The strided unit for inference: pooled input beside a strided EESP unit, plus the long-range shortcut, activated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from espkernels.layout import empty_pixels, out_size
from espkernels.triton.average_pool import run as run_average_pool
from espkernels.triton.checks import check_map, check_tensor, check_vectors
from espkernels.triton.eesp import run as run_eesp
from espkernels.triton.unit_output import shortcut_to

__all__ = ["down_sampler"]


def down_sampler(
    x: Tensor, image: Tensor | None, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor,
    reduce_slope: Tensor, weight: Tensor, dilations: Sequence[int], pyramid_scale: Tensor, pyramid_shift: Tensor,
    pyramid_slope: Tensor, expand_weight: Tensor, groups: int, shift: Tensor, shortcut_weight: Tensor | None,
    shortcut_shift: Tensor | None, slope: Tensor, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, M, H, W], image [B, few, H', W'] -> [B, M+N, H', W'] in the format of ``x``; ``packed`` is for CPUs.

    Both halves write to their channels of the result, so nothing is concatenated. Bytes: x is read twice, the second
    time from L2 where it fits; each number of the result is written once and the image read with it.
    """
    check_map("x", x)
    channels, both = x.shape[1], x.shape[1] + expand_weight.shape[0]
    out = empty_pixels(x, both, out_size(x.shape[2], 2), out_size(x.shape[3], 2))
    check_vectors(x, both, slope=slope, shortcut_shift=shortcut_shift)
    if image is not None and shortcut_weight is not None:
        check_map("image", image)
        check_tensor("image", image, x, (x.shape[0], image.shape[1], *out.shape[2:]))
        check_tensor("shortcut_weight", shortcut_weight, x, (both, image.shape[1]))
    pooled, expanded = out[:, :channels], out[:, channels:]

    of_pooled, of_expanded = (
        shortcut_to(own, image, shortcut_weight, shortcut_shift) for own in (slice(channels), slice(channels, both))
    )
    run_average_pool(x, slope[:channels], of_pooled, pooled)
    run_eesp(
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, dilations,
        (pyramid_scale, pyramid_shift, pyramid_slope), expand_weight, groups, shift, None, slope[channels:], 2, hff,
        of_expanded, expanded,
    )  # fmt: skip
    return out
