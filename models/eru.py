"""The Efficient Recurrent Unit: an LSTM cell whose input goes through an EESP unit (paper section 4.4).

The paper says no more than that, and no code of it was released. The design here is the one whose parameters are those
of Table 4; where it leaves a choice, the choice is an argument.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels import fused_unit, reference
from espkernels.frozen import FrozenEESP
from espkernels.fused_unit import UnitLayers
from espkernels.nn import init_parameters
from espkernels.recurrence import recurrence

__all__ = ["AXES", "ERU", "EESP1d", "FrozenEESP1d", "State"]

# Branches, groups and gates: branch k feeds the group of the last convolution that gives gate k.
GATES = 4
DILATIONS = (1, 2, 3, 4)
TAPS = 3
# Steps before the first of a chunk that the longest branch over time reads.
CONTEXT = (TAPS - 1) * max(DILATIONS)
AXES = ("step", "features", "time")


class State(NamedTuple):
    """What one layer hands on from a chunk of a sequence to the next.

    ``hidden`` and ``cell`` [B, H]; ``context`` [B, H, 8] the last reduced vectors over "time", [B, H, 0] elsewhere.
    """

    hidden: Tensor
    cell: Tensor
    context: Tensor

    def detach(self) -> State:
        """The same numbers, cut off from what computed them."""
        return State(*(tensor.detach() for tensor in self))


def as_pixels(x: Tensor) -> Tensor:
    """Steps [T, B, M] as maps [T, M, 1, B]: the same memory, read as channels_last."""
    return x.unsqueeze(1).permute(0, 3, 1, 2)


def as_steps(pixels: Tensor) -> Tensor:
    """:func:`as_pixels` undone."""
    return pixels.permute(0, 2, 3, 1).squeeze(1)


class EESP1d(nn.Module):
    """The EESP unit over vectors (Fig. 1c with 1-D convolutions): the four gates' part of a step's input.

    Reduce (1x1 in 4 groups from M to H channels, batch norm, PReLU), four depthwise 3-tap branches of dilations 1 to 4,
    hierarchical fusion, batch norm, PReLU, 1x1 in 4 groups, batch norm, PReLU. M H / 4 + 12 H + 4 H^2 weights of
    convolutions, 27 H of the rest. What the branches slide over is ``axis``:

    * "step": a step is a signal of length 1, so no step sees another, and of each three taps only the middle one ever
      meets a number or learns;
    * "features": each branch has three weights in all and slides over the H numbers of a step;
    * "time": over the steps before, padded with zeros before the first, never over those after; 9 steps are in reach.

    On the CPU's kernels "step" is one operator forward and one backward (:mod:`espkernels.training`); the other axes,
    and every axis elsewhere, run as plain torch operations.
    """

    def __init__(self, in_channels: int, hidden: int, axis: str = "step", plain: bool = False) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("hidden", hidden)):
            if value < 1 or value % GATES:
                raise ValueError(f"{name}: got {value}, expected a positive multiple of {GATES}, the number of groups")
        if axis not in AXES:
            raise ValueError(f"axis: got {axis!r}, expected one of {', '.join(map(repr, AXES))}")
        self.hidden, self.axis, self.plain = hidden, axis, plain
        gates = GATES * hidden
        self.reduce = nn.Sequential(
            nn.Conv1d(in_channels, hidden, 1, groups=GATES, bias=False), nn.BatchNorm1d(hidden), nn.PReLU(hidden)
        )
        self.branches = nn.ModuleList(self._branch(dilation) for dilation in DILATIONS)
        self.after_fusion = nn.Sequential(nn.BatchNorm1d(gates), nn.PReLU(gates))
        self.expand = nn.Sequential(
            nn.Conv1d(gates, gates, 1, groups=GATES, bias=False), nn.BatchNorm1d(gates), nn.PReLU(gates)
        )
        init_parameters(self)

    def _branch(self, dilation: int) -> nn.Conv1d:
        channels = 1 if self.axis == "features" else self.hidden
        padding = 0 if self.axis == "time" else dilation
        return nn.Conv1d(channels, channels, TAPS, 1, padding, dilation, groups=channels, bias=False)

    def layers(self) -> UnitLayers:
        """What :mod:`espkernels.fused_unit` asks of a unit."""
        reduce, after_fusion, expand = self.reduce, self.after_fusion, self.expand
        return UnitLayers(
            reduce=cast(nn.Conv1d, reduce[0]),
            branches=list(self.branches),
            expand=cast(nn.Conv1d, expand[0]),
            norms=(
                cast(nn.BatchNorm1d, reduce[1]), cast(nn.BatchNorm1d, after_fusion[0]), cast(nn.BatchNorm1d, expand[1]),
            ),
            activations=[cast(nn.PReLU, part) for part in (reduce[2], after_fusion[1], expand[2])],
            containers=(reduce, after_fusion, expand),
            dilations=DILATIONS,
        )  # fmt: skip

    def pyramid_weight(self) -> Tensor:
        """The branches as 3x3 filters over :func:`as_pixels`, where none may see another: the middle tap alone."""
        middle = torch.stack([cast(nn.Conv1d, branch).weight[:, 0, TAPS // 2] for branch in self.branches])
        return F.pad(middle[:, :, None, None], (1, 1, 1, 1))

    def no_context(self, x: Tensor) -> Tensor:
        """What stands before the first step of sequences x [T, B, M]: zeros [B, H, 8], or nothing to stand there."""
        return x.new_zeros(x.shape[1], self.hidden, CONTEXT if self.axis == "time" else 0)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Steps x [T, B, M] and the context before them -> gates [T, B, 4 H], those of a gate together; new context."""
        steps, batch, _ = x.shape
        if self.axis == "step" and not self.plain:
            pixels, layers = as_pixels(x), self.layers()
            if fused_unit.fits(layers, pixels):
                return as_steps(fused_unit.run(self, layers, pixels)), context
        # Signals [N, channels, length]: whole sequences over time, else single steps, which batch norm sees alike.
        signals = x.permute(1, 2, 0) if self.axis == "time" else x.reshape(steps * batch, -1, 1)
        reduced = self.reduce(signals)
        if self.axis == "time":
            reduced = torch.cat([context, reduced], dim=2)
            context = reduced[:, :, steps:]
        gates = self.expand(self.after_fusion(torch.cat(self._fused(reduced), dim=1)))
        if self.axis == "time":
            return gates.permute(2, 0, 1), context
        return gates.view(steps, batch, -1), context

    def _fused(self, reduced: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for branch, dilation in zip(self.branches, DILATIONS, strict=True):
            if self.axis == "features":
                map_ = branch(reduced.transpose(1, 2)).transpose(1, 2)
            elif self.axis == "time":
                map_ = branch(reduced[:, :, CONTEXT - (TAPS - 1) * dilation :])
            else:
                map_ = branch(reduced)
            maps.append(maps[-1] + map_ if maps else map_)
        return maps


class FrozenEESP1d(nn.Module):
    """:class:`EESP1d` over single steps for inference: one call with packed weights, batch norms folded."""

    def __init__(self, unit: EESP1d) -> None:
        super().__init__()
        self.hidden = unit.hidden
        self.eesp = FrozenEESP(unit)

    def no_context(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[1], self.hidden, 0)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return as_steps(self.eesp(as_pixels(x))), context


class Recurrence(nn.Module):
    """What the last output adds to the gates, weight [4 H, H] and bias [4 H], and the LSTM's cell.

    ``forward``: gates [T, B, 4 H], hidden and cell [B, H] -> outputs [T, B, H] and the last cell, by
    :func:`espkernels.recurrence.recurrence`.
    """

    def __init__(self, hidden: int, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.weight = nn.Parameter(torch.empty(GATES * hidden, hidden))
        self.bias = nn.Parameter(torch.empty(GATES * hidden))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, gates: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        steps = reference.recurrence if self.plain else recurrence
        return steps(gates, self.weight, self.bias, hidden, cell)


class ERU(nn.Module):
    """One recurrent layer: gates = :class:`EESP1d` of the input plus a linear map of the last output; an LSTM's cell.

    ``forward``: x [T, B, in_channels] and a :class:`State`, None for zeros -> outputs [T, B, hidden] and the state
    after the last step. Gates are in the order input, forget, candidate, output. M H / 4 + 8 H^2 + 43 H parameters,
    of which the linear map has 4 H^2 + 4 H.

    Unit and recurrence run once each for a chunk of steps; ``plain`` makes both of plain torch operations. Raises
    ValueError for a channel count that 4 does not divide and for an unknown ``axis``.
    """

    def __init__(self, in_channels: int, hidden: int, axis: str = "step", plain: bool = False) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = EESP1d(in_channels, hidden, axis, plain)
        self.recurrent = Recurrence(hidden, plain)

    def initial_state(self, x: Tensor) -> State:
        """Zeros for sequences like x [T, B, M]."""
        zeros = x.new_zeros(x.shape[1], self.hidden)
        return State(zeros, zeros, self.input.no_context(x))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden, cell, context = self.initial_state(x) if state is None else state
        gates, context = self.input(x, context)
        outputs, cell = self.recurrent(gates, hidden, cell)
        return outputs, State(outputs[-1], cell, context)
