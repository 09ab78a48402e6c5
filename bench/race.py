"""Engines in processes of their own, raced over rows of models: for :mod:`bench.peers` and :mod:`bench.training`.

A room is a module with a table ``ENGINES`` of :class:`bench.engines.Engine`; each engine of a room and way of giving it
the model is one worker (:mod:`bench.worker`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import fits
from bench.comparison import Comparison, Outcome, Provider, measure, require_kernels
from bench.fma_peak import peak
from bench.layers import Task
from bench.output import RESULTS, write_json
from bench.worker import Lost, Refused, Worker
from espkernels.backends import use_backend
from espkernels.info import collect

__all__ = ["Race", "Row", "Selection", "added_to", "begun", "described", "figure_of", "parser", "record", "saved"]

# Long enough for a segmentation network in torch.compile with autotuning.
OPENING = 1200.0


@dataclass(frozen=True)
class Row:
    """A model by name, its input for one image, and the batches of the full set; ``default`` ones take minutes."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batches: tuple[int, ...]
    default: bool


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was asked for of ``every`` row; what is empty or None is left to ``full``."""

    every: tuple[Row, ...]
    engines: tuple[str, ...]
    full: bool = False
    patterns: tuple[str, ...] = ()
    compile: bool | None = None

    def rows(self) -> tuple[Row, ...]:
        """The rows asked for."""
        if self.patterns:
            return tuple(row for row in self.every if fits(row.name, self.patterns))
        return tuple(row for row in self.every if self.full or row.default)

    def compiles(self, row: Row) -> bool:
        """Whether torch.compile takes part: a whole network takes it minutes."""
        return (self.full or row.kind.startswith("unit")) if self.compile is None else self.compile


@dataclass
class Race:
    """The workers of the engines in ``room``, started with ``environment`` and living from row to row."""

    folder: Path
    room: str = "bench.engines"
    environment: dict[str, str] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def worker(self, name: str, engine: str) -> Worker:
        """A new worker of ``engine``, which the caller closes."""
        return Worker(engine, self.folder / f"{name}.log", self.room, self.environment)

    def open(self, task: Task, files: Path, threads: int, provider: Provider) -> Worker:
        """The provider's worker with the model in ``files`` opened and its results checked."""
        name = str(provider)
        if name not in self.workers:
            self.workers[name] = self.worker(name, provider.implementation)
        try:
            results = self.workers[name].open(files, threads, provider.layout, OPENING)
        except Lost as lost:
            self.workers.pop(name).close()
            raise Refused(str(lost)) from None
        task.check(provider, results)
        return self.workers[name]

    def measure(self, comparison: Comparison) -> tuple[Outcome, dict[str, str]]:
        """The outcome, and by provider why it was not timed."""
        lost_ones: dict[str, str] = {}
        while True:
            try:
                outcome = measure(comparison)
                return outcome, lost_ones | {name: str(reason) for name, reason in outcome.refused.items()}
            except Lost as lost:
                # It died while it was timed: the others are timed anew, without it.
                name = next(name for name, worker in self.workers.items() if worker is lost.worker)
                lost_ones[name] = str(lost)
                self.workers.pop(name).close()
                left = tuple(provider for provider in comparison.providers if str(provider) != name)
                comparison = dataclasses.replace(comparison, providers=left)


def saved(task: Task, folder: Path) -> None:
    """Writes what a worker opens: the plain model, its input, the dtype to compute in, any gradient of its result."""
    torch.save({"dtype": task.dtype}, folder / "dtype.pt")
    torch.save(task.model, folder / "model.pt")
    torch.save(task.input, folder / "input.pt")
    if task.gradient is not None:
        torch.save(task.gradient, folder / "gradient.pt")


def described(row: Row, batch: int, threads: int, outcome: Outcome, refused: dict[str, str]) -> dict[str, Any]:
    """A row of the JSON: the samples of every engine and way, and the fastest way of each."""
    samples = outcome.samples
    engines: dict[str, Any] = {}
    for name, seconds in samples.seconds.items():
        engine, _, way = name.partition("-")
        found = {"seconds": samples.median(name), "calls": samples.calls[name], "samples": seconds}
        engines.setdefault(engine, {})[way] = found
    return {
        "row": row.name,
        "kind": row.kind,
        "batch": batch,
        "threads": threads,
        "flops": outcome.floor.flops,
        "floor": outcome.floor.flops / peak(threads).flops,
        "engines": engines,
        "fastest": {engine: min(ways, key=lambda way: ways[way]["seconds"]) for engine, ways in engines.items()},
        "refused": refused,
    }


def figure_of(row: dict[str, Any], engine: str, name: str) -> Any:
    """A figure of the engine's fastest way in a row of the JSON; None where there is none."""
    way = row["fastest"].get(engine)
    return None if way is None else row["engines"][engine][way].get(name)


def begun(thread_counts: Iterable[int]) -> dict[str, Any]:
    """The JSON of a run before its first row: when and where it runs, and the machine's peaks.

    Raises:
        SystemExit: the environment asks for the reference in place of our kernels.
    """
    require_kernels()
    return {
        "datetime": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine_info": {"espkernels": collect().as_dict()},
        "peaks": [dataclasses.asdict(peak(threads)) for threads in thread_counts],
        "rows": [],
    }


def added_to(run: dict[str, Any], file: Path) -> None:
    """Takes the rows of an earlier run in ``file`` into ``run``, which measures others of them, or some again.

    Of both runs' peaks the greater is the machine's, and so are the floors: in the other run neighbours were busy.

    Raises:
        SystemExit: there is no ``file``, or its rows were measured on another machine, or with other versions.
    """
    try:
        earlier = json.loads(file.read_text())
    except FileNotFoundError:
        raise SystemExit(f"--add: {file} is not there, expected the results of an earlier run") from None
    for key in ("machine_info", "packages"):
        if earlier.get(key) != run.get(key):
            raise SystemExit(f"{file}: {key} is {earlier.get(key)}, and here {run.get(key)}: measure it all anew")
    greatest: dict[int, dict[str, Any]] = {}
    for found in [*run["peaks"], *earlier["peaks"]]:
        known = greatest.setdefault(found["threads"], found)
        if found["flops"] > known["flops"]:
            greatest[found["threads"]] = found
    run["peaks"] = list(greatest.values())
    run["rows"] = [_with_floor(run, row) for row in earlier["rows"]]


def _with_floor(run: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with the seconds that its operations take at the peak that ``run`` holds for its threads."""
    rates = {one["threads"]: one["flops"] for one in run["peaks"]}
    return {**row, "floor": row["flops"] / rates[row["threads"]]}


def record(
    run: dict[str, Any], rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str], file: Path
) -> None:
    """Takes ``rows`` into ``run`` as they are measured, with the floors of its peaks, printing the ``line`` of each.

    One of the same name, batch and threads is replaced. Each goes into ``file`` at once: hours of measurements should
    not be lost with the last of them. What results are compared with owes nothing to this library's kernels; those run
    in a worker.
    """

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["row"], row["batch"], row["threads"]

    with use_backend("reference"):
        for measured in rows:
            row = _with_floor(run, measured)
            places = {identity(known): place for place, known in enumerate(run["rows"])}
            if identity(row) in places:
                run["rows"][places[identity(row)]] = row
            else:
                run["rows"].append(row)
            print(line(row), flush=True)
            write_json(run, file)


def parser(name: str, description: str | None, peers: Iterable[str]) -> argparse.ArgumentParser:
    """The options that every race has; its results are ``name``.json, .md and .png."""
    result = argparse.ArgumentParser(prog=f"bench.{name}", description=description)
    result.add_argument("--rows", action="append", default=[], metavar="PATTERN", help="rows by name, such as 's1-*'")
    result.add_argument("--engines", action="append", default=[], choices=[*peers], help="only these peers")
    result.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile in every row, or in none; by default in the units alone, where it fits the time",
    )
    result.add_argument("--add", action="store_true", help="keep the rows that are in the output and not measured now")
    result.add_argument("--output", type=Path, default=RESULTS, help=f"folder of {name}.json, .md and .png")
    return result
