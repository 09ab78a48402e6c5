"""A down-sampler of modules, or its end, as one call, where that is the same thing as its layers one by one.

The shortcut's last convolution and batch norm are folded into a weight and a shift by the moments of the image, so that
neither makes a map (:func:`espkernels.norms.folded`); what :mod:`espkernels.fused_unit` says of hooks and other classes
holds here too.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from espkernels import backends, fused_unit, inference
from espkernels.fused_unit import Unit, UnitLayers, hooked, is_pointwise, laid_out
from espkernels.layout import out_size, vector_dtype
from espkernels.norms import NORMS, folded, takes_batch
from espkernels.training_down_sampler import down_sampler_training
from espkernels.training_layers import MOST_IMAGE_CHANNELS, long_range_shortcut

__all__ = ["fits", "pooling_difference", "run"]


class DownSampler(Protocol):
    """A module with the parts of a down-sampler; ``inp_reinf`` where it has a shortcut."""

    avg: nn.AvgPool2d
    act: nn.PReLU

    @property
    def eesp(self) -> nn.Module: ...


def pooling_difference(avg: nn.AvgPool2d) -> str:
    """How ``avg`` differs from the 3x3 pooling of stride 2 that counts its padding; empty where it does not."""
    for key, value in (("kernel_size", 3), ("stride", 2), ("padding", 1)):
        actual = getattr(avg, key)
        if actual not in (value, (value, value)):
            return f"avg has {key} {actual}, not {value}"
    counts_padding = not avg.ceil_mode and avg.count_include_pad and avg.divisor_override is None
    return "" if counts_padding else "avg does not count its padding as the official one does"


def fits(unit: DownSampler, x: Tensor, image: Tensor | None) -> bool:
    """Whether :func:`run` does for the map ``x`` what the layers would do, on kernels of ours."""
    if not backends.trains_whole("long_range_shortcut", x.device):
        return False
    # One slope is for all channels; any other number than theirs is refused by the kernel as by the layer.
    if x.dim() != 4 or x.numel() == 0 or type(unit.act) is not nn.PReLU or unit.act.num_parameters == 1:
        return False
    if type(unit.avg) is not nn.AvgPool2d or pooling_difference(unit.avg):
        return False
    if not torch.is_autocast_enabled(x.device.type) and unit.act.weight.dtype != x.dtype:
        return False
    if hooked(unit.avg, unit.act):
        return False
    if image is None:
        return True
    shortcut = cast(Any, unit).inp_reinf
    if type(shortcut) is not nn.Sequential or len(shortcut) != 2:
        return False
    last = shortcut[1]
    norm: Any = getattr(last, "bn", None)
    convolution: Any = getattr(last, "conv", None)
    if type(norm) not in NORMS or not is_pointwise(convolution) or convolution.groups > 1:
        return False
    if hooked(shortcut, last, norm):
        return False
    # A channel of one value has no variance: torch's batch norm says so.
    values = x.shape[0] * out_size(x.shape[2], 2) * out_size(x.shape[3], 2)
    return convolution.in_channels <= MOST_IMAGE_CHANNELS and not (values == 1 and takes_batch(norm))


def run(unit: DownSampler, x: Tensor, image: Tensor | None, strided: Unit | None) -> Tensor:
    """The unit's result for ``x`` and the pooled ``image``, in channels_last.

    ``strided`` is ``unit.eesp`` where the forward of that does no more than its layers do.
    """
    layers = None if strided is None else _layers_in_training(strided, x)
    if strided is None or layers is None:
        pooled, expanded = inference.average_pool(x), unit.eesp(x)
        return long_range_shortcut(pooled.to(expanded.dtype), expanded, *_end(unit, image, expanded.dtype))
    *arguments, _, hff, _, save = fused_unit.arguments(strided, layers, x)
    arguments += _end(unit, image, x.dtype)
    y, moments = down_sampler_training(*arguments, hff=hff, save=save)
    fused_unit.track_all(layers, moments, x, y)
    return y


def _end(
    unit: DownSampler, image: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """What :func:`espkernels.training_layers.long_range_shortcut` takes beside its maps of ``dtype``."""
    slope = unit.act.weight.to(vector_dtype(dtype))
    if image is None:
        return None, None, None, slope
    first, last = cast(Any, unit).inp_reinf
    image, weight, shift = folded(laid_out(last.conv.weight).flatten(1), last.bn, first(image))
    return image.to(dtype), weight, shift, slope


def _layers_in_training(strided: Unit, x: Tensor) -> UnitLayers | None:
    """The layers of the strided unit where one operator does for ``x`` what they, the pooling and the end do."""
    module = cast(nn.Module, strided)
    if hooked(module) or not (module.training or torch.is_grad_enabled()):
        return None
    layers = strided.layers()
    if not fused_unit.wanted(layers, x):
        return None
    if layers.stride != 2 or layers.adds_input or len(layers.activations) != 2:
        return None
    device = x.device.type  # autocast would lower what comes to the unit, and not what comes to the pooling
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return None
    return layers if fused_unit.fits(layers, x) else None
