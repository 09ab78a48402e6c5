"""EESP-A: the unit before its pointwise convolutions became one grouped convolution (paper section 3.1, Fig. 1b)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from espkernels import nn as fused
from espkernels.models import plain

__all__ = ["EESPA", "DownSampler", "from_eesp"]


class EESPA(plain.Steps):
    """:class:`espkernels.nn.EESP` with a pointwise convolution a branch: [B, M, H, W] -> [B, N, H', W'].

    Each fused map of d = N / ``k`` channels goes through batch norm, PReLU, its own 1x1 convolution and batch norm, and
    the concatenation comes last. A convolution in ``k`` groups does the same in one call, so that weights,
    multiply-adds and, after :func:`from_eesp`, results are those of EESP. It runs as plain torch operations.

    Arguments and errors are those of :class:`espkernels.nn.EESP`.
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
        whole = plain.EESP(in_channels, out_channels, stride, k, r_lim, down_method, hff=hff, dilated=dilated)
        self.stride, self.down_method, self.hff, self.dilations = stride, down_method, hff, whole.dilations
        channels = out_channels // k
        self.proj_1x1, self.spp_dw, self.module_act = whole.proj_1x1, whole.spp_dw, whole.module_act
        self.br_after_hff = nn.ModuleList(plain.BR(channels) for _ in range(k))
        self.conv_1x1 = nn.ModuleList(fused.CB(channels, channels, 1) for _ in range(k))
        fused.init_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        maps = zip(self.transform(x), self.br_after_hff, self.conv_1x1, strict=True)
        return self.end(torch.cat([mix(activate(map_)) for map_, activate, mix in maps], dim=1), x)


class DownSampler(plain.DownSampler):
    """The strided unit around an :class:`EESPA`; the rest is that of :class:`espkernels.nn.DownSampler`."""

    eesp_type = EESPA  # type: ignore[assignment]


_PARTS = {"br_after_cat": "br_after_hff", "conv_1x1_exp": "conv_1x1"}


def from_eesp(state: Mapping[str, Tensor], k: int = 4) -> dict[str, Tensor]:
    """The state dict of :class:`EESPA` units, or of a network of them, that computes what ``state`` of EESP units does.

    What belongs to the concatenated map is cut into ``k`` parts: branch i gets the weights of group i.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(rf"(.*?)({'|'.join(_PARTS)})\.(.*)", name)
        if found is None:
            result[name] = tensor
            continue
        unit, part, rest = found.groups()
        pieces = tensor.chunk(k) if tensor.dim() else [tensor] * k  # a batch norm's counter is one number
        for i, piece in enumerate(pieces):
            result[f"{unit}{_PARTS[part]}.{i}.{rest}"] = piece
    return result
