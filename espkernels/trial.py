"""Whether two modules do the same with a map: their parts say what they hold, and only a trial what they do with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from espkernels import backends

__all__ = ["agree", "copied", "inputs_of"]

M = TypeVar("M", bound=nn.Module)

# Odd, so that rounding to half or three halves of it up or down differs, and a tenth is below the smallest branch; and
# even, with numbers that a clamp would cut. Height, width and standard deviation.
TRIALS = ((11, 13, 1.0), (8, 20, 1e4))
# A rounding of float64 is 1e-16 and a sum here has some thousand terms; another function is off by far more.
TOLERANCE = 1e-9


def copied(module: M) -> M:
    """A copy in float64 that calls no hook of the user's, with other parameters and statistics.

    Zeros and ones, which norms begin with, hide what is done with them. On the CPU, where float64 compiles no kernel,
    unless a backend was asked for.
    """
    result = copy.deepcopy(module).double()
    for part in result.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*result.named_parameters(), *result.named_buffers()):
            if tensor.is_floating_point():
                low = 0.5 if name.endswith("running_var") else -1.0
                drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                tensor.copy_(drawn.uniform_(low, 1, generator=generator))
    return result.cpu() if backends.current() is None else result


def agree(theirs: nn.Module, ours: Callable[..., Tensor], *channels: int) -> bool:
    """Whether a module in float64 and ``ours`` give the same for random maps; updates their buffers.

    ``channels`` are those of each map that they take, 0 for None; by default they take one map. False where one of them
    raises: it takes something else, or its parts do not fit together. And where the result is constant, which would say
    nothing of what made it.
    """
    try:
        like = next(theirs.parameters())
        generator = torch.Generator().manual_seed(0)
        counts = channels or (_in_channels(theirs),)
        for height, width, deviation in TRIALS:
            maps = [
                torch.empty((2, count, height, width), dtype=torch.float64, device="cpu").normal_(generator=generator)
                for count in counts
            ]
            inputs = [(deviation * map_).to(like.device) if len(map_[0]) else None for map_ in maps]
            with torch.no_grad():
                expected = theirs(*inputs)
                same = (ours(*inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max()
            if not (same and expected.min() < expected.max()):
                return False
        return True
    except Exception:
        return False


def inputs_of(forward: Callable[..., Any]) -> list[str]:
    """The names of what the ``forward`` of a class takes, but for named ones that it does not list."""
    return [p.name for p in inspect.signature(forward).parameters.values() if p.kind != p.VAR_KEYWORD][1:]


def _in_channels(module: nn.Module) -> int:
    """Of the first convolution or, where there is none, batch norm."""
    first = next(part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)))
    return first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
