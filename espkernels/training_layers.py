"""The operators of training around the units: a batch norm with its PReLU, and the end of a down-sampler.

:mod:`espkernels.nn` calls them through :mod:`espkernels.fused_norm` and :mod:`espkernels.fused_shortcut`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from espkernels import backends
from espkernels.gradient_registration import register_autograd
from espkernels.layout import empty_pixels

if backends.library is not None:
    from espkernels.registration import register_autocast, without_second_derivative

__all__ = ["MOST_IMAGE_CHANNELS", "batch_norm_prelu", "long_range_shortcut"]

MOST_IMAGE_CHANNELS = 8


def batch_norm_prelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    eps: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """``prelu(batch_norm(x))``, differentiable once in x, weight, bias and slope; only x is kept for the backward pass.

    Args:
        x: [B, C, H, W], not empty; channels_last is read as it is, other formats are copied.
        weight, bias, slope: [C], float32, float64 beside float64.
        running_mean, running_variance: float64 [C], read where the norm does not take the batch's statistics.

    Returns:
        [B, C, H, W] in channels_last, and the mean and biased variance that the norm took, float64 [2, C].

    Raises:
        RuntimeError: a shape, dtype or device is not as above; or a gradient of a gradient was asked for.
    """
    return torch.ops.espkernels.batch_norm_prelu.default(
        x, weight, bias, slope, running_mean, running_variance, eps, batch_statistics
    )


def long_range_shortcut(
    pooled: Tensor,
    expanded: Tensor,
    image: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    slope: Tensor,
) -> Tensor:
    """``prelu(concat(pooled, expanded) + image weight + shift)`` (paper section 3.2, Fig. 2), differentiable once.

    Args:
        pooled: [B, M, H, W]; expanded: [B, N, H, W]; image: [B, I, H, W] with I at most 8, or None. Not empty, of one
            dtype; channels_last is read as it is, other formats are copied.
        weight: [M+N, I]; shift: [M+N]; None without ``image``. slope: [M+N]. float32, float64 beside float64.

    Returns:
        [B, M+N, H, W] in channels_last. The two maps and the image are kept for the backward pass.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; or a gradient of a gradient was asked for.
    """
    return torch.ops.espkernels.long_range_shortcut.default(pooled, expanded, image, weight, shift, slope)


def _fake_norm(
    x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, running_mean: Tensor | None,
    running_variance: Tensor | None, eps: float, batch_statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_pixels(x, *x.shape[1:]), x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _fake_norm_backward(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, eps: float,
    batch_statistics: bool, wants_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    vectors = (of.new_empty(of.shape) for of in (weight, bias, slope))
    return (empty_pixels(x, *x.shape[1:]) if wants_x else x.new_empty(0), *vectors)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, slope, _, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, bias, slope)


def _norm_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    wanted = ctx.needs_input_grad[:4]
    found = torch.ops.espkernels.batch_norm_prelu_backward.default(grad, *ctx.saved_tensors, *ctx.options, wanted[0])
    return (*(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), None, None, None, None)


def _fake_shortcut(
    pooled: Tensor, expanded: Tensor, image: Tensor | None, weight: Tensor | None, shift: Tensor | None, slope: Tensor
) -> Tensor:  # fmt: skip
    return empty_pixels(pooled, pooled.shape[1] + expanded.shape[1], *pooled.shape[2:])


def _fake_shortcut_backward(
    grad: Tensor, pooled: Tensor, expanded: Tensor, image: Tensor | None, weight: Tensor | None, shift: Tensor | None,
    slope: Tensor, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    maps = (
        empty_pixels(of, *of.shape[1:]) if of is not None and want else pooled.new_empty(0)
        for of, want in zip((pooled, expanded, image), wanted, strict=True)
    )
    vectors = (slope.new_empty(0 if of is None else of.shape) for of in (weight, shift, slope))
    return (*maps, *vectors)


def _save_shortcut(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _shortcut_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    found = torch.ops.espkernels.long_range_shortcut_backward.default(grad, *ctx.saved_tensors, list(wanted[:3]))
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


if backends.library is not None:
    register_fake("espkernels::batch_norm_prelu", _fake_norm)
    register_fake("espkernels::batch_norm_prelu_backward", _fake_norm_backward)
    register_fake("espkernels::long_range_shortcut", _fake_shortcut)
    register_fake("espkernels::long_range_shortcut_backward", _fake_shortcut_backward)
    register_autograd("espkernels::batch_norm_prelu", _norm_backward, setup_context=_save_norm)
    register_autograd("espkernels::long_range_shortcut", _shortcut_backward, setup_context=_save_shortcut)
    for _name in ("batch_norm_prelu", "long_range_shortcut"):
        register_autograd(
            f"espkernels::{_name}_backward", without_second_derivative(_name, "the layers run one by one and have one")
        )
    for _device_type in ("cpu", "cuda"):
        register_autocast("long_range_shortcut", _device_type, (0, 1, 2))
