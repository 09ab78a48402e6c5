"""An EESP unit of modules as one or two calls of operators, where that is the same thing as its layers one by one.

In training it is :func:`espkernels.training.eesp_training`; without gradients two operators, into whose epilogues the
norms and PReLUs go. Operators know nothing of modules. What a person may have hung on them, a hook, a parametrisation,
another kind of batch norm, runs only when the modules are called, so such a unit stays with its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from espkernels import backends, ops
from espkernels.layout import layout_of, out_size, vector_dtype
from espkernels.norms import NORMS, Norm, affine_of, bias_of, running, takes_batch, track, weight_of
from espkernels.training import eesp_training

__all__ = [
    "GLOBAL_HOOKS",
    "Unit",
    "UnitLayers",
    "arguments",
    "convolves",
    "fits",
    "has_hooks",
    "hooked",
    "infer",
    "is_global_average",
    "is_pointwise",
    "is_pyramid",
    "laid_out",
    "run",
    "settled",
    "track_all",
    "wanted",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class UnitLayers:
    """The modules of a unit in the order in which data meets them, and what its code does between them."""

    reduce: nn.Conv1d | nn.Conv2d
    branches: Sequence[nn.Module]
    expand: nn.Conv1d | nn.Conv2d
    norms: tuple[Norm, Norm, Norm]
    activations: Sequence[nn.PReLU]  # behind the first two norms, and behind the last where one ends the unit
    containers: Sequence[nn.Module]  # of the modules above, called with them
    dilations: Sequence[int]
    stride: int = 1
    hff: bool = True
    adds_input: bool = False  # where shapes are equal
    memory: str = "save"
    as_known: bool = True  # the containers are of classes whose forward does no more than call their modules


class Unit(Protocol):
    """A module that can say what it is made of."""

    def layers(self) -> UnitLayers: ...

    def pyramid_weight(self) -> Tensor:
        """The weights of the branches, [K, d, 3, 3]."""


# Hooks that torch calls for every module there is.
GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def hooked(*modules: nn.Module) -> bool:
    """Whether calling one of ``modules`` would do more than the forward of its class: then it must be called."""
    return any(GLOBAL_HOOKS) or any(map(has_hooks, modules))


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, or a forward, of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks or module._backward_pre_hooks or "forward" in vars(module))


def is_global_average(module: nn.Module) -> bool:
    """Whether calling ``module`` takes the mean of each channel, and no more."""
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def is_pointwise(module: nn.Module | None) -> bool:
    """Whether calling ``module`` is a product with its ``weight`` in its ``groups``, and no more."""
    return convolves(module, 1, 1, 1)


def is_pyramid(branches: Sequence[nn.Module], dilations: Sequence[int], stride: int) -> bool:
    """Whether calling each of ``branches`` is a depthwise convolution with its 3-tap ``weight``, and no more."""
    return len(branches) == len(dilations) and all(
        convolves(branch, 3, stride, dilation) and branch.groups == branch.in_channels == branch.out_channels
        for branch, dilation in zip(branches, dilations, strict=True)
    )


def convolves(module: Any, size: int, stride: int, dilation: int) -> bool:
    """Whether calling ``module`` convolves with its ``weight``, alike over every axis, padded to keep the size."""
    if type(module) not in CONVOLUTIONS or module.bias is not None or hooked(module):
        return False
    axes = len(module.kernel_size)
    return (
        module.kernel_size == (size,) * axes
        and module.stride == (stride,) * axes
        and module.dilation == (dilation,) * axes
        and module.padding == (dilation * (size // 2),) * axes
        and module.padding_mode == "zeros"
    )


def laid_out(weight: Tensor) -> Tensor:
    """``weight`` [N, M, h, w] with its dimensions in the order of memory, so that reshaping it copies nothing.

    The gradient then comes back in the weight's own strides, also those of dimensions of size 1: distributed training
    compares strides one by one.
    """
    if weight.dim() == 4 and weight.stride(1) == 1 and weight.stride(3) == weight.shape[1]:
        return weight.permute(0, 2, 3, 1)
    return weight


def wanted(layers: UnitLayers, x: Tensor) -> bool:
    """Whether the unit is in training: a norm takes the statistics of the batch, or a gradient is wanted.

    Of what the layers hold, which need not be parameters: learning to learn puts tensors with a history there.
    """
    if any(norm.training for norm in layers.norms):
        return True
    if not torch.is_grad_enabled():
        return False
    held = (layers.reduce, *layers.branches, layers.expand, *layers.norms, *layers.activations)
    vectors = (vector for layer in held for vector in (layer.weight, getattr(layer, "bias", None)))
    return x.requires_grad or any(vector is not None and vector.requires_grad for vector in vectors)


def settled(layers: UnitLayers, x: Tensor) -> bool:
    """Whether every norm has its running statistics, and no autocast decides on the dtype of each layer."""
    return not any(map(takes_batch, layers.norms)) and not torch.is_autocast_enabled(x.device.type)


def fits(layers: UnitLayers, x: Tensor) -> bool:
    """Whether :func:`run`, or :func:`infer` of a :func:`settled` unit, does for the map ``x`` what ``layers`` would do.

    That is on kernels that train whole units, and where every layer is just what its class says.
    """
    if not backends.trains_whole("eesp_training", x.device):
        return False
    norms, activations = layers.norms, layers.activations
    plain = all(
        type(module) in kinds for modules, kinds in ((norms, NORMS), (activations, (nn.PReLU,))) for module in modules
    )
    if not plain or not is_pointwise(layers.reduce) or not is_pointwise(layers.expand):
        return False
    if not is_pyramid(layers.branches, layers.dilations, layers.stride):
        return False
    if x.dim() != 4 or x.numel() == 0 or x.shape[1] != layers.reduce.in_channels:
        return False
    # A channel of one value has no variance: torch's batch norm says so.
    values = x.shape[0] * out_size(x.shape[2], layers.stride) * out_size(x.shape[3], layers.stride)
    if values == 1 and any(takes_batch(norm) for norm in norms):
        return False
    if any(act.num_parameters != norm.num_features for act, norm in zip(activations, norms, strict=False)):
        return False
    if not layers.as_known or hooked(*layers.containers, *norms, *activations):
        return False
    if any(norm.eps <= 0 and takes_batch(norm) for norm in norms):  # torch's batch norm says that it may not be
        return False
    weights = [convolution.weight for convolution in (layers.reduce, *layers.branches, layers.expand)]
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype != torch.float64 and all(weight.dtype != torch.float64 for weight in weights)
    return all(weight.dtype == x.dtype for weight in weights)


def _adds_input(layers: UnitLayers, x: Tensor) -> bool:
    out_shape = (layers.expand.out_channels, *(out_size(size, layers.stride) for size in x.shape[2:]))
    return layers.adds_input and x.shape[1:] == out_shape


def run(unit: Unit, layers: UnitLayers, x: Tensor) -> Tensor:
    """The unit's result for ``x`` in the format of ``x``; updates the norms' running statistics as they would.

    The kernels read channels_last. A contiguous ``x`` and its result are copied once each; gradients stay in
    channels_last.
    """
    y, moments = eesp_training(*arguments(unit, layers, x))
    track_all(layers, moments, x, y)
    return y.contiguous(memory_format=layout_of(x))


def arguments(unit: Unit, layers: UnitLayers, x: Tensor) -> tuple[Any, ...]:
    """Those of :func:`espkernels.training.eesp_training`."""
    norms, reduce, expand = layers.norms, layers.reduce, layers.expand
    compute = vector_dtype(x.dtype)
    means, variances = running(norms, x.device)
    return (
        x.contiguous(memory_format=torch.channels_last),
        laid_out(reduce.weight).flatten(1),
        reduce.groups,
        unit.pyramid_weight(),
        layers.dilations,
        laid_out(expand.weight).flatten(1),
        expand.groups,
        torch.cat([weight_of(norm, compute, x.device) for norm in norms]),
        torch.cat([bias_of(norm, compute, x.device) for norm in norms]),
        torch.cat([activation.weight.to(compute) for activation in layers.activations]),
        means,
        variances,
        [norm.eps for norm in norms],
        [takes_batch(norm) for norm in norms],
        layers.stride,
        layers.hff,
        _adds_input(layers, x),
        layers.memory == "save",
    )


def track_all(layers: UnitLayers, moments: Tensor, x: Tensor, y: Tensor) -> None:
    """What the forward of the unit's norms does to their buffers, from the map ``x`` to ``y``."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3], y.shape[0] * y.shape[2] * y.shape[3]
    track(layers.norms, moments, (pixels[0], pixels[1], pixels[1]))


def infer(unit: Unit, layers: UnitLayers, x: Tensor) -> Tensor:
    """The unit's result for ``x``, without gradients, in its format: 3.5 maps of traffic instead of about 20."""
    reduce, expand, stride = layers.reduce, layers.expand, layers.stride
    compute = vector_dtype(x.dtype)
    affines = [[vector.to(compute) for vector in affine_of(norm)] for norm in layers.norms]
    (scale, shift), (pyramid_scale, pyramid_shift), (last_scale, last_shift) = affines
    slopes = [activation.weight.to(compute) for activation in layers.activations]
    dense = x.contiguous(memory_format=layout_of(x))  # as the residual has to be
    residual = dense if _adds_input(layers, x) else None
    slope = slopes[2] if len(slopes) > 2 else None
    reduce_weight, expand_weight = laid_out(reduce.weight).flatten(1), laid_out(expand.weight).flatten(1)
    reduced = ops.group_pointwise(dense, reduce_weight, reduce.groups, scale, shift, None, slopes[0])
    return ops.pyramid_pointwise(
        reduced, unit.pyramid_weight(), layers.dilations, expand_weight, expand.groups,
        pyramid_scale, pyramid_shift, slopes[1], last_scale, last_shift, residual, slope, stride, layers.hff,
    )  # fmt: skip
