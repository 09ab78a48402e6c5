"""Table 1: kinds of convolutions, and the sevenfold saving of section 3.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espkernels import nn as layers
from espkernels.models.count import count
from espkernels.models.esp import ESP
from espkernels.models.paper.printed import Row, Table

__all__ = ["table_1"]

CHANNELS = 64


def table_1() -> Table:
    """Kinds of convolutions at n = 3, c = 64 channels in and out, g = 4 groups, dilation r = 4."""
    c = CHANNELS
    kinds: list[tuple[str, str, str, nn.Module]] = [
        ("standard", "36,864 (n^2 c c')", "3 x 3", nn.Conv2d(c, c, 3, padding=1, bias=False)),
        ("group", "9,216 (n^2 c c' / g)", "3 x 3", nn.Conv2d(c, c, 3, padding=1, groups=4, bias=False)),
        ("depth-wise separable", "4,672 (n^2 c + c c')", "3 x 3", _separable(dilation=1)),
        ("depth-wise dilated separable", "4,672 (n^2 c + c c')", "9 x 9", _separable(dilation=4)),
    ]
    rows = []
    for name, formula, field, layer in kinds:
        rows.append(Row(name, "parameters", formula, count(layer, (1, 1), in_channels=c).parameters))
        rows.append(Row(name, "receptive field", field, _receptive_field(layer)))
    units = ESP(240, 240), layers.EESP(240, 240)
    weights = [sum(p.numel() for p in unit.parameters() if p.dim() == 4) for unit in units]
    rows.append(Row("ESP over EESP, M = 240", "weights", "7x (section 3.1)", weights[0] / weights[1]))
    return Table("Table 1: convolutions", tuple(rows), "n = 3, c = c' = 64, g = 4, r = 4; n_r = (n - 1) r + 1 = 9.")


def _separable(dilation: int) -> nn.Module:
    return nn.Sequential(layers.CDilated(CHANNELS, dilation), nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False))


def _receptive_field(layer: nn.Module) -> str:
    """Height and width of the part of a map that one pixel of the result depends on."""
    x = torch.zeros(1, CHANNELS, 33, 33, requires_grad=True)
    output: Tensor = layer(x)
    (gradient,) = torch.autograd.grad(output[0, :, 16, 16].sum(), x)
    seen = gradient.abs().sum(dim=(0, 1)).nonzero()
    height, width = (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist()
    return f"{height} x {width}"
