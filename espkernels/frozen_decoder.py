"""Frozen layers of the decoder: efficient pyramid pooling, and where a skip connection joins."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from espkernels import inference
from espkernels.frozen import Frozen, FrozenConvolution, slope_of
from espkernels.models.pyramid_pooling import EfficientPyramidPooling, Join
from espkernels.norms import affine_of

__all__ = ["FrozenJoin", "FrozenPyramidPooling"]


def _blocks(container: Any) -> list[Any]:
    """The modules of a container, whose types their places say."""
    return list(container)


class FrozenPyramidPooling(Frozen):
    """Efficient pyramid pooling: projection, all branches with their merge, expansion. [B, M, H, W] -> [B, N, H, W]."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    slope: Tensor
    merge_weight: Tensor
    merge_shift: Tensor
    merge_slope: Tensor

    def __init__(self, block: EfficientPyramidPooling) -> None:
        super().__init__()
        self.target_sizes = block.target_sizes
        self.enlarged = sum(scale > 1 for scale in block.scales)
        self.projection = FrozenConvolution(*_blocks(block.projection_layer.cbr))
        normalise, _, merge, expand = _blocks(block.merge_layer)
        norm, act = _blocks(normalise.br)
        scale, shift = affine_of(norm)
        conv, merge_norm, merge_act = _blocks(merge.cbr)
        merge_scale, merge_shift = affine_of(merge_norm)
        self.expansion = FrozenConvolution(expand, *(() if block.br is None else _blocks(block.br.br)))
        weights = {
            "weight": torch.stack([stage.weight.detach().squeeze(1) for stage in _blocks(block.stages)]),
            "merge_weight": conv.weight.detach().double() * merge_scale.view(-1, 1, 1, 1),
        }
        vectors = {
            "scale": scale,
            "shift": shift,
            "slope": slope_of(act, len(scale)),
            "merge_shift": merge_shift,
            "merge_slope": slope_of(merge_act, len(merge_shift)),
        }
        self._register(weights, vectors, conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        sizes = [side for size in self.target_sizes(x.shape[2], x.shape[3]) for side in size]
        x = inference.pyramid_pooling(
            x, self.weight, sizes, self.enlarged, self.scale, self.shift, self.slope,
            self.merge_weight, self.merge_shift, self.merge_slope,
        )  # fmt: skip
        return self.expansion(x)


class FrozenJoin(Frozen):
    """Resizing, weighted skip connection, batch norm and PReLU in one pass; see :class:`Join`."""

    scale: Tensor
    shift: Tensor
    slope: Tensor

    def __init__(self, join: Join) -> None:
        super().__init__()
        norm, act = cast(nn.BatchNorm2d, join[0]), cast(nn.PReLU, join[1])
        scale, shift = affine_of(norm)
        vectors = {"scale": scale, "shift": shift, "slope": slope_of(act, len(scale))}
        self._register({}, vectors, act.weight.dtype)

    def forward(self, x: Tensor, skip: Tensor, gate: Tensor) -> Tensor:
        height, width = skip.shape[2:]
        return inference.resize(x, height, width, skip, gate, self.scale, self.shift, self.slope)
