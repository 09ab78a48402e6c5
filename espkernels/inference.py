"""The operators of inference: whole units with their batch norms folded, and the layers around them in a network.

They take what :mod:`espkernels.freeze` makes of a model and are not differentiable themselves, unless said otherwise:
where a gradient is wanted, or no kernel runs, the same mathematics runs in plain torch operations or in the
differentiable operators of :mod:`espkernels.ops`. Maps of the result are channels_last unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espkernels import backends, ops, reference
from espkernels.layout import is_few, is_narrow, to_channels_last

__all__ = [
    "adaptive_average",
    "affine",
    "average_pool",
    "change_layout",
    "channels_last",
    "concatenate",
    "convolution",
    "down_sampler",
    "eesp",
    "global_average",
    "lowers",
    "pack_eesp",
    "pyramid_pooling",
    "resize",
    "resized_argmax",
]


def lowers(device: torch.device) -> bool:
    """Whether an autocast is active for tensors on ``device``; there is none for some, as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _runs_kernel(x: Tensor, *others: object) -> bool:
    """Whether the operator in the library may run: no argument asks for a gradient, and the device has kernels.

    Not where autocast has lowered some of the maps and weights: its rules are for torch's operations.
    """
    given = [a for a in (x, *others) if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(a.requires_grad for a in given):
        return False
    if lowers(x.device) and any(a.dim() > 1 and a.dtype != x.dtype for a in given):
        return False
    return not backends.runs_reference(x.device)


def eesp(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_groups: int,
    reduce_shift: Tensor,
    reduce_slope: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pyramid_scale: Tensor,
    pyramid_shift: Tensor,
    pyramid_slope: Tensor,
    expand_weight: Tensor,
    groups: int,
    shift: Tensor,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    hff: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """One EESP unit (paper Fig. 1c) with its batch norms folded, in the memory format of ``x``.

    Args:
        x: [B, M, H, W].
        reduce_weight: [d, M/reduce_groups]; reduce_shift, reduce_slope: [d].
        weight, dilations, stride, hff: as in :func:`espkernels.spatial_pyramid`.
        pyramid_scale, pyramid_shift, pyramid_slope: of the concatenated map [K*d].
        expand_weight: [N, K*d/groups]; shift, slope: [N]. Vectors are float32, float64 beside float64.
        residual: [B, N, H', W'], added before the PReLU; ``x`` itself in a unit of stride 1.
        packed: these weights from :func:`pack_eesp`, which saves preparing them in the call.

    Returns:
        [B, N, H', W'] with H' = (H - 1) // stride + 1.
    """
    unit = (
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, list(dilations),
        pyramid_scale, pyramid_shift, pyramid_slope, expand_weight, groups, shift, residual, slope, stride, hff,
    )  # fmt: skip
    if _runs_kernel(*unit):
        return torch.ops.espkernels.eesp.default(*unit, packed)
    reduced = ops.group_pointwise(x, reduce_weight, reduce_groups, None, reduce_shift, None, reduce_slope)
    return ops.pyramid_pointwise(
        reduced, weight, dilations, expand_weight, groups, pyramid_scale, pyramid_shift, pyramid_slope,
        None, shift, residual, slope, stride, hff,
    )  # fmt: skip


def pack_eesp(
    reduce_weight: Tensor,
    reduce_groups: int,
    weight: Tensor,
    expand_weight: Tensor,
    groups: int,
    pyramid_scale: Tensor,
    pyramid_shift: Tensor,
    pyramid_slope: Tensor,
) -> Tensor | None:
    """The weights of :func:`eesp` for channels_last, as bytes; see :func:`espkernels.ops.pack_group_pointwise`."""
    reduce = ops.pack_group_pointwise(reduce_weight, reduce_groups, True)
    rest = ops.pack_pyramid_pointwise(weight, expand_weight, groups, pyramid_scale, pyramid_shift, pyramid_slope, True)
    return None if reduce is None or rest is None else torch.cat([reduce, rest])


def down_sampler(
    x: Tensor,
    image: Tensor | None,
    reduce_weight: Tensor,
    reduce_groups: int,
    reduce_shift: Tensor,
    reduce_slope: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pyramid_scale: Tensor,
    pyramid_shift: Tensor,
    pyramid_slope: Tensor,
    expand_weight: Tensor,
    groups: int,
    shift: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_shift: Tensor | None,
    slope: Tensor,
    hff: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """The strided unit (paper section 3.2, Fig. 2): ``prelu(concat(average_pool(x), eesp(x)) + shortcut(image))``.

    Args:
        x: [B, M, H, W].
        image: the image pooled to the size of the result and convolved to I channels [B, I, H', W'], or None.
        shortcut_weight: [M+N, I]; shortcut_shift: [M+N]; None without ``image``.
        slope: [M+N]. The others are those of :func:`eesp`.

    Returns:
        [B, M+N, H', W'] with H' = (H - 1) // 2 + 1, in channels_last.
    """
    unit = (
        reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, list(dilations),
        pyramid_scale, pyramid_shift, pyramid_slope, expand_weight, groups, shift,
    )  # fmt: skip
    if _runs_kernel(x, image, *unit, shortcut_weight, shortcut_shift, slope):
        return torch.ops.espkernels.down_sampler.default(
            x, image, *unit, shortcut_weight, shortcut_shift, slope, hff, packed
        )
    x = to_channels_last(x)
    y = torch.cat([reference.average_pool(x), eesp(x, *unit, None, None, 2, hff)], dim=1)
    if image is None:
        return reference.epilogue(y, slope=slope.to(y.dtype))
    assert shortcut_weight is not None
    return ops.group_pointwise(image, shortcut_weight, 1, None, shortcut_shift, y, slope)


def convolution(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with its shift and PReLU: [B, M, H, W] -> [B, N, H', W'].

    The kernels are for a few dense input channels (the first convolution of a network), for 3x3 filters in eight groups
    or more of at most eight inputs, both differentiable any number of times without shift and slope, and for depthwise
    3x3 filters; other convolutions run on torch's own.
    """
    depthwise = groups == x.shape[1] == weight.shape[0] and tuple(weight.shape[2:]) == (3, 3) and padding == dilation
    differentiable = is_few(weight, dilation, groups) or is_narrow(weight, stride, padding, dilation, groups)
    trains = differentiable and shift is None and slope is None and not backends.runs_reference(x.device)
    if trains or ((depthwise or differentiable) and _runs_kernel(x, weight, shift, slope)):
        return torch.ops.espkernels.convolution.default(x, weight, shift, slope, stride, padding, dilation, groups)
    x = to_channels_last(x)
    shift, slope = (None if v is None else v.to(x.dtype) for v in (shift, slope))
    return reference.convolution(x, weight, shift, slope, stride, padding, dilation, groups)


def average_pool(x: Tensor) -> Tensor:
    """3x3 means in steps of 2, the padding of one row and column counted, in the memory format of ``x``.

    Differentiable any number of times; ``x`` is kept for its shape alone.
    """
    if not backends.runs_reference(x.device):
        return torch.ops.espkernels.average_pool.default(x)
    return reference.average_pool(x)


def global_average(x: Tensor) -> Tensor:
    """The mean of each channel: [B, C, H, W] -> [B, C, 1, 1]; half types are summed in float32.

    Differentiable any number of times; the gradient is a view of one number a channel, not a map.
    """
    if not backends.runs_reference(x.device):
        return torch.ops.espkernels.global_average.default(x)
    return reference.global_average(x)


def resize(
    x: Tensor,
    height: int,
    width: int,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """Bilinear resizing with corners aligned, and the merge of a decoder in the same pass.

    ``prelu((resized + skip * sigmoid(gate)) * scale + shift, slope)``; None leaves a step out.

    Args:
        x: [B, C, H, W]; height, width: of the result.
        skip: [B, C, height, width]; gate: [B, C, 1, 1]; scale, shift, slope: [C].

    Returns:
        [B, C, height, width] in channels_last. Differentiable any number of times where it only resizes.
    """
    others = skip, gate, scale, shift, slope
    only_resizes = all(other is None for other in others)
    if _runs_kernel(x, *others) or (only_resizes and not backends.runs_reference(x.device)):
        return torch.ops.espkernels.resize.default(x, height, width, skip, gate, scale, shift, slope)
    x = to_channels_last(x)
    scale, shift, slope = (None if v is None else v.to(x.dtype) for v in (scale, shift, slope))
    return reference.resize(x, height, width, skip, gate, scale, shift, slope)


def resized_argmax(x: Tensor, height: int, width: int, wide: bool = False) -> Tensor:
    """The class of every pixel: the channel of the largest of the logits ``x`` [B, C, H, W] after :func:`resize`.

    As torch.argmax: of equal numbers the first channel, and NaN before every number. The resized map, 80 bytes a pixel
    for 20 classes, is never stored; half types are compared before they would have been rounded. Not differentiable.

    Returns:
        [B, height, width] uint8, or int64 where ``wide`` or C is above 256.
    """
    if _runs_kernel(x):
        return torch.ops.espkernels.resized_argmax.default(x, height, width, wide)
    return reference.resized_argmax(x, height, width, wide)


def affine(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """``prelu(x * scale + shift + residual, slope)``; None leaves a step out.

    Args:
        x: [B, C, H, W]; residual: the same; scale, shift, slope: [C], float32, float64 beside float64.

    Returns:
        [B, C, H, W] in channels_last.
    """
    if _runs_kernel(x, scale, shift, residual, slope):
        return torch.ops.espkernels.affine.default(x, scale, shift, residual, slope)
    return reference.affine(x, scale, shift, residual, slope)


def change_layout(x: Tensor, channels_last: bool) -> Tensor:
    """A copy of ``x`` [B, C, H, W] in channels_last, or contiguous."""
    if _runs_kernel(x):
        return torch.ops.espkernels.change_layout.default(x, channels_last)
    return reference.change_layout(x, channels_last)


def channels_last(x: Tensor) -> Tensor:
    """``x`` [B, C, H, W] itself where it is in channels_last, else a copy that is."""
    if backends.runs_reference(x.device):
        return to_channels_last(x)
    return x if x.is_contiguous(memory_format=torch.channels_last) else change_layout(x, True)


def concatenate(maps: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat`` of maps of one dtype: along the channels of [B, C, H, W] to channels_last, else to contiguous."""
    if _runs_kernel(*maps):
        return torch.ops.espkernels.concatenate.default(list(maps), dim)
    return reference.concatenate(maps, dim)


def adaptive_average(x: Tensor, height: int, width: int) -> Tensor:
    """Means over windows that share the map out evenly: [B, C, H, W] -> [B, C, height, width] in channels_last.

    Differentiable any number of times.
    """
    if not backends.runs_reference(x.device):
        return torch.ops.espkernels.adaptive_average.default(x, height, width)
    return reference.adaptive_average(to_channels_last(x), height, width)


def pyramid_pooling(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    enlarged: int,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    merge_weight: Tensor,
    merge_shift: Tensor,
    merge_slope: Tensor,
) -> Tensor:
    """The branches of efficient pyramid pooling and their merge (see :func:`espkernels.reference.pyramid_pooling`).

    Args:
        x: the projected map [B, p, H, W].
        weight: one depthwise 3x3 filter a branch and channel [S, p, 3, 3], S at most 8.
        sizes: height and width of each branch, one after the other.
        enlarged: how many of them, the first ones, enlarge the map.
        scale, shift, slope: of the concatenated map [S*p].
        merge_weight: [p, S, 3, 3]; merge_shift, merge_slope: [p].

    Returns:
        [B, p, H, W] in channels_last.
    """
    if _runs_kernel(x, weight, scale, shift, slope, merge_weight, merge_shift, merge_slope):
        return torch.ops.espkernels.pyramid_pooling.default(
            x, weight, list(sizes), enlarged, scale, shift, slope, merge_weight, merge_shift, merge_slope
        )
    x = to_channels_last(x)
    vectors = (v.to(x.dtype) for v in (scale, shift, slope, merge_shift, merge_slope))
    scale, shift, slope, merge_shift, merge_slope = vectors
    return reference.pyramid_pooling(
        x, weight, sizes, enlarged, scale, shift, slope, merge_weight, merge_shift, merge_slope
    )
