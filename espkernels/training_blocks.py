"""Recognising, around the units of any model, what trains on this library: norms with a PReLU, and pyramid pooling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from espkernels import blocks
from espkernels import nn as layers
from espkernels.models.pyramid_pooling import FusedPyramidPooling, Join
from espkernels.structure import Layer, is_unit
from espkernels.trial import agree, copied

__all__ = ["recognise_blocks"]

_PARTS: dict[str, dict[str, type[nn.Module]]] = {
    "CBR": {"conv": nn.Conv2d, "bn": nn.BatchNorm2d, "act": nn.PReLU},
    "BR": {"bn": nn.BatchNorm2d, "act": nn.PReLU},
}
_OURS: dict[str, type[nn.Module]] = {"CBR": layers.CBR, "BR": layers.BR}


def recognise_blocks(model: nn.Module) -> Iterator[Layer]:
    """Such blocks that do not run on this library, once, with their first names.

    ``nn.Sequential`` does what it holds, and a ``Join`` of ours is known. A block with the official names of its parts
    is one where its forward does, in a trial, what the parts do one after the other, or what our own pyramid pooling
    does.
    """
    modules = list(model.named_modules())
    inside = {id(part) for _, unit in modules if is_unit(unit) for part in unit.modules()}
    for name, module in modules:
        if id(module) in inside or isinstance(module, torch.jit.ScriptModule):
            continue
        if layers.Chain.fits(module):
            yield Layer(name, module, "Sequential")
            continue
        if type(module) is Join:
            yield Layer(name, module, "Join")
            continue
        for kind, parts in _PARTS.items():
            has_parts = {part: type(child) for part, child in module._modules.items()} == parts
            if has_parts and type(module).forward is not _OURS[kind].forward and _does(module, _chain):
                yield Layer(name, module, kind)
        fused = type(module).forward is FusedPyramidPooling.forward
        if blocks.is_pyramid_pooling(module) and not fused and _does(module, blocks.pyramid_pooling):
            yield Layer(name, module, "PyramidPooling", attributes=_read_by_pooling(module))


def _does(block: nn.Module, make: Callable[[nn.Module], nn.Module]) -> bool:
    """Whether the block does what ``make`` builds of its parts, in training and in evaluation."""
    if block._parameters or block._buffers:
        return False
    for training in (True, False):
        try:
            theirs = copied(block).train(training)
            ours = make(theirs).train(training)
        except Exception:  # parts that do not fit together, or hold no numbers
            return False
        if not agree(theirs, ours):
            return False
    return True


def _chain(block: nn.Module) -> nn.Module:
    """The parts one after the other."""
    return nn.Sequential(*map(copy.deepcopy, block.children()))


def _read_by_pooling(block: nn.Module) -> dict[str, object]:
    """What the forward of our pyramid pooling reads from its module."""
    ours = blocks.pyramid_pooling(block)
    merge_types = tuple(type(block.get_submodule(f"merge_layer.{place}")) for place in (1, 2))
    return {"scales": ours.scales, "merge_types": merge_types} | ({"br": None} if ours.br is None else {})
