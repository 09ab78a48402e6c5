"""Fake tensors of the operators in the library: the sizes and the very strides that the kernels return."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from espkernels.layout import convolved_size, empty_map, empty_pixels, out_size

__all__: list[str] = []


@register_fake("espkernels::spatial_pyramid")
def _(x: Tensor, weight: Tensor, dilations: list[int], stride: int, hff: bool) -> Tensor:
    channels = weight.shape[0] * x.shape[1]
    return empty_map(x, channels, out_size(x.shape[2], stride), out_size(x.shape[3], stride))


@register_fake("espkernels::spatial_pyramid_backward_input")
def _(grad: Tensor, weight: Tensor, dilations: list[int], stride: int, hff: bool, height: int, width: int) -> Tensor:
    return empty_map(grad, weight.shape[1], height, width)


@register_fake("espkernels::spatial_pyramid_backward_weight")
def _(grad: Tensor, x: Tensor, dilations: list[int], stride: int, hff: bool) -> Tensor:
    return x.new_empty((len(dilations), x.shape[1], 3, 3))


@register_fake("espkernels::group_pointwise")
def _(
    x: Tensor,
    weight: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    return empty_map(x, weight.shape[0], x.shape[2], x.shape[3])


@register_fake("espkernels::group_pointwise_backward_input")
def _(grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    return empty_map(grad, weight.shape[1] * groups, grad.shape[2], grad.shape[3])


@register_fake("espkernels::group_pointwise_backward_weight")
def _(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1] // groups))


@register_fake("espkernels::pyramid_pointwise")
def _(
    x: Tensor, weight: Tensor, dilations: list[int], pointwise_weight: Tensor, groups: int,
    pyramid_scale: Tensor | None, pyramid_shift: Tensor | None, pyramid_slope: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None,
    stride: int, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return empty_map(x, pointwise_weight.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride))


@register_fake("espkernels::eesp")
def _(
    x: Tensor, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor, reduce_slope: Tensor,
    weight: Tensor, dilations: list[int], pyramid_scale: Tensor, pyramid_shift: Tensor, pyramid_slope: Tensor,
    expand_weight: Tensor, groups: int, shift: Tensor, residual: Tensor | None, slope: Tensor | None,
    stride: int, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return empty_map(x, expand_weight.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride))


@register_fake("espkernels::down_sampler")
def _(
    x: Tensor, image: Tensor | None, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor,
    reduce_slope: Tensor, weight: Tensor, dilations: list[int], pyramid_scale: Tensor, pyramid_shift: Tensor,
    pyramid_slope: Tensor, expand_weight: Tensor, groups: int, shift: Tensor, shortcut_weight: Tensor | None,
    shortcut_shift: Tensor | None, slope: Tensor, hff: bool, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return empty_pixels(x, slope.shape[0], out_size(x.shape[2], 2), out_size(x.shape[3], 2))


@register_fake("espkernels::convolution")
def _(
    x: Tensor, weight: Tensor, shift: Tensor | None, slope: Tensor | None,
    stride: int, padding: int, dilation: int, groups: int,
) -> Tensor:  # fmt: skip
    return empty_pixels(x, weight.shape[0], *convolved_size(x, weight, stride, padding, dilation))


@register_fake("espkernels::average_pool")
def _(x: Tensor) -> Tensor:
    return empty_map(x, x.shape[1], out_size(x.shape[2], 2), out_size(x.shape[3], 2))


@register_fake("espkernels::convolution_backward_weight")
def _(grad: Tensor, x: Tensor, height: int, width: int, stride: int, padding: int) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1], height, width))


@register_fake("espkernels::grouped_convolution_backward_weight")
def _(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1] // groups, 3, 3))


@register_fake("espkernels::average_pool_backward")
@register_fake("espkernels::adaptive_average_backward")
@register_fake("espkernels::resize_backward")
def _(grad: Tensor, height: int, width: int) -> Tensor:
    return empty_pixels(grad, grad.shape[1], height, width)


@register_fake("espkernels::add_average_pool_backward")
def _(map_: Tensor, grad: Tensor) -> None:
    return None


@register_fake("espkernels::global_average")
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


@register_fake("espkernels::resize")
def _(
    x: Tensor, height: int, width: int, skip: Tensor | None = None, gate: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, slope: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return empty_pixels(x, x.shape[1], height, width)


@register_fake("espkernels::resized_argmax")
def _(x: Tensor, height: int, width: int, wide: bool = False) -> Tensor:
    dtype = torch.int64 if wide or x.shape[1] > 256 else torch.uint8
    return x.new_empty((x.shape[0], height, width), dtype=dtype)


@register_fake("espkernels::affine")
def _(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None
) -> Tensor:  # fmt: skip
    return empty_pixels(x, x.shape[1], x.shape[2], x.shape[3])


@register_fake("espkernels::change_layout")
def _(x: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


@register_fake("espkernels::concatenate")
def _(maps: list[Tensor], dim: int) -> Tensor:
    first, size = maps[0], [*maps[0].shape]
    size[dim] = sum(map_.shape[dim] for map_ in maps)
    memory_format = torch.channels_last if first.dim() == 4 and dim == 1 else torch.contiguous_format
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=memory_format)


@register_fake("espkernels::adaptive_average")
def _(x: Tensor, height: int, width: int) -> Tensor:
    return empty_pixels(x, x.shape[1], height, width)


@register_fake("espkernels::pyramid_pooling")
def _(
    x: Tensor, weight: Tensor, sizes: list[int], enlarged: int, scale: Tensor, shift: Tensor, slope: Tensor,
    merge_weight: Tensor, merge_shift: Tensor, merge_slope: Tensor,
) -> Tensor:  # fmt: skip
    return empty_pixels(x, x.shape[1], x.shape[2], x.shape[3])
