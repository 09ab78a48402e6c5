"""The layers as every framework runs them: one convolution call a branch, running sums, a concatenation.

The baseline of the benchmarks and the "before" of :func:`espkernels.replace`. Parameters, keys and results are those of
:mod:`espkernels.nn`; no operator of this library runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn as torch_nn

from espkernels import nn, reference

__all__ = ["BR", "CBR", "EESP", "DownSampler", "Steps"]


class CBR(nn.CBR):
    """:class:`espkernels.nn.CBR` in plain torch modules."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class BR(nn.BR):
    """:class:`espkernels.nn.BR` in plain torch modules."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class Steps(torch_nn.Module):
    """What every form of the unit has in common, between and after its convolutions (paper, Fig. 1)."""

    stride: int
    down_method: str
    hff: bool
    proj_1x1: nn.CBR
    spp_dw: torch_nn.ModuleList
    module_act: torch_nn.PReLU

    def transform(self, x: Tensor) -> list[Tensor]:
        """Reduce, split, transform: the branches' maps, each added to the one before under hierarchical fusion."""
        reduced = self.proj_1x1(x)
        outputs: list[Tensor] = []
        for branch in self.spp_dw:
            output = branch(reduced)
            outputs.append(outputs[-1] + output if self.hff and outputs else output)
        return outputs

    def end(self, merged: Tensor, x: Tensor) -> Tensor:
        """The unit's result: as it is inside a down-sampler, else with the residual where it fits and the PReLU."""
        if self.stride == 2 and self.down_method == "avg":
            return merged
        if merged.shape == x.shape:
            merged = merged + x
        return self.module_act(merged)


class EESP(Steps, nn.EESP):
    """:class:`espkernels.nn.EESP` in plain torch modules."""

    cbr_type = CBR
    br_type = BR

    def forward(self, x: Tensor) -> Tensor:
        fused = torch.cat(self.transform(x), dim=1)
        return self.end(self.conv_1x1_exp(self.br_after_cat(fused)), x)


class DownSampler(nn.DownSampler):
    """:class:`espkernels.nn.DownSampler` in plain torch modules around a plain :class:`EESP`."""

    eesp_type = EESP
    cbr_type = CBR

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        output = torch.cat([self.avg(x), self.eesp(x)], dim=1)
        if image is not None:
            pooled = nn.pooled_image(image, (output.shape[2], output.shape[3]), reference.average_pool)
            output = output + self.inp_reinf(pooled)
        return self.act(output)
