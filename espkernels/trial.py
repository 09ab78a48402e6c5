"""Whether two modules do the same with a map: their parts say what they hold, and only a trial what they do with it."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["agree", "drawn"]

# Odd, so that rounding to half or three halves of it up or down differs, and a tenth is below the smallest branch.
TRIAL = (11, 13)
# A rounding of float64 is 1e-16 and a sum here has some thousand terms; another function is off by far more.
TOLERANCE = 1e-9


def drawn(module: nn.Module) -> nn.Module:
    """``module`` itself in float64 with other parameters and statistics: zeros and ones hide what is done with them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*module.double().named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                low = 0.5 if name.endswith("running_var") else -1.0
                tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(low, 1, generator=generator))
    return module


def agree(theirs: nn.Module, ours: nn.Module) -> bool:
    """Whether two modules in float64 give the same for a random map; updates their buffers.

    False where one of them raises: it takes something else than one map, or its parts do not fit together. And where
    the result is constant, which would say nothing of what made it.
    """
    try:
        like = next(theirs.parameters())
        size = (2, _in_channels(theirs), *TRIAL)
        x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.device)
        with torch.no_grad():
            expected = theirs(x)
            same = (ours(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
            return bool(same and expected.min() < expected.max())
    except Exception:
        return False


def _in_channels(module: nn.Module) -> int:
    """Of the first convolution or, where there is none, batch norm."""
    first = next(part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)))
    return first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
