"""The tables of the paper, every figure that needs no training measured on the networks of this project."""

from __future__ import annotations

from collections.abc import Callable

from espkernels.models.paper.classification import table_2, table_5, table_6
from espkernels.models.paper.convolutions import table_1
from espkernels.models.paper.printed import Row, Table
from espkernels.models.paper.tasks import figure_7, table_3, table_4

__all__ = ["TABLES", "Row", "Table"]

# In the order of the paper.
TABLES: dict[str, Callable[[], Table]] = {
    "table1": table_1,
    "table2": table_2,
    "figure7": figure_7,
    "table3": table_3,
    "table4": table_4,
    "table5": table_5,
    "table6": table_6,
}
