"""What the run of :mod:`bench.training` says: a line a row, Markdown with all that falls short, a chart.

A trainer's time is the median of its faster layout. Ratios are medians of the ratios within a round; the fastest peer
is the one that ours gains least over. Activation memory is compared with the least that eager keeps in either layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench import training_bounds
from bench.engines import OURS
from bench.race import figure_of
from bench.report import headline
from bench.tables import markdown_table
from espkernels.quantities import amount, duration

__all__ = ["GOALS", "TRAINERS", "Goal", "Verdict", "judge", "line", "markdown", "shortfalls"]

TRAINERS = (OURS, f"{OURS} save", f"{OURS} recompute", "eager", "compile", "checkpoint")


@dataclass(frozen=True)
class Goal:
    """At least ``faster`` times the speed of the fastest peer, with at most ``memory`` of eager's activations kept."""

    faster: float
    memory: float = 0.4

    def __str__(self) -> str:
        return f"{self.faster:g}x, {self.memory:.0%}"


GOALS = {
    "unit": Goal(5.0),
    "unit below 14x14": Goal(3.5),
    "classification": Goal(5.0),
    "segmentation": Goal(5.0),
}


@dataclass(frozen=True)
class Verdict:
    """One of ours in one row: its speed over the ``best`` peer, the memory that it keeps over eager's, and the goal.

    ``compiled`` is whether torch.compile was among the peers: without it no goal is reached.
    """

    ours: str
    goal: Goal
    best: str | None
    faster: float | None
    memory: float | None
    of_floor: float
    compiled: bool

    @property
    def missed(self) -> list[str]:
        """What falls short of the goal, in words; empty where it is reached."""
        if self.best is None or self.faster is None:
            return ["no peer was timed"]
        found = []
        if self.faster < self.goal.faster:
            found.append(f"{self.faster:.2f}x of {self.best}'s speed, goal {self.goal.faster:g}x")
        if not self.compiled:
            found.append("torch.compile was not timed")
        if self.memory is None:
            found.append("memory was not measured")
        elif self.memory > self.goal.memory:
            found.append(f"keeps {self.memory:.0%} of eager's activation memory, goal {self.goal.memory:.0%}")
        return found

    def __str__(self) -> str:
        if not self.missed:
            return "reached"
        return f"SLOWER than {self.best}" if self.faster is not None and self.faster < 1 else "missed"


def judge(row: dict[str, Any]) -> list[Verdict]:
    """A verdict on each of ours that a row of the JSON has."""
    found = []
    for ours, over in row["over"].items():
        best = min(over, key=over.__getitem__, default=None)
        kept, eager = figure_of(row, ours, "kept"), figure_of(row, "eager", "kept")
        found.append(
            Verdict(
                ours,
                GOALS[row["kind"]],
                best,
                None if best is None else over[best],
                None if kept is None or not eager else kept / eager,
                figure_of(row, ours, "seconds") / row["floor"],
                "compile" in over,
            )
        )
    return found


def line(row: dict[str, Any]) -> str:
    """A row as it is measured."""
    times = [f"{engine} {_time(row, engine)}" for engine in row["fastest"]]
    said = [
        f"{one.ours} {_times(one.faster)} of {one.best} with {_share(one.memory)} of the memory: {one}"
        for one in judge(row)
    ]
    return f"{row['row']}, batch {row['batch']}: {', '.join(times)}; {'; '.join(said) or 'ours was not timed'}"


def shortfalls(run: dict[str, Any]) -> Iterator[str]:
    """Every goal that is not reached, with what is missing; and what was not timed."""
    for row in run["rows"]:
        name = f"{row['row']}, batch {row['batch']}"
        for verdict in judge(row):
            if verdict.missed:
                yield f"{name}, {verdict.ours}: {'; '.join(verdict.missed)}"
        for engine, reason in row["refused"].items():
            yield f"{name}, NOT TIMED {engine}: {reason}"


def markdown(run: dict[str, Any], picture_name: str) -> str:
    """The report as Markdown, with the picture beside it."""
    allocator = " ".join(f"{name}={value}" for name, value in run["allocator"].items())
    names = [name for name in TRAINERS if any(name in row["fastest"] for row in run["rows"])]
    peak = run["peaks"][0]
    short = list(shortfalls(run))
    lines = [
        "# Training steps",
        "",
        f"{headline(run)}; {run['datetime'][:10]}.",
        "",
        f"![time of a step against what it keeps]({picture_name})",
        "",
        "Forward, loss (cross entropy; a unit is given the gradient of its result, and gives that of its input) and",
        "backward, float32, all threads; medians. Every trainer runs in a process of its own that is stopped while",
        "another one is timed; a round takes one sample of each in turn, and ratios are medians of the ratios within",
        "a round. Outputs and all gradients were compared with a float64 run of the plain model before anything was",
        "timed, and ours, bit for bit, with those of a second step. Each figure is that of the faster layout, named",
        "beside it (in brackets the slower one's; a network's is the least of three steps in a heat, which decided);",
        "eager, checkpointing (each unit on its own) and torch.compile (default mode) run the plain layers.",
        "",
        f"Every process has the same allocator setting, `{allocator}`:",
        "freed blocks are kept, without which the page faults of large maps take longer than the arithmetic, for the",
        "peers as for us.",
        "",
        "The floor is three times the multiply-adds of the forward pass over the machine's peak rate,",
        f"{peak['flops'] / 1e9:.0f} GFLOP/s with {peak['threads']} threads by {peak['source']}.",
        "",
        "## Time",
        "",
        *markdown_table(_columns(names, "floor"), [_time_cells(row, names) for row in run["rows"]]),
        "",
        "## Ours beside the fastest peer",
        "",
        *markdown_table(
            [
                ("row", "left"),
                ("batch", "right"),
                ("ours", "left"),
                ("fastest peer", "left"),
                ("times faster", "right"),
                ("of eager's memory", "right"),
                ("time / floor", "right"),
                ("goal", "left"),
                ("", "left"),
            ],
            [_verdict_cells(row, verdict) for row in run["rows"] for verdict in judge(row)],
        ),
        "",
        "## Memory",
        "",
        "Kept: what a forward pass keeps for the backward one, each storage once and whole. Parameters do not count,",
        "nor does an image; the input of a unit does, since inside a network it is the map of the layer before. The",
        "other figures are how a fresh process grew. Held: after its first step, everything freed given back; threads,",
        "code (torch.compile: all of its compiler), gradients, and buffers that a library keeps for the next step.",
        "Peak: the most of later steps, above that.",
        "",
        *markdown_table(_columns(names), [_memory_cells(row, names) for row in run["rows"]]),
    ]
    if short:
        lines += ["", "## What falls short", "", *(f"* {text}" for text in short)]
    bounded = [row for row in run["rows"] if row.get("bounds")]
    if bounded:
        lines += [
            "",
            "## What bounds these rows",
            "",
            "The operators that take at least 4 % of a step of ours, timed in steps alone; names without a prefix are",
            "ours, and what they leave of a step is Python and autograd. A unit reads or writes 7.5 maps of its size",
            "forward and 14 backward, where eager does 20 and 45 (csrc/cpu_training_door.cpp): by bytes alone that is",
            "three times eager's speed, and more where eager's operators do not reach the memory's.",
            "[tried.md](/bench/tried.md) says what was tried.",
            "",
            *(f"* {row['row']}, batch {row['batch']}: {training_bounds.sentence(row['bounds'])}" for row in bounded),
        ]
    alone = "One row alone: `python -m bench.training --rows 's1-224x224-level3' --output FOLDER`."
    return "\n".join([*lines, "", alone, ""])


def _columns(names: list[str], *first: str) -> list[tuple[str, str]]:
    return [("row", "left"), ("batch", "right"), *((name, "right") for name in (*first, *names))]


def _time_cells(row: dict[str, Any], names: list[str]) -> list[str]:
    return [row["row"], str(row["batch"]), duration(row["floor"]), *(_time(row, name) for name in names)]


def _time(row: dict[str, Any], engine: str) -> str:
    if engine not in row["fastest"]:
        return "NOT TIMED"
    others = {way: found["seconds"] for way, found in row["engines"][engine].items()} | row["heats"].get(engine, {})
    way = row["fastest"][engine]
    slower = [f"{other} {duration(seconds)}" for other, seconds in others.items() if other != way]
    said = f" ({', '.join(slower)})" if slower else ""
    return f"{duration(figure_of(row, engine, 'seconds'))} {way}{said}"


def _memory_cells(row: dict[str, Any], names: list[str]) -> list[str]:
    def cell(name: str) -> str:
        figures = ((said, figure_of(row, name, said)) for said in ("kept", "held", "peak"))
        return ", ".join("-" if count is None else f"{amount(count)} {said}" for said, count in figures)

    return [row["row"], str(row["batch"]), *map(cell, names)]


def _verdict_cells(row: dict[str, Any], verdict: Verdict) -> list[str]:
    return [
        row["row"],
        str(row["batch"]),
        verdict.ours,
        verdict.best or "-",
        _times(verdict.faster),
        _share(verdict.memory),
        f"{verdict.of_floor:.1f}",
        str(verdict.goal),
        str(verdict),
    ]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
