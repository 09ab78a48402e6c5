"""The ESP unit in the place of EESP: standard dilated convolutions (paper Fig. 1a, first row of Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espkernels import nn as fused
from espkernels.models import plain

__all__ = ["ESP", "DownSampler"]


class ESP(plain.Steps):
    """Efficient spatial pyramid of dilated convolutions: [B, M, H, W] -> [B, N, H', W'], as in EESP.

    Reduce (1x1 to d = N / ``k`` channels, batch norm, PReLU), ``k`` dilated 3x3 convolutions from d to d channels,
    hierarchical fusion, concatenation, batch norm, PReLU; nothing is mixed after it, since the convolutions are not
    depthwise. M d + 9 k d^2 weights: at M = N = 240, 144,000, where EESP has 20,160. It runs as plain torch operations.

    The arguments are those of :class:`espkernels.nn.EESP`. Raises ValueError for ``out_channels`` that ``k`` does not
    divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        k: int = 4,
        r_lim: int = 7,
        down_method: str = "esp",
        *,
        hff: bool = True,
        dilated: bool = True,
    ) -> None:
        super().__init__()
        if k < 1 or out_channels < 1 or out_channels % k:
            raise ValueError(f"out_channels: got {out_channels}, expected a positive multiple of k = {k}")
        self.stride, self.down_method, self.hff = stride, down_method, hff
        self.dilations = fused.branch_dilations(k, r_lim, dilated)
        channels = out_channels // k
        self.proj_1x1 = plain.CBR(in_channels, channels, 1)
        self.spp_dw = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False) for dilation in self.dilations
        )
        self.br_after_cat = plain.BR(out_channels)
        self.module_act = nn.PReLU(out_channels)
        fused.init_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.br_after_cat(torch.cat(self.transform(x), dim=1)), x)


class DownSampler(plain.DownSampler):
    """The strided unit around an :class:`ESP`; the rest is that of :class:`espkernels.nn.DownSampler`."""

    eesp_type = ESP  # type: ignore[assignment]
