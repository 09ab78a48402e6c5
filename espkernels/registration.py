"""What torch must know about the operators in the library: gradients and autocast.

Fake tensors are in fakes.py, the gradients of the layers around the units in layer_gradients.py. Both convolutions are
bilinear in (input, weight), so their gradients are again these operators, and gradients of gradients compose from the
same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from espkernels import fakes, reference  # noqa: F401  gradients of fake tensors are fake tensors
from espkernels.gradient_registration import register_autograd
from espkernels.layout import vector_dtype

__all__ = ["register_autocast", "save_both", "without_second_derivative"]

_ops = torch.ops.espkernels

# --- gradients --------------------------------------------------------------------------------------------------------


def save_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the two tensors that an operator takes first, and the options behind them."""
    first, second, *ctx.options = inputs
    ctx.save_for_backward(first, second)


def _spatial_pyramid_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.spatial_pyramid_backward_input(grad, weight, *ctx.options, x.shape[2], x.shape[3])
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.spatial_pyramid_backward_weight(grad, x, *ctx.options)
    return grad_x, grad_weight, None, None, None


def _spatial_pyramid_backward_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output_grad, weight = ctx.saved_tensors
    options = ctx.options[:3]
    grad_output_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_output_grad = _ops.spatial_pyramid(grad, weight, *options)
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.spatial_pyramid_backward_weight(output_grad, grad, *options)
    return grad_output_grad, grad_weight, None, None, None, None, None


def _spatial_pyramid_backward_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output_grad, x = ctx.saved_tensors
    grad_output_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_output_grad = _ops.spatial_pyramid(x, grad, *ctx.options)
    if ctx.needs_input_grad[1]:
        grad_x = _ops.spatial_pyramid_backward_input(output_grad, grad, *ctx.options, x.shape[2], x.shape[3])
    return grad_output_grad, grad_x, None, None, None


def _plain_pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return _ops.group_pointwise(x, weight, groups, None, None, None, None)


def _group_pointwise_backward_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output_grad, weight = ctx.saved_tensors
    (groups,) = ctx.options
    grad_output_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_output_grad = _plain_pointwise(grad, weight, groups)
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.group_pointwise_backward_weight(output_grad, grad, groups)
    return grad_output_grad, grad_weight, None


def _group_pointwise_backward_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output_grad, x = ctx.saved_tensors
    (groups,) = ctx.options
    grad_output_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_output_grad = _plain_pointwise(x, grad, groups)
    if ctx.needs_input_grad[1]:
        grad_x = _ops.group_pointwise_backward_input(output_grad, grad, groups)
    return grad_output_grad, grad_x, None


def _epilogue_backward(
    grad: Tensor,
    value: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``reference.epilogue(value, scale, shift, residual, slope)`` for the five inputs that need one.

    ``value`` may be None where :func:`_epilogue_needs_value` says so. Computed in the type of the vectors, float32 or
    float64, and returned in the type of each input.
    """
    dtype, (needs_value, needs_scale, needs_shift, needs_residual, needs_slope) = grad.dtype, needs
    compute = vector_dtype(dtype)
    grad = grad.to(compute)
    value = None if value is None else value.to(compute)
    grad_value = grad_scale = grad_shift = grad_residual = grad_slope = None
    if slope is not None:
        assert value is not None
        before = reference.epilogue(value, scale, shift, None if residual is None else residual.to(compute))
        positive = before > 0
        if needs_slope:
            grad_slope = torch.where(positive, 0.0, grad * before).sum((0, 2, 3))
        grad = torch.where(positive, grad, grad * slope.view(1, -1, 1, 1))
    if needs_residual:
        grad_residual = grad.to(dtype)
    if needs_shift:
        grad_shift = grad.sum((0, 2, 3))
    if needs_scale:
        assert value is not None
        grad_scale = (grad * value).sum((0, 2, 3))
    if needs_value:
        grad_value = (grad if scale is None else grad * scale.view(1, -1, 1, 1)).to(dtype)
    return grad_value, grad_scale, grad_shift, grad_residual, grad_slope


def _epilogue_needs_value(slope: Tensor | None, needs: tuple[bool, ...]) -> bool:
    """Whether the gradients of an epilogue ask for its input: for the sign at the PReLU, or as a factor of scale's."""
    return any(needs) and (slope is not None or needs[1])


def _save_group_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.groups, *epilogue, _ = inputs
    ctx.save_for_backward(x, weight, *epilogue)


def _group_pointwise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, shift, residual, slope = ctx.saved_tensors
    needs_x, needs_weight, _, *needs_epilogue = ctx.needs_input_grad[:7]  # `packed` only where it was given
    needs = (needs_x or needs_weight, *needs_epilogue)
    value = _plain_pointwise(x, weight, ctx.groups) if _epilogue_needs_value(slope, needs) else None
    grad_value, *grads_epilogue = _epilogue_backward(grad, value, scale, shift, residual, slope, needs)
    grad_x = _ops.group_pointwise_backward_input(grad_value, weight, ctx.groups) if needs_x else None
    grad_weight = _ops.group_pointwise_backward_weight(grad_value, x, ctx.groups) if needs_weight else None
    return grad_x, grad_weight, None, *grads_epilogue, None


def _save_pyramid_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.dilations, pointwise_weight, ctx.groups, *vectors, ctx.stride, ctx.hff, _ = inputs
    ctx.save_for_backward(x, weight, pointwise_weight, *vectors)


def _pyramid_pointwise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recomputes the concatenated map from the reduced one: the forward pass kept neither it nor anything as large."""
    x, weight, pointwise_weight, p_scale, p_shift, p_slope, scale, shift, residual, slope = ctx.saved_tensors
    options = (ctx.dilations, ctx.stride, ctx.hff)
    (needs_x, needs_weight, _, needs_pointwise, _, needs_p_scale, needs_p_shift, needs_p_slope, *needs_epilogue) = (
        ctx.needs_input_grad[:12]
    )
    needs_concatenated = needs_x or needs_weight
    needs_z = needs_concatenated or needs_p_scale or needs_p_shift or needs_p_slope

    needs_outer = (needs_z or needs_pointwise, *needs_epilogue)
    needs_inner = (needs_concatenated, needs_p_scale, needs_p_shift, False, needs_p_slope)
    needs_value = _epilogue_needs_value(slope, needs_outer)
    concatenated: Tensor | None = None
    z: Tensor | None = None
    value: Tensor | None = None
    if needs_value or needs_pointwise or _epilogue_needs_value(p_slope, needs_inner):
        concatenated = _ops.spatial_pyramid(x, weight, *options)
    if concatenated is not None and (needs_value or needs_pointwise):
        z = reference.epilogue(concatenated, p_scale, p_shift, None, p_slope).to(x.dtype)
    if z is not None and needs_value:
        value = _plain_pointwise(z, pointwise_weight, ctx.groups)
    grad_value, *grads_epilogue = _epilogue_backward(grad, value, scale, shift, residual, slope, needs_outer)

    grad_pointwise = _ops.group_pointwise_backward_weight(grad_value, z, ctx.groups) if needs_pointwise else None
    grad_x = grad_weight = None
    grads_pyramid: list[Tensor | None] = [None, None, None]
    if needs_z:
        grad_z = _ops.group_pointwise_backward_input(grad_value, pointwise_weight, ctx.groups)
        grad_concatenated, grad_p_scale, grad_p_shift, _, grad_p_slope = _epilogue_backward(
            grad_z, concatenated, p_scale, p_shift, None, p_slope, needs_inner
        )
        grads_pyramid = [grad_p_scale, grad_p_shift, grad_p_slope]
        if needs_x:
            grad_x = _ops.spatial_pyramid_backward_input(grad_concatenated, weight, *options, x.shape[2], x.shape[3])
        if needs_weight:
            grad_weight = _ops.spatial_pyramid_backward_weight(grad_concatenated, x, *options)
    return grad_x, grad_weight, None, grad_pointwise, None, *grads_pyramid, *grads_epilogue, None, None, None


for _name, _backward, _save in (
    ("spatial_pyramid", _spatial_pyramid_backward, save_both),
    ("spatial_pyramid_backward_input", _spatial_pyramid_backward_input_backward, save_both),
    ("spatial_pyramid_backward_weight", _spatial_pyramid_backward_weight_backward, save_both),
    ("group_pointwise", _group_pointwise_backward, _save_group_pointwise),
    ("group_pointwise_backward_input", _group_pointwise_backward_input_backward, save_both),
    ("group_pointwise_backward_weight", _group_pointwise_backward_weight_backward, save_both),
    ("pyramid_pointwise", _pyramid_pointwise_backward, _save_pyramid_pointwise),
):
    register_autograd(f"espkernels::{_name}", _backward, setup_context=_save)


def without_second_derivative(operator: str, instead: str) -> Callable[..., Any]:
    """The gradient of an operator's gradient where there is none: an error that says what to do ``instead``."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"espkernels::{operator} has no second derivative: a gradient of its gradient was asked for. Without its "
            f"kernels (espkernels.use_backend('reference')) {instead}"
        )

    return refuse


# --- autocast: like torch's own convolutions, in the lower precision --------------------------------------------------

_autocast = Library("espkernels", "IMPL")


def register_autocast(name: str, device_type: str, cast: tuple[int, ...]) -> None:
    """Casts the arguments at positions ``cast`` (maps and weights) and leaves the vectors in float32."""
    op: Callable[..., Tensor] = getattr(_ops, name).default

    def lowered(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        lower = [
            a.to(dtype) if i in cast and isinstance(a, Tensor) and a.dtype != torch.float64 else a
            for i, a in enumerate(args)
        ]
        with torch.autocast(device_type, enabled=False):
            return op(*lower)

    _autocast.impl(name, lowered, f"Autocast{device_type.upper()}")


for _device_type in ("cpu", "cuda"):
    register_autocast("spatial_pyramid", _device_type, (0, 1))
    register_autocast("group_pointwise", _device_type, (0, 1, 5))
    register_autocast("pyramid_pointwise", _device_type, (0, 1, 3, 10))
