"""ONNX files of a plain model, as fast as onnxruntime can be given it.

The TorchScript exporter writes them: it needs no package beside torch and onnx, and its graph is that of the other
exporter but for nodes that onnxruntime removes. Three operators are put in other words:

* PReLU, which onnxruntime does not fuse, is ``relu(x) - slope * relu(-x)`` in the file "relu": which of the two is
  faster depends on the row.
* ONNX has no adaptive average pooling. Windows of one size are a pooling of stride 1 of which rows and columns are
  picked; windows of several sizes, which in ESPNetv2 only the smallest maps have, are two products with constant
  matrices.
* The exporter knows no channel shuffle: it is two reshapes and a transposition.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ReluTwice", "adaptive_avg_pool2d", "export"]


class ReluTwice(nn.Module):
    """PReLU in operators that every engine fuses or vectorises: relu(x) - slope * relu(-x)."""

    def __init__(self, act: nn.PReLU) -> None:
        super().__init__()
        self.slope = nn.Parameter(act.weight.detach().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) - self.slope * F.relu(-x)


def _without_prelu(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, nn.PReLU):
            model._modules[name] = ReluTwice(child)
        else:
            _without_prelu(child)


_pool, _shuffle = F.adaptive_avg_pool2d, F.channel_shuffle


def adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """:func:`torch.nn.functional.adaptive_avg_pool2d` in operators that ONNX has."""
    sides = int(x.shape[2]), int(x.shape[3])
    targets = [int(side) for side in ((output_size, output_size) if isinstance(output_size, int) else output_size)]
    if targets == [1, 1]:
        return _pool(x, 1)
    if all(side % target == 0 for side, target in zip(sides, targets, strict=True)):
        return F.avg_pool2d(x, [side // target for side, target in zip(sides, targets, strict=True)])
    windows = [_windows(side, target) for side, target in zip(sides, targets, strict=True)]
    sizes = [{end - start for start, end in of_side} for of_side in windows]
    if all(len(of_side) == 1 for of_side in sizes):
        pooled = F.avg_pool2d(x, [of_side.pop() for of_side in sizes], stride=1)
        rows, columns = (torch.tensor([start for start, _ in of_side]) for of_side in windows)
        return pooled.index_select(2, rows).index_select(3, columns)
    # Made of plain numbers: a trace would keep every step that makes a tensor.
    rows, columns = (
        torch.tensor(
            [[(start <= i < end) / (end - start) for i in range(side)] for start, end in of_side], dtype=x.dtype
        )
        for of_side, side in zip(windows, sides, strict=True)
    )
    return rows @ (x @ columns.t())


def _windows(side: int, target: int) -> list[tuple[int, int]]:
    return [(i * side // target, -(-(i + 1) * side // target)) for i in range(target)]


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = map(int, x.shape)
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


@contextmanager
def _exportable() -> Iterator[None]:
    F.adaptive_avg_pool2d, F.channel_shuffle = adaptive_avg_pool2d, _channel_shuffle  # type: ignore[assignment]
    try:
        yield
    finally:
        F.adaptive_avg_pool2d, F.channel_shuffle = _pool, _shuffle


def export(model: nn.Module, x: Tensor, path: Path, relu: bool) -> None:
    """Writes ``model`` for inputs of the shape of ``x``, named "x" and "y"; ``relu`` puts its PReLUs in other words."""
    if relu:
        _without_prelu(model)
    with _exportable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write = functools.partial(torch.onnx.export, dynamo=False, input_names=["x"], output_names=["y"])
        write(model, (x,), str(path))
