"""The one training loop of all tasks.

An epoch is a function of the state that the last one left and of its number: random numbers are seeded anew for each,
so that a run that was interrupted and goes on from its folder has the curve, and the weights, of one that was not.
"""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from espkernels.models import checkpoint
from espkernels.models.recipes.distributed import from_first, process_group
from espkernels.models.recipes.run_folder import RunFolder
from espkernels.models.recipes.seeds import seed_everything
from espkernels.models.recipes.start import load_start
from espkernels.models.recipes.task import Share, Task, task_class

__all__ = ["Settings", "progress_bar", "said", "scores", "train", "trained", "trained_as"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A vocabulary has thousands of words, a path is of use whole.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 500

T = TypeVar("T", bound=Task)

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Settings:
    """How long, from which seed, in which precision, and whether the weights are averaged over time.

    ``precision`` other than float32 is that of autocast; ``average`` is the decay of an exponential average, which is
    then what is evaluated and kept, or None. Raises ValueError for what cannot be.
    """

    epochs: int
    seed: int = 0
    precision: str = "float32"
    average: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: got {self.epochs}, expected at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average: got {self.average}, expected a decay between 0 and 1")


class _Run:
    """What changes while a task is trained, and its way into a checkpoint and back.

    With ``start`` the network begins with the weights of the task's start, else with some that are to be restored.
    """

    def __init__(self, task: Task, settings: Settings, share: Share, device: torch.device, start: bool) -> None:
        seed_everything(settings.seed)
        self.network = task.network()
        if start and task.start is not None:
            load_start(self.network, task.start, backbone=task.starts_with_backbone)
        self.network.to(device)
        self.schedule = task.schedule(settings.epochs)
        self.optimizer = task.optimizer(self.network, self.schedule(0))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.average: AveragedModel | None = None
        if settings.average is not None:
            self.begin_average(settings.average)
        self.ranks = share.ranks
        self.rows: list[dict[str, float]] = []

    def replica(self) -> nn.Module:
        """What an epoch trains: the network, or of several processes what sums their gradients.

        Made anew for each epoch. After its first step it puts the gradients together otherwise, and gloo sums them in
        another order: a run that goes on would not have the bits of one that was not interrupted.
        """
        if self.ranks == 1:
            return self.network
        # The networks have the released code's parameters, some of which no forward pass uses, always the same.
        return DistributedDataParallel(self.network, static_graph=True)

    def begin_average(self, decay: float | None = None) -> None:
        """From now on a mean of the weights is kept: an exponential one, or of all steps alike."""
        how = None if decay is None else get_ema_multi_avg_fn(decay)
        self.average = AveragedModel(self.network, multi_avg_fn=how, use_buffers=True)

    @property
    def judged(self) -> nn.Module:
        """The weights that are evaluated and kept."""
        return self.network if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        return {
            "epoch": len(self.rows),
            "rows": self.rows,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def restore(self, state: dict[str, Any], folder: RunFolder) -> None:
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if state["average"] is not None:
                if self.average is None:
                    self.begin_average()
                self.average.load_state_dict(state["average"])  # type: ignore[union-attr]
            self.rows = list(state["rows"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"run: {folder.last} does not fit this task: {error}") from error


def train(
    task: Task,
    path: Path,
    settings: Settings,
    progress: Progress | None = None,
    tell: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Trains ``task`` in the folder ``path``, from where its last checkpoint ends, and returns a row an epoch.

    Under torchrun every process calls it; the first one alone writes. ``progress`` wraps the batches of each epoch,
    ``tell`` is given its row after each.

    Raises:
        ValueError: the folder holds another run, or a damaged one; it is left as it was.
        FloatingPointError: the loss is no number any more; the last whole epoch is kept.
    """
    task.check()
    folder = RunFolder(path)
    config = {"task": task.name, "options": task.options(), "settings": asdict(settings)}
    with process_group() as (share, device):
        _check_same(folder, config)
        state = folder.load()
        run = _Run(task, settings, share, device, start=state is None)
        if state is not None:
            run.restore(state, folder)
        elif share.rank == 0:
            folder.begin(config)
        for epoch in range(len(run.rows), settings.epochs):
            row = _epoch(task, run, settings, epoch, share, device, progress)
            if share.rank == 0:
                _keep(task, run, row, folder)
            run.rows.append(row)
            if share.rank == 0:
                folder.save(run.state())
                folder.write_metrics(run.rows)
                if tell is not None:
                    tell(row)
            from_first(None, share)
        return run.rows


def _check_same(folder: RunFolder, config: dict[str, Any]) -> None:
    """A run goes on as it began: other options would give a curve that no command gives.

    One of which no epoch has ended leaves nothing to go on from, and begins anew, with other options too where it has
    kept no weights yet.
    """
    if folder.metrics.exists() and not folder.last.exists():
        raise ValueError(f"run: {folder.path} has scores of a run and not its {folder.last.name}; name another folder")
    begun = folder.last.exists() or folder.best.exists()
    try:
        before = _entries(folder.config())
    except FileNotFoundError:
        if begun:
            raise ValueError(f"run: {folder.path} has a checkpoint and no config.json; name another folder") from None
        return
    except ValueError as error:
        raise ValueError(f"{error}; name another folder") from error
    if not begun:
        return
    now = _entries(config)
    differing = [
        f"{name} {_BRIEF.repr(before.get(name))}, got {_BRIEF.repr(now.get(name))}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f"run: {folder.path} was begun with {'; '.join(differing)}; name another folder")


def _entries(config: dict[str, Any]) -> dict[str, Any]:
    """The task of a configuration, and each of its options and settings."""
    entries = {"task": config["task"]}
    for part in ("options", "settings"):
        values = config[part]
        entries |= {f"{part} {k}": v for k, v in values.items()} if isinstance(values, dict) else {part: values}
    return entries


def _epoch(
    task: Task,
    run: _Run,
    settings: Settings,
    epoch: int,
    share: Share,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, float]:
    """One epoch's steps and scores."""
    start = time.perf_counter()
    seed_everything(settings.seed, epoch, share.rank)
    rate = run.schedule(epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    if run.average is None and task.averages(run.rows):
        run.begin_average()
    replica = run.replica().train()
    batches = task.batches(epoch, share)
    total, count = 0.0, 0
    precision = PRECISIONS[settings.precision]
    for batch in batches if progress is None else progress(batches, f"epoch {epoch + 1}/{settings.epochs}"):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = task.loss(replica, batch, device)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        if task.longest_gradient is not None:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.network.parameters(), task.longest_gradient)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if run.average is not None:
            run.average.update_parameters(run.network)
        total += loss.item()
        count += 1
        if not math.isfinite(total):
            raise FloatingPointError(f"loss: {loss.item()} in step {count} of epoch {epoch + 1}, with rate {rate}")
    judged = scores(task, run.judged, device) if share.rank == 0 else {}
    judged = cast(dict[str, float], from_first(judged, share))
    seconds = time.perf_counter() - start
    return {"epoch": epoch + 1, "rate": rate, "loss": total / max(count, 1), **judged, "seconds": seconds}


def scores(task: Task, network: nn.Module, device: torch.device) -> dict[str, float]:
    """What ``network`` scores in evaluation mode, in which it is left."""
    network.eval()
    with torch.no_grad():
        return task.evaluate(network, device)


def _keep(task: Task, run: _Run, row: dict[str, float], folder: RunFolder) -> None:
    """Keeps the weights where no epoch before scored better."""
    sign = 1 if task.higher_is_better else -1
    if all(sign * row[task.score] > sign * before[task.score] for before in run.rows):
        folder.save_best(run.judged.state_dict(), {"epoch": row["epoch"], task.score: row[task.score]})


def trained(path: Path) -> tuple[Task, nn.Module]:
    """The task of the run in ``path`` and its network with the best weights, in evaluation mode.

    Raises FileNotFoundError or ValueError where there is no whole run.
    """
    folder = RunFolder(path)
    config = folder.config()
    kind, options = task_class(config["task"]), config["options"]
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"run: the options in {folder.path / 'config.json'} do not fit {kind.name}: {error}"
        ) from error
    task = kind(**options)
    if not folder.best.is_file():
        raise FileNotFoundError(f"run: there is no {folder.best}; no epoch of the run has ended yet")
    network = task.network()
    try:
        network.load_state_dict(checkpoint.read(folder.best).tensors)
    except RuntimeError as error:
        raise ValueError(f"run: {folder.best} does not fit the task: {str(error).splitlines()[0]}") from error
    return task, network.eval()


def trained_as(kind: type[T], path: Path) -> tuple[T, nn.Module]:
    """:func:`trained` for a run of the task ``kind``; ValueError for one of another task."""
    task, network = trained(path)
    if not isinstance(task, kind):
        raise ValueError(f"run: {path} is of {task.name}, not of {kind.name}")
    return task, network


def progress_bar(batches: Iterable[Any], description: str) -> Iterable[Any]:
    """tqdm's bar with the time that is left, where standard error is a terminal."""
    from tqdm import tqdm

    total = len(batches) if isinstance(batches, Sized) else None
    bar: Iterable[Any] = tqdm(batches, description, total, unit="batch", disable=not sys.stderr.isatty(), leave=False)
    return bar


def said(row: dict[str, float], epochs: int) -> None:
    """Prints the row of one of so many epochs above tqdm's bar."""
    from tqdm import tqdm

    values = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
    tqdm.write(f"epoch {row['epoch']}/{epochs}  {values}")
