"""ESPNet, the network before ESPNetv2, for semantic segmentation (the paper's reference [32]; Fig. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels import nn as fused

__all__ = ["ESPNet", "espnet"]

DILATIONS = (1, 2, 4, 8, 16)
EPS = 1e-3  # of every batch norm


def _norm_act(channels: int) -> fused.BR:
    layer = fused.BR(channels)
    layer.bn.eps = EPS
    return layer


class CBR(fused.CBR):
    """:class:`espkernels.nn.CBR` with ESPNet's epsilon."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.bn.eps = EPS


class Convolution(nn.Module):
    """A convolution without bias that keeps the size at stride 1: the names of the checkpoints have a ``conv`` more."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Pyramid(nn.Module):
    """Reduce, five dilated 3x3 convolutions, fusion from the second one on: [B, M, H, W] -> [B, N, H', W'].

    Branches have N / 5 channels, rounded down, and the first what is missing; it stands outside the fusion for that.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        channels = out_channels // len(DILATIONS)
        if channels < 1:
            raise ValueError(f"out_channels: got {out_channels}, expected at least {len(DILATIONS)}, one a branch")
        first = out_channels - channels * (len(DILATIONS) - 1)
        self.c1 = Convolution(in_channels, channels, kernel_size, stride)
        for dilation in DILATIONS:
            setattr(self, f"d{dilation}", Convolution(channels, first if dilation == 1 else channels, 3, 1, dilation))

    def pyramid(self, x: Tensor) -> Tensor:
        """The concatenated maps."""
        reduced = self.c1(x)
        maps: list[Tensor] = []
        for dilation in DILATIONS:
            map_ = self.get_submodule(f"d{dilation}")(reduced)
            maps.append(maps[-1] + map_ if len(maps) > 1 else map_)
        return torch.cat(maps, dim=1)


class Unit(Pyramid):
    """The ESP unit: the pyramid of a reduced map, x where ``residual``, batch norm and PReLU; the size stays."""

    def __init__(self, in_channels: int, out_channels: int, residual: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, 1)
        self.bn = _norm_act(out_channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        merged = self.pyramid(x)
        return self.bn(merged + x if self.residual else merged)


class StridedUnit(Pyramid):
    """The unit that halves the size: a 3x3 convolution with stride 2 reduces. [B, M, H, W] -> [B, N, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 2)
        self.bn = nn.BatchNorm2d(out_channels, eps=EPS)
        self.act = nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.pyramid(x)))


class Encoder(nn.Module):
    """ESPNet-C. ``forward``: image [B, 3, H, W] -> maps of 1/2, 1/4 and 1/8 of its sides, the last one of classes."""

    def __init__(self, num_classes: int, p: int, q: int) -> None:
        super().__init__()
        self.level1 = CBR(3, 16, 3, 2)
        self.b1 = _norm_act(16 + 3)
        self.level2_0 = StridedUnit(16 + 3, 64)
        self.level2 = nn.ModuleList(Unit(64, 64) for _ in range(p))
        self.b2 = _norm_act(128 + 3)
        self.level3_0 = StridedUnit(128 + 3, 128)
        self.level3 = nn.ModuleList(Unit(128, 128) for _ in range(q))
        self.b3 = _norm_act(256)
        self.classifier = Convolution(256, num_classes, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = F.avg_pool2d(image, 3, stride=2, padding=1)
        quarter = F.avg_pool2d(half, 3, stride=2, padding=1)
        level1 = self.level1(image)
        first = level2 = self.level2_0(self.b1(torch.cat([level1, half], dim=1)))
        for unit in self.level2:
            level2 = unit(level2)
        joined = self.b2(torch.cat([level2, first, quarter], dim=1))
        first = level3 = self.level3_0(joined)
        for unit in self.level3:
            level3 = unit(level3)
        return level1, joined, self.classifier(self.b3(torch.cat([first, level3], dim=1)))


class ESPNet(nn.Module):
    """The network; :func:`espnet` describes it. ``forward``: image [B, 3, H, W] -> logits [B, num_classes, H, W]."""

    def __init__(self, num_classes: int, p: int, q: int) -> None:
        super().__init__()
        for name, value in (("p", p), ("q", q)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.num_classes = num_classes
        self.encoder = Encoder(num_classes, p, q)
        self.level3_C = Convolution(128 + 3, num_classes, 1)
        self.br = nn.BatchNorm2d(num_classes, eps=EPS)
        self.conv = CBR(16 + num_classes, num_classes, 3)
        self.up_l3 = nn.Sequential(_doubled(num_classes))
        self.combine_l2_l3 = nn.Sequential(
            _norm_act(2 * num_classes), Unit(2 * num_classes, num_classes, residual=False)
        )
        self.up_l2 = nn.Sequential(_doubled(num_classes), _norm_act(num_classes))
        self.classifier = _doubled(num_classes)
        fused.init_parameters(self)

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() != 4 or image.shape[2] % 8 or image.shape[3] % 8:
            raise ValueError(f"image: got shape {list(image.shape)}, expected [B, 3, H, W] with sides that 8 divides")
        level1, joined, classes = self.encoder(image)
        x = self.up_l3(self.br(classes))
        x = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(joined), x], dim=1)))
        return self.classifier(self.conv(torch.cat([x, level1], dim=1)))


def _doubled(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)


def espnet(num_classes: int, *, p: int = 2, q: int = 8) -> ESPNet:
    """ESPNet with ``p`` units at a quarter and ``q`` at an eighth of the image's sides: 20 outputs for Cityscapes.

    Parameters and state_dict keys are those of the official network that its test checkpoints load into. Units have
    five branches, of which the first is wider and stands outside the fusion: no operator of this library has that
    shape, and the network runs as plain torch operations.

    Raises ValueError for fewer than 5 classes (one a branch of the decoder's unit), ``p`` or ``q`` below 1, and in
    ``forward`` for sides that 8 does not divide.
    """
    return ESPNet(num_classes, p, q)
