"""An inference copy of a model: batch norms folded, whole units in one call, whole networks replayed.

What is recognised here, or in somebody else's model in :mod:`espkernels.blocks`, becomes a layer of
:mod:`espkernels.frozen` or :mod:`espkernels.frozen_decoder`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espkernels import blocks, frozen, frozen_decoder, graphs, replay, tuning
from espkernels import nn as layers
from espkernels.checks import DTYPES, MAX_BRANCHES
from espkernels.fused_unit import has_hooks, is_global_average
from espkernels.models.eru import EESP1d, FrozenEESP1d
from espkernels.models.espnetv2 import Encoder
from espkernels.models.pyramid_pooling import EfficientPyramidPooling, FusedJoin, Join
from espkernels.replace import as_written, replace_units
from espkernels.structure import recognise

__all__ = ["freeze"]

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, tune: Tensor | None = None, graph: bool = False) -> M:
    """A copy of ``model`` for inference, on this library's kernels; the model itself is not touched.

    The copy is in eval mode. EESP units and down-samplers, ours or anybody's that :func:`espkernels.replace`
    recognises, become single modules; convolutions followed by a batch norm (and PReLU) become one convolution, and
    efficient pyramid pooling one layer. Layers, ours, the official ones and copies of them, are recognised by their
    parts and proven by trials in which a ``forward`` that does something else differs, unless it does so for other
    sizes or numbers alone: compare the results where a model's layers may. What is not recognised stays as it is. Maps
    between frozen layers are channels_last, whatever format the input has. A ``nn.Sequential`` of convolution, norm and
    PReLU does all in its first part: a ``forward`` that takes a map from between them gets the last one.

    Gradients flow to the inputs of a frozen model, its folded weights are buffers. A batch norm without running
    statistics cannot be folded, and its layer stays as it was; so does a layer with hooks.

    Kernels read copies of the folded weights, which follow ``load_state_dict``, ``to``, ``half`` and the like. A buffer
    edited in place counts after ``frozen.load_state_dict(frozen.state_dict())``; those that
    ``torch.func.functional_call`` puts in do not count.

    ``tune`` is an input [B, C, H, W] like those to come: every unit of the network is timed on its first image with its
    strips of rows cut once, twice and four times as finely, some seconds in all, and the fastest is kept for inputs of
    that shape, in the ``state_dict`` too; results have the same bits. :func:`espkernels.explain` shows the choice.
    Raises ValueError where the model cannot be replayed on ``tune``, with the reason.

    ``graph`` is for a model on a CUDA device: the frozen model captures its forward pass into a CUDA graph for each
    shape, dtype and memory format of its input, at most eight of them, and replays that; results are fresh tensors.
    **This has not run on a GPU yet.** Raises ValueError where the model is not on one CUDA device,
    and where ``tune``, which is for the CPU, is given too.
    """
    if graph and tune is not None:
        raise ValueError(
            "tune: got a tensor beside graph=True, expected None: only plans on the CPU have what is tuned"
        )
    root = nn.ModuleList([copy.deepcopy(model)])  # a parent for a model that is itself a layer
    root.eval()
    replace_units(root)
    for part in root.modules():
        # A network of ours built from torch's layers pools and resizes by torch's operations too; its copy need not.
        if isinstance(part, Encoder):
            part.switches = dataclasses.replace(part.switches, plain=False)
    _freeze_children(root)
    if graph:
        return graphs.graphed(root[0])  # type: ignore[return-value]
    return replay.replayed(root[0]) if tune is None else tuning.tuned(root[0], tune)  # type: ignore[return-value]


def _freeze_children(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        layer = _frozen(child)
        if layer is None:
            _freeze_children(child)
        else:
            parent._modules[name] = layer.eval()


def _frozen(module: nn.Module) -> nn.Module | None:
    """The frozen form of a layer, or None where it has none."""
    if not all(_foldable(part) for part in module.modules()):
        return module if isinstance(module, layers.EESP) else None  # it reaches for the parts of its parts
    if isinstance(module, EESP1d):
        known = type(module) is EESP1d and all(map(as_written, module.children()))
        return FrozenEESP1d(module) if module.axis == "step" and known else None
    if isinstance(module, layers.EESP):
        return _frozen_unit(module, frozen.FrozenEESP) or module
    if isinstance(module, layers.DownSampler) and isinstance(module.eesp, layers.EESP):
        return _frozen_unit(module, frozen.FrozenDownSampler)
    if isinstance(module, (layers.CBR, layers.CB)):
        return blocks.proven(module, lambda m: frozen.FrozenConvolution(m.conv, m.bn, getattr(m, "act", None)))
    if isinstance(module, EfficientPyramidPooling):
        few = len(module.scales) <= MAX_BRANCHES
        return blocks.proven(module, frozen_decoder.FrozenPyramidPooling) if few else None
    if isinstance(module, Join):
        known = type(module).forward in (Join.forward, FusedJoin.forward)
        known = known and isinstance(module[0], _BatchNorm) and type(module[1]) is nn.PReLU
        return frozen_decoder.FrozenJoin(module) if known else None
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not (module.weight.numel() and module.weight.dtype in DTYPES):
        return None
    if type(module) is nn.Conv2d and tuple(module.kernel_size) == tuple(module.stride) == (1, 1):
        return frozen.FrozenConvolution(module) if module.padding_mode == "zeros" else None
    if type(module) is nn.Linear:
        return frozen.FrozenLinear(module)
    if is_global_average(module):
        return frozen.FrozenGlobalAverage()
    if isinstance(module, nn.Sequential) and type(module).forward in (nn.Sequential.forward, layers.Chain.forward):
        kinds = tuple(type(part) for part in module)
        if kinds in ((nn.Conv2d, nn.BatchNorm2d, nn.PReLU), (nn.Conv2d, nn.BatchNorm2d)):
            return _all_in_first(module, frozen.FrozenConvolution) if module[0].padding_mode == "zeros" else None
        if kinds == (nn.BatchNorm2d, nn.PReLU):
            return _all_in_first(module, frozen.FrozenAffine)
    if type(module) is nn.BatchNorm2d:
        return frozen.FrozenAffine(module)
    if type(module) is nn.PReLU and module.num_parameters > 1:
        return frozen.FrozenAffine(None, module)
    return blocks.frozen(module)


def _all_in_first(chain: nn.Sequential, make: Callable[..., nn.Module]) -> nn.Sequential:
    """The chain with what ``make`` gives for its parts in the first one's place, and nothing done in the others'.

    Code that walks through the parts, by whatever way and name, finds as many and ends with the same map.
    """
    parts: list[nn.Module] = list(chain)
    chain[0] = make(*parts)
    for place in range(1, len(parts)):
        chain[place] = nn.Identity()
    return chain


def _frozen_unit(unit: M, make: Callable[[M], nn.Module]) -> nn.Module | None:
    """The frozen form of a unit or down-sampler of ours, or None where it is not what such a one is."""
    found = list(recognise(unit))
    if not found or any(layer.reason for layer in found):
        return None
    return make(unit) if as_written(unit) else blocks.proven(unit, make, *found[0].inputs)


def _foldable(part: nn.Module) -> bool:
    """False where a hook or a forward of the object's own wants to be called, and where a norm cannot be folded.

    That is a normalisation not torch's, and one without statistics.
    """
    if has_hooks(part):
        return False
    if isinstance(part, _BatchNorm):
        return part.running_mean is not None
    return not hasattr(part, "running_mean")
