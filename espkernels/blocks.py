"""Recognising the blocks around the units in somebody else's model: by their parts, and by what they do with them.

The parts are attributes with the official names, whatever the class is called. What a block's ``forward`` does with
them is tried: a block and its frozen form get the same map in float64, and only where they agree is it recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from espkernels.checks import MAX_BRANCHES
from espkernels.frozen import FrozenAffine, FrozenConvolution
from espkernels.frozen_decoder import FrozenPyramidPooling
from espkernels.models.pyramid_pooling import EfficientPyramidPooling
from espkernels.trial import agree, copied, inputs_of

__all__ = ["frozen", "is_pyramid_pooling", "proven", "pyramid_pooling"]

M = TypeVar("M", bound=nn.Module)

_KINDS = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d, "act": nn.PReLU}


def frozen(module: nn.Module) -> nn.Module | None:
    """The frozen form of a block, or None where it has other parts or does something else with them."""
    make = _maker(module)
    return None if make is None else proven(module, make)


def proven(module: M, make: Callable[[M], nn.Module], *inputs: Sequence[int]) -> nn.Module | None:
    """What ``make`` gives for ``module``, or None where that does something else.

    ``inputs`` are the channels of the maps of each call to try; by default one map. A module that takes more than the
    frozen one may be called with it.
    """
    try:
        theirs = copied(module)
        ours = make(theirs)
    except Exception:  # parts that do not fit together
        return None
    if len(inputs_of(type(module).forward)) > len(inputs_of(type(ours).forward)):
        return None
    return make(module) if all(agree(theirs, ours, *channels) for channels in inputs or [()]) else None


def _maker(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """How to freeze a module with these parts, if there is a way."""
    if module._parameters or module._buffers:
        return None
    parts = {name for name, part in module._modules.items() if part is not None}
    if parts in ({"conv", "bn"}, {"conv", "bn", "act"}, {"bn", "act"}):
        if all(type(module._modules[name]) is _KINDS[name] for name in parts):
            return _affine if "conv" not in parts else _convolution
    elif is_pyramid_pooling(module):
        return lambda block: FrozenPyramidPooling(pyramid_pooling(block).eval())
    return None


def _convolution(block: nn.Module) -> nn.Module:
    return FrozenConvolution(block.conv, block.bn, block._modules.get("act"))  # type: ignore[arg-type]


def _affine(block: nn.Module) -> nn.Module:
    return FrozenAffine(block.bn, block.act)  # type: ignore[arg-type]


def is_pyramid_pooling(module: nn.Module) -> bool:
    """Whether the module has the parts of efficient pyramid pooling."""
    parts = {name for name, part in module._modules.items() if part is not None}
    return parts - {"br"} == {"projection_layer", "stages", "merge_layer"} and hasattr(module, "scales")


def pyramid_pooling(block: nn.Module) -> EfficientPyramidPooling:
    """Our own block with the tensors of such a module, which has its keys."""
    state = block.state_dict()
    projection = state["projection_layer.cbr.0.weight"]
    scales = [float(scale) for scale in block.scales]  # type: ignore[union-attr]
    if len(scales) > MAX_BRANCHES:
        raise ValueError(f"scales: got {len(scales)}, expected at most {MAX_BRANCHES}")
    outputs, last = state["merge_layer.3.weight"].shape[0], "br.br.0.weight" not in state
    with torch.device("meta"):  # draws no random numbers
        ours = EfficientPyramidPooling(projection.shape[1], projection.shape[0], outputs, scales, last)
    ours.load_state_dict(state, assign=True)
    for name, part in ours.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = block.get_submodule(name).eps  # type: ignore[assignment]
    return ours
