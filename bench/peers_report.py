"""What the run of :mod:`bench.peers` says: a line a row, Markdown with every loss, a chart.

An engine's figure is the median of the fastest way of giving it the model, ours like the others'. Ratios are medians of
the ratios within a round; the best engine is the one whose ratio is worst for us.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bounds import sentence
from bench.engines import ENGINES, OURS
from bench.race import figure_of
from bench.report import headline
from bench.tables import markdown_table
from espkernels.quantities import duration

__all__ = ["GOALS", "Goal", "Verdict", "judge", "line", "markdown", "picture", "verdicts"]


@dataclass(frozen=True)
class Goal:
    """Our time is to be at most ``of_best`` of the best engine's, or within ``of_floor`` of the floor where given."""

    of_best: float
    of_floor: float | None = None

    def __str__(self) -> str:
        floor = "" if self.of_floor is None else f" or {self.of_floor:.2f} of the floor"
        return f"{self.of_best:.2f} of the best{floor}"

    def reached(self, of_best: float | None, of_floor: float | None) -> bool | None:
        """Whether it is; None where nothing that could say so was measured."""
        if of_floor is not None and self.of_floor is not None and of_floor <= self.of_floor:
            return True
        return None if of_best is None or of_floor is None else of_best <= self.of_best


GOALS = {
    "classification": Goal(0.5, 1.35),
    "unit": Goal(0.5, 1.35),
    "segmentation": Goal(1 / 3),
    "detection": Goal(0.5, 1.35),
}


@dataclass(frozen=True)
class Verdict:
    """One row: our time in parts of the ``best`` engine's and of the floor, and whether that is the goal."""

    best: str | None
    of_best: float | None
    of_floor: float | None
    reached: bool | None

    def __str__(self) -> str:
        if self.reached is None:
            return "not measured"
        if self.reached:
            return "reached"
        return f"SLOWER than {self.best}" if self.of_best is not None and self.of_best > 1 else "missed"


def judge(row: dict[str, Any]) -> Verdict:
    """The verdict on a row of the JSON. The floor is that of float32, and so no goal of another dtype."""
    best = max(row["over"], key=row["over"].__getitem__, default=None)
    of_best = row["over"].get(best)
    ours = figure_of(row, OURS, "seconds")
    of_floor = None if ours is None else ours / row["floor"]
    goal = goal_of(row["kind"], row["dtype"])
    return Verdict(best, of_best, of_floor, goal.reached(of_best, of_floor))


def goal_of(kind: str, dtype: str) -> Goal:
    """The goal of the rows of a kind."""
    return GOALS[kind] if dtype == "float32" else Goal(GOALS[kind].of_best)


def line(row: dict[str, Any]) -> str:
    """A row as it is measured."""
    verdict = judge(row)
    times = [
        f"{engine} {duration(figure_of(row, engine, 'seconds'))} ({way})" for engine, way in row["fastest"].items()
    ]
    threads = f"{row['threads']} thread" + "s" * (row["threads"] != 1)
    said = f"{_share(verdict.of_best)} of {verdict.best}, {_share(verdict.of_floor)} of the floor: {verdict}"
    return f"{row['row']}, batch {row['batch']}, {threads}: {', '.join(times)}; {said}"


def verdicts(run: dict[str, Any]) -> Iterator[str]:
    """How many rows of each kind reach their goal, and in how many an engine is faster than we are."""
    for kind in GOALS:
        goal = goal_of(kind, run["dtype"])
        judged = [judge(row) for row in run["rows"] if row["kind"] == kind]
        if judged:
            reached = sum(verdict.reached is True for verdict in judged)
            slower = sum(verdict.of_best is not None and verdict.of_best > 1 for verdict in judged)
            yield f"{kind}, {goal}: {reached} of {len(judged)} rows reach it; another engine is faster in {slower}"
        else:
            yield f"{kind}, {goal}: not measured"


def markdown(run: dict[str, Any], picture_name: str) -> str:
    """The report as Markdown, with the picture beside it."""
    asked = {name.partition("-")[0] for row in run["rows"] for name in (*row["fastest"], *row["refused"])}
    engines = [name for name in ENGINES if name in asked]
    columns = [
        ("row", "left"),
        ("batch", "right"),
        ("threads", "right"),
        *((name, "right") for name in engines),
        ("best engine", "left"),
        ("ours / best", "right"),
        ("ours / floor", "right"),
        ("goal", "left"),
        ("", "left"),
    ]
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    lines = [
        "# Beside other inference engines",
        "",
        f"{headline(run)}{', ' if packages else ''}{packages}; {run['datetime'][:10]}.",
        "",
        f"![times of every engine]({picture_name})",
        "",
        f"{run['dtype']}, medians. Every engine runs in a process of its own, stopped while another one is timed;",
        "a round takes one sample of each in turn, and ratios are medians of ratios within a round. Each result was",
        "compared with a float64 run of the plain model before it was timed. Each engine's figure, ours too, is that",
        "of the fastest way of giving it the model, named beside it (`bench/engines.py`). A ratio below 1 is in our",
        "favour.",
        "The floor is the multiply-adds of the convolutions over the machine's peak rate of those in float32:",
        "",
        *(f"* {_peak(peak)}" for peak in run["peaks"]),
        "",
        "Goals:",
        "",
        *(f"* {text}" for text in verdicts(run)),
        "",
        *markdown_table(columns, [_cells(row, engines) for row in run["rows"]]),
    ]
    short = [row for row in run["rows"] if row.get("bounds")]
    if short:
        lines += ["", "## What bounds the rows that fall short", ""]
        lines += [
            "The kernels that take at least 8 % of our time, nothing else running. The peak is the floor's rate; the",
            "roof is what copying and torch.mm were measured to reach, above 100 % where a kernel multiplies faster",
            "than torch.mm. `python -m espkernels explain` has every layer, [bench/tried.md](/bench/tried.md) what was",
            "tried. A batch goes through the same kernels image by image: its row is bounded as that of one image.",
            "",
        ]
        peaks = {peak["threads"]: peak["flops"] for peak in run["peaks"]}
        lines += [
            f"* {row['row']} x{row['threads']}: {sentence(row['bounds'], peaks[row['threads']])}" for row in short
        ]
    reasons: dict[str, list[str]] = {}
    for row in run["rows"]:
        for name, reason in row["refused"].items():
            reasons.setdefault(f"{name}: {reason}", []).append(f"{row['row']} x{row['batch']}")
    if reasons:
        lines += ["", "NOT TIMED:", ""]
        lines += [f"* {reason} ({', '.join(dict.fromkeys(names))})" for reason, names in reasons.items()]
    alone = "One row alone: `python -m bench.peers --rows 's1-224x224-network' --batch 1 --output FOLDER`."
    return "\n".join([*lines, "", alone, ""])


def _peak(peak: dict[str, Any]) -> str:
    threads = f"{peak['threads']} thread" + "s" * (peak["threads"] != 1)
    product = f"torch.mm does {peak['matrix_product'] / 1e9:.0f}"
    return f"{threads}: {peak['flops'] / 1e9:.0f} GFLOP/s by {peak['source']} ({product})"


def _cells(row: dict[str, Any], engines: list[str]) -> list[str]:
    verdict = judge(row)

    def time(engine: str) -> str:
        seconds = figure_of(row, engine, "seconds")
        return "NOT TIMED" if seconds is None else f"{duration(seconds)} {row['fastest'][engine]}"

    return [
        row["row"],
        str(row["batch"]),
        str(row["threads"]),
        *map(time, engines),
        verdict.best or "-",
        _share(verdict.of_best),
        _share(verdict.of_floor),
        str(goal_of(row["kind"], row["dtype"])),
        str(verdict),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


COLORS = {
    "eager": "#0b5394",
    "compile": "#b45f06",
    "onnxruntime": "#38761d",
    "openvino": "#741b47",
    "ncnn": "#f1a208",
    "litert": "#45818e",
    "floor": "#7f7f7f",
}


def picture(run: dict[str, Any], path: Path) -> None:
    """Writes the chart: for each row the times of all engines in multiples of ours, its goal and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown = [row for row in run["rows"] if OURS in row["fastest"]]
    if not shown:
        return
    figure, axis = pyplot.subplots(figsize=(10.5, 0.3 * len(shown) + 2.6), layout="constrained")
    every = [1.0]
    for i, row in enumerate(shown):
        verdict, goal = judge(row), goal_of(row["kind"], row["dtype"])
        ours = figure_of(row, OURS, "seconds")
        ratios = {engine: 1 / ratio for engine, ratio in row["over"].items()} | {"floor": row["floor"] / ours}
        every += [*ratios.values(), 1 / goal.of_best]
        for engine, ratio in ratios.items():
            marker = "|" if engine == "floor" else "o"
            axis.plot(ratio, i, marker, color=COLORS[engine], markersize=12 if engine == "floor" else 6)
        # The best engine is to be right of this mark, or the floor right of its own.
        axis.plot(1 / goal.of_best, i, ">", color="black", markersize=7, fillstyle="none")
        said = f"{_share(verdict.of_best)} of {verdict.best}, {_share(verdict.of_floor)} of floor, {verdict}"
        colour = "#38761d" if verdict.reached else "#cc0000"
        axis.annotate(said, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour)
    axis.axvline(1, color="black", linewidth=1.2)
    axis.set_xscale("log")
    limits = min(every) * 0.85, max(every) * 1.15
    axis.set_xlim(limits)
    ticks = [tick for tick in (2.0**power for power in range(-6, 8)) if limits[0] <= tick <= limits[1]]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_locator(NullLocator())
    labels = [f"{row['row'].removesuffix('-network')}, batch {row['batch']}, x{row['threads']}" for row in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.grid(axis="both", linewidth=0.4, alpha=0.5)
    present = [name for name in COLORS if name == "floor" or any(name in row["over"] for row in shown)]
    legend = [
        Line2D([], [], color=COLORS[name], marker="|" if name == "floor" else "o", linestyle="", label=name)
        for name in present
    ]
    legend.append(
        Line2D([], [], color="black", marker=">", linestyle="", fillstyle="none", label="goal: best engine here")
    )
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    figure.suptitle(
        f"Time of each engine over ours, {run['dtype']} (right of 1x: we are faster)\n{headline(run)}", fontsize=10
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
