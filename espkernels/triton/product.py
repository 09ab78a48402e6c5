"""The core of every pointwise pass: the product of two tiles, by matrix units where they fit and by sums elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from espkernels.precision import allows_tf32

__all__ = ["multiply_add", "way"]

LEAST_DOT = 16


@triton.jit
def multiply_add(
    a,  # [N, Q]
    b,  # [Q, P]
    sum,  # [N, P], in TYPE
    WAY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """``sum`` + a b, every product and sum in TYPE.

    WAY "sums" multiplies and adds [N, Q, P] numbers; "stored" feeds half types to the matrix units as they are, whose
    products are exact in float32; any other is the ``input_precision`` of float32 operands.
    """
    if WAY == "sums":
        sum += tl.sum(a.to(TYPE)[:, :, None] * b.to(TYPE)[None, :, :], axis=1)
    elif WAY == "stored":
        sum = tl.dot(a, b, sum)
    else:
        sum = tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision=WAY)
    return sum


def way(x: Tensor, outputs: int, inputs: int, stored: bool) -> str:
    """How tiles of ``outputs`` x ``inputs`` numbers a group are multiplied; ``stored``: both are in the dtype of ``x``.

    tl.dot takes at least 16 of each, which are padded with zeros; float64 has matrix units on few devices, and sums on
    all. A float32 map is multiplied in full unless torch's own flag allows tf32. A half type beside float32 sums that
    were never stored keeps those: NVIDIA's tf32 units do it in three products, AMD's multiply float32.
    """
    if x.dtype == torch.float64 or min(outputs, inputs) < LEAST_DOT:
        return "sums"
    amd = torch.version.hip is not None
    if x.dtype == torch.float32:
        return "tf32" if allows_tf32() and not amd else "ieee"
    if knobs.runtime.interpret:
        return "ieee"  # the interpreter's dot knows no bfloat16
    if stored:
        return "stored"
    return "ieee" if amd else "tf32x3"
