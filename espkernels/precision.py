"""How precisely float32 is to be multiplied on a GPU: torch's own flag, in either of the ways of setting it."""

from __future__ import annotations

import torch

__all__ = ["allows_tf32"]


def allows_tf32() -> bool:
    """Whether factors of float32 products may be rounded to eleven digits, for all threads.

    ``torch.backends.cuda.matmul.allow_tf32`` and ``torch.set_float32_matmul_precision`` set what is read here; reading
    the former raises where somebody has set the latest of them, ``fp32_precision``.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
