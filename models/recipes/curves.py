"""Pictures of a run's epochs and of schedules (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espkernels.models.recipes.run_folder import write_atomically
from espkernels.models.recipes.schedules import Schedule

__all__ = ["draw_curves", "draw_schedules"]


def _figure(panels: int, width: float) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'espkernels[train]'") from error
    figure = Figure(figsize=(width * panels, 3.2), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """The rate, the loss and each score by epoch, a panel each, as a PNG."""
    names = [name for name in rows[0] if name not in ("epoch", "seconds")]
    figure, axes = _figure(len(names), 3.6)
    for axis, name in zip(axes, names, strict=True):
        axis.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker="." if len(rows) < 40 else "")
        axis.set(xlabel="epoch", title=name)
        axis.grid(alpha=0.3)
    _save(figure, path)


def draw_schedules(schedules: Mapping[str, Schedule], epochs: int, path: Path) -> None:
    """Rates by epoch, a line a schedule, as a PNG."""
    figure, (axis,) = _figure(1, 7.0)
    for name, schedule in schedules.items():
        axis.plot(range(epochs), [schedule(epoch) for epoch in range(epochs)], label=name, linewidth=1)
    axis.set(xlabel="epoch", ylabel="rate of learning")
    axis.legend()
    axis.grid(alpha=0.3)
    _save(figure, path)
