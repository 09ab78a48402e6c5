"""A number as the paper prints it, beside what was measured here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["NOT_BUILT", "NOT_TRAINED", "Row", "Table"]

NOT_BUILT = "not built here"
NOT_TRAINED = "not trained here"
_UNITS = {"": 1.0, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Row:
    """One cell of a table: ``quantity`` of ``subject``, as the ``paper`` prints it and as measured here.

    ``ours`` is a number, compared with the one that ``paper`` begins with ("28 M", "36,864 (formula)"), or a text,
    which agrees where it is the same; None where nothing was measured, and ``reason`` then says why.
    """

    subject: str
    quantity: str
    paper: str
    ours: float | str | None = None
    reason: str = NOT_TRAINED

    @property
    def agrees(self) -> bool | None:
        """Whether ours is less than one unit of the paper's last digit away, since the paper rounds some numbers and
        cuts others; None where nothing was measured.
        """
        if self.ours is None:
            return None
        if isinstance(self.ours, str):
            return self.ours == self.paper
        value, unit_of_last_digit, _ = self._printed()
        return abs(self.ours - value) < unit_of_last_digit

    def measured(self) -> str:
        """Ours in the paper's unit with three decimals, whole numbers as they are, or why there is none."""
        if self.ours is None:
            return self.reason
        return self.ours if isinstance(self.ours, str) else self._in_unit(self.ours, "")

    def difference(self) -> str:
        """Ours less the paper's."""
        if self.ours is None:
            return "-"
        if isinstance(self.ours, str):
            return "none" if self.agrees else "differs"
        value, _, _ = self._printed()
        return "none" if self.ours == value else self._in_unit(self.ours - value, "+")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "subject": self.subject,
            "quantity": self.quantity,
            "paper": self.paper,
            "ours": self.ours,
            "agrees": self.agrees,
            "reason": self.reason if self.ours is None else "",
        }

    def _printed(self) -> tuple[float, float, str]:
        """The paper's number, one unit of its last digit, and the letter that stands for a power of ten."""
        found = re.match(r"([\d,]+)(?:\.(\d+))?x?(?: ([MB])\b)?", self.paper)
        if found is None:
            raise ValueError(f"paper: {self.paper!r} does not begin with a number, but ours is {self.ours}")
        whole, decimals, letter = found[1].replace(",", ""), found[2] or "", found[3] or ""
        return float(f"{whole}.{decimals or 0}") * _UNITS[letter], _UNITS[letter] / 10 ** len(decimals), letter

    def _in_unit(self, number: float, sign: str) -> str:
        letter = self._printed()[2]
        if not letter and number == int(number):
            return f"{int(number):{sign},}"
        return f"{number / _UNITS[letter]:{sign}.3f} {letter}".rstrip()


@dataclass(frozen=True)
class Table:
    """A table of the paper, cell by cell; ``note`` says what its figures rest on, where that is not plain."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""
