"""The operator of a recurrent layer: all steps of a chunk in one call, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from espkernels import backends, checks, reference
from espkernels.gradient_registration import register_autograd
from espkernels.layout import vector_dtype

if backends.library is not None:
    from espkernels.registration import register_autocast, without_second_derivative

__all__ = ["recurrence"]


def recurrence(
    gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """An LSTM's cell over T steps, the input's part of whose gates is known (paper section 4.4).

    ``i, f, g, o = gates[t] + weight h[t-1] + bias``, ``c[t] = sigmoid(f) c[t-1] + sigmoid(i) tanh(g)`` and
    ``h[t] = sigmoid(o) tanh(c[t])``. 4 H^2 multiply-adds a step and row of the batch.

    Args:
        gates: [T, B, 4 H], float32, float64, bfloat16 or float16; the numbers of a gate lie together.
        weight: [4 H, H], dtype and device of ``gates``.
        bias: [4 H] or None.
        hidden, cell: [B, H], h and c before the first step, dtype and device of ``gates``.

    Returns:
        All h [T, B, H], and the c after the last step [B, H]. Differentiable once in every tensor on the CPU's kernels,
        as often as wanted in the reference. On the kernels arithmetic and the cell within a call are float32, or
        float64 for float64, and results are the same bit for bit on any number of threads.

    Raises:
        ValueError: a shape or device is not as above; the message names the argument.
        TypeError: an argument has the wrong type or dtype.
    """
    checks.check_recurrence(gates, weight, bias, hidden, cell)
    if gates.device.type not in ("cpu", "meta") or backends.runs_reference(gates.device):
        return reference.recurrence(gates, weight, bias, hidden, cell)
    compute = vector_dtype(gates.dtype)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (gates, weight, bias, hidden, cell)
    )
    out, last, _, _ = torch.ops.espkernels.recurrence.default(
        gates, weight, None if bias is None else bias.to(compute), hidden, cell, save
    )
    return out, last


def _fake(
    gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor, save: bool
) -> tuple[Tensor, ...]:
    steps, batch, size = gates.shape[0], gates.shape[1], weight.shape[1]
    out, last = gates.new_empty((steps, batch, size)), gates.new_empty((batch, size))
    if not save:
        return out, last, gates.new_empty(0), gates.new_empty(0)
    return out, last, gates.new_empty((steps, batch, 4 * size)), gates.new_empty((steps, batch, size))


def _fake_backward(
    grad: Tensor, grad_cell: Tensor | None, activated: Tensor, cells: Tensor, cell: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    first = activated.new_empty((activated.shape[1], weight.shape[1]))
    return activated.new_empty(activated.shape), first, torch.empty_like(first)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, hidden, cell, ctx.saved = inputs
    out, _, activated, cells = output
    ctx.mark_non_differentiable(activated, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, hidden, cell, out, activated, cells)


def _backward(ctx: Any, grad: Tensor | None, grad_cell: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    weight, hidden, cell, out, activated, cells = ctx.saved_tensors
    if not ctx.saved:
        raise RuntimeError("espkernels::recurrence: a gradient was asked for of a call with save=False")
    if grad is None and grad_cell is None:
        return (None,) * 6
    grad_gates, grad_hidden, grad_first_cell = torch.ops.espkernels.recurrence_backward.default(
        torch.zeros_like(out) if grad is None else grad, grad_cell, activated, cells, cell, weight
    )
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        # One product over all steps: each gate's gradient with the output of the step before.
        before = torch.cat([hidden[None], out])[: len(out)]
        grad_weight = grad_gates.flatten(0, 1).T @ before.flatten(0, 1)
    if ctx.needs_input_grad[2]:
        grad_bias = grad_gates.sum((0, 1), dtype=vector_dtype(out.dtype))
    return grad_gates, grad_weight, grad_bias, grad_hidden, grad_first_cell, None


if backends.library is not None:
    register_fake("espkernels::recurrence", _fake)
    register_fake("espkernels::recurrence_backward", _fake_backward)
    register_autograd("espkernels::recurrence", _backward, setup_context=_save)
    register_autograd("espkernels::recurrence_backward", without_second_derivative("recurrence", "it has one"))
    register_autocast("recurrence", "cpu", (0, 1, 3, 4))
