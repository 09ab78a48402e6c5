"""The chart of :mod:`bench.training`: the time of a step against the memory that its forward pass keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.engines import OURS
from bench.race import figure_of
from bench.report import headline
from bench.training_report import GOALS, TRAINERS

__all__ = ["picture"]

COLORS = dict(zip(TRAINERS, ("#cc0000", "#cc0000", "#f1a208", "#0b5394", "#b45f06", "#38761d"), strict=True))


def picture(run: dict[str, Any], path: Path) -> None:
    """Writes a panel for each row; down and left is better, and ours are to be in the shaded corner."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [row for row in run["rows"] if row["over"]]
    if not shown:
        return
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    drawing, axes = pyplot.subplots(
        lines, columns, figsize=(max(6.5, 4.2 * columns), 3.4 * lines + 1.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    present: dict[str, None] = {}
    for axis, row in zip(axes.flat, shown, strict=False):
        points = {
            name: (figure_of(row, name, "seconds") * 1e3, figure_of(row, name, "kept") / 2**20)
            for name in TRAINERS
            if figure_of(row, name, "kept") is not None
        }
        for name, (time, kept) in points.items():
            present[name] = None
            axis.plot(time, kept, "o" if name.startswith(OURS) else "s", color=COLORS[name], markersize=7)
        floor = row["floor"] * 1e3
        peers = [time for name, (time, _) in points.items() if not name.startswith(OURS)]
        axis.axvline(floor, color="#7f7f7f", linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0, 1.15 * max((kept for _, kept in points.values()), default=1.0))
        axis.set_xlim(floor * 0.8, 1.4 * max([floor, *(time for time, _ in points.values())]))
        if peers and "eager" in points:
            goal = GOALS[row["kind"]]
            axis.fill_between(
                [floor * 0.8, min(peers) / goal.faster],
                0,
                points["eager"][1] * goal.memory,
                color="#38761d",
                alpha=0.15,
            )
        axis.set_title(f"{row['row'].removesuffix('-network')}, batch {row['batch']}", fontsize=9, loc="left")
        axis.set_xlabel("milliseconds a step", fontsize=8)
        axis.set_ylabel("MiB kept", fontsize=8)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(linewidth=0.4, alpha=0.5)
    legend = [
        Line2D([], [], color=COLORS[name], marker="o" if name.startswith(OURS) else "s", linestyle="", label=name)
        for name in present
    ]
    legend += [
        Line2D([], [], color="#7f7f7f", linestyle=":", label="floor of multiply-adds"),
        Line2D([], [], color="#38761d", alpha=0.3, linewidth=8, label="goal"),
    ]
    drawing.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)), fontsize=9, frameon=False)
    drawing.suptitle(f"Training: time of a step against activations kept, float32\n{headline(run)}", fontsize=8)
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)
