"""Random numbers that depend on the run's seed and on where in the run they are drawn, and on nothing else."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

__all__ = ["seed_everything", "seed_of"]


def seed_of(*parts: int) -> int:
    """A seed from 0 to 2^63 that depends on all of ``parts``: sums of them would give two epochs the same numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(*parts: int) -> None:
    """Seeds the generators of Python, numpy and torch with :func:`seed_of` ``parts``."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
