"""Makes a benchmark of every (comparison, provider) of the bench files, from samples that were taken in turn.

pytest-benchmark times one test after the other, and on a shared machine the peer then meets other minutes than we do.
So the first provider of a comparison times all of them, interleaved, and each test only replays its own samples through
a clock that pytest-benchmark reads: its table, JSON and comparisons between runs show the interleaved figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.cases import check
from bench.comparison import PEERS, Comparison, Outcome, Provider, WrongResult, measure
from bench.floor import MODES
from bench.output import keep_whole
from bench.selection import DTYPES, Selection
from espkernels.commands.bench import FILES
from espkernels.info import collect
from espkernels.probe import probe


class ReplayClock:
    """A clock that moves by one recorded sample with every call of :meth:`step`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return "interleaved samples of time.perf_counter"

    def load(self, samples: list[float]) -> None:
        self.now = 0.0
        self.samples = iter(samples)

    def step(self) -> None:
        self.now += next(self.samples)


clock = ReplayClock()
refused: list[dict[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("espkernels", "which comparisons run (the default takes minutes)")
    group.addoption("--full", action="store_true", help="every shape, mode, dtype and thread count: hours")
    group.addoption("--cases", action="append", default=[], metavar="PATTERN", help="cases by name: 's1-224x224-*'")
    group.addoption("--modes", action="append", default=[], choices=MODES)
    group.addoption("--dtypes", action="append", default=[], choices=tuple(DTYPES))
    group.addoption("--threads", action="append", default=[], type=int, metavar="N")
    group.addoption("--batch", type=int, default=1, metavar="N", help="images at once")
    group.addoption("--compile", action="store_true", default=None, help="torch.compile in every comparison")
    group.addoption("--no-compile", action="store_false", dest="compile", help="torch.compile in none")


def pytest_configure(config: pytest.Config) -> None:
    try:
        check(config.getoption("cases", ()))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    batch = config.getoption("batch", 1)
    if batch < 1:
        raise pytest.UsageError(f"--batch: got {batch}, expected at least 1")
    results = config.getoption("benchmark_json", None)
    whole = {Path(name).stem for name in config.args} >= {f"bench_{name}" for name in FILES}
    narrowed = any(config.getoption(name, ()) for name in ("cases", "modes", "dtypes", "threads"))
    if results is not None:
        try:
            without_compile = config.getoption("compile", None) is False
            keep_whole(results.parent, narrowed or batch > 1 or without_compile or not whole)
        except SystemExit as refusal:
            raise pytest.UsageError(str(refusal)) from None


def _selection(config: pytest.Config) -> Selection:
    # Without these options this file was found late, as a part of a larger run: the default selection then.
    option = config.getoption
    return Selection(
        full=option("full", False),
        patterns=tuple(option("cases", ())),
        modes=tuple(option("modes", ())),
        dtypes=tuple(option("dtypes", ())),
        threads=tuple(option("threads", ())),
        batch=option("batch", 1),
        compile=option("compile", None),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    comparisons = getattr(metafunc.module, "comparisons", None)
    if comparisons is None or "comparison" not in metafunc.fixturenames:
        return
    rows = [(row, provider) for row in comparisons(_selection(metafunc.config)) for provider in row.providers]
    ids = [f"{row}-{provider}".replace(" ", "-") for row, provider in rows]
    metafunc.parametrize(("comparison", "provider"), rows, ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=False, warmup=False))


@pytest.fixture
def compare(benchmark: Any) -> Callable[[Comparison, Provider], None]:
    """Measures the comparison with all its providers, and reports the samples of one."""

    def report(comparison: Comparison, provider: Provider) -> None:
        outcome = measure(comparison)
        name = str(provider)
        if name in outcome.refused:
            reason = outcome.refused[name]
            refused.append({"comparison": str(comparison), "reason": str(reason)})
            if provider.implementation in PEERS and isinstance(reason, WrongResult):
                pytest.xfail(f"{comparison}: {reason}")  # their mistake: told in the report, and no failure of ours
            raise reason
        benchmark.group, benchmark.name = str(comparison), name
        benchmark.extra_info.update(facts(comparison, provider, outcome))
        samples = outcome.samples.seconds[name]
        clock.load(samples)
        benchmark.pedantic(clock.step, rounds=len(samples))
        # Parameters that are no plain values would fill the JSON with their representation.
        benchmark.stats.params = {"comparison": str(comparison), "provider": name}

    return report


def facts(comparison: Comparison, provider: Provider, outcome: Outcome) -> dict[str, Any]:
    """What the report needs beside the samples. ``speedup`` holds the median ratio to each other provider."""
    name, samples = str(provider), outcome.samples
    seconds = samples.median(name)
    return {
        "operator": comparison.operator,
        "case": comparison.case,
        "dtype": comparison.dtype,
        "mode": comparison.mode,
        "threads": comparison.threads,
        "implementation": provider.implementation,
        "layout": provider.layout,
        "calls": samples.calls[name],
        "speedup": {other: samples.speedup(name, other) for other in samples.seconds if other != name},
        "bytes": outcome.floor.bytes,
        "flops": outcome.floor.flops,
        "bytes_per_second": outcome.floor.bytes / seconds,
        "flops_per_second": outcome.floor.flops / seconds,
        "share_of_ceiling": probe(comparison.threads).least_seconds(outcome.floor.bytes, outcome.floor.flops) / seconds,
        "memory": outcome.memory.get(name),
    }


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["espkernels"] = collect().as_dict()
    machine_info["load_average"] = os.getloadavg()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    threads = {row["extra_info"]["threads"] for row in output_json["benchmarks"] if "threads" in row["extra_info"]}
    output_json["ceilings"] = [probe(count).as_dict() for count in sorted(threads)]
    output_json["refused"] = refused
    output_json["choices"] = "interleaved rounds; hot buffers: every call uses the same ones; medians"
