"""What the public functions ask of their arguments, and the sentences they raise where it does not hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espkernels.layout import out_size

__all__ = ["check_dilations", "check_group_pointwise", "check_pyramid", "check_pyramid_pointwise", "check_recurrence"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_BRANCHES = 8


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_numbers(name: str, x: Tensor, expected: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor {expected}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float32, float64, bfloat16 or float16")


def _check_map(name: str, x: Tensor, expected: str) -> None:
    _check_numbers(name, x, expected)
    shape = x.shape  # a new object each time that it is asked for
    if len(shape) != 4:
        raise ValueError(f"{name}: got shape {_shape(x)}, expected four dimensions {expected}")
    if shape[1] < 1 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"{name}: got shape {_shape(x)}, expected at least one channel, row and column")


def _check_alike(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Same device and dtype as the map x. Under autocast the operator casts, and dtypes may differ."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.device != x.device:
        raise ValueError(f"{name}: is on {tensor.device}, expected {x.device}, where {x_name} is")
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {x.dtype}, that of {x_name}")


def check_dilations(dilations: Sequence[int], stride: int) -> None:
    """1 to 8 dilations, each an int of at least 1, and a stride of at least 1."""
    if not isinstance(dilations, Sequence) or isinstance(dilations, str):
        raise TypeError(f"dilations: got {type(dilations).__name__}, expected a sequence of ints, one a branch")
    if not 1 <= len(dilations) <= MAX_BRANCHES:
        raise ValueError(f"dilations: got {len(dilations)} of them, expected 1 to {MAX_BRANCHES}, one a branch")
    for dilation in dilations:
        if not isinstance(dilation, int) or isinstance(dilation, bool):
            raise TypeError(f"dilations: got {list(dilations)}, expected ints")
        if dilation < 1:
            raise ValueError(f"dilations: got {list(dilations)}, expected each at least 1")
    if not isinstance(stride, int) or isinstance(stride, bool):
        raise TypeError(f"stride: got {type(stride).__name__}, expected an int")
    if stride < 1:
        raise ValueError(f"stride: got {stride}, expected at least 1")


def check_pyramid(x: Tensor, weight: Tensor, dilations: Sequence[int], stride: int) -> None:
    _check_map("x", x, "[B, d, H, W]")
    check_dilations(dilations, stride)
    _check_alike("weight", weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[2] != 3 or shape[3] != 3:
        raise ValueError(f"weight: got shape {_shape(weight)}, expected [K, d, 3, 3]")
    if shape[0] != len(dilations):
        raise ValueError(
            f"weight: got shape {_shape(weight)}, {shape[0]} branches, but {len(dilations)} dilations; "
            "expected as many of each"
        )
    if shape[1] != x.shape[1]:
        raise ValueError(f"weight: got shape {_shape(weight)}, expected d = {x.shape[1]} channels as x {_shape(x)} has")


def _check_pointwise_weight(name: str, weight: Tensor, x: Tensor, in_channels: int, groups: int) -> None:
    _check_alike(name, weight, x)
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups: got {type(groups).__name__}, expected an int")
    if groups < 1 or in_channels % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of the {in_channels} input channels")
    shape = weight.shape
    if len(shape) != 2 or shape[1] != in_channels // groups or shape[0] < 1:
        raise ValueError(f"{name}: got shape {_shape(weight)}, expected [N, M/groups] = [N, {in_channels // groups}]")
    if shape[0] % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of the {shape[0]} output channels")


def _check_channel_vector(name: str, vector: Tensor | None, x: Tensor, channels: int) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name}: got {type(vector).__name__}, expected a tensor or None")
    if vector.device != x.device:
        raise ValueError(f"{name}: is on {vector.device}, expected {x.device}, where x is")
    if vector.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name}: got dtype {vector.dtype}, expected float32 or {x.dtype}, that of x")
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise ValueError(f"{name}: got shape {_shape(vector)}, expected [{channels}], one number a channel")


def _check_epilogue(
    x: Tensor,
    out_shape: tuple[int, int, int, int],
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
) -> None:
    for name, vector in (("scale", scale), ("shift", shift), ("slope", slope)):
        _check_channel_vector(name, vector, x, out_shape[1])
    if residual is not None:
        _check_alike("residual", residual, x)
        if tuple(residual.shape) != out_shape:
            raise ValueError(f"residual: got shape {_shape(residual)}, expected {list(out_shape)}, that of the result")


def check_group_pointwise(
    x: Tensor,
    weight: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
) -> None:
    _check_map("x", x, "[B, M, H, W]")
    batch, channels, height, width = x.shape
    _check_pointwise_weight("weight", weight, x, channels, groups)
    _check_epilogue(x, (batch, weight.shape[0], height, width), scale, shift, residual, slope)


def check_pyramid_pointwise(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    pointwise_weight: Tensor,
    groups: int,
    pyramid_scale: Tensor | None,
    pyramid_shift: Tensor | None,
    pyramid_slope: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    stride: int,
) -> None:
    check_pyramid(x, weight, dilations, stride)
    concatenated = weight.shape[0] * weight.shape[1]
    _check_pointwise_weight("pointwise_weight", pointwise_weight, x, concatenated, groups)
    for name, vector in (
        ("pyramid_scale", pyramid_scale),
        ("pyramid_shift", pyramid_shift),
        ("pyramid_slope", pyramid_slope),
    ):
        _check_channel_vector(name, vector, x, concatenated)
    out_shape = (x.shape[0], pointwise_weight.shape[0], out_size(x.shape[2], stride), out_size(x.shape[3], stride))
    _check_epilogue(x, out_shape, scale, shift, residual, slope)


def check_recurrence(gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor) -> None:
    _check_numbers("gates", gates, "[T, B, 4 H]")
    if gates.dim() != 3 or gates.shape[2] < 4 or gates.shape[2] % 4:
        raise ValueError(f"gates: got shape {_shape(gates)}, expected [T, B, 4 H]")
    batch, size = gates.shape[1], gates.shape[2] // 4
    for name, tensor, shape in (
        ("weight", weight, (4 * size, size)),
        ("hidden", hidden, (batch, size)),
        ("cell", cell, (batch, size)),
    ):
        _check_alike(name, tensor, gates, "gates")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {_shape(tensor)}, expected {list(shape)} beside gates {_shape(gates)}")
    _check_channel_vector("bias", bias, gates, 4 * size)
