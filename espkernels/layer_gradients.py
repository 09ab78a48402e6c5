"""Gradients of the operators of single layers: pooling, means, resizing and convolutions.

All are linear in the map, so gradients of gradients are again these operators, or torch's own where there is none of
ours: on a GPU, and of convolutions of many channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espkernels.gradient_registration import register_autograd
from espkernels.layout import is_few, is_narrow, layout_of
from espkernels.registration import save_both

__all__ = ["average_pool_backward"]

_ops = torch.ops.espkernels

# --- pooling, means and resizing --------------------------------------------------------------------------------------


def average_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the map ``x``, of which the shape and format alone are read, from that of its pooling."""
    if x.device.type == "cpu" and layout_of(x) == torch.channels_last:
        return _ops.average_pool_backward(grad, x.shape[2], x.shape[3])
    return torch.ops.aten.avg_pool2d_backward.default(grad, x, [3, 3], [2, 2], [1, 1], False, True, None)


def _save_average_pool(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _average_pool_backward(ctx: Any, grad: Tensor) -> Tensor:
    return average_pool_backward(grad, *ctx.saved_tensors)


register_autograd("espkernels::average_pool", _average_pool_backward, setup_context=_save_average_pool)
register_autograd("espkernels::average_pool_backward", lambda ctx, grad: (_ops.average_pool(grad), None, None))


def _save_size(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = inputs[0].shape
    ctx.others = any(isinstance(other, Tensor) for other in inputs[1:])


def _global_average_backward(ctx: Any, grad: Tensor) -> Tensor:
    return (grad / (ctx.size[2] * ctx.size[3])).expand(ctx.size)


def _adaptive_average_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if grad.device.type == "cpu":
        return _ops.adaptive_average_backward(grad, *ctx.size[2:]), None, None
    return torch.ops.aten._adaptive_avg_pool2d_backward.default(grad, grad.new_empty(ctx.size)), None, None


def _resize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.others:
        raise RuntimeError("espkernels::resize has no derivative with a skip connection, gate, scale, shift or slope")
    if grad.device.type == "cpu":
        found = _ops.resize_backward(grad, *ctx.size[2:])
    else:
        found = torch.ops.aten.upsample_bilinear2d_backward.default(grad, grad.shape[2:], ctx.size, True)
    return found, *(None,) * 7


register_autograd("espkernels::global_average", _global_average_backward, setup_context=_save_size)
register_autograd("espkernels::adaptive_average", _adaptive_average_backward, setup_context=_save_size)
register_autograd("espkernels::resize", _resize_backward, setup_context=_save_size)
register_autograd(
    "espkernels::adaptive_average_backward",
    lambda ctx, grad: (_ops.adaptive_average(grad, *ctx.size[2:]), None, None),
    setup_context=_save_size,
)
register_autograd(
    "espkernels::resize_backward",
    lambda ctx, grad: (_ops.resize(grad, *ctx.size[2:]), None, None),
    setup_context=_save_size,
)


# --- convolutions -----------------------------------------------------------------------------------------------------


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, shift, slope, *ctx.options = inputs
    ctx.epilogue = shift is not None or slope is not None
    ctx.save_for_backward(x, weight)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """The weight [N, M/groups, 3, 3] of a grouped convolution as that of the gradient of its input."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(3, 4).flatten(0, 1)


def _grouped(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return _ops.convolution(x, weight, None, None, 1, 1, 1, groups)


def _aten_backward(
    grad: Tensor, x: Tensor, weight: Tensor, options: tuple[int, int, int, int], wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and ``weight`` by torch's own convolutions."""
    *geometry, groups = options
    pairs = ([one] * 2 for one in geometry)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, *pairs, False, [0, 0], groups, [*wanted, False]
    )
    return grad_x, grad_weight


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.epilogue:
        raise RuntimeError("espkernels::convolution has no derivative with a shift or slope")
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.options
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    here = x.device.type == "cpu"
    grad_x = grad_weight = None
    if here and is_narrow(weight, *ctx.options) and weight.shape[0] <= 8 * groups:  # outputs too
        grad_x = _grouped(grad, _turned(weight, groups), groups) if needs_x else None
        grad_weight = _ops.grouped_convolution_backward_weight(grad, x, groups) if needs_weight else None
        return grad_x, grad_weight, *(None,) * 6
    few = here and is_few(weight, dilation, groups)
    left = [needs_x, needs_weight and not few]
    if any(left):
        grad_x, grad_weight = _aten_backward(grad, x, weight, ctx.options, left)
    if few and needs_weight:
        grad_weight = _ops.convolution_backward_weight(grad, x, *weight.shape[2:], stride, padding)
    return grad_x, grad_weight, *(None,) * 6


def _convolution_backward_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output_grad, x = ctx.saved_tensors
    *_, stride, padding = ctx.options
    grad_output_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_output_grad = _ops.convolution(x, grad, None, None, stride, padding, 1, 1)
    if ctx.needs_input_grad[1]:
        grad_x, _ = _aten_backward(output_grad, x, grad, (stride, padding, 1, 1), [True, False])
    return grad_output_grad, grad_x, *(None,) * 4


def _grouped_backward_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output_grad, x = ctx.saved_tensors
    (groups,) = ctx.options
    grad_output_grad = _grouped(x, grad, groups) if ctx.needs_input_grad[0] else None
    grad_x = _grouped(output_grad, _turned(grad, groups), groups) if ctx.needs_input_grad[1] else None
    return grad_output_grad, grad_x, None


register_autograd("espkernels::convolution", _convolution_backward, setup_context=_save_convolution)
register_autograd(
    "espkernels::convolution_backward_weight", _convolution_backward_weight_backward, setup_context=save_both
)
register_autograd(
    "espkernels::grouped_convolution_backward_weight", _grouped_backward_weight_backward, setup_context=save_both
)
