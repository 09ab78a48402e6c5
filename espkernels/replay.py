"""Replays of a frozen network: one call into the library for a whole forward pass.

The first forward pass on a new input shape runs as it is written and is recorded: the library notes each of its kernel
calls, and :class:`_Watch` sees every operation of torch's in between. What torch does to maps and the library can do too
is done by the library's operators while recording; any other operation on a map ends the recording, and the model keeps
running as it is written, layer by layer, with the reason in :attr:`Replayed.plans`. So a replay needs no knowledge of the
model's code, only that the code does the same for every image of one shape, which eval mode and its layers give.

A replay holds its own copy of the prepared weights; it is dropped when frozen weights are loaded, moved or cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espkernels import backends, inference

__all__ = ["Recorded", "Replayed", "forget", "record", "replayed"]

_aten = torch.ops.aten


# Counts the changes of frozen weights in this process; plans of an earlier count hold old weights.
_generation = 0


def forget() -> None:
    """Makes every plan outdated: some frozen weights have changed."""
    global _generation
    _generation += 1


class _Refused(Exception):
    """Why a forward pass cannot be replayed."""


def _whole_mean(x: Tensor, size: Any = (1, 1)) -> Tensor | None:
    return inference.global_average(x) if x.dim() == 4 and list(size) == [1, 1] else None


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor | None:
    if x.dim() != 4 or dim is None or sorted(d % 4 for d in dim) != [2, 3]:
        return None
    mean = inference.global_average(x)
    return mean if keepdim else mean.flatten(1)


def _same_elements(x: Tensor, size: Any, stride: Any, offset: Any = None) -> Tensor | None:
    """The strides that torch gives a mean over channels_last maps: other numbers, for sides of length 1 only."""
    if list(size) != list(x.shape) or offset:
        return None
    moved = any(n > 1 and old != new for n, old, new in zip(size, x.stride(), stride, strict=True))
    return None if moved else x.as_strided_(size, stride)


def _dropout(x: Tensor, p: float, train: bool) -> Tensor | None:
    return None if train else x


# Operations of torch's that an operator of the library does as well; None where it cannot with these arguments.
_TRANSLATED: dict[Any, Callable[..., Tensor | None]] = {
    _aten.as_strided_.default: _same_elements,
    _aten.mean.dim: _mean,
    _aten._adaptive_avg_pool2d.default: _whole_mean,
    _aten.adaptive_avg_pool2d.default: _whole_mean,
    _aten.dropout.default: _dropout,
}

# Operations that only look at a map in another way, or make memory for one.
_HARMLESS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.flatten.using_ints,
    _aten.alias.default,
    _aten.detach.default,
    _aten.slice.Tensor,
    _aten.empty.memory_format,
}


class _Watch(TorchDispatchMode):
    """Lets the library's operators and harmless ones through, translates what can be, and refuses the rest.

    What does not touch the input, nor what was made of it, is a constant and may be anything.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.data = {_storage(x)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        result = None
        if not any(_storage(a) in self.data for a in given):
            return func(*args, **kwargs)
        if func in _HARMLESS or func.namespace == "espkernels":
            result = func(*args, **kwargs)
        elif func in _TRANSLATED:
            result = _TRANSLATED[func](*args, **kwargs)
        if result is None:
            raise _Refused(f"{func} on shape {list(given[0].shape)} has no kernel in this library")
        self.data.update(_storage(a) for a in tree_leaves(result) if isinstance(a, Tensor))
        return result


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Recorded:
    """What is known of one input shape: a plan and the shape of one image's result, or why there is none."""

    plan: Any
    shape: tuple[int, ...]
    channels_last: bool
    refusal: str = ""


def record(forward: Callable[[Tensor], Any], x: Tensor) -> Recorded:
    """Runs ``forward`` on the first image of ``x`` and gives its plan, or why there is none."""
    library = backends.library
    assert library is not None
    image = x[:1]
    library.begin_recording(image.data_ptr(), image.numel() * image.element_size())
    try:
        with _Watch(image):
            result = forward(image)
        if not isinstance(result, Tensor):
            raise _Refused(f"the result is a {type(result).__name__}, not one tensor")
        if result.shape[0] != 1:
            raise _Refused(f"the result has shape {list(result.shape)}, not one row an image")
        if result.dtype != x.dtype:
            raise _Refused(f"the result is {result.dtype} for an input of {x.dtype}")
        last = result.dim() == 4 and not result.is_contiguous()
        plan = library.end_recording(result.data_ptr(), result.numel() * result.element_size())
        return Recorded(plan, tuple(result.shape[1:]), last)
    except (_Refused, ValueError) as reason:
        return Recorded(None, (), False, str(reason))
    finally:
        library.drop_recording()


class Replayed(nn.Module):
    """Beside the class of a frozen model: its forward replays what the model's own forward once did.

    ``plans`` maps (shape of an image, dtype, memory format) to what was recorded. Calls that a plan cannot serve (several
    arguments, gradients, another device, under ``torch.compile`` or ``torch.export``) run the model's own forward.
    """

    plans: dict[Any, Recorded]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs or not self._replayable(args[0]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x = args[0]
        last = not x.is_contiguous()
        key = (tuple(x.shape[1:]), x.dtype, last, backends.library.isa(), _generation)  # type: ignore[union-attr]
        recorded = self.plans.get(key)
        if recorded is None:
            self.plans = {k: plan for k, plan in self.plans.items() if k[-1] == _generation}
            recorded = self.plans[key] = record(super().forward, x)
        if recorded.plan is None:
            return super().forward(x)
        memory_format = torch.channels_last if recorded.channels_last else torch.contiguous_format
        result = torch.empty((x.shape[0], *recorded.shape), dtype=x.dtype, memory_format=memory_format)
        recorded.plan.run(x.data_ptr(), result.data_ptr(), x.shape[0])
        return result

    def _replayable(self, x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and type(x) in (Tensor, nn.Parameter)
            and x.device.type == "cpu"
            and x.dim() == 4
            and x.shape[0] > 0
            and not self.training
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu")
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
            and backends.current() in (None, "cpu")
            and backends.library is not None
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch.jit.is_tracing()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__getstate__()


@functools.cache
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{base.__name__}", (Replayed, base), {"__doc__": base.__doc__})


def _blank(base: type[nn.Module]) -> nn.Module:
    made = _class_of(base)
    return made.__new__(made)


def replayed(model: nn.Module) -> nn.Module:
    """``model`` itself, its class joined with :class:`Replayed`: still an instance of its own class, same state_dict."""
    model.__class__ = _class_of(type(model))
    model.plans = {}  # type: ignore[assignment]
    return model
