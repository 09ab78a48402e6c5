"""The benchmarks: shapes of the real networks, floors by hand, wrong results refused, samples in turn, reports."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espkernels
import espkernels.__main__
import espkernels.info
from bench import layers, memory, providers, report
from bench.cases import CASES, DEFAULT, IMAGES, SCALES, Case, check, matching, units, widths
from bench.comparison import Comparison, Provider, WrongResult, largest_error, measure, require_kernels
from bench.floor import Floor, operator_floor, operator_memory
from bench.interleave import Run, Samples, interleave
from bench.selection import Selection, Variant
from espkernels import backends, models, problem
from espkernels.commands import bench as command
from espkernels.probe import Ceilings, probe

ROOT = Path(__file__).resolve().parent.parent

# --- cases


def _units_of(model: nn.Module, size: tuple[int, int]) -> list[tuple[object, ...]]:
    """What reaches every EESP unit of a network, in order, seen from outside on the meta device."""
    seen: list[tuple[object, ...]] = []

    def watch(unit: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dilations = tuple(branch.conv.dilation[0] for branch in unit.spp_dw)
        seen.append((tuple(inputs[0].shape), tuple(output.shape), dilations, unit.spp_dw[0].conv.stride[0]))

    for module in model.modules():
        if isinstance(module, espkernels.nn.EESP):
            module.register_forward_hook(watch)
    with torch.no_grad(), espkernels.use_backend("reference"):
        model.to("meta").eval()(torch.empty(1, 3, *size, device="meta"))
    return seen


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("scale", SCALES)
def test_cases_are_the_units_of_the_networks(scale: float, image: str) -> None:
    height, width, last = IMAGES[image]
    with torch.device("meta"):
        classification = last == 5
        model = models.espnetv2(scale) if classification else models.espnetv2_segmentation(scale, 20)
    expected = _units_of(model, (height, width))
    listed = [
        (
            (1, case.in_channels, case.height, case.width),
            (1, case.out_channels, *case.output_size),
            case.dilations,
            case.stride,
        )
        for case in units(scale, image)
        for _ in range(case.repeats)
    ]
    assert listed == expected
    if classification:
        # Table 2 of the paper, by the network's own convolutions.
        assert widths(scale)[1:] == tuple(getattr(model, f"level{level}_0").act.num_parameters for level in range(2, 6))


def test_cases_are_distinct_and_complete() -> None:
    every = {case.shape for image in IMAGES for scale in SCALES for case in units(scale, image)}
    assert len(CASES) == len(every) == len({case.shape for case in CASES}) == len({case.name for case in CASES})
    assert {case.shape for case in CASES} == every
    assert set(DEFAULT) <= set(CASES)
    assert [case.name for case in DEFAULT if case.name.startswith("s1-")] == [
        case.name for case in units(1.0, "224x224")
    ]
    assert any(case.stride == 2 for case in DEFAULT)
    assert all(case.channels * case.k == case.out_channels for case in CASES)


def test_cases_are_chosen_by_name() -> None:
    assert [case.name for case in matching(["s2-384x384-level4"])] == ["s2-384x384-level4"]
    assert matching([]) == CASES
    assert matching(["s9-*"]) == ()
    check(["s1-*-level3", "s3-*-network"])
    with pytest.raises(ValueError, match=r"s9-.*fits none"):
        check(["s1-*", "s9-*"])
    case = CASES[0].with_batch(3)
    assert case.batch == 3
    assert str(case) == f"{CASES[0].name}-batch3"


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_unit_can_be_built_for_every_case(scale: float) -> None:
    for image in IMAGES:
        for case in units(scale, image):
            assert layers.unit(case)[0].dilations == case.dilations


# --- what runs


def test_default_is_part_of_full() -> None:
    threads = torch.get_num_threads()
    full = Selection(full=True)
    assert full.cases() == CASES
    every = set(full.variants(()))
    assert every == {
        Variant(mode, dtype, count, True)
        for mode in ("forward", "backward", "full")
        for dtype in ("float32", "bfloat16")
        for count in {1, threads}
    }


def test_selection_follows_what_is_asked() -> None:
    default = (Variant("forward", "float32", 2, True),)
    assert Selection().cases() == DEFAULT
    assert tuple(Selection().variants(default)) == default
    assert tuple(Selection(compile=False).variants(default)) == (Variant("forward", "float32", 2, False),)
    asked = Selection(patterns=("s1-224x224-level3",), modes=("full",), dtypes=("bfloat16",), threads=(1,), batch=2)
    assert [(case.name, case.batch) for case in asked.cases()] == [("s1-224x224-level3", 2)]
    assert tuple(asked.variants(default)) == (Variant("full", "bfloat16", 1, True),)


# --- floors and ceilings

SMALL = Case("small", 16, 16, (1, 1, 2, 3), 1, 6, 5)


def test_floor_by_hand() -> None:
    pyramid = providers.spatial_pyramid(SMALL, True)
    x, weight, output = 4 * 30, 4 * 4 * 9, 16 * 30
    assert operator_floor(pyramid, torch.float32, "forward") == Floor(4 * (x + weight + output), 2 * 9 * output)
    assert operator_floor(pyramid, torch.bfloat16, "backward") == Floor(2 * (output + 2 * (x + weight)), 4 * 9 * output)
    full = operator_floor(pyramid, torch.float32, "full")
    assert full == Floor(4 * (2 * output + 3 * (x + weight)), 6 * 9 * output)
    assert operator_memory(pyramid, torch.float32, "full") == 4 * 2 * (x + weight + output)

    # Groups of 4 of the 16 channels, for every pixel of the result.
    expand = providers.expand(SMALL, True)
    assert operator_floor(expand, torch.float32, "forward") == Floor(4 * (480 + 64 + 480), 2 * 30 * 16 * 4)


def test_floor_of_a_network_is_the_papers() -> None:
    task = layers.Task(functools.partial(layers.network, 1.0), (1, 3, 224, 224), torch.float32, "forward")
    assert round(task.floor().flops / 2e6, 2) == 85.72


@pytest.mark.parametrize(("mode", "maps", "parameters"), [("forward", 1, 1), ("training", 1, 2), ("inside", 2, 2)])
def test_bytes_of_a_strided_unit_by_hand(mode: str, maps: int, parameters: int) -> None:
    case = Case("small", 16, 32, (1, 1, 2, 3), 2, 6, 5)
    task = layers.Task(functools.partial(layers.unit, case), (2, 16, 6, 5), torch.float32, mode)
    counted = models.count(layers.unit(case), (6, 5), in_channels=16)
    values = maps * 2 * (16 * 30 + 32 * 9) + parameters * counted.parameters
    assert task.floor() == Floor(4 * values, 2 * 2 * counted.macs * (1 if mode == "forward" else 3))


def test_the_slower_ceiling_counts() -> None:
    ceilings = Ceilings(1, flops=1e9, bandwidth={1000: 4e9, 2000: 1e9})
    assert ceilings.least_seconds(900, 0) == pytest.approx(900 / 4e9)
    assert ceilings.least_seconds(1500, 0) == pytest.approx(1500 / 1e9)
    assert ceilings.least_seconds(5000, 0) == pytest.approx(5000 / 1e9)
    assert ceilings.least_seconds(900, 10**9) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_measures_this_machine(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    start = time.process_time()  # not the time that neighbours take
    found = probe(1, dtype)
    assert f"(torch.mm, {str(dtype).removeprefix('torch.')})" in str(found)
    assert time.process_time() - start < 30
    assert torch.get_num_threads() == before
    # Slower than a clock and faster than any machine would be a mistake of units.
    assert 1e8 < found.flops < 1e14
    assert all(1e8 < rate < 1e13 for rate in found.bandwidth.values())


# --- samples


def test_speedup_is_the_median_of_the_ratios_of_each_round() -> None:
    samples = Samples({"peer": [1.0, 4.0, 9.0], "ours": [1.0, 1.0, 3.0]}, {"peer": 1, "ours": 1})
    assert samples.speedup("ours", "peer") == 3.0
    assert samples.median("peer") == 4.0


def test_every_round_runs_everything_once_and_starts_with_another() -> None:
    order: list[str] = []

    def step(name: str) -> Callable[[], None]:
        return lambda: (order.append(name), time.sleep(2e-3))[1]

    samples = interleave({name: Run(step(name)) for name in "abc"}, seconds=0.0, rounds=(4, 4))
    assert samples.calls == {"a": 1, "b": 1, "c": 1}
    assert all(len(taken) == 4 for taken in samples.seconds.values())
    assert "".join(order[-12:]) == "abcbcacababc"


def test_what_comes_before_is_not_timed() -> None:
    def before() -> str:
        time.sleep(0.01)
        return "argument"

    seen: list[str] = []
    assert Run(seen.append, before).time(3) < 0.01
    assert seen == ["argument"] * 3


def test_fast_calls_are_timed_many_at_once() -> None:
    samples = interleave({"fast": Run(lambda: None)}, seconds=0.0, sample=1e-3)
    assert samples.calls["fast"] > 100
    assert samples.median("fast") < 1e-4


# --- wrong results


def _wrong_value(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(**arguments: Any) -> Tensor:
        output = call(**arguments).clone()
        output[0, 0, 0, 0] += 1
        return output

    return wrong


def _wrong_gradient(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(x: Tensor, **arguments: Any) -> Tensor:
        return call(x=2 * x - x.detach(), **arguments)

    return wrong


EAGER = Provider("eager", "contiguous")


@pytest.mark.parametrize(
    ("spoil", "mode"), [(_wrong_value, "forward"), (_wrong_value, "full"), (_wrong_gradient, "backward")]
)
@pytest.mark.parametrize("make", [providers.spatial_pyramid, providers.expand, providers.pyramid_pointwise])
def test_wrong_operator_is_refused(
    make: Callable[[Case, bool], problem.Problem],
    spoil: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = make(SMALL, mode != "forward")
    providers.build(EAGER, one, torch.float32, mode).time(1)
    right = providers.function
    monkeypatch.setattr(providers, "function", lambda *names: spoil(right(*names)))
    with pytest.raises(WrongResult, match="eager-contiguous: "):
        providers.build(EAGER, one, torch.float32, mode)


def test_one_wrong_gradient_is_not_hidden_by_larger_ones() -> None:
    large, small = torch.full((8,), 1e3, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert largest_error([large.float(), small.float()], [large, small]) == 0
    assert largest_error([large, 0 * small], [large, small]) == 1
    assert largest_error([1.5 * large, small], [large, small]) == 0.5
    assert largest_error([large, 0 * small], [large, 0 * small]) == 0
    assert largest_error([large, small], [large, 0 * small]) == math.inf
    for wrong in ([math.nan * large, small], [large, math.nan * small]):
        assert math.isnan(largest_error(wrong, [large, small]))


def test_the_reference_is_not_timed_under_our_name() -> None:
    require_kernels()
    with backends.use_backend("reference"), pytest.raises(SystemExit, match="ESPKERNELS_BACKEND: got 'reference'"):
        require_kernels()


def test_wrong_provider_is_not_timed_and_the_others_are() -> None:
    def build(provider: Provider) -> Run:
        if provider.implementation == "ours":
            raise WrongResult("off by one")
        return Run(lambda: None)

    both = (EAGER, Provider("ours", "contiguous"))
    threads = torch.get_num_threads()
    comparison = Comparison("op", "case", "float32", "forward", 1, both, build, lambda: Floor(1, 1))
    outcome = measure(comparison)
    assert list(outcome.samples.seconds) == ["eager-contiguous"]
    assert isinstance(outcome.refused["ours-contiguous"], WrongResult)
    assert measure(comparison) is outcome
    assert torch.get_num_threads() == threads


def test_without_library_nothing_is_timed_under_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library", None)
    with pytest.raises(RuntimeError):
        providers.function("ours", "spatial_pyramid")


@pytest.mark.parametrize("mode", ["forward", "training", "inside"])
def test_wrong_layer_is_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = layers.Task(functools.partial(layers.unit, SMALL), (2, 16, 6, 5), torch.float32, mode)
    for layout in ("contiguous", "channels_last"):
        task.build(Provider("eager", layout)).time(1)
        task.build(Provider("replaced", layout)).time(1)
    if mode == "forward":
        task.build(Provider("frozen", "contiguous")).time(1)
    right = layers.variant

    def wrong(model: nn.Module, implementation: str) -> nn.Module:
        model = right(model, implementation)
        if implementation == "replaced":
            with torch.no_grad():
                model[0].spp_dw[3].conv.weight[0, 0, 0, 0] += 0.1  # type: ignore[index, union-attr]
        return model

    monkeypatch.setattr(layers, "variant", wrong)
    with pytest.raises(WrongResult, match="replaced-contiguous: off by"):
        task.build(Provider("replaced", "contiguous"))


@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux can reset the high-water mark of memory")
def test_peak_memory_sees_a_temporary_buffer() -> None:
    # In a process of its own: this one has free memory that a buffer would come from.
    code = (
        "import torch; from bench.memory import peak; torch.zeros(8).sum();"
        "print(peak(lambda: torch.ones(2**23)), peak(lambda: None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    large, none = map(int, done.stdout.split())
    assert 2**25 <= large < 2**25 + 2**23
    assert none < 2**22


# --- reports


def _benchmark(
    implementation: str, layout: str, seconds: float, others: dict[str, float], **facts: Any
) -> dict[str, Any]:
    known = {
        "operator": "spatial_pyramid",
        "case": "s1-224x224-level3",
        "dtype": "float32",
        "mode": "forward",
        "threads": 2,
        "bytes_per_second": 3.21e9,
        "flops_per_second": 4.56e9,
        "share_of_ceiling": 0.41,
        "memory": 3 * 2**20,
        **facts,
    }
    return {
        "group": " ".join(str(known[name]) for name in ("operator", "case", "mode", "dtype", "threads")),
        "stats": {"median": seconds},
        "extra_info": known | {"implementation": implementation, "layout": layout, "speedup": others},
    }


@pytest.fixture
def run() -> dict[str, Any]:
    ratios = {"eager-contiguous": 5.0, "eager-channels_last": 3.0, "compile-contiguous": 2.5, "ours-channels_last": 0.5}
    slow = {"eager-contiguous": 0.75, "eager-channels_last": 0.5}
    return {
        "datetime": "2026-11-23T10:00:00",
        "machine_info": {"espkernels": espkernels.info.collect().as_dict()},
        "ceilings": [{"threads": 2, "flops": 1e11, "bandwidth": {str(2**19): 5e10, str(2**28): 1e10}}],
        "benchmarks": [
            _benchmark("eager", "contiguous", 5e-4, {}),
            _benchmark("eager", "channels_last", 3e-4, {}),
            _benchmark("compile", "contiguous", 2.5e-4, {}),
            _benchmark("ours", "contiguous", 1e-4, ratios),
            _benchmark("eager", "contiguous", 3e-3, {}, operator="unit", mode="training", memory=None),
            _benchmark("eager", "channels_last", 2e-3, {}, operator="unit", mode="training", memory=None),
            _benchmark("replaced", "contiguous", 4e-3, slow, operator="unit", mode="training", memory=None),
        ],
    }


def test_rows_compare_with_the_same_layout_and_the_best_of_all(run: dict[str, Any]) -> None:
    first, second = report.rows(run)
    assert first.over == {"eager": 5.0, "compile": 2.5}
    assert (first.over_best, first.best, first.slower) == (2.5, "compile-contiguous", False)
    assert first.peers == {"eager": 5e-4, "compile": 2.5e-4}
    assert second.over == {"eager": 0.75}
    assert (second.over_best, second.best, second.slower) == (0.5, "eager-channels_last", True)


def test_goals_say_how_many_rows_reach_them(run: dict[str, Any]) -> None:
    found = report.rows(run)
    reached = report.Goal("spatial_pyramid", "forward", "ours", "eager", 4.0).verdict(found)
    assert "1 of 1 rows; least 5.00x (s1-224x224-level3" in reached
    assert "0 of 1 rows; least 0.75x" in report.Goal("unit", "training", "replaced", "eager", 1.0).verdict(found)
    assert "not measured" in report.Goal("network", "forward", "frozen", "eager", 2.5).verdict(found)


def test_refused_results_are_told(run: dict[str, Any]) -> None:
    run["refused"] = [{"comparison": "this on that", "reason": "off by 3"}]
    assert "* NOT TIMED this on that: off by 3" in report.markdown(run, "bench.png").splitlines()


def test_markdown_shows_every_row_and_marks_the_slower(run: dict[str, Any]) -> None:
    text = report.markdown(run, "bench.png")
    assert "![speed-up of each layer](bench.png)" in text
    assert run["machine_info"]["espkernels"]["machine"]["cpu"] in text
    lines = [line for line in text.splitlines() if line.startswith("| s1-")]
    assert len(lines) == 2
    assert all(line.count("|") == len(report.COLUMNS) + 1 for line in lines)
    assert "500.0 us | 250.0 us | 100.0 us | 5.00x | 2.50x | 2.50x | 3.2 | 4.6 | 41% | 3.0 MiB" in lines[0]
    assert "slower" not in lines[0]
    assert "slower than eager-channels_last" in lines[1]


def test_table_is_printed(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    report.table(run)
    text = capsys.readouterr().out
    assert "spatial_pyramid, forward" in text
    assert "2.50x" in text
    assert "slower" in text
    assert "faster in 1 of 2 rows" in text


def test_picture_is_drawn(run: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    report.picture(run, tmp_path / "bench.png")
    with image.open(tmp_path / "bench.png") as opened:
        assert opened.width > 600
        assert opened.height > 150
        # The colours of both peers are there: the dots were drawn.
        pixels = opened.convert("RGB").tobytes()
    found = {pixels[i : i + 3] for i in range(0, len(pixels), 3)}
    assert {bytes.fromhex(color[1:]) for color in report.COLORS.values()} <= found


# --- the command


def test_installed_package_says_that_it_has_no_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert espkernels.__main__.main(["bench"]) == 2
    assert "not of an installed package" in capsys.readouterr().err


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "EXTRA", ("rich", "surely_not_installed"))
    assert espkernels.__main__.main(["bench"]) == 2
    assert "surely_not_installed not found; install the extra 'bench'" in capsys.readouterr().err


@pytest.mark.skipif(command._why_not() is not None, reason=str(command._why_not()))
def test_one_case_from_command_to_picture(tmp_path: Path) -> None:
    # pytest-benchmark measures nothing within a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["OMP_NUM_THREADS"] = "1"
    chosen = ["--only=spatial_pyramid", "--cases=s1-224x224-level5", "--modes=full", "--threads=1", "--no-compile"]
    done = subprocess.run(
        [sys.executable, "-m", "espkernels", "bench", *chosen, "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replacing its layers" in done.stdout
    assert "spatial_pyramid, forward and backward" in done.stdout
    results = json.loads((tmp_path / "bench.json").read_text())
    assert {row["name"] for row in results["benchmarks"]} == {
        f"{name}-{layout}" for name in ("eager", "ours") for layout in ("contiguous", "channels_last")
    }
    for row in results["benchmarks"]:
        # The table of pytest-benchmark shows the very samples that the ratios are made of.
        assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= 5
        assert row["extra_info"]["flops_per_second"] * row["stats"]["median"] == pytest.approx(
            row["extra_info"]["flops"]
        )
    assert results["machine_info"]["espkernels"]["threads"]["torch"] == 1
    assert results["ceilings"][0]["threads"] == 1
    assert "s1-224x224-level5" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 5000


def pytest_of_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_unknown_case_is_a_mistake() -> None:
    done = pytest_of_benchmarks("bench/bench_spatial_pyramid.py", "--cases", "s9-*")
    assert done.returncode == 4
    assert "'s9-*' fits none" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "part",
    [
        ["bench/bench_unit.py"],
        *(
            [*(f"bench/bench_{name}.py" for name in command.FILES), part]
            for part in ("--cases=s1-224x224-level3", "--modes=forward", "--threads=1", "--batch=4", "--no-compile")
        ),
    ],
    ids=["only", "cases", "modes", "threads", "batch", "no-compile"],
)
def test_a_part_of_the_layers_does_not_replace_the_results_of_all(part: list[str]) -> None:
    pytest.importorskip("pytest_benchmark")
    # Nothing is measured, so the results stay where this test fails.
    done = pytest_of_benchmarks(*part, "--collect-only", "--benchmark-json=bench/results/bench.json")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "--output: got bench/results, whose" in done.stdout + done.stderr


@pytest.mark.parametrize("batch", ["0", "-1"])
def test_a_batch_of_no_images_is_a_mistake(batch: str) -> None:
    done = pytest_of_benchmarks("bench/bench_unit.py", f"--batch={batch}")
    assert done.returncode == 4
    assert f"--batch: got {batch}, expected at least 1" in done.stdout + done.stderr
