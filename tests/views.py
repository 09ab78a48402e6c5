"""Ways to lay one tensor out in memory. What lies between its elements is NaN, so that reading it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MAP_VIEWS", "expanded", "interleaved", "transposed"]


def interleaved(tensor: Tensor) -> Tensor:
    """Every second element of a buffer; for a tensor of any rank."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The strides of the reversed order of dimensions; for a tensor of any rank."""
    reverse = list(range(tensor.dim()))[::-1]
    return tensor.permute(reverse).contiguous().permute(reverse)


def expanded(tensor: Tensor) -> Tensor:
    """Its first entry, repeated along the first dimension without memory; for a tensor of any rank."""
    return tensor[:1].clone().expand(tensor.shape)


def _inside(tensor: Tensor, dim: int, before: int, after: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] += before + after
    wider = torch.full(shape, torch.nan, dtype=tensor.dtype)
    view = wider.narrow(dim, before, tensor.shape[dim])
    view.copy_(tensor)
    return view


def _inside_channels_last(tensor: Tensor) -> Tensor:
    return _inside(tensor.permute(0, 2, 3, 1), 3, 1, 2).permute(0, 3, 1, 2)


def _every_second_row(tensor: Tensor) -> Tensor:
    b, c, h, w = tensor.shape
    taller = torch.full((b, c, 2 * h, w), torch.nan, dtype=tensor.dtype)
    taller[:, :, ::2] = tensor
    return taller[:, :, ::2]


def _offset(tensor: Tensor) -> Tensor:
    flat = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
    view = flat[3:].view(tensor.shape)
    view.copy_(tensor)
    return view


def _expanded(*dims: int) -> Callable[[Tensor], Tensor]:
    def expand(tensor: Tensor) -> Tensor:
        one = tensor
        for dim in dims:
            one = one.narrow(dim, 0, min(1, one.shape[dim]))
        return one.clone().expand(tensor.shape)

    return expand


def _odd_strides_of_single(tensor: Tensor) -> Tensor:
    # The stride of a dimension of one element may be anything; torch ignores it and so must we.
    strides = [1000003 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.contiguous().as_strided(tensor.shape, strides)


# Those that expand change the values too: take the result's.
MAP_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of the batch": lambda t: _inside(t, 0, 1, 1),
    "slice of the channels": lambda t: _inside(t, 1, 2, 1),
    "slice of the rows": lambda t: _inside(t, 2, 1, 1),
    "slice of the columns": lambda t: _inside(t, 3, 1, 2),
    "slice of channels_last channels": _inside_channels_last,
    "every second row": _every_second_row,
    "every second element": interleaved,
    "rows and columns transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch and channels transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "storage offset": _offset,
    "expanded batch": _expanded(0),
    "expanded channels": _expanded(1),
    "expanded map": _expanded(2, 3),
    "expanded everywhere": _expanded(0, 1, 2, 3),
    "odd strides of single dimensions": _odd_strides_of_single,
}
