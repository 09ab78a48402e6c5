"""An inference copy of a model: batch norms folded, whole units in one call, whole networks replayed.

What is recognised here, or in somebody else's model in :mod:`espkernels.blocks`, becomes a layer of
:mod:`espkernels.frozen` or :mod:`espkernels.frozen_decoder`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TypeVar

from torch import Tensor, nn

from espkernels import blocks, frozen, frozen_decoder, graphs, replay, tuning
from espkernels import nn as layers
from espkernels.checks import MAX_BRANCHES
from espkernels.fused_unit import hooked
from espkernels.models.eru import EESP1d, FrozenEESP1d
from espkernels.models.espnetv2 import Encoder
from espkernels.models.pyramid_pooling import EfficientPyramidPooling, Join
from espkernels.replace import replace_units

__all__ = ["freeze"]

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, tune: Tensor | None = None, graph: bool = False) -> M:
    """A copy of ``model`` for inference, on this library's kernels; the model itself is not touched.

    The copy is in eval mode. EESP units and down-samplers, ours or anybody's that :func:`espkernels.replace`
    recognises, become single modules; convolutions followed by a batch norm (and PReLU) become one convolution, and
    efficient pyramid pooling one layer: in the official classes and copies of them too, which are recognised by their
    parts and proven by a trial. What is not recognised stays as it is. Maps between frozen layers are channels_last,
    whatever format the input has.

    Gradients flow to the inputs of a frozen model, its folded weights are buffers. A batch norm without running
    statistics cannot be folded, and its layer stays as it was; so does a layer with hooks.

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
    root = nn.ModuleList([copy.deepcopy(model).eval()])  # a parent for a model that is itself a layer
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
        return FrozenEESP1d(module) if module.axis == "step" else None
    if isinstance(module, layers.EESP):
        return frozen.FrozenEESP(module)
    if isinstance(module, layers.DownSampler) and isinstance(module.eesp, layers.EESP):
        return frozen.FrozenDownSampler(module)
    if isinstance(module, (layers.CBR, layers.CB)):
        return frozen.FrozenConvolution(module.conv, module.bn, getattr(module, "act", None))
    if isinstance(module, EfficientPyramidPooling):
        return frozen_decoder.FrozenPyramidPooling(module) if len(module.scales) <= MAX_BRANCHES else None
    if isinstance(module, Join):
        return frozen_decoder.FrozenJoin(module)
    if type(module) is nn.Conv2d and tuple(module.kernel_size) == tuple(module.stride) == (1, 1):
        return frozen.FrozenConvolution(module) if module.padding_mode == "zeros" else None
    if type(module) is nn.Linear:
        return frozen.FrozenLinear(module)
    if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
        return frozen.FrozenGlobalAverage()
    if isinstance(module, nn.Sequential) and type(module).forward in (nn.Sequential.forward, layers.Chain.forward):
        kinds = tuple(type(part) for part in module)
        if kinds in ((nn.Conv2d, nn.BatchNorm2d, nn.PReLU), (nn.Conv2d, nn.BatchNorm2d)):
            return frozen.FrozenConvolution(*module) if module[0].padding_mode == "zeros" else None
        if kinds == (nn.BatchNorm2d, nn.PReLU):
            return frozen.FrozenAffine(*module)
    if type(module) is nn.BatchNorm2d:
        return frozen.FrozenAffine(module)
    if type(module) is nn.PReLU and module.num_parameters > 1:
        return frozen.FrozenAffine(None, module)
    return blocks.frozen(module)


def _foldable(part: nn.Module) -> bool:
    """False where a hook wants to be called, for a normalisation not torch's, and for one without statistics."""
    if hooked(part):
        return False
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return part.running_mean is not None
    return not hasattr(part, "running_mean")
