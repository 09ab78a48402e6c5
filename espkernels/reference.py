"""The specification: every operator of this library in plain torch operations.

Tests compare each kernel with these functions in float64, benchmarks check against them before timing, and they are
what runs where no kernel can. They are written to be read beside the paper, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from espkernels.layout import to_channels_last

__all__ = [
    "adaptive_average",
    "affine",
    "average_pool",
    "change_layout",
    "concatenate",
    "convolution",
    "down_sampler",
    "eesp",
    "epilogue",
    "global_average",
    "group_pointwise",
    "pyramid_pointwise",
    "pyramid_pooling",
    "resize",
    "resized_argmax",
    "spatial_pyramid",
]


def spatial_pyramid(x: Tensor, weight: Tensor, dilations: Sequence[int], stride: int = 1, hff: bool = True) -> Tensor:
    """K depthwise 3x3 convolutions of one map, one dilation each, fused hierarchically and concatenated (Fig. 1b, 1c).

    ``x`` [B, d, H, W], ``weight`` [K, d, 3, 3] -> [B, K*d, H', W'], branch-major, with H' = (H - 1) // stride + 1.
    With ``hff`` (paper section 3.1) output k is the sum of branches 1..k, without it branch k alone.
    """
    channels = x.shape[1]
    outputs: list[Tensor] = []
    for branch_weight, dilation in zip(weight, dilations, strict=True):
        branch = F.conv2d(
            x, branch_weight.unsqueeze(1), stride=stride, padding=dilation, dilation=dilation, groups=channels
        )
        outputs.append(outputs[-1] + branch if hff and outputs else branch)
    return torch.cat(outputs, dim=1)


def epilogue(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """``prelu(x * scale + shift + residual, slope)``: one scale, shift and slope a channel; None leaves a step out."""
    if scale is not None:
        x = x * scale.view(1, -1, 1, 1)
    if shift is not None:
        x = x + shift.view(1, -1, 1, 1)
    if residual is not None:
        x = x + residual
    if slope is not None:
        x = torch.where(x > 0, x, x * slope.view(1, -1, 1, 1))
    return x


def group_pointwise(
    x: Tensor,
    weight: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """1x1 convolution in ``groups`` groups, then :func:`epilogue`.

    ``x`` [B, M, H, W], ``weight`` [N, M/groups] -> [B, N, H, W]; ``scale``, ``shift``, ``slope`` [N], ``residual`` like
    the result.
    """
    return epilogue(F.conv2d(x, weight[:, :, None, None], groups=groups), scale, shift, residual, slope)


def pyramid_pointwise(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pointwise_weight: Tensor,
    groups: int,
    pyramid_scale: Tensor | None = None,
    pyramid_shift: Tensor | None = None,
    pyramid_slope: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
    stride: int = 1,
    hff: bool = True,
) -> Tensor:
    """:func:`spatial_pyramid`, an affine and PReLU a channel, then :func:`group_pointwise` with its epilogue.

    This is the EESP unit after its reduction (Fig. 1c) with the statistics of both batch norms known.
    ``pyramid_*`` [K*d] belong to the concatenated map, ``scale``, ``shift``, ``slope`` [N] to the result.
    """
    z = epilogue(spatial_pyramid(x, weight, dilations, stride, hff), pyramid_scale, pyramid_shift, None, pyramid_slope)
    return group_pointwise(z, pointwise_weight, groups, scale, shift, residual, slope)


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
) -> Tensor:
    """One EESP unit with its batch norms folded (Fig. 1c): reduce to d channels, then :func:`pyramid_pointwise`.

    ``x`` [B, M, H, W], ``reduce_weight`` [d, M/reduce_groups] -> [B, N, H', W'].
    """
    reduced = group_pointwise(x, reduce_weight, reduce_groups, None, reduce_shift, None, reduce_slope)
    return pyramid_pointwise(
        reduced, weight, dilations, expand_weight, groups, pyramid_scale, pyramid_shift, pyramid_slope,
        None, shift, residual, slope, stride, hff,
    )  # fmt: skip


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
) -> Tensor:
    """The strided unit with its long-range shortcut (section 3.2, Fig. 2), batch norms folded.

    ``x`` [B, M, H, W], ``image`` [B, I, H', W'] (already pooled and convolved) -> [B, M+N, H', W'], the pooled map
    first; ``shortcut_weight`` [M+N, I], ``shortcut_shift`` and ``slope`` [M+N].
    """
    unit = eesp(
        x, reduce_weight, reduce_groups, reduce_shift, reduce_slope, weight, dilations,
        pyramid_scale, pyramid_shift, pyramid_slope, expand_weight, groups, shift, None, None, 2, hff,
    )  # fmt: skip
    y = torch.cat([average_pool(x), unit], dim=1)
    if image is not None:
        assert shortcut_weight is not None
        y = y + group_pointwise(image, shortcut_weight, 1, None, shortcut_shift)
    return epilogue(y, slope=slope)


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
    """Convolution, shift and PReLU: ``x`` [B, M, H, W], ``weight`` [N, M/groups, h, w] -> [B, N, H', W']."""
    return epilogue(F.conv2d(x, weight, None, stride, padding, dilation, groups), None, shift, None, slope)


def average_pool(x: Tensor) -> Tensor:
    """3x3 means in steps of 2; the padding of one row and column counts. [B, C, H, W] -> [B, C, H', W']."""
    return F.avg_pool2d(x, kernel_size=3, stride=2, padding=1)


def global_average(x: Tensor) -> Tensor:
    """The mean of each channel: [B, C, H, W] -> [B, C, 1, 1]."""
    return x.mean((2, 3), keepdim=True)


def recurrence(
    gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """An LSTM's cell step by step.

    ``gates`` [T, B, 4 H], ``weight`` [4 H, H], ``bias`` [4 H], ``hidden`` and ``cell`` [B, H] -> outputs [T, B, H] and
    the last cell.
    """
    bias = None if bias is None else bias.to(gates.dtype)
    outputs = []
    for step in gates:
        entry, forget, candidate, exit_ = (step + F.linear(hidden, weight, bias)).chunk(4, dim=1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(entry) * torch.tanh(candidate)
        hidden = torch.sigmoid(exit_) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs) if len(gates) else gates.new_empty((0, *hidden.shape)), cell


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
    """Bilinear resizing with corners aligned, plus ``skip * sigmoid(gate)``, then :func:`epilogue`.

    ``x`` [B, C, H, W], ``skip`` [B, C, height, width], ``gate`` [B, C, 1, 1] -> [B, C, height, width].
    """
    y = F.interpolate(x, (height, width), mode="bilinear", align_corners=True)
    if skip is not None:
        y = y + (skip if gate is None else skip * gate.sigmoid())
    return epilogue(y, scale, shift, None, slope)


def resized_argmax(x: Tensor, height: int, width: int, wide: bool = False) -> Tensor:
    """The channel with the largest number of each pixel of :func:`resize`: ``x`` [B, C, H, W] -> [B, height, width].

    As torch.argmax: of equal numbers the first channel, and NaN before every number. uint8, or int64 where ``wide`` or
    C is above 256.
    """
    winner = resize(x, height, width).argmax(1)
    return winner if wide or x.shape[1] > 256 else winner.to(torch.uint8)


def affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None
) -> Tensor:
    """:func:`epilogue` of a map that no operator above has made: [B, C, H, W] -> the same in channels_last."""
    scale, shift, slope = (None if v is None else v.to(x.dtype) for v in (scale, shift, slope))
    return epilogue(to_channels_last(x), scale, shift, residual, slope)


def change_layout(x: Tensor, channels_last: bool) -> Tensor:
    """A copy of ``x`` [B, C, H, W] in channels_last, or contiguous."""
    return x.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def concatenate(maps: Sequence[Tensor], dim: int) -> Tensor:
    """The maps one behind the other along ``dim``; with 4 dimensions and ``dim`` 1 in channels_last."""
    result = torch.cat(list(maps), dim)
    pixels = result.dim() == 4 and dim == 1
    return to_channels_last(result) if pixels else result.contiguous()


def adaptive_average(x: Tensor, height: int, width: int) -> Tensor:
    """Means over windows that share the map out evenly: [B, C, H, W] -> [B, C, height, width]."""
    return F.adaptive_avg_pool2d(x, (height, width))


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
    """The S branches of efficient pyramid pooling and their merge, batch norms folded.

    ``x`` [B, p, H, W] -> the same shape. Branch b resizes to ``sizes[2b]`` x ``sizes[2b + 1]``, convolves 3x3 depthwise
    with ``weight[b]`` [p, 3, 3] and resizes back: the first ``enlarged`` branches bilinearly and back by means, the
    others by means and back bilinearly. Scale, shift and PReLU [S*p] act on the concatenated map, and ``merge_weight``
    [p, S, 3, 3] mixes the S maps of each channel.
    """
    height, width = x.shape[2:]
    maps = []
    for b, filters in enumerate(weight):
        h, w = sizes[2 * b], sizes[2 * b + 1]
        larger = b < enlarged
        y = resize(x, h, w) if larger else adaptive_average(x, h, w)
        y = F.conv2d(y, filters.unsqueeze(1), padding=1, groups=x.shape[1])
        maps.append(adaptive_average(y, height, width) if larger else resize(y, height, width))
    z = epilogue(torch.cat(maps, dim=1), scale, shift, None, slope)
    z = F.channel_shuffle(z, len(maps))
    return epilogue(F.conv2d(z, merge_weight, padding=1, groups=x.shape[1]), None, merge_shift, None, merge_slope)
