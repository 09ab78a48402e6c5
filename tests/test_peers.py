"""The comparison with other engines: every engine on a small model, wrong ones refused, goals by hand, reports."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espkernels.info
from bench import engines, fma_peak, language, layers, onnx_export, peers, peers_report, race, training
from bench.bounds import bounds
from bench.cases import Case
from bench.comparison import LAYOUTS, Provider, WrongResult
from bench.engines import ENGINES, OURS
from bench.fma_peak import Peak
from bench.peers_report import Goal, judge
from bench.worker import Lost, Refused, Worker
from espkernels import backends, models

ROOT = Path(__file__).resolve().parent.parent
SMALL = Case("small", 16, 16, (1, 1, 2, 3), 1, 6, 5)
WAYS = [(name, way) for name, engine in ENGINES.items() for way in engine.ways]


def _task(batch: int, dtype: torch.dtype = torch.float32) -> layers.Task:
    return layers.Task(functools.partial(layers.unit, SMALL), (batch, 16, 6, 5), dtype, "forward")


def _needs(engine: str) -> None:
    reason = engines.why_not(engine)
    if reason is not None:
        pytest.skip(f"{engine}: {reason}")


@pytest.fixture
def files(tmp_path: Path) -> tuple[layers.Task, Path]:
    task = _task(2)
    race.saved(task, tmp_path)
    return task, tmp_path


# --- engines


@pytest.mark.parametrize(("engine", "way"), [one for one in WAYS if one[0] != "compile"])
def test_engine_runs_a_batch_in_its_own_process(engine: str, way: str, files: tuple[layers.Task, Path]) -> None:
    _needs(engine)
    task, folder = files
    worker = Worker(engine, folder / "log")
    try:
        results = worker.open(folder, 1, way, 120)
        task.check(Provider(engine, way), results)
        assert 0 < worker.time(3) < 10
        # It sleeps while others are timed, whatever its threads would like to do.
        assert _state(worker.process.pid) == "T"
        task.check(Provider(engine, way), worker.open(folder, 1, way, 120))
    finally:
        worker.close()


@pytest.mark.parametrize(("engine", "way"), [one for one in WAYS if one[0] != "compile"])
def test_engine_computes_in_bfloat16_or_says_why_not(engine: str, way: str, tmp_path: Path) -> None:
    _needs(engine)
    task = _task(2, torch.bfloat16)
    race.saved(task, tmp_path)
    worker = Worker(engine, tmp_path / "log")
    try:
        if engine in ("onnxruntime", "ncnn", "litert"):
            with pytest.raises(Refused, match="bfloat16"):
                worker.open(tmp_path, 1, way, 120)
            return
        results = worker.open(tmp_path, 1, way, 120)
        task.check(Provider(engine, way), results)
        if engine == OURS:  # others may have kept some of it in float32, which is no mistake
            assert torch.equal(results[0], results[0].bfloat16().float())
    finally:
        worker.close()


@pytest.mark.slow
def test_compiled_model_is_right(files: tuple[layers.Task, Path]) -> None:
    task, folder = files
    worker = Worker("compile", folder / "log")
    try:
        task.check(Provider("compile", "contiguous"), worker.open(folder, 1, "contiguous", 300))
    finally:
        worker.close()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("engine", [OURS, "onnxruntime", "openvino", "ncnn", "litert"])
def test_engine_runs_the_segmentation_network(engine: str, tmp_path: Path) -> None:
    """Its adaptive poolings, channel shuffle and resizing are what converters trip over."""
    _needs(engine)
    task = layers.Task(functools.partial(layers.segmentation, 0.5, 5), (1, 3, 96, 64), torch.float32, "forward")
    race.saved(task, tmp_path)
    way = ENGINES[engine].ways_of(1)[0]
    worker = Worker(engine, tmp_path / "log")
    try:
        with espkernels.use_backend("reference"):
            task.check(Provider(engine, way), worker.open(tmp_path, 1, way, 120))
    finally:
        worker.close()


def test_missing_engine_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "ncnn", engines.Engine(("images",), ("surely_not_installed",), engines._ncnn))
    reason = engines.why_not("ncnn")
    assert reason is not None
    assert "surely_not_installed not found" in reason
    assert "make peers" in reason
    row = next(row for row in peers.ROWS if row.kind == "unit")
    providers, refused = peers.Selection().providers(row, 1)
    assert refused["ncnn"] == reason
    assert all(provider.implementation != "ncnn" for provider in providers)
    assert {provider.implementation for provider in providers} >= {OURS, "eager", "compile"}


def test_one_image_is_no_batch() -> None:
    assert ENGINES["ncnn"].ways_of(1) == ("images",)
    assert ENGINES["ncnn"].ways_of(2) == ("batch", "images")
    assert ENGINES[OURS].ways_of(1) == ENGINES[OURS].ways_of(2) == ("contiguous", "channels_last")


def test_model_that_cannot_be_opened_is_refused_and_the_next_one_is_not(files: tuple[layers.Task, Path]) -> None:
    task, folder = files
    worker = Worker("eager", folder / "log")
    try:
        with pytest.raises(Refused, match="FileNotFoundError"):
            worker.open(folder / "nowhere", 1, "contiguous", 60)
        task.check(Provider("eager", "contiguous"), worker.open(folder, 1, "contiguous", 60))
    finally:
        worker.close()


def test_dead_or_silent_process_is_lost(files: tuple[layers.Task, Path]) -> None:
    _, folder = files
    worker = Worker("eager", folder / "log")
    try:
        with pytest.raises(Lost, match="no answer within 0 s"):
            worker.open(folder, 1, "contiguous", 0)
    finally:
        worker.close()
    worker = Worker("eager", folder / "log")
    try:
        with pytest.raises(Lost, match="AssertionError"):
            worker.time(1)  # nothing is open: the call raises, the process lives
    finally:
        worker.close()
    worker = Worker("eager", folder / "log")
    try:
        worker.open(folder, 1, "contiguous", 60)
        worker.process.send_signal(signal.SIGKILL)
        with pytest.raises(Lost, match="died with status -9"):
            worker.time(1)
    finally:
        worker.close()


def test_stopped_process_does_not_outlive_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys, time; from bench.worker import Worker\n"
        "worker = Worker('eager', pathlib.Path(sys.argv[1]))\n"
        "try: worker.open(pathlib.Path('/nowhere'), 1, 'contiguous', 60)\n"
        "except Exception: print(worker.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    for _ in range(100):
        # Nobody may be there to reap it.
        if not Path(f"/proc/{pid}").exists() or _state(pid) == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


# --- wrong results


def test_wrong_engine_is_refused() -> None:
    task = _task(2)
    right = task.model(task.input).detach()
    task.check(Provider("ncnn", "images"), [right])
    for wrong in (right + 1e-3, right.flip(0), torch.full_like(right, float("nan"))):
        with pytest.raises(WrongResult, match="ncnn-images: off by"):
            task.check(Provider("ncnn", "images"), [wrong])
    with pytest.raises(WrongResult, match=r"shapes \[\(1, 16, 6, 5\)\]"):
        task.check(Provider("ncnn", "images"), [right[:1]])


# --- what is exported


@pytest.mark.parametrize(
    ("size", "target"), [((12, 9), (8, 6)), ((12, 8), (6, 4)), ((19, 23), (5, 5)), ((7, 5), (7, 3)), ((4, 4), (6, 6))]
)
def test_poolings_of_the_export_are_the_adaptive_ones(size: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x, target)
    # A window has at most a few dozen numbers of size one: sums in another order differ by some 1e-16 a step.
    torch.testing.assert_close(onnx_export.adaptive_avg_pool2d(x, target), expected, rtol=0, atol=1e-14)


def test_relu_twice_is_prelu() -> None:
    act = nn.PReLU(3)
    nn.init.normal_(act.weight)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(onnx_export.ReluTwice(act)(x), act(x))


# --- rows and goals


def test_rows_are_the_asked_ones() -> None:
    shapes = [row.shape for row in peers.ROWS]
    units = [(128, 28, 28), (256, 14, 14), (512, 7, 7), (256, 28, 28), (512, 14, 14), (1024, 7, 7), (128, 64, 128)]
    assert shapes[:3] == [(3, 224, 224)] * 3
    assert set(shapes[3:5]) == {(3, 512, 1024), (3, 384, 384)}
    assert shapes[5:7] == [(3, 256, 256), (3, 512, 512)]
    assert sorted(shapes[7:]) == sorted(units)
    assert len({row.name for row in peers.ROWS}) == len(peers.ROWS)
    chosen = peers.Selection(patterns=("s1-*",), batches=(2,), threads=(1,))
    assert next(row.name for row in chosen.rows()) == "s1-224x224-network"
    assert all(row.name.startswith("s1-") for row in chosen.rows())
    assert chosen.batches_of(peers.ROWS[0]) == (2,)
    assert chosen.thread_counts() == (1,)
    full = peers.Selection(full=True)
    assert full.rows() == peers.ROWS
    assert full.batches_of(peers.ROWS[0]) == (1, 8, 32)
    assert full.batches_of(peers.ROWS[-1]) == (1, 16)


def test_unknown_row_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--rows", "s9-*"]) == 2
    assert "s1-224x224-network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "of_best", "of_floor", "reached"),
    [
        (Goal(0.5, 1.35), 0.5, 9.0, True),
        (Goal(0.5, 1.35), 0.51, 9.0, False),
        (Goal(0.5, 1.35), 0.9, 1.35, True),
        (Goal(0.5, 1.35), None, 9.0, None),
        (Goal(0.5, 1.35), None, 1.2, True),
        (Goal(1 / 3), 0.33, 1.2, True),
        (Goal(1 / 3), 0.34, 1.2, False),
        (Goal(1 / 3), None, 1.2, None),
        (Goal(1 / 3), 0.2, None, None),
    ],
)
def test_goal_by_hand(goal: Goal, of_best: float | None, of_floor: float | None, reached: bool | None) -> None:
    assert goal.reached(of_best, of_floor) is reached


def _row(kind: str, ours: float, others: dict[str, float], floor: float, dtype: str = "float32") -> dict[str, Any]:
    times = {OURS: {"contiguous": ours, "channels_last": 2 * ours}} | {name: {"way": t} for name, t in others.items()}
    return {
        "row": "s1-224x224-network",
        "kind": kind,
        "dtype": dtype,
        "batch": 1,
        "threads": 2,
        "floor": floor,
        "engines": {name: {way: {"seconds": t} for way, t in ways.items()} for name, ways in times.items()},
        "fastest": {name: next(iter(ways)) for name, ways in times.items()},
        "over": {name: ours / t for name, t in others.items()},
        "refused": {"onnxruntime-relu": "off by 3"},
    }


def _bounds() -> list[dict[str, Any]]:
    first = dict(kernel="convolution", calls=2, seconds=3e-5, multiply_adds=1.5e6, bytes=6e4, share=0.75, roof=0.5)
    return [first, first | {"kernel": "few", "share": 0.05}]


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "datetime": "2026-11-24T10:00:00",
        "dtype": "float32",
        "machine_info": {"espkernels": espkernels.info.collect().as_dict()},
        "packages": {"ncnn": "1.0"},
        "peaks": [vars(Peak(2, 2e11, "a loop", 1e11))],
        "rows": [
            _row("classification", 1e-3, {"ncnn": 2e-3, "eager": 4e-3}, 2.5e-4),
            _row("unit", 2e-4, {"ncnn": 1e-4}, 1e-5) | {"bounds": _bounds()},
            _row("segmentation", 3e-2, {"ncnn": 6e-2}, 1e-2),
        ],
    }


def test_rows_are_judged(run: dict[str, Any]) -> None:
    first, second, third = map(judge, run["rows"])
    assert (first.best, first.of_best, first.of_floor, str(first)) == ("ncnn", 0.5, 4.0, "reached")
    assert (second.of_best, str(second)) == (2.0, "SLOWER than ncnn")
    assert (third.of_best, str(third)) == (0.5, "missed")
    # The engine that we gain least over, be its median the second.
    close = _row("classification", 1e-3, {"ncnn": 2e-3, "eager": 2.1e-3}, 1e-4)
    close["over"] = {"ncnn": 0.45, "eager": 0.55}
    assert (judge(close).best, judge(close).of_best) == ("eager", 0.55)
    alone = judge(_row("segmentation", 3e-2, {}, 1e-2))
    assert (alone.best, str(alone)) == (None, "not measured")
    # Within 1.35 of the floor, which is none of bfloat16.
    assert str(judge(_row("unit", 1e-4, {"ncnn": 1.1e-4}, 0.9e-4))) == "reached"
    assert str(judge(_row("unit", 1e-4, {"ncnn": 1.1e-4}, 0.9e-4, "bfloat16"))) == "missed"
    said = {text.partition(",")[0]: text.partition(": ")[2] for text in peers_report.verdicts(run)}
    assert said == {
        "classification": "1 of 1 rows reach it; another engine is faster in 0",
        "unit": "0 of 1 rows reach it; another engine is faster in 1",
        "segmentation": "0 of 1 rows reach it; another engine is faster in 0",
        "detection": "not measured",
    }


@pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
def test_bounds_add_up_to_the_replayed_kernels() -> None:
    model = models.espnetv2(0.5).eval()
    x = torch.randn(2, 3, 64, 64)
    found = bounds(model, x, 1)
    assert sum(one["share"] for one in found) == pytest.approx(1)
    assert [one["seconds"] for one in found] == sorted((one["seconds"] for one in found), reverse=True)
    frozen = espkernels.freeze(model)
    frozen(x[:1])
    (recorded,) = frozen.plans.values()
    assert sum(one["calls"] for one in found) == len(recorded.plan.steps())
    # No convolution is left out.
    assert sum(one["multiply_adds"] for one in found) >= models.count(model, (64, 64)).macs


@pytest.mark.skipif(backends.library is None, reason="the compiled library is not built")
def test_bounds_are_of_the_layout_that_was_given() -> None:
    task = layers.Task(lambda: torch.nn.Sequential(models.plain.EESP(16, 16)), (1, 16, 9, 8), torch.float32, "forward")
    kernels = {
        name: {one["kernel"] for one in bounds(*task.cast("eager", layout), 1)} for name, layout in LAYOUTS.items()
    }
    assert kernels["contiguous"] - kernels["channels_last"] == {"change_layout"}


@pytest.mark.parametrize("part", [["--rows", "s1-*"], ["--engines", "ncnn"], ["--batch", "1"], ["--threads", "1"]])
def test_a_part_of_the_rows_does_not_replace_the_results_of_all(part: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"--output: got .*results, whose results are of all rows"):
        peers.main(part)


def test_report_shows_losses_and_what_was_not_timed(run: dict[str, Any], tmp_path: Path) -> None:
    text = peers_report.markdown(run, "peers.png")
    assert "200 GFLOP/s by a loop (torch.mm does 100)" in text
    assert "SLOWER than ncnn" in text
    assert "* onnxruntime-relu: off by 3 (s1-224x224-network x1)" in text
    bounds = "2 calls, 30.0 us, 100 GFLOP/s, 50% of the peak, 2 GB/s, 50% of the roof"
    assert f"* s1-224x224-network x2: convolution 75% ({bounds})" in text
    assert "few" not in text
    lines = [line for line in text.splitlines() if line.startswith("| s1-")]
    assert len(lines) == 3
    assert "| 1.00 ms contiguous | 4.00 ms way | NOT TIMED |" in lines[0]
    assert "| ncnn | 0.50 | 4.00 | 0.50 of the best or 1.35 of the floor | reached |" in lines[0]
    assert "ours 1.00 ms (contiguous)" in peers_report.line(run["rows"][0])
    pytest.importorskip("matplotlib")
    peers_report.picture(run, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 5000


def test_peak_without_a_compiler_is_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "surely-no-compiler")
    found = fma_peak.peak.__wrapped__(1)
    assert found.flops == found.matrix_product
    assert "no C++ compiler" in found.source


def test_a_detector_is_one_result_of_all_its_numbers() -> None:
    model = layers.detection(0.5, 256, 21)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        offsets, logits = model.model(x)  # type: ignore[operator]
        torch.testing.assert_close(model(x), torch.cat([offsets.flatten(), logits.flatten()])[None], rtol=0, atol=0)


def test_rows_of_an_earlier_run_on_the_same_machine_stay(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"

    def run(machine: str, **peaks: int) -> dict[str, Any]:
        found = [{"threads": int(name[1:]), "flops": flops} for name, flops in peaks.items()]
        return {"machine_info": machine, "packages": {}, "peaks": found, "rows": []}

    def rows(**seconds: int) -> list[dict[str, Any]]:
        return [{"row": n, "batch": 1, "threads": 1, "flops": 60, "seconds": s} for n, s in seconds.items()]

    race.record(run("this", x1=10), rows(a=1, b=2), str, file)
    assert [row["floor"] for row in json.loads(file.read_text())["rows"]] == [6, 6]
    second = run("this", x2=7, x1=20)
    race.added_to(second, file)
    race.record(second, rows(b=3, c=4), str, file)
    third = run("this", x1=5)  # a busy hour
    race.added_to(third, file)
    race.record(third, rows(d=5), str, file)
    kept = json.loads(file.read_text())
    assert {row["row"]: row["seconds"] for row in kept["rows"]} == {"a": 1, "b": 3, "c": 4, "d": 5}
    assert {peak["threads"]: peak["flops"] for peak in kept["peaks"]} == {1: 20, 2: 7}
    assert [row["floor"] for row in kept["rows"]] == [3, 3, 3, 3]

    with pytest.raises(SystemExit, match="machine_info is this, and here that"):
        race.added_to(run("that", x1=1), file)
    assert json.loads(file.read_text()) == kept


def test_rows_are_added_to_an_earlier_run_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--add: .*peers\.json is not there, expected the results of an earlier run"):
        race.added_to({}, tmp_path / "peers.json")


def test_an_interrupted_write_loses_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "peers.json"
    rows = [{"row": name, "batch": 1, "threads": 1, "flops": 60} for name in "ab"]
    run: dict[str, Any] = {"peaks": [{"threads": 1, "flops": 10}], "rows": []}
    race.record(run, rows[:1], str, file)
    kept, whole = json.loads(file.read_text()), Path.write_text

    def half(path: Path, text: str) -> None:
        whole(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        race.record(run, rows[1:], str, file)
    assert json.loads(file.read_text()) == kept
    assert os.listdir(tmp_path) == ["peers.json"]


@pytest.mark.parametrize("main", [peers.main, training.main, language.main])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    main: Callable[[list[str]], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(race, "begun", measured)
    monkeypatch.setattr(language, "measured", measured)
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below", Path("/proc"), Path("/proc/x")):
        with pytest.raises(SystemExit, match=f"--output: got {folder}, expected a folder that can be made and written"):
            main(["--output", str(folder)])


def test_one_row_from_command_to_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = ["--rows=s1-224x224-level5", "--threads=1", "--batch=2", "--engines=eager", "--no-compile"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers", *chosen, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "peers.json").read_text())
    (row,) = results["rows"]
    assert set(row["engines"]) == {OURS, "eager"}
    assert row["batch"] == 2
    assert row["flops"] / row["floor"] == pytest.approx(results["peaks"][0]["flops"])
    for ways in row["engines"].values():
        assert set(ways) == {"contiguous", "channels_last"}
        assert all(len(way["samples"]) >= 5 for way in ways.values())
    assert "s1-224x224-level5" in (tmp_path / "peers.md").read_text()
    assert (tmp_path / "peers.png").stat().st_size > 5000
