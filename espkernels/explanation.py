"""What :func:`espkernels.explain` found: a table by layer, as text, as plain values and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from espkernels.probe import Ceilings
from espkernels.quantities import amount, duration

__all__ = ["Explanation", "Row"]


@dataclass(frozen=True)
class Row:
    """One layer, or one kernel of a layer that runs several.

    ``layer`` is the name of a module, "" the model's own code; ``kind`` the module's class; ``runs_on`` an instruction
    set of this library, or "torch". ``moved`` are the bytes of all maps that its kernels read and write and of their
    weights, ``ideal`` those that one kernel for the whole layer could not do without: weights, maps that come in and
    maps that go out, each once. ``least_moving`` and ``least_computing`` are the seconds that ``ideal`` and
    ``multiply_adds`` take at this machine's ceilings. None stands for what is not known.
    """

    layer: str
    kind: str
    kernel: str
    runs_on: str
    seconds: float
    multiply_adds: int | None = None
    moved: int | None = None
    ideal: int | None = None
    least_moving: float | None = None
    least_computing: float | None = None
    kernels: tuple[Row, ...] = ()

    @property
    def flops_per_second(self) -> float | None:
        """Two operations a multiply-add."""
        return None if self.multiply_adds is None else 2 * self.multiply_adds / self.seconds

    @property
    def least_seconds(self) -> float | None:
        """The time that the slower of the two ceilings allows."""
        if self.least_moving is None or self.least_computing is None:
            return None
        return max(self.least_moving, self.least_computing)

    @property
    def share_of_roof(self) -> float | None:
        """1 is as fast as the ceilings allow.

        They are what torch reaches here when they are measured: a busier machine then, or a kernel that gets more out
        of this one than a large matrix product or a copy does, gives more than 1.
        """
        return None if self.least_seconds is None else self.least_seconds / self.seconds

    @property
    def bound(self) -> str | None:
        """Which ceiling is the slower one: "bytes" or "arithmetic"."""
        if self.least_moving is None or self.least_computing is None:
            return None
        return "bytes" if self.least_moving >= self.least_computing else "arithmetic"

    def as_dict(self, total: float) -> dict[str, Any]:
        """Plain values for JSON; ``share`` is that of ``total`` seconds."""
        return {
            "layer": self.layer,
            "kind": self.kind,
            "kernel": self.kernel,
            "runs_on": self.runs_on,
            "seconds": self.seconds,
            "share": self.seconds / total,
            "multiply_adds": self.multiply_adds,
            "bytes_moved": self.moved,
            "bytes_ideal": self.ideal,
            "flops_per_second": self.flops_per_second,
            "share_of_roof": self.share_of_roof,
            "bound": self.bound,
            "kernels": [kernel.as_dict(total) for kernel in self.kernels],
        }


@dataclass(frozen=True)
class Explanation:
    """Layers in the order they run. ``refusal`` says why the model is not replayed, "" where it is.

    ``whole_seconds`` is the median of a whole call, which the rows' sum differs from by what happens between kernels,
    and by the clock. ``ceilings`` are None where no roof applies.
    """

    model: str
    sample: str
    threads: int
    instruction_set: str
    refusal: str
    notes: tuple[str, ...]
    whole_seconds: float
    rows: tuple[Row, ...]
    ceilings: Ceilings | None = None

    @property
    def seconds(self) -> float:
        """The sum of the rows."""
        return sum(row.seconds for row in self.rows)

    @property
    def multiply_adds(self) -> int | None:
        """Of all kernels, pooling and linear layers too, which :func:`espkernels.models.count` leaves out."""
        return _sum(row.multiply_adds for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of plain values, ready for JSON."""
        ceilings = self.ceilings
        return {
            "model": self.model,
            "sample": self.sample,
            "threads": self.threads,
            "instruction_set": self.instruction_set,
            "replayed": not self.refusal,
            "refusal": self.refusal,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "whole_seconds": self.whole_seconds,
            "multiply_adds": self.multiply_adds,
            "ceilings": ceilings
            and {**ceilings.as_dict(), "bandwidth": {str(n): rate for n, rate in ceilings.bandwidth.items()}},
            "rows": [row.as_dict(self.seconds) for row in self.rows],
        }

    def __str__(self) -> str:
        table = [HEADS, *self._lines()]
        widths = [max(len(line[i]) for line in table) for i in range(len(HEADS))]
        kept = [i for i in range(len(HEADS)) if any(line[i] not in ("", "-") for line in table[1:])]
        lines = [
            "  ".join(line[i].ljust(widths[i]) if i < _LEFT else line[i].rjust(widths[i]) for i in kept).rstrip()
            for line in table
        ]
        return "\n".join([*self._facts(), "", *lines])

    def _facts(self) -> Iterator[str]:
        yield f"{self.model}, {self.sample}, {self.threads} thread{'s' * (self.threads != 1)}, {self.instruction_set}"
        if self.refusal:
            yield f"not replayed: {self.refusal}"
        calls = f"{duration(self.whole_seconds)} a call; the rows add up to {duration(self.seconds)}"
        yield calls if self.refusal else f"replayed: {calls}"
        yield from self.notes
        if self.ceilings:
            yield f"ceilings of {self.ceilings}"
        if any((row.share_of_roof or 0) > 1 for row in self.rows):
            yield "rows above 100% of the roof did more than the probe reached: no ceiling is proven by it"

    def _lines(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            yield self._cells(row)
            for kernel in row.kernels:
                yield ("", "", *self._cells(kernel)[2:])
        yield self._cells(self._total())

    def _total(self) -> Row:
        rows = self.rows
        least = _sum(row.least_seconds for row in rows)
        return Row(
            "total",
            "",
            "",
            "",
            self.seconds,
            self.multiply_adds,
            _sum(row.moved for row in rows),
            _sum(row.ideal for row in rows),
            least,
            least,
        )

    def _cells(self, row: Row) -> tuple[str, ...]:
        def text(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        rate = row.flops_per_second
        return (
            row.layer or OWN_CODE,
            row.kind,
            f"{len(row.kernels)} kernels" if row.kernels else row.kernel,
            row.runs_on,
            duration(row.seconds),
            f"{row.seconds / self.seconds:.1%}",
            "-" if row.moved is None else amount(row.moved),
            f"{row.moved / row.ideal:.2f}x" if row.moved and row.ideal else "-",
            text(rate and rate / 1e9, ".1f"),
            text(row.share_of_roof, ".0%"),
            (row.bound or "-") if row.kernel else "",
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a picture: a bar of time for each layer, with the part that the ceilings ask for in a dark colour.

        The ending of ``path`` chooses the format, as matplotlib knows them. Raises ImportError without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError("the picture needs matplotlib: pip install 'espkernels[bench]'") from error
        figure = Figure(figsize=(11, 1.8 + 0.24 * len(self.rows)), layout="constrained")
        axis = figure.add_subplot()
        for i, row in enumerate(self.rows):
            least = min(row.least_seconds or 0.0, row.seconds)
            axis.barh(i, row.seconds * 1e6, color=COLORS[row.bound][0])
            axis.barh(i, least * 1e6, color=COLORS[row.bound][1])
            roof = "" if row.share_of_roof is None else f", {row.share_of_roof:.0%} of roof"
            axis.text(row.seconds * 1e6, i, f" {row.seconds / self.seconds:.1%}{roof}", va="center", fontsize=7)
        labels = [f"{row.layer or OWN_CODE}: {row.kernel}" for row in self.rows]
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.margins(x=0.15)
        axis.set_xlabel("microseconds")
        axis.grid(axis="x", linewidth=0.4, alpha=0.5)
        axis.set_axisbelow(True)
        axis.set_title("\n".join(self._facts()), fontsize=8, loc="left", wrap=True)
        shown = [bound for bound in COLORS if bound and any(row.bound == bound for row in self.rows)]
        handles = [Patch(color=COLORS[bound][1], label=f"what the ceiling of {bound} asks for") for bound in shown]
        if handles:
            figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=110)


OWN_CODE = "(model)"
HEADS = (
    "layer", "kind", "kernel", "runs on", "time", "share", "moved", "/ ideal", "GFLOP/s", "of roof", "bound by",
)  # fmt: skip
# The first columns are text.
_LEFT = 4
# Of the time, and of the part of it that is needed, by what the layer is bound by.
COLORS = {"bytes": ("#a9c4e4", "#0b5394"), "arithmetic": ("#f0cfa0", "#b45f06"), None: ("#b7b7b7", "#666666")}


def _sum(values: Iterator[Any]) -> Any:
    """None where one of them is not known."""
    found = list(values)
    return None if None in found else sum(found)
