"""Replays of a frozen network: one call into the library for a whole forward pass.

The first forward pass on a new input shape runs as it is written and is recorded: the library notes each of its kernel
calls, and :class:`_Watch` sees every operation of torch's in between. What torch does to maps and the library can do
too is done by the library's operators while recording (see :mod:`espkernels.translation`); any other operation on a map
ends the recording, and the model keeps running as it is written, layer by layer, with the reason in
:attr:`Replayed.plans`. So a replay needs no knowledge of the model's code, only that the code does the same for every
image of one shape and for any number of them, which eval mode and its layers give.

A replay holds its own copy of the prepared weights; it is dropped when frozen weights are loaded, moved or cast, and
when a layer of the model, or of any of its layers that have some, is added, removed or exchanged. Not followed are
other attributes set later, what ``forward`` keeps or draws in Python, and one image written as a number: view(1, -1).
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from espkernels import backends
from espkernels.fused_unit import GLOBAL_HOOKS
from espkernels.result_memory import KEPT_BYTES, ResultMemory
from espkernels.translation import Translation
from espkernels.watching import ALONE, Watching

__all__ = ["Layers", "Recorded", "Replayed", "Result", "changing", "forget", "generation", "record", "replayed"]

_aten = torch.ops.aten


# Plans of one model, each for another input shape.
KEPT = 32

# Counts the changes of frozen weights in this process; plans of an earlier count hold old weights.
_generation = 0


def forget() -> None:
    """Makes every plan outdated: some frozen weights have changed."""
    global _generation
    _generation += 1


def generation() -> int:
    """Another number whenever frozen weights have changed."""
    return _generation


class _Refused(Exception):
    """Why a forward pass cannot be replayed."""


# Operations that only look at a map in another way, or make memory for one.
_HARMLESS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.permute.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.slice.Tensor,
    _aten.as_strided_.default,
    _aten.empty.memory_format,
}


# Arguments of the library's operators that may differ from image to image; a plan copies all others.
_MAPS = ("x", "residual", "image", "skip", "gate")


class _Watch(Watching):
    """Lets the library's operators and harmless ones through, translates what can be, and refuses the rest.

    What does not touch the input, nor what was made of it, is a constant and may be anything but a random number, a
    parameter or a buffer of a layer that is not frozen, which may change at any time, and a tensor that outlives the
    pass and is changed by it.
    """

    def __init__(self, x: Tensor, changing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.data = {_storage(x)}
        self.changing = {_storage(a) for a in changing}
        self.made: set[int] = set()  # constants of this pass, which it may change
        self.alive: list[Any] = []  # what was made of such as change: no other tensor gets its memory meanwhile
        self.translation = Translation()
        self.refusal = ""
        self.done = False  # an interrupt can leave this on torch's stack of modes

    def refuse(self, reason: str) -> None:
        """Raises, and keeps the reason for where the model catches it."""
        self.refusal = self.refusal or reason
        raise _Refused(reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.done:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # of several operations, which come one by one except in inference mode
                return func.decompose(*args, **kwargs)
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        result = None
        changes = any(_storage(a) in self.changing for a in given)
        if not any(_storage(a) in self.data for a in given):
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.refuse(f"{func} draws random numbers")
            if func._schema.is_mutable and any(_storage(a) not in self.made for a in given):
                self.refuse(
                    f"{func} may change a tensor of shape {list(given[0].shape)} that outlives the forward pass"
                )
            result = func(*args, **kwargs)
            results = {_storage(a) for a in tree_leaves(result) if isinstance(a, Tensor)}
            self.made |= results - {_storage(a) for a in given}
            if changes:
                if not results:
                    self.refuse(f"{func} reads a parameter or buffer that is not frozen")
                self.alive.append(result)
                self.changing |= results
            return result
        if _moves_images(func, *args):
            self.refuse(f"{func} on shape {list(given[0].shape)} picks or moves images, dimension 0")
        if func.namespace == "espkernels":
            if changes:
                self.refuse(f"{func} has a parameter or buffer that is not frozen")
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if isinstance(value, Tensor) and argument.name not in _MAPS and _storage(value) in self.data:
                    self.refuse(f"{func} has a {argument.name} that was made of the input")
        unwritten = next(filter(None, map(self.translation.unwritten, given)), "")
        result = self.translation(func, args, kwargs)
        if result is None and not unwritten and (func in _HARMLESS or func.namespace == "espkernels"):
            result = func(*args, **kwargs)
        if result is None:
            self.refuse(f"{unwritten or f'{func} on shape {list(given[0].shape)}'} has no kernel in this library")
        self.data.update(_storage(a) for a in tree_leaves(result) if isinstance(a, Tensor))
        return result


class _WatchReads(TorchFunctionMode):
    """Refuses what hands a tensor's numbers to Python without an operation that :class:`_Watch` sees."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__) and not self.watch.done:
            self.watch.refuse(f"{func.__name__} reads a tensor of shape {list(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def _moves_images(func: Any, x: Any, dims: Any = 0, *_: Any) -> bool:
    """Whether a view reaches for dimension 0, of which a recording has one image and a call any number."""
    if func is _aten.permute.default:
        return bool(dims[0] % x.dim())
    if func not in (_aten.slice.Tensor, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default):
        return False
    count = x.dim() + (func is _aten.unsqueeze.default)
    return any(dim % count == 0 for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _storage(x: Tensor) -> int:
    """Where the numbers of a tensor lie; 0 for a sparse one, which no kernel reads."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


@dataclass(frozen=True)
class Result:
    """A tensor that a forward pass gives: its shape for one image, its dtype and its memory format."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    memory: ResultMemory = field(default_factory=ResultMemory, compare=False)

    def empty(self, images: int) -> Tensor:
        size = (images, *self.shape)
        count = math.prod(size)
        if count * self.dtype.itemsize < KEPT_BYTES:
            return torch.empty_strided(size, self._stride, dtype=self.dtype, device="cpu")
        return self.memory.empty(size, self._stride, self.dtype, count)

    @functools.cached_property
    def _stride(self) -> tuple[int, ...]:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty((1, *self.shape), memory_format=memory_format, device="meta").stride()


@dataclass(frozen=True)
class Layers:
    """The layers of a model when it was recorded.

    ``hooks`` are the dictionaries of all layers' hooks and of those that torch calls for every module. A replay calls
    none: while one is not empty the layers run.
    ``parts`` are the dictionaries of the layers in each of them that had any, and ``parts_then`` what they held.
    """

    hooks: tuple[dict[int, Any], ...] = ()
    parts: tuple[dict[str, nn.Module | None], ...] = ()
    parts_then: tuple[dict[str, nn.Module | None], ...] = ()

    @staticmethod
    def of(model: nn.Module) -> Layers:
        layers = [layer for layer in model.modules() if layer is not model]
        hooks = tuple(hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks))
        parts = tuple(layer._modules for layer in (model, *layers) if layer._modules)
        return Layers((*hooks, *GLOBAL_HOOKS), parts, tuple(map(dict, parts)))

    def exchanged(self) -> bool:
        """Whether one of them was put in, taken out or exchanged since."""
        return self.parts != self.parts_then


@dataclass(frozen=True)
class Recorded:
    """What is known of one input shape: a plan, or why there is none.

    ``structure`` is how the ``results`` lie in what forward returns: alone, or in tuples, lists and dictionaries. A
    refusal that is not ``for_good`` is of one call.
    """

    plan: Any = None
    results: tuple[Result, ...] = ()
    structure: TreeSpec | None = field(default=None, repr=False)
    refusal: str = ""
    for_good: bool = True
    layers: Layers = field(default_factory=Layers, repr=False)

    def run(self, x: Tensor) -> Any:
        """What forward returns for images ``x`` [B, C, H, W]."""
        outputs = self.outputs(x.shape[0])
        self.plan.run(x.data_ptr(), [output.data_ptr() for output in outputs], x.shape[0])
        assert self.structure is not None
        return tree_unflatten(outputs, self.structure)

    def profile(self, x: Tensor, rounds: int) -> list[float]:
        """Seconds of each step of the plan on the first image of ``x``, the median over ``rounds``."""
        outputs = self.outputs(1)
        found: list[float] = self.plan.profile(x.data_ptr(), [output.data_ptr() for output in outputs], rounds)
        return found

    def outputs(self, images: int) -> list[Tensor]:
        return [result.empty(images) for result in self.results]


def changing(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a model that may change with nobody told: parameters, and buffers of layers not frozen."""
    yield from model.parameters()
    for layer in model.modules():
        if not getattr(layer, "tells_changes", False):
            yield from layer.buffers(recurse=False)


def record(forward: Callable[[Tensor], Any], x: Tensor, changing: Iterable[Tensor]) -> Recorded:
    """Runs ``forward`` on the first image of ``x`` and gives its plan, or why there is none.

    ``changing`` are tensors of the model that may change from call to call. What the model itself raises is such a
    reason too: one image alone may not be what it takes. While another thread records there is none for now: waiting
    for it would never end where it waits for this one.
    """
    library = backends.library
    assert library is not None
    image = x[:1]
    watch = _Watch(image, changing)
    modes, functions = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    if not ALONE.acquire(blocking=False):
        return Recorded(refusal="another thread is recording", for_good=False)
    try:
        library.begin_recording(image.data_ptr(), image.numel() * image.element_size())
        with _WatchReads(watch), watch:
            returned = forward(image)
        if watch.refusal:
            raise _Refused(watch.refusal)
        tensors, structure = tree_flatten(returned)
        results = tuple(_result(tensor, watch) for tensor in tensors)
        try:
            plan = library.end_recording([(t.data_ptr(), t.numel() * t.element_size()) for t in tensors])
        except ValueError as reason:
            raise _Refused(str(reason)) from None
        return Recorded(plan, results, structure)
    except Exception as reason:
        own = "" if isinstance(reason, _Refused) else f"one image alone raises {type(reason).__name__}: "
        return Recorded(refusal=watch.refusal or f"{own}{reason}", for_good=not _no_memory(reason))
    finally:
        watch.done = True
        while torch._C._len_torch_dispatch_stack() > modes:
            torch._C._pop_torch_dispatch_stack(None)
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        library.drop_recording()
        ALONE.release()


def _no_memory(reason: Exception) -> bool:
    """Whether memory was short, which it need not be the next time; torch says so in words alone."""
    return isinstance(reason, MemoryError) or (
        isinstance(reason, RuntimeError) and any(word in str(reason) for word in ("alloc", "aten::empty"))
    )


def _result(result: Any, watch: _Watch) -> Result:
    """What is to be known of one of the results for one image."""
    if not isinstance(result, Tensor):
        raise _Refused(f"a result is a {type(result).__name__}, not a tensor")
    if result.dim() < 1 or result.shape[0] != 1:
        raise _Refused(f"the result has shape {list(result.shape)}, not one row an image")
    if unwritten := watch.translation.unwritten(result):
        raise _Refused(f"{unwritten} has no kernel in this library")
    last = result.dim() == 4 and not result.is_contiguous()
    if not result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format):
        raise _Refused(f"the result has strides {list(result.stride())}, neither contiguous nor channels_last")
    return Result(tuple(result.shape[1:]), result.dtype, last)


class Replayed(nn.Module):
    """Beside the class of a frozen model: its forward replays what the model's own forward once did.

    ``plans`` maps (shape of an image, dtype, memory format) to what was recorded, for the last ``KEPT`` of them: a plan
    has memory and weights of its own. Calls that a plan cannot serve (several arguments, gradients, another device,
    under ``torch.compile`` or ``torch.export``) run the model's own forward.
    """

    plans: dict[Any, Recorded]
    _espkernels_base: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs or not self._replayable(args[0]):
            return super().forward(*args, **kwargs)
        return self._replay("forward", super().forward, args[0])

    def classes(self, x: Tensor) -> Tensor:
        """The class of every pixel of images ``x`` [B, C, H, W], for a segmentation network: its largest logit.

        [B, H, W] uint8, or int64 where there are more than 256 classes: ``forward(x).argmax(1)``, the first of equal
        logits. Where the logits are resized last, as in these networks, the replay compares them as it resizes them
        and never stores them at full size. Hooks of the model itself are not called.

        Raises ValueError where the model gives no map of logits.
        """
        if torch.compiler.is_compiling() or not self._replayable(x):
            return self._classes(x)
        result: Tensor = self._replay("classes", self._classes, x)
        return result

    def _classes(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if not isinstance(logits, Tensor) or logits.dim() != 4:
            given = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model: its result is of {given}, expected logits [B, classes, H, W]")
        winner = logits.argmax(1)
        return winner.to(torch.uint8) if logits.shape[1] <= 256 else winner

    def _replay(self, what: str, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        last = not x.is_contiguous()
        key = (what, x.shape[1:], x.dtype, last, backends.library.isa(), _generation)  # type: ignore[union-attr]
        recorded = self.plans.get(key)
        if recorded is not None and recorded.layers.exchanged():
            recorded = None
        layers = Layers.of(self) if recorded is None else recorded.layers
        if any(layers.hooks):
            return forward(x)
        if recorded is None:
            current = [(k, plan) for k, plan in self.plans.copy().items() if k[-1] == _generation]
            self.plans = dict(current[-(KEPT - 1) :])
            recorded = replace(record(forward, x, changing(self)), layers=layers)
            if recorded.plan is not None:
                self._prepare(recorded.plan, x)
            if recorded.for_good:
                self.plans[key] = recorded
        return forward(x) if recorded.plan is None else recorded.run(x)

    def _prepare(self, plan: Any, x: Tensor) -> None:
        """What is to be done to a plan for inputs like ``x`` before its first replay."""

    def _replayable(self, x: Any) -> bool:
        return (
            type(x) in (Tensor, nn.Parameter)
            and x.is_cpu
            and x.dim() == 4
            and x.shape[0] > 0
            and not self.training
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu")
            and not x.is_neg()
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
            and backends.current() in (None, "cpu")
            and backends.library is not None
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch._C._is_tracing()
        )

    def __getstate__(self) -> dict[str, Any]:
        own = getattr(super(), "__getstate__", lambda: self.__dict__)  # object has one since Python 3.11
        return {**own(), "plans": {}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[1], type(self)._espkernels_base), self.__getstate__()


_classes: dict[Any, type[nn.Module]] = {}


def _class_of(joined: type[Replayed], base: type[nn.Module]) -> type[nn.Module]:
    if (joined, base) not in _classes:
        name = f"Frozen{base.__name__.removeprefix('Frozen')}"
        # With the signature of the base's, which torch.export asks for.
        code = joined.forward
        forward = types.FunctionType(code.__code__, code.__globals__, closure=code.__closure__)
        members = {"__doc__": base.__doc__, "_espkernels_base": base, "forward": functools.wraps(base.forward)(forward)}
        if hasattr(base, "classes"):  # the user's own
            members["classes"] = base.classes
        _classes[joined, base] = type(name, (joined, base), members)
    return _classes[joined, base]


def _blank(joined: type[Replayed], base: type[nn.Module]) -> nn.Module:
    made = _class_of(joined, base)
    return made.__new__(made)


def replayed(model: nn.Module, joined: type[Replayed] = Replayed) -> nn.Module:
    """``model`` itself, its class joined with ``joined``: still an instance of its own class.

    Raises ValueError where it has ``plans`` of its own.
    """
    if isinstance(model, joined):
        return model
    if hasattr(model, "plans") and not isinstance(model, Replayed):
        raise ValueError(f"model: {type(model).__name__} has an attribute 'plans', where a frozen model keeps its own")
    base = type(model)._espkernels_base if isinstance(model, Replayed) else type(model)
    model.__class__ = _class_of(joined, base)
    model.plans = {}  # type: ignore[assignment]
    return model
