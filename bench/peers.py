"""Frozen networks and units beside the inference engines that people use: ``python -m bench.peers``, ``make peers``.

Rows are ESPNetv2 for classification and segmentation and single EESP units, in float32. Every engine's result is
compared with a float64 run of the plain model before anything is timed; an engine that is wrong, missing or cannot
take the model is listed with its reason. Then all are timed in turn, round after round (:mod:`bench.interleave`), each
in a process of its own that is stopped while others run (:mod:`bench.worker`). :mod:`bench.engines` says how each is
set up, and :mod:`bench.peers_report` what is made of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import peers_report
from bench.cases import IMAGES, NETWORKS, SEGMENTATION, fits, matching
from bench.comparison import Comparison, Outcome, Provider, measure
from bench.engines import ENGINES, OURS, why_not
from bench.fma_peak import peak
from bench.layers import Task, network, segmentation, unit
from bench.worker import Lost, Refused, Worker
from espkernels.backends import use_backend
from espkernels.info import collect

__all__ = ["ROWS", "Row", "Selection", "main"]

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


def _rows() -> Iterator[Row]:
    for name in ("s0.5-224x224-network", "s1-224x224-network", "s2-224x224-network"):
        make = functools.partial(network, NETWORKS[name])
        yield Row(name, "classification", make, (3, *IMAGES["224x224"][:2]), (1, 8, 32), True)
    for name, (scale, image, classes) in SEGMENTATION.items():
        # Thirty-two results of 1024x512 in float64 beside those of all engines would not fit a small machine's memory.
        shape = (3, *IMAGES[image][:2])
        yield Row(
            name, "segmentation", functools.partial(segmentation, scale, classes), shape, (1, 8), image != "1024x512"
        )
    for case in matching(["s1-224x224-level?", "s2-224x224-level?", "s1-1024x512-level3"]):
        shape = (case.in_channels, case.height, case.width)
        first = case.name.startswith("s1-")
        yield Row(case.name, "unit", functools.partial(unit, case), shape, (1, 16), first)


ROWS = tuple(_rows())


@dataclass(frozen=True)
class Selection:
    """What was asked for; what is empty or None is left to ``full``: batch 1 on all threads, or everything."""

    full: bool = False
    patterns: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    compile: bool | None = None
    engines: tuple[str, ...] = tuple(ENGINES)

    def rows(self) -> tuple[Row, ...]:
        """The rows asked for."""
        if self.patterns:
            return tuple(row for row in ROWS if fits(row.name, self.patterns))
        return tuple(row for row in ROWS if self.full or row.default)

    def batches_of(self, row: Row) -> tuple[int, ...]:
        """The batches of a row."""
        return self.batches or (row.batches if self.full else (1,))

    def thread_counts(self) -> tuple[int, ...]:
        """One and all of them, or what was asked for."""
        every = torch.get_num_threads()
        return self.threads or (tuple(sorted({1, every})) if self.full else (every,))

    def compiles(self, row: Row) -> bool:
        """Whether torch.compile takes part: autotuning a network takes a minute and more a thread count."""
        return (self.full or row.kind == "unit") if self.compile is None else self.compile


@dataclass
class Race:
    """The workers of all engines, and what one row needs: a :class:`bench.layers.Task` and its files."""

    selection: Selection
    folder: Path
    workers: dict[str, Worker] = field(default_factory=dict)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def results(self) -> Iterator[dict[str, Any]]:
        """Measures row after row."""
        for row in self.selection.rows():
            for batch in self.selection.batches_of(row):
                with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                    task = Task(row.make, (batch, *row.shape), torch.float32, "forward")
                    torch.save(task.model, f"{folder}/model.pt")
                    torch.save(task.input, f"{folder}/input.pt")
                    for threads in self.selection.thread_counts():
                        yield self._measure(row, batch, threads, task, Path(folder))

    def _measure(self, row: Row, batch: int, threads: int, task: Task, files: Path) -> dict[str, Any]:
        providers, refused = self._providers(row, batch)
        comparison = Comparison(
            operator=row.kind,
            case=row.name if batch == 1 else f"{row.name}-batch{batch}",
            dtype="float32",
            mode="inference",
            threads=threads,
            providers=providers,
            build=functools.partial(self._open, task, files, threads),
            floor=task.floor,
            prepare=task.prepare,
            seconds=3.0,
        )
        while True:
            try:
                outcome = measure(comparison)
                break
            except Lost as lost:
                # It died while it was timed: the others are timed anew, without it.
                name = next(name for name, worker in self.workers.items() if worker is lost.worker)
                refused[name] = str(lost)
                self.workers.pop(name).close()
                left = tuple(provider for provider in comparison.providers if str(provider) != name)
                comparison = dataclasses.replace(comparison, providers=left)
        refused |= {name: str(reason) for name, reason in outcome.refused.items()}
        return _as_dict(row, batch, threads, outcome, refused)

    def _providers(self, row: Row, batch: int) -> tuple[tuple[Provider, ...], dict[str, str]]:
        """Those that can run here, and why the others cannot."""
        providers, refused = [], {}
        for name in dict.fromkeys((OURS, *self.selection.engines)):
            reason = why_not(name)
            if name == "compile" and not self.selection.compiles(row):
                reason = "not asked for: autotuning a network takes minutes (--compile, --full)"
            if reason is not None:
                refused[name] = reason
            else:
                providers += [Provider(name, way) for way in ENGINES[name].ways_of(batch)]
        return tuple(providers), refused

    def _open(self, task: Task, files: Path, threads: int, provider: Provider) -> Worker:
        name = str(provider)
        if name not in self.workers:
            self.workers[name] = Worker(provider.implementation, self.folder / f"{name}.log")
        try:
            output = self.workers[name].open(files, threads, provider.layout, OPENING)
        except Lost as lost:
            self.workers.pop(name).close()
            raise Refused(str(lost)) from None
        task.check(provider, [output])
        return self.workers[name]


def _as_dict(row: Row, batch: int, threads: int, outcome: Outcome, refused: dict[str, str]) -> dict[str, Any]:
    samples = outcome.samples
    engines: dict[str, Any] = {}
    for name, seconds in samples.seconds.items():
        engine, _, way = name.partition("-")
        found = {"seconds": samples.median(name), "calls": samples.calls[name], "samples": seconds}
        engines.setdefault(engine, {})[way] = found
    fastest = {engine: min(ways, key=lambda way: ways[way]["seconds"]) for engine, ways in engines.items()}
    over = {
        engine: 1 / samples.speedup(f"{OURS}-{fastest[OURS]}", f"{engine}-{way}")
        for engine, way in fastest.items()
        if engine != OURS and OURS in fastest
    }
    return {
        "row": row.name,
        "kind": row.kind,
        "batch": batch,
        "threads": threads,
        "flops": outcome.floor.flops,
        "floor": outcome.floor.flops / peak(threads).flops,
        "engines": engines,
        "fastest": fastest,
        "over": over,
        "refused": refused,
    }


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m bench.peers``."""
    result = argparse.ArgumentParser(prog="bench.peers", description=__doc__)
    result.add_argument("--rows", action="append", default=[], metavar="PATTERN", help="rows by name, such as 's1-*'")
    result.add_argument("--batch", action="append", default=[], type=int, metavar="N", help="may be repeated")
    result.add_argument("--threads", action="append", default=[], type=int, metavar="N", help="may be repeated")
    result.add_argument("--engines", action="append", default=[], choices=[*ENGINES][1:], help="only these peers")
    result.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile in every row, or in none; by default in the units alone, where it fits the time",
    )
    result.add_argument("--full", action="store_true", help="every row and batch, one thread and all of them: hours")
    result.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder of peers.json, .md and .png"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what was asked for, writes JSON, Markdown and chart, and returns the exit status."""
    args = parser().parse_args(arguments)
    selection = Selection(
        args.full,
        tuple(args.rows),
        tuple(args.batch),
        tuple(args.threads),
        args.compile,
        tuple(args.engines) or tuple(ENGINES),
    )
    if not selection.rows():
        print(f"peers: rows: {args.rows} fit none of {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    missing = {name: reason for name in selection.engines if (reason := why_not(name)) is not None}
    for name, reason in missing.items():
        print(f"peers: {name} takes no part: {reason}", file=sys.stderr)
    run: dict[str, Any] = {
        "datetime": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine_info": {"espkernels": collect().as_dict()},
        "packages": {
            package: importlib.metadata.version(package)
            for name in selection.engines
            if name not in missing
            for package in ENGINES[name].packages
        },
        "peaks": [dataclasses.asdict(peak(threads)) for threads in selection.thread_counts()],
        "rows": [],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        race = Race(selection, Path(folder))
        try:
            # What results are compared with owes nothing to this library's kernels; those run in a worker.
            with use_backend("reference"):
                for row in race.results():
                    run["rows"].append(row)
                    print(peers_report.line(row), flush=True)
                    # Hours of measurements should not be lost with the last of them.
                    (args.output / "peers.json").write_text(json.dumps(run, indent=1))
        finally:
            race.close()
    (args.output / "peers.md").write_text(peers_report.markdown(run, "peers.png"))
    peers_report.picture(run, args.output / "peers.png")
    for text in peers_report.verdicts(run):
        print(text)
    print(f"{args.output}/peers.json, peers.md, peers.png; {time.perf_counter() - start:.0f} s")
    return 0 if all(OURS in row["fastest"] for row in run["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
