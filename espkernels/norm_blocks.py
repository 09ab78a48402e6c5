"""Recognising, around the units of any model, where a PReLU follows a batch norm, in torch's own classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from espkernels import nn as layers
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

    ``nn.Sequential`` does what it holds. A block with the official names of its parts is one where its forward, in a
    trial, does what the parts do one after the other.
    """
    modules = list(model.named_modules())
    inside = {id(part) for _, unit in modules if is_unit(unit) for part in unit.modules()}
    for name, module in modules:
        if id(module) in inside or isinstance(module, torch.jit.ScriptModule):
            continue
        if layers.Chain.fits(module):
            yield Layer(name, module, "Sequential")
            continue
        for kind, parts in _PARTS.items():
            has_parts = {part: type(child) for part, child in module._modules.items()} == parts
            if has_parts and type(module).forward is not _OURS[kind].forward and _is_chain(module, list(parts)):
                yield Layer(name, module, kind)


def _is_chain(block: nn.Module, names: list[str]) -> bool:
    """Whether the block is its parts one after the other, in training and in evaluation."""
    if block._parameters or block._buffers:
        return False
    for training in (True, False):
        theirs = copied(block).train(training)
        ours = nn.Sequential(*(copy.deepcopy(theirs.get_submodule(name)) for name in names))
        if not agree(theirs, ours):
            return False
    return True
