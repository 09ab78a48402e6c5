"""Where the time of a forward pass goes, layer by layer, against what this machine could do."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from espkernels import backends, replay
from espkernels.explanation import Explanation, Row
from espkernels.freeze import freeze
from espkernels.frozen import Frozen
from espkernels.probe import Ceilings, probe
from espkernels.running import running
from espkernels.watching import ALONE, Watching

__all__ = ["explain"]

# Seconds that the timing takes about, and the fewest and most rounds.
SECONDS = 1.0
ROUNDS = (5, 201)


def explain(model: nn.Module, sample: Tensor) -> Explanation:
    """Times every layer of ``model`` on the first image of ``sample``, and says which kernels ran.

    A frozen model is recorded as its forward passes are, cut as it was tuned, and each kernel of the plan is timed
    inside whole replays, on the threads that torch has. Bytes, multiply-adds and the share of the roof come from the
    plan and from ceilings measured here (two seconds for each number of threads, once a process). Of a model that is
    not frozen a frozen copy is explained, and the notes say so.

    Where a forward pass cannot be replayed, ``refusal`` says why; the rows are then the modules that run operations of
    their own, timed between hooks without the modules inside them, and kernels are operators of this library or
    "torch".

    Args:
        model: on the CPU; not touched.
        sample: [B, C, H, W] with B >= 1, contiguous or channels_last, in the dtype of the model; models that take
            other tensors are not replayed, and are explained on all of ``sample``.

    Raises TypeError where ``model`` is no module or ``sample`` no tensor, ValueError for an empty sample or one that is
    not on the CPU, and what the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: got {type(sample).__name__}, expected a tensor [B, C, H, W]")
    if sample.device.type != "cpu" or sample.numel() == 0:
        raise ValueError(f"sample: got shape {list(sample.shape)} on {sample.device}, expected numbers on the CPU")
    notes = []
    name = type(model).__name__
    if not isinstance(model, (replay.Replayed, Frozen)):
        model = freeze(model)
        notes.append("the model was not frozen: this is a frozen copy of it")
    x = sample.detach()
    if x.dim() == 4:
        x = x[:1]
    forward = super(replay.Replayed, model).forward if isinstance(model, replay.Replayed) else model.forward
    ceilings = None
    with torch.no_grad():
        refusal = _why_not(model, x)
        recorded, owners = (None, []) if refusal else _recorded(model, forward, x)
        if recorded is not None and recorded.plan is not None:
            if x.dtype == torch.float64:
                notes.append("no roof: the ceilings are measured in float32")
            else:
                ceilings = probe(torch.get_num_threads(), _multiplied(x.dtype))
            rows = _planned(model, x, recorded, owners, ceilings)
        else:
            refusal = refusal or recorded.refusal  # type: ignore[union-attr]
            rows = _hooked(model, forward, x)
        whole = statistics.median(_timed(lambda: model(x)))
    last = x.dim() == 4 and not x.is_contiguous()
    layout = "channels_last" if last else "contiguous"
    shown = f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')} {layout}"
    return Explanation(
        name, shown, torch.get_num_threads(), _instructions(), refusal, tuple(notes), whole, tuple(rows), ceilings
    )


def _instructions() -> str:
    """The instruction set of the library's kernels, or "torch" where they do not run."""
    return "torch" if backends.runs_reference(torch.device("cpu")) else backends.library.isa()  # type: ignore[union-attr]


def _multiplied(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels multiply maps of ``dtype`` in."""
    as_it_is = dtype == torch.bfloat16 and backends.library.multiplies_bfloat16()  # type: ignore[union-attr]
    return torch.bfloat16 if as_it_is else torch.float32


def _why_not(model: nn.Module, x: Tensor) -> str:
    """Why a call would not even be recorded, or ""."""
    if backends.runs_reference(x.device):
        named = backends.current()
        return f"backend {named!r} was asked for" if named else str(backends.why_not("cpu"))
    if x.dim() != 4:
        return f"the sample has {x.dim()} dimensions, and maps have 4"
    if isinstance(model, replay.Replayed) and not model._replayable(x):
        return "it is in training mode or under autocast or tracing, or the sample is not dense in memory"
    if isinstance(model, replay.Replayed) and any(replay.Layers.of(model).hooks):
        return "its layers have hooks, which a replay does not call"
    return ""


def _recorded(model: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> tuple[replay.Recorded, list[str]]:
    """A plan, and the name of the innermost module that was running at each of its steps."""
    library = backends.library
    assert library is not None
    owners: list[str] = []

    def before(names: list[str]) -> None:
        owners.extend([names[-1] if names else ""] * (library.recorded_steps() - len(owners)))

    with running(model, before):
        recorded = replay.record(forward, x, replay.changing(model))
    if recorded.plan is not None:
        if isinstance(model, replay.Replayed):
            model._prepare(recorded.plan, x)
        # Kernels whose work a later one took over are not in the plan.
        kept = recorded.plan.recorded_as
        owners.extend([""] * (max(kept) + 1 - len(owners)))
        owners = [owners[step] for step in kept]
    return recorded, owners


def _planned(
    model: nn.Module, x: Tensor, recorded: replay.Recorded, owners: list[str], ceilings: Ceilings | None
) -> list[Row]:
    plan = recorded.plan
    recorded.profile(x, 3)  # pages and caches
    rounds = int(SECONDS / max(sum(recorded.profile(x, 3)), 1e-9))
    seconds = recorded.profile(x, max(ROUNDS[0], min(ROUNDS[1], rounds)))
    steps = plan.steps()
    isa = _instructions()
    names = [f"{step[0]} (cut {cut}x)" if cut > 1 else step[0] for step, cut in zip(steps, plan.cuts, strict=True)]

    def row(owner: str, span: range) -> Row:
        multiply_adds = sum(steps[i][1] for i in span)
        ideal = _ideal(steps, plan.buffer_bytes, span)
        kernels = () if len(span) == 1 else tuple(row(owner, range(i, i + 1)) for i in span)
        return Row(
            owner,
            type(model.get_submodule(owner)).__name__,
            ", ".join(names[i] for i in span),
            isa,
            sum(seconds[i] for i in span),
            multiply_adds,
            sum(steps[i][2] + sum(steps[i][4]) for i in span),
            ideal,
            None if ceilings is None else ceilings.moving(ideal),
            None if ceilings is None else 2 * multiply_adds / ceilings.flops,
            kernels,
        )

    rows, first = [], 0
    for owner, group in itertools.groupby(owners):
        span = range(first, first + len(list(group)))
        first = span.stop
        rows.append(row(owner, span))
    return rows


def _ideal(steps: list[Any], sizes: list[int], span: range) -> int:
    """Bytes that the steps in ``span`` must move, were they one kernel.

    A map that one of them writes and only they read need not reach memory; one that no step reads is a result.
    """
    total = sum(steps[i][2] for i in span)
    outside = {buffer for i, step in enumerate(steps) if i not in span for buffer in step[3]}
    used = {buffer for i in span for buffer in steps[i][3]}
    read = {buffer for step in steps for buffer in step[3][:-1]}
    for buffer in used:
        touched = sum(n for i in span for b, n in zip(steps[i][3], steps[i][4], strict=True) if b == buffer)
        if buffer == 0 or buffer in outside or buffer not in read:
            total += min(touched, sizes[buffer])
    return total


class _Operators(Watching):
    """The operators that run in each module: those of this library by name, all others as "torch"."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.names: dict[str, dict[str, None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.namespace == "espkernels"
        if ours or not func.is_view:
            owner = self.running[-1] if self.running else ""
            self.names.setdefault(owner, {})[func._schema.name.partition("::")[2] if ours else "torch"] = None
        return func(*args, **(kwargs or {}))


def _hooked(model: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> list[Row]:
    """Seconds of each module's own operations, in the order in which the modules first come to them."""
    with ALONE, running(model) as names, _Operators(names) as operators:
        forward(x)
    spent: dict[str, float] = {}
    then = 0.0

    def before(names: list[str]) -> None:
        nonlocal then
        now = time.perf_counter()
        owner = names[-1] if names else ""
        spent[owner] = spent.get(owner, 0.0) + now - then
        # Read again, so that the book-keeping is nobody's.
        then = time.perf_counter()

    rounds: list[dict[str, float]] = []

    def once() -> None:
        nonlocal spent, then
        spent, then = {}, time.perf_counter()
        forward(x)
        before([])
        rounds.append(spent)

    with running(model, before):
        _timed(once)
    return [
        Row(
            owner,
            type(model.get_submodule(owner)).__name__,
            ", ".join(found),
            "torch" if list(found) == ["torch"] else _instructions(),
            statistics.median(one[owner] for one in rounds),
        )
        for owner, found in operators.names.items()
    ]


def _timed(call: Callable[[], object]) -> list[float]:
    """Seconds of each of as many calls as fit the time, after one that is not counted."""
    call()
    taken: list[float] = []
    while len(taken) < ROUNDS[0] or (sum(taken) < SECONDS and len(taken) < ROUNDS[1]):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken
