"""The tables of the paper: what is printed stands in the paper, and what is ours is measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from espkernels import models
from espkernels.__main__ import main
from espkernels.models.paper import TABLES, Row, Table, classification

TEXT = Path(__file__).parents[1] / ".." / "shared" / "spec" / "espnetv2_paper.txt"

# Of each table: a subject, a quantity, and the exact count of the official network or of a closed form.
EXACT = {
    "table1": ("group", "parameters", 9_216),
    "table2": ("s = 1.75", "parameters", 3_032_432),
    "table3": ("ESPNetv2-384, COCO", "FLOPs", 1_584.82e6),
    "table4": ("ERU, hidden 768", "parameters", 15_111_488),
    "table5": ("dilated (standard), s = 1.0", "FLOPs", 478.084e6),
    "table6": ("R2: HFF, fixed", "FLOPs", 84.333e6),
    "figure7": ("ESPNetv2-test, VOC 2012", "FLOPs", 759.13e6),
}


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    built = {name: build() for name, build in TABLES.items()}
    torch.set_num_threads(threads)
    return built


def test_every_figure_that_needs_no_training_is_measured_and_agrees(tables: dict[str, Table]):
    rows = [row for table in tables.values() for row in table.rows]
    for row in rows:
        scores = row.quantity in ("top-1", "mAP", "mIOU", "perplexity")
        others = row.reason == "not built here"
        assert (row.ours is None) == (scores or others), row
        assert row.paper
    # ESPNet's count agrees where transposed convolutions are left out; with them it is one that cannot.
    assert {row.quantity for row in rows if row.agrees is False} == {"FLOPs, transposed convolutions too"}


@pytest.mark.parametrize("name", TABLES)
def test_exact_counts(tables: dict[str, Table], name: str):
    subject, quantity, expected = EXACT[name]
    (row,) = [row for row in tables[name].rows if (row.subject, row.quantity) == (subject, quantity)]
    # Counts in the tables of the official networks end at the fifth or sixth digit.
    assert row.ours == pytest.approx(expected, rel=5e-6)


def test_sizes_and_channels_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classification, "espnetv2", lambda *_, **__: models.espnetv2(0.5, 10))
    monkeypatch.setattr(classification, "IMAGENET", (64, 64))
    monkeypatch.setattr(classification, "TABLE_2", classification.TABLE_2[-1:])
    rows = {(row.subject, row.quantity): row for row in classification.table_2().rows}
    assert rows["all", "output sizes"].ours == "32 16 8 8 4 4 2 2 2 2 1"
    assert rows["s = 2.0", "output channels"].ours == "16 32 64 64 128 128 256 256 256 1024 10"
    assert not any(row.agrees for (_, quantity), row in rows.items() if quantity == "FLOPs")


@pytest.mark.skipif(not TEXT.is_file(), reason="../shared/spec is not there")
def test_what_is_printed_stands_in_the_paper(tables: dict[str, Table]):
    text = TEXT.read_text()
    for name, table in tables.items():
        for row in table.rows:
            if name == "table1" or (re.fullmatch(r"[\d ]+", row.paper) and " " in row.paper):
                continue  # formulas with numbers put in, and columns that the text has line by line
            assert re.search(rf"(?<![\d.]){re.escape(row.paper)}(?![\d.]*\d)", text), row


@pytest.mark.parametrize(
    ("row", "agrees", "measured", "difference"),
    [
        (Row("", "", "28 M", 28_376_000), True, "28.376 M", "+0.376 M"),
        (Row("", "", "28 M", 27_000_000), False, "27.000 M", "-1.000 M"),
        (Row("", "", "0.76 B", 0.7591e9), True, "0.759 B", "-0.001 B"),
        (Row("", "", "0.76 B", 0.7501e9), True, "0.750 B", "-0.010 B"),
        (Row("", "", "0.76 B", 0.7699e9), True, "0.770 B", "+0.010 B"),
        (Row("", "", "0.76 B", 0.7701e9), False, "0.770 B", "+0.010 B"),
        (Row("", "", "36,864 (n^2)", 36_865), False, "36,865", "+1"),
        (Row("", "", "36,864 (n^2)", 36_864), True, "36,864", "none"),
        (Row("", "", "7x", 50 / 7), True, "7.143", "+0.143"),
        (Row("", "", "3 x 3", "3 x 3"), True, "3 x 3", "none"),
        (Row("", "", "3 x 3", "5 x 5"), False, "5 x 5", "differs"),
        (Row("", "", "66.1"), None, "not trained here", "-"),
    ],
)
def test_how_a_figure_is_set_beside_the_papers(row: Row, agrees: bool | None, measured: str, difference: str):
    assert (row.agrees, row.measured(), row.difference()) == (agrees, measured, difference)


def test_a_number_beside_no_number_is_refused():
    with pytest.raises(ValueError, match=r"paper: 'many' does not begin with a number, but ours is 3"):
        Row("", "", "many", 3).measured()


def test_the_command_prints_the_tables_asked_for_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["paper", "--only", "table1", "--only", "table6", "--json", str(tmp_path / "paper.json")]) == 0
    printed = capsys.readouterr().out
    assert "Table 1: convolutions" in printed
    assert re.search(r"R1.*1\.66 M.*1\.665 M.*\+0\.005 M.*yes", printed)
    assert "19 of 19 cells measured here agree" in printed
    assert "Table 2" not in printed
    content = json.loads((tmp_path / "paper.json").read_text())
    assert [table["title"][:7] for table in content] == ["Table 1", "Table 6"]
    assert content[1]["rows"][2] == {
        "subject": "R1: neither HFF nor LRSC, fixed",
        "quantity": "top-1",
        "paper": "58.94",
        "ours": None,
        "agrees": None,
        "reason": "not trained here",
    }


def test_the_command_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["paper", "--only", "table1"]) == 2
    assert "espkernels[images]" in capsys.readouterr().err
