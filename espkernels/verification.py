"""Is this layer with another class still the same function? Two versions of one module, compared on the same input.

Two questions, each asked where its answer is sharp:

* Is it the same function? Both run in float64, forward and backward. A float64 kernel and the original differ by
  rounding only, so whatever is above that is an error. Input, image, parameters and updated buffers are all compared.
* Is it as accurate in the model's own type? The output has the original's type. Both are measured against the float64
  original, and ours may err as the original errs, plus rounding. For the gradients every PReLU slope is set to 1
  meanwhile: a value next to zero falls on either side of the kink by rounding alone and changes the gradients far more
  than any rounding does.

The layer's parameters and buffers are never touched: both versions run on copies that stand in for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from espkernels.fused_unit import is_global_average

__all__ = ["Comparison", "compare"]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Largest relative errors of our version in the model's own type, and a sentence on the first that is too large."""

    forward_error: float
    gradient_error: float
    difference: str = ""


class _Forward(nn.Module):
    """Calls a layer's forward without the layer's own hooks, which have seen this input already."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.layer.forward(*inputs, **named)


def _copy(value: Any, dtype: torch.dtype | None, leaf: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    floating = value.is_floating_point()
    copy = value.detach().to(dtype if dtype is not None and floating else value.dtype, copy=True)
    return copy.requires_grad_() if leaf and floating else copy


def _cotangent(output: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # its own: the model's random state is not ours to advance
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, dtype)


def _run(
    layer: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
    dtype: torch.dtype | None,
    smooth: bool = False,
    backward: bool = True,
) -> tuple[Values, Values]:
    """Output with updated buffers, and gradients, all by name; in ``dtype``, or the layer's own where that is None.

    ``smooth`` sets every PReLU slope to 1.
    """
    slopes = {f"{name}.weight" for name, part in layer.named_modules() if isinstance(part, nn.PReLU)}
    parameters = {name: _copy(value, dtype, True) for name, value in layer.named_parameters()}
    buffers = {name: _copy(value, dtype, False) for name, value in layer.named_buffers()}
    if smooth:
        for name in slopes & parameters.keys():
            parameters[name] = torch.ones_like(parameters[name]).requires_grad_()
    copies = [_copy(value, dtype, True) for value in inputs]
    named_copies = {name: _copy(value, dtype, True) for name, value in named.items()}

    state = {f"layer.{name}": value for name, value in (parameters | buffers).items()}
    # Without gradients a unit runs other kernels than with them: both are compared.
    with nullcontext() if backward else torch.no_grad():
        output = functional_call(_Forward(layer), state, tuple(copies), named_copies)
    updated = {f"buffer {name}": value for name, value in buffers.items() if value.is_floating_point()}
    outcome = {"output": output.detach()} | updated
    if not backward:
        return outcome, {}
    leaves = {f"input {index}": value for index, value in enumerate(copies)} | named_copies | parameters
    leaves = {name: value for name, value in leaves.items() if isinstance(value, Tensor) and value.requires_grad}
    cotangent = _cotangent(output, output.dtype)
    found = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return outcome, gradients


def _errors(actual: Values, expected: Values) -> dict[str, float]:
    """max|actual - expected| / max|expected| for each; a gradient that cancels to nothing is measured by the others."""
    largest = max((_largest(value) for value in expected.values()), default=0.0)
    errors = {}
    for name, value in expected.items():
        same = (actual[name] == value) | (actual[name].isnan() & value.isnan())
        difference = (actual[name].to(value.dtype) - value).abs().masked_fill(same, 0).nan_to_num(nan=math.inf)
        error = difference.max().item() if difference.numel() else 0.0
        scale = max(_largest(value), 0.01 * largest)
        errors[name] = error / scale if scale else (math.inf if error else 0.0)
    return errors


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _terms(layer: nn.Module, pixels: int, parameters: bool) -> int:
    """Length of the longest sum behind a value: all that it meets on its way, and all pixels for a parameter.

    These are the weights of convolutions, two numbers of a batch norm, and the pixels of a mean over them.
    """
    met = 0
    for part in layer.modules():
        if isinstance(part, nn.Conv2d):
            met += part.weight[0].numel()
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            met += 2
        elif is_global_average(part):
            met += pixels
    return met + (pixels if parameters else 0)


def compare(
    layer: nn.Module,
    switched: Callable[[], AbstractContextManager[object]],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Comparison:
    """``layer`` as it is against ``layer`` inside ``with switched():``, on these inputs, in the layer's mode."""
    with torch.inference_mode(False), torch.enable_grad():
        return _compare(layer, switched, inputs, named)


def _compare(
    layer: nn.Module,
    switched: Callable[[], AbstractContextManager[object]],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Comparison:
    first = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
    device = first.device.type
    own = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
    double = torch.float32 if device == "mps" else torch.float64
    pixels = first.numel() // first.shape[1] if first.numel() else 1

    def run(dtype: torch.dtype | None, **how: bool) -> tuple[Values, Values]:
        with nullcontext() if dtype is None else torch.autocast(device, enabled=False):
            return _run(layer, inputs, named, dtype, **how)

    def both(dtype: torch.dtype | None, **how: bool) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
        original = run(dtype, **how)
        with switched():
            return original, run(dtype, **how)

    def allowed(eps: float, name: str) -> float:
        return eps * math.sqrt(_terms(layer, pixels, parameters=name != "output" and not name.startswith("input")))

    mode = "train" if layer.training else "eval"
    original, ours = both(double)
    forward, gradients = _errors(ours[0], original[0]), _errors(ours[1], original[1])
    for name, error in (forward | gradients).items():
        # Batch norms of small variance multiply rounding errors; four digits of the sixteen are theirs.
        tolerance = 1e4 * allowed(torch.finfo(double).eps, name)
        if not error <= tolerance:
            what = name if name in forward else f"gradient of {name}"
            sentence = f"{what} is off by {error:.1e} in {_name(double)}, allowed {tolerance:.1e}, {mode} mode"
            return Comparison(max(forward.values()), max(gradients.values(), default=0.0), sentence)
    if own == double:
        return Comparison(max(forward.values()), max(gradients.values(), default=0.0))

    exact_forward = original[0]
    (original_forward, _), (our_forward, _) = both(None, backward=False)
    _, exact_gradients = run(double, smooth=True)
    (original_smooth, original_gradients), (our_smooth, our_gradients) = both(None, smooth=True)

    theirs = _errors(original_forward, exact_forward) | _errors(original_gradients, exact_gradients)
    forward, gradients = _errors(our_forward, exact_forward), _errors(our_gradients, exact_gradients)
    worst = max(forward.values()), max(gradients.values(), default=0.0)
    for expected, actual in ((original_forward, our_forward), (original_smooth, our_smooth)):
        given, wanted = actual["output"].dtype, expected["output"].dtype
        if given != wanted:
            return Comparison(*worst, f"output is {_name(given)}, the original's {_name(wanted)}, {mode} mode")
    for name, error in (forward | gradients).items():
        # Half types are summed in float32 and rounded once for each map that is stored.
        summed = torch.finfo(torch.promote_types(own, torch.float32)).eps
        tolerance = 4 * theirs[name] + 8 * (allowed(summed, name) + torch.finfo(own).eps)
        if not error <= tolerance:
            what = name if name in forward else f"gradient of {name}"
            sentence = f"{what} is off by {error:.1e} in {_name(own)}, allowed {tolerance:.1e}, {mode} mode"
            return Comparison(*worst, sentence)
    return Comparison(*worst)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
