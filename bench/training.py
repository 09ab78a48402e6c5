"""Training steps beside torch's own: ``python -m bench.training``, ``make training``.

Rows are ESPNetv2 for classification and segmentation and single EESP units in float32: forward, loss and backward, up
to the gradients. Outputs and gradients of every trainer (:mod:`bench.trainers`) are compared with a float64 run of the
plain model before anything is timed. Then they are timed in turn, round after round, each in a process of its own that
is stopped while others run (:mod:`bench.race`); of a network only the layout of each that won a heat of its own. Peak
memory, and what a forward pass keeps for the backward one, are those of a fresh process each.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import race, training_bounds, training_report
from bench.cases import IMAGES, NETWORKS, matching
from bench.comparison import Comparison, Provider, WrongResult
from bench.engines import OURS
from bench.layers import Task, network, segmentation, unit
from bench.output import keep_whole, make_folder
from bench.race import Race, Row, Selection
from bench.trainers import ALLOCATOR, ENGINES, why_not
from bench.training_picture import picture
from bench.worker import Lost, Refused

__all__ = ["ROWS", "main", "results"]

PEERS = tuple(name for name in ENGINES if not name.startswith(OURS))
# Seconds for the samples of a row; a network gets its five rounds, however long they take.
SECONDS = 6.0


def _rows() -> Iterator[Row]:
    for case in matching(["s1-224x224-level?", "s1-1024x512-level3"]):
        shape = (case.in_channels, case.height, case.width)
        kind = "unit" if case.height >= 14 else "unit below 14x14"
        yield Row(case.name, kind, functools.partial(unit, case), shape, (16,), True)
    for name in ("s1-224x224-network", "s2-224x224-network"):
        make = functools.partial(network, NETWORKS[name])
        yield Row(name, "classification", make, (3, *IMAGES["224x224"][:2]), (32,), name.startswith("s1-"))
    yield Row(
        "s2-512x256-network", "segmentation", functools.partial(segmentation, 2.0, 20), (3, 256, 512), (4,), False
    )


ROWS = tuple(_rows())


def results(selection: Selection, racing: Race) -> Iterator[dict[str, Any]]:
    """Measures row after row."""
    for row in selection.rows():
        mode = "inside" if row.kind.startswith("unit") else "training"
        for batch in row.batches:
            with tempfile.TemporaryDirectory(dir=racing.folder) as folder:
                task = Task(row.make, (batch, *row.shape), torch.float32, mode)
                race.saved(task, Path(folder))
                yield _measure(selection, racing, row, task, Path(folder))


def _measure(selection: Selection, racing: Race, row: Row, task: Task, files: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    engines, refused = _engines(selection, row)
    ways = {engine: ENGINES[engine].ways for engine in engines}
    heats: dict[str, dict[str, float]] = {}
    if not row.kind.startswith("unit"):
        for engine in engines:
            heats[engine], not_timed = _heat(racing, task, files, threads, engine)
            refused |= not_timed
            ways[engine] = tuple(sorted(heats[engine], key=heats[engine].__getitem__)[:1])
    comparison = Comparison(
        operator=row.kind,
        case=f"{row.name}-batch{task.shape[0]}",
        dtype="float32",
        mode="training",
        threads=threads,
        providers=tuple(Provider(engine, way) for engine in engines for way in ways[engine]),
        build=functools.partial(racing.open, task, files, threads),
        floor=task.floor,
        prepare=task.prepare,
        seconds=SECONDS,
    )
    outcome, not_timed = racing.measure(comparison)
    found = race.described(row, task.shape[0], threads, outcome, refused | not_timed)
    found["heats"] = heats
    if heats:
        racing.close()
    samples = outcome.samples
    names = {engine: f"{engine}-{way}" for engine, way in found["fastest"].items()}
    found["over"] = {
        ours: {peer: samples.speedup(names[ours], names[peer]) for peer in names if peer in PEERS}
        for ours in names
        if ours not in PEERS
    }
    for engine, way in found["fastest"].items():
        found["engines"][engine][way] |= _memory(racing, engine, way, files, threads)
    short = [verdict.ours for verdict in training_report.judge(found) if verdict.missed]
    # What bounds "save" bounds "recompute" too.
    found["bounds"] = training_bounds.bounds(files, found["fastest"][short[0]], short[0].split()[-1]) if short else []
    return found


def _heat(racing: Race, task: Task, files: Path, threads: int, engine: str) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of a step in each layout, and which was refused and why.

    One process at a time: a large network in all of them would fill the memory, so the slower layout stays out of the
    race.
    """
    seconds, refused = {}, {}
    for way in ENGINES[engine].ways:
        provider = Provider(engine, way)
        try:
            worker = racing.open(task, files, threads, provider)
            seconds[way] = min(worker.time(1) for _ in range(3))
        except (Refused, WrongResult) as error:
            refused[str(provider)] = str(error)
        racing.close()
    return seconds, refused


def _engines(selection: Selection, row: Row) -> tuple[list[str], dict[str, str]]:
    """Those that can run a row here, and why the others cannot."""
    engines, refused = [], {}
    for name in ENGINES:
        if name in PEERS and name not in selection.engines:
            continue
        reason = why_not(name)
        if name == "compile" and not selection.compiles(row):
            reason = "not asked for: compiling a network takes minutes (--compile, --full)"
        if reason is None:
            engines.append(name)
        else:
            refused[name] = reason
    return engines, refused


def _memory(racing: Race, engine: str, way: str, files: Path, threads: int) -> dict[str, int | None]:
    """The figures of a process that runs nothing else; empty where it fails."""
    worker = racing.worker(f"{engine}-{way}-memory", engine)
    try:
        return worker.memory(files, threads, way, race.OPENING)
    except (Lost, Refused) as error:
        print(f"training: {engine}: its memory was not measured: {error}", file=sys.stderr)
        return {}
    finally:
        worker.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what was asked for, writes JSON, Markdown and chart, and returns the exit status."""
    parser = race.parser("training", __doc__, PEERS)
    parser.add_argument("--full", action="store_true", help="every row, all with torch.compile: an hour")
    args = parser.parse_args(arguments)
    selection = Selection(
        every=ROWS,
        engines=tuple(args.engines) or PEERS,
        full=args.full,
        patterns=tuple(args.rows),
        compile=args.compile,
    )
    if not selection.rows():
        print(f"training: rows: {args.rows} fit none of {', '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    keep_whole(args.output, not args.add and bool(args.rows or args.engines))
    make_folder(args.output)
    start = time.perf_counter()
    run = race.begun([torch.get_num_threads()]) | {"allocator": ALLOCATOR}
    if args.add:
        race.added_to(run, args.output / "training.json")
    with tempfile.TemporaryDirectory() as folder:
        racing = Race(Path(folder), "bench.trainers", ALLOCATOR)
        try:
            race.record(run, results(selection, racing), training_report.line, args.output / "training.json")
        finally:
            racing.close()
    (args.output / "training.md").write_text(training_report.markdown(run, "training.png"))
    picture(run, args.output / "training.png")
    for text in training_report.shortfalls(run):
        print(text)
    print(f"{args.output}/training.json, training.md, training.png; {time.perf_counter() - start:.0f} s")
    return 0 if all(row["over"] for row in run["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
