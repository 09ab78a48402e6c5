"""Frozen networks and units beside the inference engines that people use: ``python -m bench.peers``, ``make peers``.

Rows are ESPNetv2 for classification, segmentation and detection and single EESP units, in float32, or with
``--dtype bfloat16`` on engines that compute so, into results of their own. Every engine's result is compared with a
float64 run of the plain model before anything is timed; an engine that is wrong, missing or cannot take the model is
listed with its reason. Then all are timed in turn, round after round
(:mod:`bench.interleave`), each in a process of its own that is stopped while others run (:mod:`bench.worker`).
:mod:`bench.engines` says how each is set up, and :mod:`bench.peers_report` what is made of it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import peers_report, race
from bench.bounds import bounds
from bench.cases import DETECTION, IMAGES, NETWORKS, SEGMENTATION, matching
from bench.comparison import LAYOUTS, Comparison, Provider
from bench.engines import ENGINES, OURS, why_not
from bench.layers import Task, detection, network, segmentation, unit
from bench.output import keep_whole, make_folder
from bench.race import Race, Row
from bench.selection import DTYPES
from espkernels.models.recipes.arguments import whole_number

__all__ = ["ROWS", "Selection", "main"]


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
    for name, (scale, size, classes) in DETECTION.items():
        make = functools.partial(detection, scale, size, classes)
        yield Row(name, "detection", make, (3, size, size), (1, 8), size == 256)
    for case in matching(["s1-224x224-level?", "s2-224x224-level?", "s1-1024x512-level3"]):
        shape = (case.in_channels, case.height, case.width)
        first = case.name.startswith("s1-")
        yield Row(case.name, "unit", functools.partial(unit, case), shape, (1, 16), first)


ROWS = tuple(_rows())


@dataclass(frozen=True, kw_only=True)
class Selection(race.Selection):
    """What was asked for; what is empty or None is left to ``full``: batch 1 on all threads, or everything."""

    every: tuple[Row, ...] = ROWS
    engines: tuple[str, ...] = tuple(ENGINES)
    batches: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    dtype: str = "float32"

    def batches_of(self, row: Row) -> tuple[int, ...]:
        """The batches of a row."""
        return self.batches or (row.batches if self.full else (1,))

    def thread_counts(self) -> tuple[int, ...]:
        """One and all of them, or what was asked for."""
        every = torch.get_num_threads()
        return self.threads or (tuple(sorted({1, every})) if self.full else (every,))

    def providers(self, row: Row, batch: int) -> tuple[tuple[Provider, ...], dict[str, str]]:
        """Those that can run a row here, and why the others cannot."""
        providers, refused = [], {}
        for name in dict.fromkeys((OURS, *self.engines)):
            reason = why_not(name)
            if name == "compile" and not self.compiles(row):
                reason = "not asked for: autotuning a network takes minutes (--compile, --full)"
            if reason is not None:
                refused[name] = reason
            else:
                providers += [Provider(name, way) for way in ENGINES[name].ways_of(batch)]
        return tuple(providers), refused


def results(selection: Selection, racing: Race) -> Iterator[dict[str, Any]]:
    """Measures row after row."""
    for row in selection.rows():
        for batch in selection.batches_of(row):
            with tempfile.TemporaryDirectory(dir=racing.folder) as folder:
                task = Task(row.make, (batch, *row.shape), DTYPES[selection.dtype], "forward")
                race.saved(task, Path(folder))
                for threads in selection.thread_counts():
                    yield _measure(selection, racing, row, task, Path(folder), threads)


def _measure(selection: Selection, racing: Race, row: Row, task: Task, files: Path, threads: int) -> dict[str, Any]:
    batch = task.shape[0]
    providers, refused = selection.providers(row, batch)
    comparison = Comparison(
        operator=row.kind,
        case=row.name if batch == 1 else f"{row.name}-batch{batch}",
        dtype=selection.dtype,
        mode="inference",
        threads=threads,
        providers=providers,
        build=functools.partial(racing.open, task, files, threads),
        floor=task.floor,
        prepare=task.prepare,
        seconds=3.0,
    )
    outcome, not_timed = racing.measure(comparison)
    found = race.described(row, batch, threads, outcome, refused | not_timed)
    found["dtype"] = selection.dtype
    fastest = found["fastest"]
    found["over"] = {
        engine: 1 / outcome.samples.speedup(f"{OURS}-{fastest[OURS]}", f"{engine}-{way}")
        for engine, way in fastest.items()
        if engine != OURS and OURS in fastest
    }
    # Of a batch, image by image goes through the same kernels.
    short = batch == 1 and peers_report.judge(found).reached is False
    found["bounds"] = bounds(*task.cast("eager", LAYOUTS[fastest[OURS]]), threads) if short else []
    return found


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m bench.peers``."""
    result = race.parser("peers", __doc__, [*ENGINES][1:])
    several: dict[str, Any] = {
        "action": "append",
        "default": [],
        "type": whole_number(1),
        "metavar": "N",
        "help": "may be repeated",
    }
    result.add_argument("--batch", **several)
    result.add_argument("--threads", **several)
    result.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    result.add_argument("--full", action="store_true", help="every row and batch, one thread and all of them: hours")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what was asked for, writes JSON, Markdown and chart, and returns the exit status."""
    args = parser().parse_args(arguments)
    selection = Selection(
        engines=tuple(args.engines) or tuple(ENGINES),
        full=args.full,
        patterns=tuple(args.rows),
        compile=args.compile,
        batches=tuple(args.batch),
        threads=tuple(args.threads),
        dtype=args.dtype,
    )
    name = "peers" if args.dtype == "float32" else f"peers_{args.dtype}"
    if not selection.rows():
        print(f"peers: rows: {args.rows} fit none of {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    keep_whole(args.output, not args.add and bool(args.rows or args.engines or args.batch or args.threads))
    make_folder(args.output)
    start = time.perf_counter()
    missing = {name: reason for name in selection.engines if (reason := why_not(name)) is not None}
    for name, reason in missing.items():
        print(f"peers: {name} takes no part: {reason}", file=sys.stderr)
    run = race.begun(selection.thread_counts())
    run["dtype"] = args.dtype
    run["packages"] = {
        package: importlib.metadata.version(package)
        for name in selection.engines
        if name not in missing
        for package in ENGINES[name].packages
    }
    if args.add:
        race.added_to(run, args.output / f"{name}.json")
    with tempfile.TemporaryDirectory() as folder:
        racing = Race(Path(folder))
        try:
            race.record(run, results(selection, racing), peers_report.line, args.output / f"{name}.json")
        finally:
            racing.close()
    (args.output / f"{name}.md").write_text(peers_report.markdown(run, f"{name}.png"))
    peers_report.picture(run, args.output / f"{name}.png")
    for text in peers_report.verdicts(run):
        print(text)
    print(f"{args.output}/{name}.json, {name}.md, {name}.png; {time.perf_counter() - start:.0f} s")
    return 0 if all(OURS in row["fastest"] for row in run["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
