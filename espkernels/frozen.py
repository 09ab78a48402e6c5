"""Frozen layers: what :func:`espkernels.freeze` puts in place of a model's layers, batch norms folded into weights.

Those of the decoder are in :mod:`espkernels.frozen_decoder`.

Traffic of a stride-1 unit, in maps of N channels: the reduction reads one and writes a quarter, the rest reads that and
the residual and writes one; 3.5 in all, where eager moves about 20.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espkernels import backends, inference, ops, replay
from espkernels import nn as layers
from espkernels.fused_unit import Unit
from espkernels.layout import out_size, vector_dtype
from espkernels.norms import affine_of

__all__ = [
    "Frozen",
    "FrozenAffine",
    "FrozenConvolution",
    "FrozenDownSampler",
    "FrozenEESP",
    "FrozenGlobalAverage",
    "FrozenLinear",
    "slope_of",
]


def slope_of(act: nn.PReLU, channels: int) -> Tensor:
    return act.weight.detach().double().expand(channels).contiguous()


class Frozen(nn.Module):
    """Folded weights as buffers, and packs of them, which follow ``load_state_dict``, ``to`` and other ``_apply``.

    What edits a buffer in place, or calls with others (``torch.func.functional_call``), changes no pack and no replay;
    an edit counts after ``load_state_dict(state_dict())``.
    """

    tells_changes = True  # to replay.forget
    packed: Tensor | None = None  # made for the addresses of this process

    def _register(self, weights: dict[str, Tensor], vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
        for name, weight in weights.items():
            self.register_buffer(name, weight.to(dtype).contiguous())
        for name, vector in vectors.items():
            self.register_buffer(name, vector.to(vector_dtype(dtype)).contiguous())
        self._pack()

    def _pack(self) -> None:
        """Makes the packs anew; nothing to do for a module that has none."""

    def _changed(self) -> None:
        self._pack()
        replay.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def applied(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dim() == 1 and result.is_floating_point() and result.dtype != vector_dtype(result.dtype):
                return tensor.to(result.device, vector_dtype(result.dtype))  # vectors beside half types are not halved
            return result

        result = super()._apply(applied, recurse)
        self._changed()
        return result


class FrozenConvolution(Frozen):
    """Convolution, batch norm and PReLU as one convolution: [B, M, H, W] -> [B, N, H', W'] in channels_last.

    The convolution's padding is zeros; one image [M, H, W] is taken too.
    """

    weight: Tensor
    shift: Tensor
    slope: Tensor | None

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, act: nn.PReLU | None = None) -> None:
        super().__init__()
        weight = conv.weight.detach().double()
        shift = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            scale, offset = affine_of(norm)
            weight, shift = weight * scale.view(-1, 1, 1, 1), shift * scale + offset
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.pointwise = (
            tuple(conv.kernel_size) == (1, 1) and tuple(conv.stride) == (1, 1) and conv.padding in ((0, 0), 0, "valid")
        )
        # One number each, as all convolutions of these networks have.
        self.square = all(
            isinstance(value, tuple) and len(set(value)) == 1 for value in (conv.stride, conv.padding, conv.dilation)
        )
        vectors = {"shift": shift}
        if act is None:
            self.slope = None
        else:
            vectors["slope"] = slope_of(act, conv.out_channels)
        self._register({"weight": weight.flatten(1) if self.pointwise else weight}, vectors, conv.weight.dtype)

    def _pack(self) -> None:
        self.packed = ops.pack_group_pointwise(self.weight, self.groups, True) if self.pointwise else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        channels = self.weight.shape[1] * self.groups
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x: shape {tuple(x.shape)}, expected [B, {channels}, H, W]")
        if x.dtype != self.weight.dtype and not inference.lowers(x.device):
            raise TypeError(f"x: dtype {x.dtype}, expected {self.weight.dtype} as the frozen weights")
        if self.pointwise:
            return ops.group_pointwise(
                inference.channels_last(x),
                self.weight,
                self.groups,
                None,
                self.shift,
                None,
                self.slope,
                packed=self.packed,
            )
        if self.square:
            stride, padding, dilation = self.stride[0], int(self.padding[0]), self.dilation[0]
            return inference.convolution(x, self.weight, self.shift, self.slope, stride, padding, dilation, self.groups)
        x = F.conv2d(x, self.weight, self.shift.to(x.dtype), self.stride, self.padding, self.dilation, self.groups)
        return x if self.slope is None else F.prelu(x, self.slope.to(x.dtype))


class FrozenAffine(Frozen):
    """A batch norm, a PReLU, or both, that no convolution takes in: [B, C, H, W] -> the same in channels_last."""

    scale: Tensor | None
    shift: Tensor | None
    slope: Tensor | None

    def __init__(self, norm: nn.BatchNorm2d | None, act: nn.PReLU | None = None) -> None:
        super().__init__()
        vectors: dict[str, Tensor] = {}
        if norm is None:
            self.scale = self.shift = None
        else:
            vectors["scale"], vectors["shift"] = affine_of(norm)
        if act is None:
            self.slope = None
        else:
            vectors["slope"] = slope_of(act, act.weight.numel() if norm is None else norm.num_features)
        like = act.weight if norm is None and act is not None else cast(nn.BatchNorm2d, norm).running_var
        self._register({}, vectors, cast(Tensor, like).dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 and self.scale is None and self.slope is not None:
            return F.prelu(x, self.slope.to(x.dtype))
        return inference.affine(x, self.scale, self.shift, None, self.slope)


class FrozenGlobalAverage(nn.Module):
    """The mean of each channel: [B, C, H, W] -> [B, C, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return inference.global_average(x) if x.dim() == 4 else F.adaptive_avg_pool2d(x, 1)


class FrozenLinear(Frozen):
    """A linear layer: [B, M] -> [B, N]."""

    weight: Tensor
    shift: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        vectors: dict[str, Tensor] = {}
        if linear.bias is None:
            self.shift = None
        else:
            vectors["shift"] = linear.bias.detach()
        self._register({"weight": linear.weight.detach()}, vectors, linear.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The shift, under the name and in the dtype in which code around a ``nn.Linear`` looks for it."""
        return None if self.shift is None else self.shift.to(self.weight.dtype)

    def _pack(self) -> None:
        self.packed = ops.pack_group_pointwise(self.weight, 1, True)  # one pixel lies so in both layouts

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or backends.runs_reference(x.device):
            return F.linear(x, self.weight, self.bias)
        y = ops.group_pointwise(x[:, :, None, None], self.weight, 1, None, self.shift, packed=self.packed)
        return y.flatten(1)


class FrozenEESP(Frozen):
    """An EESP unit in two kernels: the reduction, and all of the rest (paper Fig. 1c).

    [B, M, H, W] -> [B, N, H', W'] in channels_last.
    """

    reduce_weight: Tensor
    reduce_shift: Tensor
    reduce_slope: Tensor
    weight: Tensor
    pyramid_scale: Tensor
    pyramid_shift: Tensor
    pyramid_slope: Tensor
    expand_weight: Tensor
    shift: Tensor
    slope: Tensor | None

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        parts = unit.layers()
        self.dilations, self.stride, self.hff = tuple(parts.dilations), parts.stride, parts.hff
        self.reduce_groups, self.groups, self.adds_input = parts.reduce.groups, parts.expand.groups, parts.adds_input
        (reduce_scale, reduce_shift), (pyramid_scale, pyramid_shift), (expand_scale, shift) = map(
            affine_of, parts.norms
        )
        # PReLU behind the first norm, behind the second, and behind the unit where one ends it.
        slopes = [
            slope_of(activation, norm.num_features)
            for activation, norm in zip(parts.activations, parts.norms, strict=False)
        ]
        reduce_weight = parts.reduce.weight.detach()
        vectors = {
            "reduce_shift": reduce_shift,
            "reduce_slope": slopes[0],
            "pyramid_scale": pyramid_scale,
            "pyramid_shift": pyramid_shift,
            "pyramid_slope": slopes[1],
            "shift": shift,
        }
        if len(slopes) == 2:
            self.slope = None
        else:
            vectors["slope"] = slopes[2]
        weights = {
            "reduce_weight": reduce_weight.flatten(1).double() * reduce_scale.view(-1, 1),
            "weight": unit.pyramid_weight().detach().double(),
            "expand_weight": parts.expand.weight.detach().flatten(1).double() * expand_scale.view(-1, 1),
        }
        self._register(weights, vectors, reduce_weight.dtype)

    def _pack(self) -> None:
        self.packed = inference.pack_eesp(
            self.reduce_weight, self.reduce_groups, self.weight, self.expand_weight, self.groups,
            self.pyramid_scale, self.pyramid_shift, self.pyramid_slope,
        )  # fmt: skip

    @property
    def unit(self) -> dict[str, Any]:
        """The arguments that :func:`espkernels.inference.eesp` and ``down_sampler`` have in common."""
        return {
            "reduce_weight": self.reduce_weight,
            "reduce_groups": self.reduce_groups,
            "reduce_shift": self.reduce_shift,
            "reduce_slope": self.reduce_slope,
            "weight": self.weight,
            "dilations": self.dilations,
            "pyramid_scale": self.pyramid_scale,
            "pyramid_shift": self.pyramid_shift,
            "pyramid_slope": self.pyramid_slope,
            "expand_weight": self.expand_weight,
            "groups": self.groups,
            "shift": self.shift,
            "hff": self.hff,
            "packed": self.packed,
        }

    def forward(self, x: Tensor) -> Tensor:
        x = inference.channels_last(x)
        same_shape = self.stride == 1 and x.shape[1] == self.expand_weight.shape[0]
        residual = x if same_shape and self.adds_input else None
        return inference.eesp(x, **self.unit, residual=residual, slope=self.slope, stride=self.stride)


class FrozenDownSampler(Frozen):
    """The strided unit with its shortcut from the image (paper section 3.2, Fig. 2): [B, M, H, W] -> [B, N, H', W']."""

    slope: Tensor
    shortcut_weight: Tensor
    shortcut_shift: Tensor

    def __init__(self, unit: layers.DownSampler) -> None:
        super().__init__()
        self.eesp = FrozenEESP(unit.eesp)
        channels = unit.eesp.proj_1x1.conv.in_channels + self.eesp.expand_weight.shape[0]
        vectors = {"slope": slope_of(unit.act, channels)}
        weights: dict[str, Tensor] = {}
        if hasattr(unit, "inp_reinf"):
            first, second = cast(layers.CBR, unit.inp_reinf[0]), cast(layers.CB, unit.inp_reinf[1])
            self.image_convolution = FrozenConvolution(first.conv, first.bn, first.act)
            scale, shift = affine_of(second.bn)
            weights["shortcut_weight"] = second.conv.weight.detach().flatten(1).double() * scale.view(-1, 1)
            vectors["shortcut_shift"] = shift
        self._register(weights, vectors, unit.act.weight.dtype)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        shortcut_weight = shortcut_shift = None
        if image is not None:
            if not hasattr(self, "image_convolution"):
                raise ValueError(f"image: shape {tuple(image.shape)}, expected None in a unit built with reinf=False")
            size = out_size(x.shape[2], 2), out_size(x.shape[3], 2)
            image = self.image_convolution(layers.pooled_image(image, size))
            shortcut_weight, shortcut_shift = self.shortcut_weight, self.shortcut_shift
        return inference.down_sampler(
            x,
            image,
            **self.eesp.unit,
            shortcut_weight=shortcut_weight,
            shortcut_shift=shortcut_shift,
            slope=self.slope,
        )
