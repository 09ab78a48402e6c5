"""The operator of whole EESP units in training: with their batch norms, forward and backward in four passes each.

:mod:`espkernels.nn` calls it through :mod:`espkernels.fused_unit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from espkernels import backends
from espkernels.gradient_registration import register_autograd
from espkernels.layout import empty_pixels, out_size

if backends.library is not None:
    from espkernels.registration import register_autocast, without_second_derivative

__all__ = ["eesp_training"]


def eesp_training(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_groups: int,
    weight: Tensor,
    dilations: Sequence[int],
    expand_weight: Tensor,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    slope: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    eps: Sequence[float],
    batch_statistics: Sequence[bool],
    stride: int = 1,
    hff: bool = True,
    residual: bool = True,
    save_concatenated: bool = True,
) -> tuple[Tensor, Tensor]:
    """One EESP unit with its batch norms (paper Fig. 1c), differentiable once in every tensor.

    ``prelu(norm(group_pointwise(z)) + x)`` with ``z = prelu(norm(spatial_pyramid(r)))`` and
    ``r = prelu(norm(group_pointwise(x)))``; the vectors of the three norms lie behind one another.

    Args:
        x: [B, M, H, W], not empty; channels_last is read as it is, other formats are copied.
        reduce_weight: [d, M/reduce_groups]; weight: [K, d, 3, 3]; expand_weight: [N, K*d/groups]; dtype of ``x``.
        dilations, stride, hff: as in :func:`espkernels.spatial_pyramid`.
        norm_weight, norm_bias: [d + K*d + N], float32, float64 beside float64.
        slope: of the PReLUs behind the norms, as long, or [d + K*d]: then no PReLU ends the unit.
        running_mean, running_variance: float64 [d + K*d + N], read where a norm does not take the batch's.
        eps, batch_statistics: one each of the three norms, which take the batch's statistics or the running ones.
        residual: adds ``x``, which has the result's shape.
        save_concatenated: keeps the concatenated map for the backward pass (3.25 maps of N channels in a stride-1 unit)
            instead of making it again there (2.25).

    Returns:
        The result [B, N, H', W'] in channels_last, and the mean and biased variance that the norms took, float64
        [2, d + K*d + N]. Gradients are the same bit for bit on any number of threads; that of ``x`` is channels_last.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; or a gradient of a gradient was asked for.
    """
    result, _, _, _, statistics = torch.ops.espkernels.eesp_training.default(
        x, reduce_weight, reduce_groups, weight, list(dilations), expand_weight, groups, norm_weight, norm_bias, slope,
        running_mean, running_variance, list(eps), list(batch_statistics), stride, hff, residual, save_concatenated,
    )  # fmt: skip
    return result, statistics


def _map(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    return empty_pixels(x, channels, out_size(x.shape[2], stride), out_size(x.shape[3], stride))


def _fake_training(
    x: Tensor, reduce_weight: Tensor, reduce_groups: int, weight: Tensor, dilations: list[int], expand_weight: Tensor,
    groups: int, norm_weight: Tensor, norm_bias: Tensor, slope: Tensor, running_mean: Tensor | None,
    running_variance: Tensor | None, eps: list[float], batch_statistics: list[bool], stride: int, hff: bool,
    residual: bool, save_concatenated: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs, concatenated = expand_weight.shape[0], weight.shape[0] * weight.shape[1]
    return (
        _map(x, outputs, stride),
        _map(x, weight.shape[1]),
        _map(x, concatenated, stride) if save_concatenated else x.new_empty(0),
        _map(x, outputs, stride),
        x.new_empty((2, norm_weight.shape[0]), dtype=torch.float64),
    )


def _fake_training_backward(
    grad: Tensor, x: Tensor, reduced: Tensor, concatenated: Tensor, expanded: Tensor, statistics: Tensor,
    reduce_weight: Tensor, reduce_groups: int, weight: Tensor, dilations: list[int], expand_weight: Tensor, groups: int,
    norm_weight: Tensor, norm_bias: Tensor, slope: Tensor, eps: list[float], batch_statistics: list[bool], stride: int,
    hff: bool, residual: bool, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    vectors = any(wanted[4:])
    return (
        _map(x, x.shape[1]) if wanted[0] else x.new_empty(0),
        *(
            torch.empty(of.shape, dtype=x.dtype, device=x.device) if want else x.new_empty(0)
            for of, want in zip((reduce_weight, weight, expand_weight), wanted[1:4], strict=True)
        ),
        *(of.new_empty(of.shape if vectors else 0) for of in (norm_weight, norm_bias, slope)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, *vectors = inputs
    norm_weight, norm_bias, slope, _, _, eps, batch_statistics, stride, hff, residual, _ = vectors
    _, reduced, concatenated, expanded, statistics = output
    ctx.mark_non_differentiable(reduced, concatenated, expanded, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, reduced, concatenated, expanded, statistics,
        reduce_weight, weight, expand_weight, norm_weight, norm_bias, slope,
    )  # fmt: skip
    ctx.options = (reduce_groups, dilations, groups, eps, batch_statistics, stride, hff, residual)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = (0, 1, 3, 5, 7, 8, 9)  # the places of the differentiable tensors among the arguments
    gradients: list[Tensor | None] = [None] * 18
    if grad is None:
        return tuple(gradients)
    *maps, reduce_weight, weight, expand_weight, norm_weight, norm_bias, slope = ctx.saved_tensors
    reduce_groups, dilations, groups, *options = ctx.options
    wanted = [ctx.needs_input_grad[i] for i in inputs]
    found = torch.ops.espkernels.eesp_training_backward.default(
        grad, *maps, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups,
        norm_weight, norm_bias, slope, *options, wanted,
    )  # fmt: skip
    for place, gradient, want in zip(inputs, found, wanted, strict=True):
        gradients[place] = gradient if want else None
    return tuple(gradients)


if backends.library is not None:
    register_fake("espkernels::eesp_training", _fake_training)
    register_fake("espkernels::eesp_training_backward", _fake_training_backward)
    register_autograd("espkernels::eesp_training", _backward, setup_context=_save)
    register_autograd(
        "espkernels::eesp_training_backward",
        without_second_derivative("eesp_training", "the unit runs layer by layer and has one"),
    )
    for _device_type in ("cpu", "cuda"):
        register_autocast("eesp_training", _device_type, (0, 1, 3, 5))
