"""How the reports write tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(columns: Sequence[tuple[str, str]], cells: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; ``columns`` are names and "left" or "right"."""
    return [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + "|".join("---:" if justify == "right" else ":---" for _, justify in columns) + "|",
        *("| " + " | ".join(line) + " |" for line in cells),
    ]
