"""How the reports write times, sizes and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["amount", "duration", "markdown_table"]


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def amount(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def markdown_table(columns: Sequence[tuple[str, str]], cells: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; ``columns`` are names and "left" or "right"."""
    return [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + "|".join("---:" if justify == "right" else ":---" for _, justify in columns) + "|",
        *("| " + " | ".join(line) + " |" for line in cells),
    ]
