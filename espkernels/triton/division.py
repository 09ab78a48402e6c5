"""Division that rounds to nearest, so that a mean of whole numbers that is whole is exact on a GPU too."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["divided"]


@triton.jit
def divided(a, b, TYPE: tl.constexpr):
    """``a / b`` in TYPE; Triton's own ``/`` of float32 may miss the nearest number by two."""
    return a / b if TYPE == tl.float64 else tl.math.div_rn(a, b)  # noqa: SIM300
