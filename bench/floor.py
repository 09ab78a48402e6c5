"""The least work of a problem: every input read once, every result written once, every multiply-add done once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from espkernels.problem import Problem

__all__ = ["MODES", "Floor", "operator_floor", "operator_memory"]

MODES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Floor:
    """Bytes moved and floating-point operations (two a multiply-add of the convolutions)."""

    bytes: int
    flops: int


def operator_floor(problem: Problem, dtype: torch.dtype, mode: str) -> Floor:
    """The floor of one operator call; "full" is a forward and a backward that share nothing."""
    values, gradients, output = _numel(problem)
    needed = sum(tensor.numel() for name, tensor in problem.tensors.items() if name == "x" or name.endswith("weight"))
    macs = _macs(problem)
    forward = Floor((values + output) * dtype.itemsize, 2 * macs)
    # The gradients of both factors of every product.
    backward = Floor((output + needed + gradients) * dtype.itemsize, 4 * macs)
    return {
        "forward": forward,
        "backward": backward,
        "full": Floor(forward.bytes + backward.bytes, forward.flops + backward.flops),
    }[mode]


def operator_memory(problem: Problem, dtype: torch.dtype, mode: str) -> int:
    """Bytes of the arguments and results that are alive together; what a provider keeps beside them is its own."""
    values, gradients, output = _numel(problem)
    return dtype.itemsize * (values + output if mode == "forward" else values + gradients + 2 * output)


def _numel(problem: Problem) -> tuple[int, int, int]:
    values = sum(tensor.numel() for tensor in problem.tensors.values())
    return values, values, problem.expected["output"].numel()


def _macs(problem: Problem) -> int:
    tensors = problem.tensors
    batch, _, *size = problem.expected["output"].shape
    positions = batch * size[0] * size[1]
    # Each weight of a convolution is used once for every position of the result.
    return positions * sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("weight"))
