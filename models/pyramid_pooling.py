"""The blocks of the decoder: efficient pyramid pooling, the weighting of a skip connection, and where the two join.

Module names are those of the official checkpoints (``cbr.{0,1,2}``, ``br.{0,1}``, ``merge_layer.{0,2,3}``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espkernels import fused_pooling, inference, reference, single_layers
from espkernels import nn as fused
from espkernels.fused_norm import norm_prelu
from espkernels.layout import layout_of

__all__ = [
    "BR",
    "CBR",
    "SCALES",
    "EfficientPyramidPooling",
    "FusedJoin",
    "FusedPyramidPooling",
    "Join",
    "SkipWeighting",
    "resized",
]

SCALES = (2.0, 1.5, 1.0, 0.5, 0.1)
SMALLEST = 5


def resized(x: Tensor, height: int, width: int, plain: bool) -> Tensor:
    """``x`` [B, C, H, W] resized bilinearly, corners aligned, in its own format; ``plain`` demands torch's kernel.

    Our kernel gives channels_last. To it the planes of a contiguous map are images of one channel: so in training, as
    torch's takes twice as long forward and four times backward. Recordings of inference keep to maps of all channels.
    """
    if plain:
        return reference.resize(x, height, width)
    if layout_of(x) == torch.channels_last:
        return inference.resize(x, height, width)
    if x.device.type != "cpu" or not x.requires_grad or not x.is_contiguous():
        return reference.resize(x, height, width)
    planes = inference.resize(x.view(-1, 1, *x.shape[2:]), height, width)
    return planes.view(*x.shape[:2], height, width)


def _averaged(x: Tensor, height: int, width: int, plain: bool) -> Tensor:
    """``x`` [B, C, H, W] averaged to ``height`` x ``width`` windows, in channels_last on our kernel alone."""
    ours = not plain and layout_of(x) == torch.channels_last
    return (inference.adaptive_average if ours else reference.adaptive_average)(x, height, width)


class CBR(nn.Module):
    """Convolution, batch norm, PReLU; the padding keeps the size at stride 1. [B, M, H, W] -> [B, N, H', W']."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.cbr = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.PReLU(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cbr(x)


class BR(nn.Module):
    """Batch norm, PReLU; shape unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.br = nn.Sequential(nn.BatchNorm2d(channels), nn.PReLU(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.br(x)


class EfficientPyramidPooling(nn.Module):
    """Depthwise convolutions of one projected map at several sizes, merged again (EPP).

    [B, M, H, W] -> [B, N, H, W]. The map is projected to ``projection`` channels, resized to each of ``scales`` (never
    below 5 pixels a side), convolved depthwise 3x3, resized back, and the results are concatenated, shuffled and
    merged. Scales run from large to small whatever their order in the argument. The last block of a decoder sets
    ``last=True``: its merging convolution has a bias and nothing follows it.
    """

    def __init__(
        self,
        in_channels: int,
        projection: int,
        out_channels: int,
        scales: Sequence[float] = SCALES,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.scales = tuple(sorted(scales, reverse=True))
        self.projection_layer = CBR(in_channels, projection, 1)
        self.stages = nn.ModuleList(
            nn.Conv2d(projection, projection, 3, padding=1, groups=projection, bias=False) for _ in self.scales
        )
        self.merge_layer = nn.Sequential(
            BR(projection * len(self.scales)),
            nn.ChannelShuffle(len(self.scales)),
            CBR(projection * len(self.scales), projection, 3, groups=projection),
            nn.Conv2d(projection, out_channels, 1, bias=last),
        )
        self.br = None if last else BR(out_channels)

    def target_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width that each branch resizes a map to; scale 1 leaves it as it is."""
        return [
            (height, width) if s == 1 else (max(math.ceil(height * s), SMALLEST), max(math.ceil(width * s), SMALLEST))
            for s in self.scales
        ]

    def branches(self, x: Tensor, plain: bool) -> list[Tensor]:
        """The convolved maps of the projected map [B, p, H, W], each of its size; ``plain`` demands torch's kernels."""
        height, width = x.shape[-2:]
        maps = []
        for scale, target, stage in zip(self.scales, self.target_sizes(height, width), self.stages, strict=True):
            if scale > 1:
                maps.append(_averaged(stage(resized(x, *target, plain)), height, width, plain))
            elif scale < 1:
                maps.append(resized(stage(_averaged(x, *target, plain)), height, width, plain))
            else:
                maps.append(stage(x))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        out = self.merge_layer(torch.cat(self.branches(self.projection_layer(x), plain=True), dim=1))
        return out if self.br is None else self.br(out)


class FusedPyramidPooling(EfficientPyramidPooling):
    """:class:`EfficientPyramidPooling` on this library's operators (:mod:`espkernels.fused_pooling`)."""

    merge_types: tuple[type[nn.Module], type[nn.Module]] = (nn.ChannelShuffle, CBR)

    def forward(self, x: Tensor) -> Tensor:
        out = fused_pooling.merged(self, self.branches(self.projection_layer(x), plain=False))
        return out if self.br is None else self.br(out)


class SkipWeighting(nn.Module):
    """A skip map on its way into the decoder (PW): a 3x3 convolution, weighted a channel by the map's global average.

    [B, M, H, W] -> [B, N, H, W]; the convolution has gcd(M, N) groups.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.Sigmoid()
        )
        self.expansion_layer = CBR(in_channels, out_channels, 3, groups=math.gcd(in_channels, out_channels))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolved map [B, N, H, W] and, before their sigmoid, its weights [B, N, 1, 1]."""
        pool, mix, _ = self.wt_layer
        average = single_layers.run(pool, x) if isinstance(self.wt_layer, fused.Chain) else pool(x)
        return self.expansion_layer(x), mix(average)

    def forward(self, x: Tensor) -> Tensor:
        skip, gate = self.parts(x)
        return skip * self.wt_layer[2](gate)


class Join(nn.Sequential):
    """Where a skip connection enters the decoder: ``x`` resized and the weighted skip, added, batch norm and PReLU.

    x [B, C, h, w], skip [B, C, H, W], gate [B, C, 1, 1] -> [B, C, H, W]. Resizing is exactly a doubling only where the
    image's sides allow it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.PReLU(channels))

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(resized(x, skip.shape[2], skip.shape[3], plain=True) + skip * gate.sigmoid())


class FusedJoin(Join):
    """:class:`Join` on this library's operators."""

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        norm, act = self
        return norm_prelu(norm, act, resized(x, skip.shape[2], skip.shape[3], plain=False) + skip * gate.sigmoid())
