"""The operator of whole down-samplers in training: the strided unit, the pooled map beside it, and what joins the two.

It is made of the operators of its parts, so it runs wherever they do, and saves what they would keep and add one by
one. :mod:`espkernels.nn` calls it through :mod:`espkernels.fused_shortcut`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from espkernels import backends
from espkernels.gradient_registration import register_autograd

if backends.library is not None:
    from espkernels.layer_gradients import average_pool_backward
    from espkernels.registration import register_autocast

__all__ = ["down_sampler_training"]

_ops = torch.ops.espkernels


def down_sampler_training(
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
    image: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_shift: Tensor | None,
    last_slope: Tensor,
    *,
    hff: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """``prelu(concat(average_pool(x), unit(x)) + image shortcut)`` (paper section 3.2, Fig. 2), differentiable once.

    Args:
        x: [B, M, H, W], not empty; channels_last is read as it is, other formats are copied.
        image, shortcut_weight, shortcut_shift, last_slope: those of
            :func:`espkernels.training_layers.long_range_shortcut`.
        save: keeps the concatenated, the pooled and the normalised map for the backward pass, of a quarter of the
            pixels of ``x`` each, instead of making them again there.

    The others are those of :func:`espkernels.training.eesp_training` with stride 2 and without a last PReLU.

    Returns:
        The result in channels_last, and the statistics that the three norms of the unit took. The gradients of the
        operators it is made of, the same bit for bit with either ``save``.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; or a gradient of a gradient was asked for.
    """
    result, *_, statistics = _ops.down_sampler_training.default(
        x, image, reduce_weight, reduce_groups, weight, list(dilations), expand_weight, groups, norm_weight, norm_bias,
        slope, running_mean, running_variance, list(eps), list(batch_statistics), hff, shortcut_weight, shortcut_shift,
        last_slope, save,
    )  # fmt: skip
    return result, statistics


def _forward(
    x: Tensor, image: Tensor | None, reduce_weight: Tensor, reduce_groups: int, weight: Tensor, dilations: list[int],
    expand_weight: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, slope: Tensor,
    running_mean: Tensor | None, running_variance: Tensor | None, eps: list[float], batch_statistics: list[bool],
    hff: bool, shortcut_weight: Tensor | None, shortcut_shift: Tensor | None, last_slope: Tensor, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    normalised, reduced, concatenated, expanded, statistics = _ops.eesp_training.default(
        x, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, norm_weight, norm_bias, slope,
        running_mean, running_variance, eps, batch_statistics, 2, hff, False, save,
    )  # fmt: skip
    pooled = _ops.average_pool.default(x)
    result = _ops.long_range_shortcut.default(pooled, normalised, image, shortcut_weight, shortcut_shift, last_slope)
    if not save:
        pooled, normalised = x.new_empty(0), x.new_empty(0)
    return result, pooled, reduced, concatenated, expanded, normalised, statistics


def _normalised(expanded: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The map behind the unit's last norm from the one in front of it, as the forward pass made it."""
    weight, bias = (vector[-expanded.shape[1] :] for vector in (weight, bias))
    mean, variance = statistics[:, -expanded.shape[1] :]
    no_prelu = torch.ones_like(weight)
    result: Tensor
    result, _ = _ops.batch_norm_prelu.default(expanded, weight, bias, no_prelu, mean, variance, eps, False)
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, image, reduce_weight, reduce_groups, weight, dilations, expand_weight, groups, *rest = inputs
    norm_weight, norm_bias, slope, _, _, eps, batch_statistics, hff, *shortcut, _ = rest
    _, *maps, statistics = output
    ctx.mark_non_differentiable(*maps, statistics)
    ctx.set_materialize_grads(False)
    weights = reduce_weight, weight, expand_weight, norm_weight, norm_bias, slope
    ctx.save_for_backward(x, image, *maps, statistics, *weights, *shortcut)
    ctx.options = (reduce_groups, dilations, groups, eps, batch_statistics, hff)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 20
    if grad is None:
        return tuple(gradients)
    x, image, pooled, reduced, concatenated, expanded, normalised, statistics, *rest = ctx.saved_tensors
    reduce_weight, weight, expand_weight, norm_weight, norm_bias, slope, *shortcut = rest
    reduce_groups, dilations, groups, eps, batch_statistics, hff = ctx.options
    if pooled.numel() == 0:
        pooled = _ops.average_pool.default(x)
        normalised = _normalised(expanded, statistics, norm_weight, norm_bias, eps[2])
    of_unit, of_end = (0, 2, 4, 6, 8, 9, 10), (1, 16, 17, 18)  # the places of differentiable tensors
    wanted = [ctx.needs_input_grad[i] for i in of_unit]
    into_pooled, into_unit, *at_end = _ops.long_range_shortcut_backward.default(
        grad, pooled, normalised, image, *shortcut, [wanted[0], any(wanted), ctx.needs_input_grad[1]]
    )
    found: Sequence[Tensor] = ()
    if any(wanted):
        found = _ops.eesp_training_backward.default(
            into_unit, x, reduced, concatenated, expanded, statistics, reduce_weight, reduce_groups, weight, dilations,
            expand_weight, groups, norm_weight, norm_bias, slope, eps, batch_statistics, 2, hff, False, wanted,
        )  # fmt: skip
    for place, gradient in zip((*of_unit[: len(found)], *of_end), (*found, *at_end), strict=True):
        gradients[place] = gradient if ctx.needs_input_grad[place] else None
    if gradients[0] is not None:
        gradients[0] = _with_pooled(gradients[0], into_pooled, x)
    return tuple(gradients)


def _with_pooled(grad: Tensor, into_pooled: Tensor, x: Tensor) -> Tensor:
    """``grad``, which nobody else holds, with that of the pooling of ``x`` added."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # as torch.autograd.grad makes of several gradients
    if torch.is_grad_enabled() or grad.device.type != "cpu" or batched:
        return grad + average_pool_backward(into_pooled, x)
    _ops.add_average_pool_backward.default(grad, into_pooled)
    return grad


if backends.library is not None:
    _library = Library("espkernels", "FRAGMENT")
    _library.impl("down_sampler_training", _forward, "CompositeExplicitAutograd")
    register_fake("espkernels::down_sampler_training", _forward)
    register_autograd("espkernels::down_sampler_training", _backward, setup_context=_save)
    for _device_type in ("cpu", "cuda"):
        register_autocast("down_sampler_training", _device_type, (0, 1, 2, 4, 6))
