"""Prints the paper's tables beside what the networks here measure: parameters and multiply-adds, cell by cell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from espkernels.models.paper import TABLES, Table

if TYPE_CHECKING:
    from rich.table import Table as Grid

__all__ = ["add_arguments", "run"]

COLUMNS = ("", "quantity", "paper", "ours", "ours - paper", "agrees")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=list(TABLES), help="one table; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    parser.add_argument("--figure4", type=Path, metavar="FILE", help="no table: the schedules of Fig. 4, drawn as PNG")


def run(args: argparse.Namespace) -> int:
    """0 when the tables were printed, 2 when they could not be."""
    try:
        if args.figure4 is not None:
            return _draw_figure4(args.figure4)
        tables = _printed([build for name, build in TABLES.items() if name in (args.only or TABLES)])
        if args.json is not None:
            content = [
                {"title": table.title, "note": table.note, "rows": [row.as_dict() for row in table.rows]}
                for table in tables
            ]
            args.json.write_text(json.dumps(content, indent=2) + "\n")
    except (ImportError, OSError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    return 0


def _draw_figure4(path: Path) -> int:
    from espkernels.models.recipes import curves, schedules

    shown = {
        "equation 1": schedules.cyclic(),
        "as the released code runs it": schedules.cyclic(released=True),
        "steps of 30 epochs": schedules.steps(0.1),
        "fixed": schedules.fixed(0.1),
    }
    curves.draw_schedules(shown, 300, path)
    print(path)
    return 0


def _printed(builds: Sequence[Callable[[], Table]]) -> list[Table]:
    """The tables, each printed as soon as it is measured."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("the tables need rich: pip install 'espkernels[images]'") from error
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no edge to wrap at
    tables = []
    for build in builds:
        tables.append(build())
        console.print(_grid(tables[-1]))
    found = [row.agrees for table in tables for row in table.rows if row.agrees is not None]
    console.print(
        f"{found.count(True)} of {len(found)} cells measured here agree with the paper to less than one unit of its "
        "last digit. FLOPs are multiply-adds of convolutions. Scores need training, which this command does not do.",
        highlight=False,
    )
    return tables


def _grid(table: Table) -> Grid:
    from rich.table import Table as Grid

    grid = Grid(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
    for index, name in enumerate(COLUMNS):
        grid.add_column(name, justify="left" if index < 2 else "right")
    subject = ""
    for row in table.rows:
        word = {True: "yes", False: "no", None: "-"}[row.agrees]
        first = "" if row.subject == subject else row.subject
        cells = (first, row.quantity, row.paper, row.measured(), row.difference(), word)
        grid.add_row(*cells, style="red" if row.agrees is False else None)
        subject = row.subject
    return grid
