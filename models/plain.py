"""The two layers as every framework runs them: one convolution call a branch, running sums, a concatenation.

The baseline of the benchmarks and the "before" of :func:`espkernels.replace`. Parameters, keys and results are those of
:mod:`espkernels.nn`; no operator of this library runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espkernels import nn

__all__ = ["EESP", "DownSampler"]


class EESP(nn.EESP):
    """:class:`espkernels.nn.EESP` in plain torch modules."""

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.proj_1x1(x)
        outputs: list[Tensor] = []
        for branch in self.spp_dw:
            output = branch(reduced)
            outputs.append(outputs[-1] + output if self.hff and outputs else output)
        expanded = self.conv_1x1_exp(self.br_after_cat(torch.cat(outputs, dim=1)))
        if self.stride == 2 and self.down_method == "avg":
            return expanded
        if expanded.shape == x.shape:
            expanded = expanded + x
        return self.module_act(expanded)


class DownSampler(nn.DownSampler):
    """:class:`espkernels.nn.DownSampler` in plain torch modules around a plain :class:`EESP`."""

    eesp_type = EESP

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        output = torch.cat([self.avg(x), self.eesp(x)], dim=1)
        if image is not None:
            output = output + self.inp_reinf(nn.pooled_image(image, (output.shape[2], output.shape[3])))
        return self.act(output)
