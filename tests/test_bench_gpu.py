"""The comparison on a GPU as far as it goes without one: on the CPU's clock, and on stand-ins for streams."""

from __future__ import annotations

import functools
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bench.providers as operators
from bench import gpu, gpu_engines, gpu_report
from bench.cases import matching
from bench.gpu import Row, measured
from bench.gpu_engines import ENGINES, RACES, Engine
from bench.gpu_tasks import Gradients, Inference, Training
from bench.layers import unit
from espkernels import backends
from espkernels.models import plain
from espkernels.quantities import duration

(CASE,) = matching(["s0.5-224x224-level4"])
SHAPE = (3, CASE.in_channels, CASE.height, CASE.width)

needs_library = pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")


def row(kind: str, task: Any) -> Row:
    return Row("tiny", kind, SHAPE[0], "float32", task)


def inference(dtype: torch.dtype = torch.float32) -> Any:
    return functools.partial(Inference, functools.partial(unit, CASE), SHAPE, dtype)


def soon() -> float:
    return time.monotonic() + 600


@needs_library
def test_a_race_of_a_unit() -> None:
    found = measured(row("unit", inference()), "eager", "cpu", soon(), seconds=0.01)
    timed = {name for name, engine in found["engines"].items() if "seconds" in engine}
    # What needs a stream of a device says so.
    assert timed == {"ours", "eager contiguous", "eager channels_last"}
    assert set(found["engines"]) - timed == {
        "ours graph", *(name for name in RACES["eager"] if "graph" in name or "streams" in name)
    }  # fmt: skip
    assert all(found["engines"][name]["refused"] for name in set(found["engines"]) - timed)
    assert found["best of ours"] == "ours" and set(found["speedup"]) == timed - {"ours"}
    assert found["bytes"] == 2 * 3 * CASE.in_channels * CASE.height * CASE.width * 4


@needs_library
def test_a_race_of_gradients() -> None:
    case = matching(["s0.5-224x224-level5"])[0].with_batch(2)
    for make in (operators.spatial_pyramid, operators.expand):
        task = functools.partial(Gradients, make, case, torch.float32)
        found = measured(row("operator", task), "eager", "cpu", soon(), seconds=0.01)
        assert set(found["speedup"]) == {"eager contiguous", "eager channels_last"}, found


@needs_library
def test_a_race_of_training() -> None:
    task = functools.partial(Training, functools.partial(unit, CASE), SHAPE, torch.float32)
    found = measured(row("training", task), "eager", "cpu", soon(), seconds=0.01)
    ours, peers = {"ours save", "ours recompute"}, {"eager contiguous", "eager channels_last"}
    assert set(found["engines"]) == ours | peers and set(found["speedup"]) == peers, found
    assert found["bytes"] == 4 * 3 * CASE.in_channels * CASE.height * CASE.width * 4
    kept = {name: engine["kept"] for name, engine in found["engines"].items()}
    assert kept["ours recompute"] < kept["ours save"] < min(kept[peer] for peer in peers)


def test_wrong_results_and_late_engines_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> Any:
        return lambda x: model(x) * 1.01

    monkeypatch.setitem(gpu_engines.ENGINES, "eager contiguous", Engine(wrong))
    found = measured(row("unit", inference()), "eager", "cpu", soon(), seconds=0.01)
    assert "off by 0.01" in found["engines"]["eager contiguous"]["refused"]
    late = measured(row("unit", inference()), "eager", "cpu", time.monotonic() - 1)
    assert {engine["refused"] for engine in late["engines"].values()} == {gpu_report.NO_TIME}
    assert not late["speedup"] and not gpu_report.failed(late)
    over = list(gpu.results([row("unit", inference())], "cpu", time.monotonic() - 1))
    assert [one["refused"] for one in over] == [gpu_report.NO_TIME] * 2


def test_every_row_can_be_made_and_ours_is_in_every_race() -> None:
    assert {one.kind for one in gpu.rows()} == {"unit", "network", "operator", "training"}
    assert [one.batch for one in gpu.rows(["*-network"])] == [1, 32, 512, 8, 128]
    assert set(RACES) == {"eager", "compile"} and len(ENGINES) == 2 + sum(map(len, RACES.values()))


def test_branches_on_streams_give_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: order.append(f"{name} waits for {other.name}"))

    names = iter("abcdefgh")
    here = stream("here")
    stand_in = SimpleNamespace(
        Stream=lambda: stream(next(names)), current_stream=lambda: here, stream=lambda s: nullcontext()
    )
    monkeypatch.setattr(gpu_engines, "cuda", stand_in)
    for hff in (True, False):
        torch.manual_seed(0)
        names, model = iter("abcdefgh"), nn.Sequential(plain.EESP(16, 16, 1, 4, 9, "esp", hff=hff)).eval()
        x = torch.randn(2, 16, 9, 8)
        expected = model(x)
        order.clear()
        assert torch.equal(gpu_engines._on_streams(model)(x), expected)
        # Each waits for the map that it reads, and the sums for each of them.
        assert order == [*(f"{s} waits for here" for s in "abcd"), *(f"here waits for {s}" for s in "abcd")]


def fabricated() -> dict[str, Any]:
    def engines(seconds: dict[str, float]) -> dict[str, Any]:
        return {name: {"seconds": s, "peak": 2**20, "joules": 0.5} for name, s in seconds.items()}

    def one(name: str, kind: str, batch: int, race: str, bytes: int, seconds: dict[str, float]) -> dict[str, Any]:
        best = min((n for n in seconds if n.startswith("ours")), key=lambda n: seconds[n])
        return {
            "row": name, "kind": kind, "batch": batch, "dtype": "bfloat16", "race": race, "bytes": bytes,
            "engines": engines(seconds), "best of ours": best,
            "speedup": {n: s / seconds[best] for n, s in seconds.items() if not n.startswith("ours")},
        }  # fmt: skip

    rows = [
        one("u", "unit", 256, "eager", 10**9, {"ours": 2e-3, "ours graph": 1e-3, "eager a": 8e-3, "eager b": 7e-3}),
        one("u", "unit", 256, "compile", 10**9, {"ours": 2e-3, "ours graph": 1e-3, "max-autotune a": 0.5e-3}),
        one("n", "network", 1, "eager", 10**6, {"ours": 3e-4, "ours graph": 1e-4, "streams a": 2e-3}),
    ]
    step = one("u", "training", 32, "compile", 10**9, {"ours save": 3e-3, "ours recompute": 2e-3, "compile a": 4e-3})
    eager = one("u", "training", 32, "eager", 10**9, {"ours save": 3e-3, "ours recompute": 2e-3, "eager a": 2e-2})
    step["engines"]["ours save"]["kept"], eager["engines"]["eager a"]["kept"] = 3 * 2**20, 8 * 2**20
    step["engines"]["ours recompute"]["kept"] = 2 * 2**20
    rows += [step, eager]
    rows[0]["engines"]["streams a"] = {"refused": "OutOfMemoryError: too large"}
    rows.append({"row": "n", "kind": "network", "batch": 1, "race": "compile", "refused": gpu_report.NO_TIME})
    versions = {"versions": {"torch": "2.13.0", "espkernels": "0.1.0"}}
    return {"device": "A GPU", "date": "2026-11-28", "espkernels": versions, "copy bandwidth": 2e12, "rows": rows}


def test_the_report(tmp_path: Path) -> None:
    run = fabricated()
    gpu_report.write(run, tmp_path / "a-gpu")
    text = (tmp_path / "a-gpu.md").read_text()
    # 10^9 bytes in 1 ms of the 2 * 10^12 a second of a copy.
    assert "| u | 256 | 1.00 ms | ours graph | 7.00x | - | - | **0.50x** | 256000 | 50% |" in text
    assert "unit: at least 6x eager: 1 of 1 rows; least 7.00x" in text
    assert "unit: at least 3x max-autotune: 0 of 1 rows; least 0.50x" in text
    assert "operator: at least 2x compile: not measured" in text
    assert "training: at least 2.5x compile: 0 of 1 rows; least 2.00x" in text
    assert "at most a third of what eager keeps for the backward pass: 1 of 1 rows; most 25%" in text
    assert "within 1.3x of one read and one write: 0 of 1 rows; most 2.00x" in text
    assert f"under {duration(150e-6)}: {duration(100e-6)}" in text
    assert "NOT TIMED u, batch 256, streams a: OutOfMemoryError: too large" in text
    assert "NOT TIMED n, batch 1, compile race: no time was left" in text
    assert (tmp_path / "a-gpu.png").stat().st_size > 10_000
    assert not any(map(gpu_report.failed, run["rows"]))
    run["rows"][0]["engines"]["ours"] = {"refused": "WrongResult: off"}
    assert gpu_report.failed(run["rows"][0])
    assert "1.00 ms" in gpu_report.line(run["rows"][1]) and gpu_report.NO_TIME in gpu_report.line(run["rows"][5])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: bench/bench_gpu.py runs the comparison itself")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no GPU here" in capsys.readouterr().err
