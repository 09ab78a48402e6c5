"""Reads the JSON of a run and shows it: a table in the terminal, Markdown, a picture.

A row is one of our implementations on one layout; its peers are those of the same layout, and "best other" the fastest
of all of them. Rows in which another one is faster are marked and stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.comparison import PEERS
from bench.tables import markdown_table
from espkernels.probe import Ceilings
from espkernels.quantities import amount, duration

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["GOALS", "Goal", "Row", "headline", "load", "markdown", "picture", "rows", "table"]

MARK = "slower"
# Ratios are written "/ eager": how many times faster than eager.
COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("layer", "left"),
    ("run as", "left"),
    ("layout", "left"),
    ("eager", "right"),
    ("compile", "right"),
    ("ours", "right"),
    ("/ eager", "right"),
    ("/ compile", "right"),
    ("/ best other", "right"),
    ("GB/s", "right"),
    ("GFLOP/s", "right"),
    ("of ceiling", "right"),
    ("memory", "right"),
    ("", "left"),
)

# The columns of a narrow window: all but the rates.
NARROW = (*range(9), len(COLUMNS) - 1)


@dataclass(frozen=True)
class Goal:
    """``implementation`` of ``operator`` in ``mode`` is to be ``factor`` times as fast as ``peer`` on its layout."""

    operator: str
    mode: str
    implementation: str
    peer: str
    factor: float

    def fits(self, row: Row) -> bool:
        """Whether ``row`` is one that the goal speaks of, and has the peer."""
        asked = (self.operator, self.mode, self.implementation)
        return asked == (row.operator, row.mode, row.implementation) and self.peer in row.over

    def verdict(self, table: Sequence[Row]) -> str:
        """How many rows reach it, and the one that is furthest from it."""
        fitting = [row for row in table if self.fits(row)]
        name = f"{self.operator} {self.mode}, {self.implementation} at least {self.factor:g}x {self.peer}"
        if not fitting:
            return f"{name}: not measured"
        reached = sum(row.over[self.peer] >= self.factor for row in fitting)
        least = min(fitting, key=lambda row: row.over[self.peer])
        return f"{name}: {reached} of {len(fitting)} rows; least {least.over[self.peer]:.2f}x ({least})"


GOALS = (
    Goal("spatial_pyramid", "forward", "ours", "eager", 4.0),
    Goal("spatial_pyramid", "forward", "ours", "compile", 2.0),
    Goal("spatial_pyramid", "full", "ours", "eager", 3.0),
    Goal("network", "forward", "frozen", "eager", 2.5),
    Goal("network", "training", "replaced", "eager", 1.0),
    Goal("unit", "training", "replaced", "eager", 1.0),
)


@dataclass(frozen=True)
class Row:
    """One of our implementations: median seconds, ``peers`` of the same layout, ratios ``over`` them."""

    operator: str
    case: str
    mode: str
    dtype: str
    threads: int
    implementation: str
    layout: str
    seconds: float
    peers: dict[str, float]
    over: dict[str, float]
    over_best: float | None
    best: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.case}, {self.run_as}, {self.layout}"

    @property
    def run_as(self) -> str:
        """Implementation, dtype and threads."""
        name = "" if self.implementation == "ours" else f"{self.implementation} "
        return f"{name}{self.dtype} x{self.threads}"

    @property
    def slower(self) -> bool:
        """Whether another implementation is faster."""
        return self.over_best is not None and self.over_best < 1


def load(path: Path) -> dict[str, Any]:
    """The JSON of a run."""
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def rows(run: dict[str, Any]) -> list[Row]:
    """The rows of a run, in the order they ran."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in run["benchmarks"]:
        facts = benchmark["extra_info"]
        name = f"{facts['implementation']}-{facts['layout']}"
        groups.setdefault(benchmark["group"], {})[name] = benchmark
    return [row for group in groups.values() for row in _rows_of(group)]


def _rows_of(group: dict[str, dict[str, Any]]) -> Iterator[Row]:
    for benchmark in group.values():
        facts = benchmark["extra_info"]
        implementation, layout = facts["implementation"], facts["layout"]
        if implementation in PEERS:
            continue
        same = {peer: f"{peer}-{layout}" for peer in PEERS if f"{peer}-{layout}" in group}
        others = {
            other: ratio
            for other, ratio in facts["speedup"].items()
            if other in group and group[other]["extra_info"]["implementation"] in PEERS
        }
        best = min(others, key=lambda other: others[other], default="")
        yield Row(
            operator=facts["operator"],
            case=facts["case"],
            mode=facts["mode"],
            dtype=facts["dtype"],
            threads=facts["threads"],
            implementation=implementation,
            layout=layout,
            seconds=benchmark["stats"]["median"],
            peers={peer: group[name]["stats"]["median"] for peer, name in same.items()},
            over={peer: facts["speedup"][name] for peer, name in same.items()},
            over_best=others.get(best),
            best=best,
            facts=facts,
        )


def headline(run: dict[str, Any]) -> str:
    """One line: the machine, its instruction set, torch, threads."""
    info = run["machine_info"]["espkernels"]
    machine, sets = info["machine"], info["instruction_sets"]
    used = sets.get("in use", "no compiled library")
    return (
        f"{machine['cpu']}, {machine['cores for us']} cores, {used}; "
        f"torch {info['versions']['torch']}, espkernels {info['versions']['espkernels']}"
    )


def _ceilings(run: dict[str, Any]) -> list[str]:
    return [
        str(Ceilings(one["threads"], one["flops"], {int(size): rate for size, rate in one["bandwidth"].items()}))
        for one in run.get("ceilings", ())
    ]


def _cells(row: Row) -> tuple[str, ...]:
    def over(peer: str) -> str:
        return f"{row.over[peer]:.2f}x" if peer in row.over else "-"

    facts = row.facts
    return (
        row.case,
        row.run_as,
        row.layout,
        *(duration(row.peers[peer]) if peer in row.peers else "-" for peer in PEERS),
        duration(row.seconds),
        *(over(peer) for peer in PEERS),
        "-" if row.over_best is None else f"{row.over_best:.2f}x",
        f"{facts['bytes_per_second'] / 1e9:.1f}",
        f"{facts['flops_per_second'] / 1e9:.1f}",
        f"{facts['share_of_ceiling']:.0%}",
        "-" if facts["memory"] is None else amount(facts["memory"]),
        f"{MARK} than {row.best}" if row.slower else "",
    )


def _sections(table: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each operator and mode, under what a reader calls them."""
    for operator, mode in dict.fromkeys((row.operator, row.mode) for row in table):
        said = "forward and backward" if mode == "full" else mode
        yield f"{operator}, {said}", [row for row in table if (row.operator, row.mode) == (operator, mode)]


def _summary(run: dict[str, Any], table: Sequence[Row]) -> list[str]:
    lines = [goal.verdict(table) for goal in GOALS]
    lines += [f"NOT TIMED {one['comparison']}: {one['reason']}" for one in run.get("refused", ())]
    slower = sum(row.slower for row in table)
    return [*lines, f"Another implementation is faster in {slower} of {len(table)} rows; they are marked."]


def table(run: dict[str, Any]) -> None:
    """Prints the tables, one for each operator and mode, and how the goals stand."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a file has no edge to wrap at
    found = rows(run)
    for title, section in _sections(found):
        shown = _table(title, section, range(len(COLUMNS)))
        if Measurement.get(console, console.options, shown).minimum > console.width:
            shown = _table(title, section, NARROW)
        console.print(shown)
    console.print(headline(run))
    for line in (*_ceilings(run), *_summary(run, found)):
        console.print(line, highlight=False)


def _table(title: str, section: Sequence[Row], columns: Iterable[int]) -> Table:
    from rich.table import Table

    cells = [(*_cells(row)[:-1], MARK if row.slower else "") for row in section]
    shown = Table(title=title, title_justify="left")
    kept = [i for i in columns if any(line[i] not in ("", "-") for line in cells)]
    for i in kept:
        shown.add_column(COLUMNS[i][0], justify=COLUMNS[i][1], no_wrap=True)
    for row, line in zip(section, cells, strict=True):
        shown.add_row(*(line[i] for i in kept), style="red" if row.slower else None)
    return shown


def markdown(run: dict[str, Any], picture_name: str) -> str:
    """The report as Markdown, with the picture beside it."""
    found = rows(run)
    lines = [
        "# Benchmark",
        "",
        f"{headline(run)}, {run['datetime'][:10]}.",
        "",
        f"![speed-up of each layer]({picture_name})",
        "",
        "Times are medians. Ratios are medians of the ratios within a round; a round takes one sample of every",
        "implementation in turn. Every call uses the same buffers, so what fits the caches is timed in the",
        "caches. Each result was compared with the float64 reference before it was timed. GB/s and GFLOP/s count",
        "every input read once, every result written once and every multiply-add of the convolutions as two",
        "operations; the ceiling is the slower of copying those bytes and multiplying matrices with those",
        "operations on this machine. Memory is that of all arguments and results; for networks, by how much a",
        "fresh process grew in its second step.",
        "",
        *(f"* {line}" for line in (*_ceilings(run), *_summary(run, found))),
    ]
    for title, section in _sections(found):
        lines += ["", f"## {title}", ""]
        lines += markdown_table(COLUMNS, map(_cells, section))
    first = found[0].case if found else "NAME"
    lines += ["", f"One layer alone: `python -m espkernels bench --cases {first} --output FOLDER`.", ""]
    return "\n".join(lines)


COLORS = {"eager": "#0b5394", "compile": "#b45f06"}
MARKERS = {"contiguous": "o", "channels_last": "^"}


def picture(run: dict[str, Any], path: Path) -> None:
    """Writes the chart: a panel for each operator and mode, a dot for each layer, layout and peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    panels = _panels(rows(run))
    if not panels:
        return
    columns = min(3, len(panels))
    stacked = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(dict.fromkeys(map(_label, section))) for _, section in line) + 2.5 for line in stacked]
    figure, axes = pyplot.subplots(
        len(stacked),
        columns,
        figsize=(max(9.0, 5.6 * columns), 0.27 * sum(heights) + 1.4),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    every = [ratio for _, section in panels for row in section for ratio in row.over.values()]
    limits = min(0.8, min(every) * 0.9), max(8.0, max(every) * 1.15)
    for axis, panel in zip(axes.flat, [*panels, *[None] * (axes.size - len(panels))], strict=True):
        if panel is None:
            axis.set_axis_off()
            continue
        title, section = panel
        labels = list(dict.fromkeys(map(_label, section)))
        for row in section:
            for peer, ratio in row.over.items():
                offset = 0.16 if row.layout == "channels_last" else -0.16
                axis.plot(
                    ratio, labels.index(_label(row)) + offset, MARKERS[row.layout], color=COLORS[peer], markersize=5
                )
        axis.axvline(1, color="black", linewidth=1.2)
        for goal in GOALS:
            if any(goal.fits(row) for row in section) and goal.factor != 1:
                axis.axvline(goal.factor, color=COLORS[goal.peer], linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axis.set_xscale("log")
        axis.set_xlim(limits)
        ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if limits[0] <= tick <= limits[1]]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.grid(axis="both", linewidth=0.4, alpha=0.5)
    legend = [
        *(
            Line2D([], [], color=color, marker="s", linestyle="", label=f"over {peer}")
            for peer, color in COLORS.items()
        ),
        *(Line2D([], [], color="grey", marker=mark, ls="", label=name) for name, mark in MARKERS.items()),
        Line2D([], [], color="black", label="as fast (1x)"),
        Line2D([], [], color="grey", linestyle="--", label="goal"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3 if columns == 1 else 6, fontsize=9, frameon=False)
    figure.suptitle(f"Times faster, float32, all threads (right is better)\n{headline(run)}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panels(found: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """What the chart shows: float32 with the most threads that were used."""
    threads = max((row.threads for row in found), default=1)
    shown = [row for row in found if row.dtype == "float32" and row.threads == threads and row.over]
    return [(title, section) for title, section in _sections(shown)]


def _label(row: Row) -> str:
    return row.case if row.implementation == "ours" else f"{row.case} {row.implementation}"
