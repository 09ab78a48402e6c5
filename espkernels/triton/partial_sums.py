"""The second stage of weight gradients and means: partial sums are added in a fixed order, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from espkernels.triton.division import divided
from espkernels.triton.launch import launch

__all__ = ["add_partials"]

# A program takes 32 parts at a time: one after the other, it would wait for memory as often as there are parts.
PARTS, NUMBERS = 32, 32


@triton.jit
def partial_sums_kernel(
    partials,  # [parts, numbers]
    out,  # [numbers]
    parts,
    numbers,
    divisor,
    PARTS: tl.constexpr,
    NUMBERS: tl.constexpr,  # of one program
):
    """out[i] = the sum of partials[:, i], divided: part p goes to sum p % PARTS in ascending order, then all add up.

    Bytes: parts + 1 numbers a number of the result; as many additions.
    """
    index = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    valid = index < numbers
    part = tl.arange(0, PARTS)
    sums = tl.zeros((PARTS, NUMBERS), partials.dtype.element_ty)
    for first in range(0, parts, PARTS):
        at = partials + (first + part).to(tl.int64)[:, None] * numbers + index[None, :]
        sums += tl.load(at, mask=(first + part < parts)[:, None] & valid[None, :], other=0)
    result = divided(tl.sum(sums, axis=0), tl.full((), divisor, sums.dtype), sums.dtype)
    tl.store(out + index, result.to(out.dtype.element_ty), mask=valid)


def add_partials(partials: Tensor, out: Tensor, divisor: int = 1) -> None:
    """Writes the sum of ``partials`` [parts, ...] over its first dimension, divided, to ``out`` [...], both dense."""
    launch(
        partial_sums_kernel, -(-out.numel() // NUMBERS), partials, out, partials.shape[0], out.numel(), divisor,
        PARTS=PARTS, NUMBERS=NUMBERS,
    )  # fmt: skip
