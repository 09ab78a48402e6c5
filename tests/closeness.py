"""What may differ between a kernel and the reference: nothing on integers, a derived rounding error otherwise.

The bound. Let u be the unit round-off of the type the kernel adds in (float32 for the half types, else the type
itself) and v that of the type it stores. A sum of n products, added in any order, with or without fused multiply-add,
errs by at most gamma_n * S, where S is the sum of the absolute products and gamma_n = n u / (1 - n u) (Higham, Accuracy
and Stability of Numerical Algorithms, section 3.1). The operators here are sums of products of their arguments, so S is
the reference itself run on absolute values, and for a gradient the gradient of that run: see ``magnitude``. A chain of
such steps has the n of its steps together. Storing rounds once more: v * |result|.

For the long sums of weight gradients n is the number of pixels, and gamma_n would pass a kernel that loses one of them.
Rounding errors of random data are not all of one sign: with probability above 1 - 2n exp(-32) the same bound holds with
8 sqrt(n) in place of n (Higham and Mary 2019, theorem 2.4, lambda = 8). Samples are fixed by their seed.
"""

from __future__ import annotations

import math

import torch
from arguments import Arguments
from torch import Tensor

from espkernels import reference

__all__ = ["assert_exact", "assert_within_rounding", "keep_from_kinks", "magnitude", "terms"]


def assert_exact(name: str, actual: Tensor, expected: Tensor) -> None:
    """``actual`` is ``expected``, which is exact in float64, rounded once to its type."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    rounded = expected.to(actual.dtype)
    wrong = ~((actual == rounded) | (actual.isnan() & rounded.isnan()))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values of shape {tuple(actual.shape)} differ, "
            f"first at {where}: got {actual[where].item()}, expected {rounded[where].item()}"
        )


def _statistical(n: int) -> float:
    return min(n, 8 * math.sqrt(n))


def assert_within_rounding(
    name: str, actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int, stores: int = 1
) -> None:
    """``actual`` differs from ``expected`` (float64) by no more than rounding does: see the top of this file.

    ``terms`` is n, ``magnitude`` S. ``stores`` counts the tensors of the stored type that a value passes through; each
    but the last may have rounded something as large as S.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    stored = torch.finfo(actual.dtype)
    added = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    u, v = added.eps / 2, stored.eps / 2
    n = _statistical(terms)
    bound = n * u / (1 - n * u) * magnitude
    if actual.dtype == torch.float64:
        bound = 2 * bound  # the reference adds in float64 too and errs by as much
    bound = bound + (stores - 1) * v * magnitude + v * expected.abs()
    bound = bound * (1 + stores * v) + stores * stored.smallest_normal * stored.eps  # second order; the subnormal step
    error = (actual.double() - expected).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        ratio = (error / bound).nan_to_num(nan=math.inf).max().item()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values of shape {tuple(actual.shape)} are off by more than "
            f"rounding, at worst {ratio:.3g} times; first at {where}: got {actual[where].item()}, expected "
            f"{expected[where].item()}, bound {bound[where].item():.3g}"
        )


def _absolute_epilogue(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, slope: Tensor | None
) -> Tensor:
    x = reference.epilogue(x, scale, shift, residual)
    # prelu(x) is x or slope * x: at most (1 + |slope|) |x|, whose derivatives bound those of either branch.
    return x if slope is None else x * (1 + slope.view(1, -1, 1, 1))


def magnitude(operator: str, arguments: Arguments) -> Tensor:
    """S of the result for absolute ``arguments``; its gradients, for an absolute gradient, are the S of gradients."""
    a = arguments
    if operator == "spatial_pyramid":
        return reference.spatial_pyramid(**a)
    if operator == "group_pointwise":
        sums = reference.group_pointwise(a["x"], a["weight"], a["groups"])
        return _absolute_epilogue(sums, a["scale"], a["shift"], a["residual"], a["slope"])
    if operator == "down_sampler":
        unit = magnitude("eesp", {**a, "residual": None, "slope": None, "stride": 2})
        both = torch.cat([reference.average_pool(a["x"]), unit], dim=1)
        shortcut = a["image"]
        if shortcut is not None:
            shortcut = reference.group_pointwise(shortcut, a["shortcut_weight"], 1, None, a["shortcut_shift"])
        return _absolute_epilogue(both, None, None, shortcut, a["slope"])
    if operator == "eesp":
        sums = reference.group_pointwise(a["x"], a["reduce_weight"], a["reduce_groups"])
        reduced = _absolute_epilogue(sums, None, a["reduce_shift"], None, a["reduce_slope"])
        a = {**a, "x": reduced, "pointwise_weight": a["expand_weight"], "scale": None}
    sums = reference.spatial_pyramid(a["x"], a["weight"], a["dilations"], a["stride"], a["hff"])
    z = _absolute_epilogue(sums, a["pyramid_scale"], a["pyramid_shift"], None, a["pyramid_slope"])
    sums = reference.group_pointwise(z, a["pointwise_weight"], a["groups"])
    return _absolute_epilogue(sums, a["scale"], a["shift"], a["residual"], a["slope"])


def _largest(tensor: Tensor) -> Tensor:
    """The largest value a channel; zero where there is none."""
    zero = torch.zeros(1, tensor.shape[1], 1, 1, dtype=tensor.dtype)
    return torch.cat([tensor.amax((2, 3), keepdim=True), zero]).amax(0).flatten()


def _one_sided(largest: Tensor) -> Tensor:
    sides = 1.0 - 2.0 * (torch.arange(largest.numel()) % 2)
    return 1.25 * (largest + 1.0) * sides


def keep_from_kinks(operator: str, arguments: Arguments) -> Arguments:
    """``arguments`` with shifts that hold each PReLU on one side for a whole channel, the sides alternating.

    The derivative jumps at zero. Where rounding may choose the side no error bound holds, so the real-valued tests stay
    away from it; the integer tests, which are exact, cross it everywhere.
    """
    a: Arguments = {n: v.abs() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    shifts: Arguments = {}
    if operator == "spatial_pyramid":
        return arguments
    x, weight = a["x"], a["weight"]
    if operator == "pyramid_pointwise":
        x = reference.spatial_pyramid(x, weight, a["dilations"], a["stride"], a["hff"])
        x = reference.epilogue(x, a["pyramid_scale"])
        shifts["pyramid_shift"] = _one_sided(_largest(x))
        x, weight = reference.epilogue(x, shift=shifts["pyramid_shift"].abs()), a["pointwise_weight"]
    x = reference.group_pointwise(x, weight, a["groups"], a["scale"], residual=a["residual"])
    shifts["shift"] = _one_sided(_largest(x))
    return arguments | shifts


def terms(operator: str, arguments: Arguments, value: str, output: Tensor) -> int:
    """n for ``value``: "output", or the name of the argument whose gradient it is."""
    pixels = output.shape[0] * output.shape[2] * output.shape[3]
    steps = 0
    per_channel_sum = False
    if operator in ("eesp", "down_sampler"):
        # The reduction before all that pyramid_pointwise does, its two steps of an epilogue, and the shortcut after it,
        # which is longer than the nine numbers and the division of a mean.
        arguments = {**arguments, "pointwise_weight": arguments["expand_weight"]}
        steps += arguments["reduce_weight"].shape[1] + 4
        steps += 12 if operator == "down_sampler" else 0
        operator = "pyramid_pointwise"
    if operator != "group_pointwise":
        k = len(arguments["dilations"])
        steps += 9 * k + k  # taps, then the suffix sums of the backward
        per_channel_sum |= value == "weight"
    if operator != "spatial_pyramid":
        weight = arguments["pointwise_weight" if operator == "pyramid_pointwise" else "weight"]
        outputs, inputs = weight.shape
        # Products over a group's inputs going forward and its outputs going back; an epilogue has four steps.
        steps += inputs + (outputs // arguments["groups"] if value != "output" else 0) + 4
        steps += 4 if operator == "pyramid_pointwise" else 0
        per_channel_sum |= value not in ("output", "x", "residual")
    return steps + (pixels if per_channel_sum else 0)
