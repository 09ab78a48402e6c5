"""What a launch asks of its tensors before a kernel reads through their addresses: one device, and these sizes.

The operators that people call themselves have sentences of their own in espkernels/checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_map", "check_size", "check_tensor", "check_unit", "check_vectors"]


def check_tensor(name: str, tensor: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    """``tensor`` is None, or has ``shape`` and is where ``x`` is; else RuntimeError."""
    if tensor is not None and (tensor.device != x.device or tuple(tensor.shape) != tuple(shape)):
        raise RuntimeError(f"{name}: got {list(tensor.shape)} on {tensor.device}, expected {list(shape)} on {x.device}")


def check_map(name: str, x: Tensor) -> None:
    """[B, C, H, W] with at least one channel, row and column."""
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise RuntimeError(f"{name}: got {list(x.shape)}, expected [B, C, H, W], at least 1 of each but B")


def check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise RuntimeError(f"height, width: got {height}, {width}, expected at least 1")


def check_vectors(x: Tensor, channels: int, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        check_tensor(name, vector, x, (channels,))


def check_unit(
    x: Tensor, reduce_weight: Tensor, reduce_groups: int, reduce_shift: Tensor, reduce_slope: Tensor, weight: Tensor,
    dilations: Sequence[int], pyramid: Sequence[Tensor | None], expand_weight: Tensor, groups: int, shift: Tensor,
) -> None:  # fmt: skip
    """The weights of an EESP unit fit each other and ``x``."""
    check_map("x", x)
    channels, branches, outputs = len(reduce_shift), len(dilations), len(shift)
    for name, count, of in (
        ("reduce_groups", reduce_groups, x.shape[1]), ("reduce_groups", reduce_groups, channels),
        ("groups", groups, branches * channels), ("groups", groups, outputs),
    ):  # fmt: skip
        if count < 1 or of % count:
            raise RuntimeError(f"{name}: got {count}, expected a divisor of {of} channels")
    check_tensor("reduce_weight", reduce_weight, x, (channels, x.shape[1] // reduce_groups))
    check_vectors(x, channels, reduce_shift=reduce_shift, reduce_slope=reduce_slope)
    check_tensor("weight", weight, x, (branches, channels, 3, 3))
    names = ("pyramid_scale", "pyramid_shift", "pyramid_slope")
    check_vectors(x, branches * channels, **dict(zip(names, pyramid, strict=True)))
    check_tensor("expand_weight", expand_weight, x, (outputs, branches * channels // groups))
    check_vectors(x, outputs, shift=shift)
