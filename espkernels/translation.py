"""What the library's operators do in the place of torch's while a forward pass is recorded.

Some kernels do what several of torch's operations do: the merge of a decoder is a resize, a sigmoid, a product, a sum,
a batch norm and a PReLU. A :class:`Translation` remembers how each map was made, so that an operation that comes later
can run as one kernel with those before it. The kernels that had run for the earlier ones write maps that nobody reads
then, and the plan drops them (csrc/plan.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from espkernels import backends, inference
from espkernels.layout import vector_dtype

__all__ = ["Translation"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Resized:
    """``x`` resized to ``height`` x ``width``, plus ``skip * sigmoid(gate)``."""

    x: Tensor
    height: int
    width: int
    skip: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class _Gate:
    """The sigmoid of ``logits`` [B, C, 1, 1], which no kernel makes alone."""

    logits: Tensor


@dataclass(frozen=True)
class _Weighted:
    """``map * sigmoid(gate)``, which no kernel makes alone."""

    map: Tensor
    gate: Tensor


@dataclass(frozen=True)
class _Classes:
    """The largest channel of ``x`` resized to ``height`` x ``width``."""

    x: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class _Pooled:
    """``x`` itself, and its 3x3 means: every down-sampler of the official networks pools the image anew."""

    x: Tensor
    means: Tensor


def _name(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), tuple(x.stride()), x.dtype


class Translation:
    """The operations of one forward pass that torch would run and the library runs."""

    def __init__(self) -> None:
        self._origins: dict[tuple[Any, ...], Any] = {}
        self._alive: list[Tensor] = []  # no other tensor takes their memory, and with it their name
        self._unwritten: dict[int, str] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The result of ``func`` by operators of the library; None where they cannot with these arguments."""
        rule = _RULES.get(func)
        if rule is None or (func not in _TAKING_IN and any(self.unwritten(a) for a in args if isinstance(a, Tensor))):
            return None
        return rule(self, *args, **kwargs)

    def unwritten(self, x: Tensor) -> str:
        """Which operation made the memory of ``x`` that no kernel has written, or ""."""
        return self._unwritten.get(x.untyped_storage().data_ptr(), "")

    def _origin(self, x: Any) -> Any:
        return self._origins.get(_name(x)) if isinstance(x, Tensor) else None

    def _remember(self, result: Tensor, origin: Any) -> Tensor:
        self._origins[_name(result)] = origin
        self._alive.append(result)
        return result

    def _torchs(self, func: Any, result: Tensor, origin: Any) -> Tensor:
        """A result of torch's own: right, but useless to a plan unless a later operation takes it in."""
        self._unwritten[result.untyped_storage().data_ptr()] = f"{func} on shape {list(result.shape)}"
        return self._remember(result, origin)

    def _resize(self, to: _Resized, *epilogue: Tensor | None) -> Tensor:
        return inference.resize(to.x, to.height, to.width, to.skip, to.gate, *epilogue)

    def mean(self, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor | None:
        if x.dim() != 4 or dtype not in (None, x.dtype) or dim is None or sorted(d % 4 for d in dim) != [2, 3]:
            return None
        mean = inference.global_average(x)
        return mean if keepdim else mean.flatten(1)

    def bilinear(self, x: Tensor, size: Any, align_corners: bool, *scales: Any) -> Tensor | None:
        if not align_corners:
            return None
        to = _Resized(x, *size)
        return self._remember(self._resize(to), to)

    def resized(self, x: Tensor, height: int, width: int, skip: Any = None, gate: Any = None, *epilogue: Any) -> Tensor:
        to = _Resized(x, height, width, skip, gate)
        result = self._resize(to, *epilogue)
        return result if any(step is not None for step in epilogue) else self._remember(result, to)

    def average_pool(
        self, x: Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, *others: Any
    ) -> Tensor | None:
        usual = [*kernel_size], [*stride], [*padding]
        counted = list(others[:3]) in ([], [False], [False, True], [False, True, None])
        if not counted or usual != ([3, 3], [2, 2], [1, 1]):
            return None
        return self.pooled(x)

    def pooled(self, x: Tensor) -> Tensor:
        before = self._origin(x)
        if isinstance(before, _Pooled):
            return before.means
        means = inference.average_pool(x)
        if before is None:
            self._remember(x, _Pooled(x, means))
        return means

    def adaptive_average(self, x: Tensor, size: Any) -> Tensor | None:
        if x.dim() != 4:
            return None
        return inference.global_average(x) if list(size) == [1, 1] else inference.adaptive_average(x, *size)

    def sigmoid(self, x: Tensor) -> Tensor | None:
        if x.dim() != 4 or x.shape[2:] != (1, 1):
            return None
        return self._torchs(_aten.sigmoid.default, x.sigmoid(), _Gate(x))

    def multiply(self, a: Any, b: Any) -> Tensor | None:
        for x, gate in ((a, self._origin(b)), (b, self._origin(a))):
            gates = isinstance(gate, _Gate) and isinstance(x, Tensor) and x.dim() == 4
            if gates and x.shape[:2] == gate.logits.shape[:2]:
                return self._torchs(_aten.mul.Tensor, a * b, _Weighted(x, gate.logits))
        return None

    def add(self, a: Any, b: Any, *, alpha: Any = 1) -> Tensor | None:
        if alpha != 1 or not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == 4):
            return None
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        for to, skip in ((self._origin(a), b), (self._origin(b), a)):
            weighted = self._origin(skip)
            if isinstance(to, _Resized) and to.skip is None and (weighted is None or not self.unwritten(skip)):
                merged = replace(to, skip=skip)
            elif isinstance(to, _Resized) and to.skip is None and isinstance(weighted, _Weighted):
                merged = replace(to, skip=weighted.map, gate=weighted.gate)
            else:
                continue
            return self._remember(self._resize(merged), merged)
        return None if self.unwritten(a) or self.unwritten(b) else inference.affine(a, residual=b)

    def affine(self, x: Tensor, scale: Any, shift: Any, residual: Any, slope: Any) -> Tensor:
        before = self._origin(x)
        if isinstance(before, _Resized) and residual is None:
            return self._resize(before, scale, shift, slope)
        return inference.affine(x, scale, shift, residual, slope)

    def relu(self, x: Tensor) -> Tensor | None:
        """As a PReLU of slope 0, of which minus infinity, the sign of an overflow, is NaN and not 0."""
        if x.dim() != 4:
            return None
        return inference.affine(x, slope=torch.zeros(x.shape[1], dtype=vector_dtype(x.dtype), device=x.device))

    def concatenate(self, maps: Any, dim: int = 0) -> Tensor | None:
        """Along the channels of maps in channels_last, or of contiguous tensors along any dimension but the images'."""
        first = maps[0]
        dim = dim % first.dim() if first.dim() else 0
        if dim == 0:
            return None
        pixels = first.dim() == 4 and dim == 1
        memory_format = torch.channels_last if pixels else torch.contiguous_format
        for map_ in maps:
            alike = map_.dim() == first.dim() and map_.dtype == first.dtype
            if not alike or self.unwritten(map_) or not map_.is_contiguous(memory_format=memory_format):
                return None
        return inference.concatenate(maps, dim)

    def argmax(self, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor | None:
        if x.dim() != 4 or dim not in (1, -3) or keepdim:
            return None
        before = self._origin(x)
        if not isinstance(before, _Resized) or before.skip is not None:
            before = _Resized(x, x.shape[2], x.shape[3])
        to = _Classes(before.x, before.height, before.width)
        return self._remember(inference.resized_argmax(to.x, to.height, to.width, wide=True), to)

    def to_copy(self, x: Tensor, *, dtype: Any = None, memory_format: Any = None, **others: Any) -> Tensor | None:
        before = self._origin(x)
        if isinstance(before, _Classes) and dtype == torch.uint8 and before.x.shape[1] <= 256:
            return inference.resized_argmax(before.x, before.height, before.width)
        others = {name: value for name, value in others.items() if value is not None and name != "non_blocking"}
        return None if others or dtype not in (None, x.dtype) else self.clone(x, memory_format=memory_format)

    def clone(self, x: Tensor, *, memory_format: Any = None) -> Tensor | None:
        """The map itself where only its layout would have changed: no operation of a plan writes to its input."""
        if memory_format in (None, torch.preserve_format):
            return x
        if x.dim() != 4 or x.is_contiguous(memory_format=memory_format):
            return x if x.is_contiguous(memory_format=memory_format) else None
        return inference.change_layout(x, memory_format == torch.channels_last)


# Operations that may read what no kernel has written.
_TAKING_IN = (_aten.mul.Tensor, _aten.add.Tensor)

_RULES: dict[Any, Callable[..., Tensor | None]] = {
    _aten.mean.dim: Translation.mean,
    _aten._adaptive_avg_pool2d.default: Translation.adaptive_average,
    _aten.avg_pool2d.default: Translation.average_pool,
    _aten.upsample_bilinear2d.default: Translation.bilinear,
    _aten.sigmoid.default: Translation.sigmoid,
    _aten.relu.default: Translation.relu,
    _aten.cat.default: Translation.concatenate,
    _aten.mul.Tensor: Translation.multiply,
    _aten.add.Tensor: Translation.add,
    _aten.argmax.default: Translation.argmax,
    _aten._to_copy.default: Translation.to_copy,
    _aten.clone.default: Translation.clone,
}
if backends.library is not None:
    _RULES[torch.ops.espkernels.affine.default] = Translation.affine
    _RULES[torch.ops.espkernels.average_pool.default] = Translation.pooled
    _RULES[torch.ops.espkernels.resize.default] = Translation.resized
