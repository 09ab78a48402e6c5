"""Running the EESP units and down-samplers of any model on this library's kernels, and taking it back."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espkernels import nn as layers
from espkernels.models import plain
from espkernels.models.pyramid_pooling import FusedJoin, FusedPyramidPooling
from espkernels.structure import Layer, recognise
from espkernels.training_blocks import recognise_blocks
from espkernels.trial import agree, copied, inputs_of
from espkernels.verification import Comparison, compare

__all__ = ["Replacement", "Report", "as_written", "replace", "replace_units", "restore"]

_LAYERS: dict[str, type[nn.Module]] = {
    "EESP": layers.EESP,
    "DownSampler": layers.DownSampler,
    "CBR": layers.CBR,
    "BR": layers.BR,
    "Sequential": layers.Chain,
    "PyramidPooling": FusedPyramidPooling,
    "Join": FusedJoin,
}
_BEFORE = "_espkernels_before"  # where a replaced layer keeps the attributes it had
_ABSENT = "<absent>"
_RUNS = "already runs on this library"


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace` did with one layer; ``status`` is "replaced", "skipped" or "reverted" (``reason`` says why).

    The errors are the largest ones of the new version, relative to the largest value, over output and gradients; None
    where nothing was compared.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    forward_error: float | None = None
    gradient_error: float | None = None


@dataclass(frozen=True)
class Report:
    """One :class:`Replacement` for each module that has a layer's parts, in the model's order; prints as a table."""

    layers: tuple[Replacement, ...]

    def named(self, status: str) -> list[str]:
        """Names of the layers with this status."""
        return [layer.name for layer in self.layers if layer.status == status]

    @property
    def replaced(self) -> list[str]:
        """Names of the layers that run on this library now."""
        return self.named("replaced")

    @property
    def skipped(self) -> list[str]:
        """Names of the layers left alone."""
        return self.named("skipped")

    @property
    def reverted(self) -> list[str]:
        """Names of the layers that were tried, differed, and were put back."""
        return self.named("reverted")

    def __str__(self) -> str:
        def number(error: float | None) -> str:
            return "-" if error is None else f"{error:.1e}"

        rows = [("layer", "kind", "status", "forward", "gradients", "reason")]
        for layer in self.layers:
            errors = number(layer.forward_error), number(layer.gradient_error)
            rows.append((layer.name or "(the model)", layer.kind, layer.status, *errors, layer.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        counts = ", ".join(f"{len(self.named(status))} {status}" for status in ("replaced", "skipped", "reverted"))
        return "\n".join([*lines, counts])


class _Replaced:
    """Base of every replaced layer's class; pickles and copies by the original class, as ours is made at run time."""

    _espkernels_original: ClassVar[type[nn.Module]]
    _espkernels_kind: ClassVar[str]

    def __init__(self, *args: Any, **named: Any) -> None:
        """A layer made by a replaced one, such as a slice of ``nn.Sequential``, is of the original class."""
        self.__class__ = self._espkernels_original  # type: ignore[assignment]
        self.__init__(*args, **named)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return (_blank, (self._espkernels_original, self._espkernels_kind), *reduced[2:])


def _blank(original: type[nn.Module], kind: str) -> nn.Module:
    replaced = _replaced_class(original, kind)
    return replaced.__new__(replaced)


def _forward(ours: type[nn.Module], original: type[nn.Module]) -> Callable[..., Tensor]:
    """Our forward, taking its inputs by the original's names too."""
    names = inputs_of(original.forward)
    forward: Callable[..., Tensor] = ours.forward
    if names == inputs_of(forward):
        return forward

    def renamed(self: nn.Module, *inputs: Any, **named: Any) -> Tensor:
        inputs += tuple(named.pop(name) for name in names[len(inputs) :] if name in named)
        return forward(self, *inputs, **named)

    return renamed


_KNOWN = {
    layers.EESP, layers.DownSampler, layers.CBR, layers.CB, layers.BR, layers.CDilated, layers.Chain,
    plain.EESP, plain.DownSampler, plain.CBR, plain.BR, nn.Sequential, nn.ModuleList,
    nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU, nn.AvgPool2d,
}  # fmt: skip


def as_written(module: nn.Module) -> bool:
    """Whether the module and its parts have classes of ours and torch's alone, whose forwards need no trial."""
    originals = (p._espkernels_original if isinstance(p, _Replaced) else type(p) for p in module.modules())
    return _KNOWN.issuperset(originals) and not any("forward" in vars(part) for part in module.modules())


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _replaced_class(original: type[nn.Module], kind: str) -> type[nn.Module]:
    """The class of a replaced layer whose own class is ``original``; one for each, so that two such layers share it."""
    if (original, kind) in _classes:
        return _classes[original, kind]
    ours = _LAYERS[kind]
    bases = (_Replaced, original) if issubclass(original, ours) else (_Replaced, ours, original)
    members = {
        "_espkernels_original": original,
        "_espkernels_kind": kind,
        "forward": _forward(ours, original),
        "__module__": __name__,
        "__doc__": ours.__doc__,
    }
    made = types.new_class(f"Replaced{original.__name__}", bases, exec_body=lambda body: body.update(members))
    return _classes.setdefault((original, kind), made)


def _swap(layer: Layer) -> None:
    module = layer.module
    original = type(module)
    module.__class__ = _replaced_class(original, layer.kind)
    own = vars(module)
    own[_BEFORE] = {name: own.get(name, _ABSENT) for name in layer.attributes}
    own.update(layer.attributes)


def _unswap(module: nn.Module) -> None:
    replaced, own = type(module), vars(module)
    assert issubclass(replaced, _Replaced)
    for name, value in own.pop(_BEFORE, {}).items():
        if isinstance(value, str) and value == _ABSENT:
            own.pop(name, None)
        else:
            own[name] = value
    module.__class__ = replaced._espkernels_original


@contextmanager
def _swapped(layer: Layer) -> Iterator[None]:
    _swap(layer)
    try:
        yield
    finally:
        _unswap(layer.module)


def _why_not(layer: Layer) -> str:
    """Why a layer of the right structure still cannot be replaced; empty where it can."""
    module: nn.Module = layer.module
    original, ours = type(module), _LAYERS[layer.kind]
    if isinstance(module, _Replaced) or original.forward is ours.forward:
        return _RUNS
    if original.forward is nn.Module.forward:
        return "its class has no forward: a container, as tracing leaves it"
    if "forward" in vars(module):
        return "its forward was replaced on the object itself"
    if len(inputs_of(original.forward)) > len(inputs_of(ours.forward)):
        return f"its forward takes {', '.join(inputs_of(original.forward))}"
    try:
        with _swapped(layer):
            return ""
    except TypeError as error:  # a metaclass, slots or __init_subclass__ that does not go with ours
        return f"its class cannot be exchanged: {error}"


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that scatter, synchronise or compile: none of that belongs into a comparison."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Buffers and random states are afterwards what they were before."""
    buffers = [(part, name, value) for part in model.modules() for name, value in part.named_buffers(recurse=False)]
    before = [(part, name, value, value.clone()) for part, name, value in buffers]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for part, name, value, copy in before:
                if getattr(part, name) is not value:
                    part._buffers[name] = value
                if not torch.equal(value, copy):
                    value.copy_(copy)


def _verify(model: nn.Module, sample: Any, candidates: Sequence[Layer]) -> dict[int, Comparison]:
    """Compares the layers on what reaches them in one run of ``model`` on ``sample``; by the id of the module."""
    found: dict[int, Comparison] = {}
    busy = False

    def watch(layer: Layer) -> Callable[..., None]:
        def arrived(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], _: Any) -> None:
            nonlocal busy
            earlier = found.get(id(module))
            if busy or (earlier is not None and earlier.difference):
                return  # inside another comparison; or called again after a difference
            busy = True
            try:
                now = compare(module, lambda: _swapped(layer), inputs, named)
            except Exception as error:
                now = Comparison(math.nan, math.nan, f"the comparison raised {type(error).__name__}: {error}")
            finally:
                busy = False
            if earlier is not None:
                now = Comparison(
                    max(earlier.forward_error, now.forward_error),
                    max(earlier.gradient_error, now.gradient_error),
                    now.difference,
                )
            found[id(module)] = now

        return arrived

    inner = _unwrapped(model)
    inputs = tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_untouched(model))
        for layer in candidates:
            # First of all hooks: those of the model may change what comes out.
            handle = layer.module.register_forward_hook(watch(layer), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        inner(*inputs)
    return found


def replace(model: nn.Module, verify: Tensor | Sequence[Any] | None = None, memory: str | None = None) -> Report:
    """Runs every EESP unit and down-sampler in ``model`` on this library's kernels, in place, and reports on each.

    Layers are recognised by their structure (:mod:`espkernels.structure`), whichever class they have, so both official
    repositories' models and copies of them work; one that looks alike but differs in any part is left alone, and the
    report says in what. The convolutions change hands, and on the CPU the batch norms and PReLUs of a unit with them
    where they are torch's own; otherwise these are run as they are. So do the batch norms with a PReLU behind them in
    the blocks around the units: "CBR" (convolution, batch norm, PReLU), "BR" and ``nn.Sequential``; means over whole
    maps in the last; and the resizing and merge of efficient pyramid pooling ("PyramidPooling") and
    of where our own decoder's skip connections enter ("Join").

    Args:
        model: any module, wrapped for data parallelism or compiled or not; may be a layer itself.
        verify: inputs of ``model``, a tensor or a tuple of them. The model runs on them once, as it is; every layer is
            compared with its replacement on what reaches it, output, gradients and updated buffers
            (:mod:`espkernels.verification`). One that differs, or whose replacement raises, is put back and reported;
            one that the sample does not reach is left alone. Parameters, gradients, buffers and random states are
            afterwards what they were; hooks of the model do run.
        memory: what each unit keeps for its backward pass, "save" or "recompute": see :class:`espkernels.nn.EESP`. Set
            for units that already run on this library too, and the report says so. None leaves these as they are and is
            "save" for the others.

    Raises ValueError for an unknown ``memory``, and whatever ``model`` raises on ``verify``. Whenever this function
    raises, the model is exactly as it was.

    A layer stays the very object it was and changes its class, as :mod:`torch.nn.utils.parametrize` does it, to one
    that inherits from ours and from its own. Exchanging the objects would lose what points at them: hooks, a
    container's plain list of layers, an optimizer's or a user's references; and a model that is itself a layer has no
    parent to be exchanged in. This way ``isinstance`` holds for both classes, methods and attributes of the user's
    class stay, parameters and state_dict are the same, and deepcopy and pickle work (by the original class).
    :func:`restore` sets the class back.

    Example:
        >>> report = espkernels.replace(model, verify=images)
        >>> print(report)
    """
    if memory is not None:
        layers.check_memory(memory)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = sorted([*recognise(model), *recognise_blocks(model)], key=lambda layer: order[layer.name])
    return _replaced(found, model, verify, memory)


def replace_units(model: nn.Module) -> Report:
    """:func:`replace` for the units and down-samplers alone, those that do in a trial what ours do."""
    found = list(recognise(model))
    for layer in found:
        layer.reason = layer.reason or _why_not(layer) or _tried(layer)
    return _replaced(found, model, None, None)


def _tried(layer: Layer) -> str:
    """Why a layer that can be replaced should not be: it gives something else than ours; empty where it does not."""
    if as_written(layer.module):
        return ""
    try:
        tried = dataclasses.replace(layer, module=copied(layer.module))
    except Exception as error:  # on the meta device there is nothing to try
        return f"it cannot be copied for a trial: {error}"

    def ours(*inputs: Tensor | None) -> Tensor:
        with _swapped(tried):
            return tried.module(*inputs)

    same = all(agree(tried.module, ours, *channels) for channels in layer.inputs)
    return "" if same else "its forward gives something else in a trial"


def _replaced(
    found: Sequence[Layer], model: nn.Module, verify: Tensor | Sequence[Any] | None, memory: str | None
) -> Report:
    for layer in found:
        if layer.kind == "EESP":
            layer.attributes["memory"] = memory or "save"
        layer.reason = layer.reason or _why_not(layer)
    candidates = [layer for layer in found if not layer.reason]
    comparisons = {} if verify is None else _verify(model, verify, candidates)

    replacements = []
    with ExitStack() as undo:
        for layer in found:
            name, kind, comparison = layer.name, layer.kind, comparisons.get(id(layer.module))
            if layer.reason:
                reason, unit = layer.reason, layer.module
                if reason == _RUNS and isinstance(unit, layers.EESP) and memory not in (None, unit.memory):
                    undo.callback(setattr, unit, "memory", unit.memory)
                    unit.memory = memory
                    reason = f"{reason}, from now on with memory={memory!r}"
                replacements.append(Replacement(name, kind, "skipped", reason))
            elif verify is not None and comparison is None:
                replacements.append(Replacement(name, kind, "skipped", "the sample does not reach it"))
            else:
                errors = (comparison.forward_error, comparison.gradient_error) if comparison else (None, None)
                if comparison is not None and comparison.difference:
                    replacements.append(Replacement(name, kind, "reverted", comparison.difference, *errors))
                    continue
                _swap(layer)
                undo.callback(_unswap, layer.module)
                replacements.append(Replacement(name, kind, "replaced", "", *errors))
        undo.pop_all()
    return Report(tuple(replacements))


def restore(model: nn.Module) -> nn.Module:
    """The exact undo of :func:`replace`: every layer has its original class again. Returns ``model``.

    Parameters and buffers are the same objects all along, so they are as trained meanwhile. Units that are of this
    library's own class keep the ``memory`` they have.
    """
    for module in model.modules():
        if isinstance(module, _Replaced):
            _unswap(module)
    return model
