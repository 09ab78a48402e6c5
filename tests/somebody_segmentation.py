"""Somebody else's segmentation network: the decoder as the official code structures it, knowing nothing of ours.

Attributes and state_dict keys are the official ones, so that weights move to and from ours; forwards are the dataflow
of the paper in plain torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from somebody import CBR, Down, Unit
from torch import Tensor, nn

__all__ = ["ConvAct", "Pooling", "Segmenter"]


class ConvAct(nn.Module):
    def __init__(self, m: int, n: int, size: int, groups: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d(m, n, size, padding=(size - 1) // 2, bias=False, groups=groups)
        self.cbr = nn.Sequential(conv, nn.BatchNorm2d(n), nn.PReLU(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.cbr(x)


class NormAct(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.br = nn.Sequential(nn.BatchNorm2d(n), nn.PReLU(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.br(x)


class Mix(nn.Module):
    """The channel shuffle, written out."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class Pooling(nn.Module):
    """Efficient pyramid pooling."""

    def __init__(self, m: int, p: int, n: int, last_layer_br: bool = True) -> None:
        super().__init__()
        self.scales = [2.0, 1.5, 1.0, 0.5, 0.1]
        s = len(self.scales)
        self.projection_layer = ConvAct(m, p, 1)
        self.stages = nn.ModuleList(nn.Conv2d(p, p, 3, padding=1, groups=p, bias=False) for _ in self.scales)
        self.merge_layer = nn.Sequential(
            NormAct(s * p), Mix(s), ConvAct(s * p, p, 3, groups=p), nn.Conv2d(p, n, 1, bias=not last_layer_br)
        )
        if last_layer_br:
            self.br = NormAct(n)
        self.last_layer_br = last_layer_br

    def size(self, side: int, scale: float) -> int:
        return max(5, math.ceil(side * scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection_layer(x)
        whole, maps = x.shape[2:], []
        for stage, scale in zip(self.stages, self.scales, strict=True):
            target = self.size(whole[0], scale), self.size(whole[1], scale)
            if scale < 1:
                small = stage(F.adaptive_avg_pool2d(x, target))
                maps.append(F.interpolate(small, whole, mode="bilinear", align_corners=True))
            elif scale > 1:
                large = stage(F.interpolate(x, target, mode="bilinear", align_corners=True))
                maps.append(F.adaptive_avg_pool2d(large, whole))
            else:
                maps.append(stage(x))
        merged = self.merge_layer(torch.cat(maps, 1))
        return self.br(merged) if self.last_layer_br else merged


class Weighting(nn.Module):
    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(m, n, 1, bias=False), nn.Sigmoid())
        self.expansion_layer = ConvAct(m, n, 3, groups=math.gcd(m, n))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.wt_layer(x)
        return self.expansion_layer(x) * weights


class Backbone(nn.Module):
    def __init__(self, c: tuple[int, ...]) -> None:
        super().__init__()
        self.level1 = CBR(3, c[0], 3, 2)
        self.level2_0 = Down(c[0], c[1])
        self.level3_0 = Down(c[1], c[2])
        self.level3 = nn.ModuleList(Unit(c[2], c[2]) for _ in range(3))
        self.level4_0 = Down(c[2], c[3])
        self.level4 = nn.ModuleList(Unit(c[3], c[3], (1, 1, 2, 3)) for _ in range(7))


class Segmenter(nn.Module):
    """The network at the width whose four levels have ``c`` channels; image sides are multiples of 16."""

    def __init__(self, classes: int, c: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.base_net = Backbone(c)
        p = min(classes // 2, 16)
        self.bu_dec_l1 = Pooling(c[3], p, 64)
        self.bu_dec_l2 = Pooling(64, p, 48)
        self.bu_dec_l3 = Pooling(48, p, 32)
        self.bu_dec_l4 = Pooling(32, p, classes, last_layer_br=False)
        self.merge_enc_dec_l2 = Weighting(c[2], 64)
        self.merge_enc_dec_l3 = Weighting(c[1], 48)
        self.merge_enc_dec_l4 = Weighting(c[0], 32)
        self.bu_br_l2 = nn.Sequential(nn.BatchNorm2d(64), nn.PReLU(64))
        self.bu_br_l3 = nn.Sequential(nn.BatchNorm2d(48), nn.PReLU(48))
        self.bu_br_l4 = nn.Sequential(nn.BatchNorm2d(32), nn.PReLU(32))

    def forward(self, image: Tensor) -> Tensor:
        net = self.base_net
        level1 = net.level1(image)
        level2 = net.level2_0(level1, image)
        level3 = net.level3_0(level2, image)
        for unit in net.level3:
            level3 = unit(level3)
        level4 = net.level4_0(level3, image)
        for unit in net.level4:
            level4 = unit(level4)
        x = self.bu_dec_l1(level4)
        x = self.bu_dec_l2(self.bu_br_l2(self.merge_enc_dec_l2(level3) + self.upsample(x)))
        x = self.bu_dec_l3(self.bu_br_l3(self.merge_enc_dec_l3(level2) + self.upsample(x)))
        x = self.bu_dec_l4(self.bu_br_l4(self.merge_enc_dec_l4(level1) + self.upsample(x)))
        return F.interpolate(x, size=image.shape[2:], mode="bilinear", align_corners=True)

    def upsample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
